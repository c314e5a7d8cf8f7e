//! From what the user names (files, globs, directories) to the list of files, in their order.
//!
//! - A path that exists is taken as it is, even where its name holds `*`, `?` or `[`.
//! - A directory is searched recursively for files with a known extension; links are followed.
//! - A glob takes every file that it matches; each must have a known extension.
//! - Directories and globs skip names that start with `_` or `.`, such as `_SUCCESS`, and give each
//!   file once, in the bytewise order of paths. Inputs keep the order in which they were named, and a
//!   file that two inputs name is read twice.
//! - Segments `key=value` below a directory, or from a glob's first wildcard on, are partition
//!   columns: every file must have the same keys.
//!
//! In an object store the same holds of keys: an object, else a prefix, else a glob over keys.

mod objects;

use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::data::format::{InputFormat, KNOWN_EXTENSIONS};
use crate::data::store::{Identity, Location, Stores};
use crate::error::{Error, Result, nearest_name, one_line};

/// What Hive writes into a path for a null partition value.
const HIVE_NULL: &str = "__HIVE_DEFAULT_PARTITION__";

/// The message about a glob without files.
const GLOB_MATCHES_NOTHING: &str = "the glob matches no file; quote it if the shell should leave it alone";

/// A file to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundFile {
    /// Where it is: the input as the user wrote it, and what was found below.
    pub location: Location,
    /// Which version of it was found, in an object store.
    pub identity: Option<Identity>,
    /// The format, by extension or as the user said.
    pub format: InputFormat,
    /// The `key=value` segments of its path, decoded, in their order; `None` is null.
    pub partitions: Vec<(String, Option<String>)>,
}

impl FoundFile {
    /// The path or the URL.
    pub fn path(&self) -> &Path {
        self.location.path()
    }
}

/// The files behind `inputs`, each read as `format` where one is given.
///
/// # Errors
///
/// [`Error::NoInput`] where an input names nothing, [`Error::Usage`] for addresses of stores that are not built in
/// and for files whose format cannot be told, [`Error::Io`] where a directory cannot be read, [`Error::Store`].
pub fn discover(inputs: &[String], format: Option<InputFormat>, stores: &Stores) -> Result<Vec<FoundFile>> {
    if inputs.is_empty() {
        return Err(Error::Usage("no input: name a file, a directory or a glob with --input".to_owned()));
    }
    let mut found = Vec::new();
    for input in inputs {
        let location = stores.locate(input)?;
        if location.is_object() {
            objects::find(&location, format, &mut found)?;
            continue;
        }
        let path = Path::new(input);
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => directory(path, format, &mut found)?,
            Ok(metadata) if metadata.is_file() => found.push(file(location, None, format, Vec::new())?),
            Ok(_) => return Err(no_input(path, "not a regular file; write it to a file first")),
            Err(_) if is_glob(input) => glob_files(input, format, &mut found)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(missing(path)),
            Err(error) => return Err(Error::io("read", path)(error)),
        }
    }
    Ok(found)
}

fn no_input(path: &Path, message: impl Into<String>) -> Error {
    Error::NoInput { path: path.to_owned(), message: message.into() }
}

/// The error for a path that is not there, with the most similar name beside it.
fn missing(path: &Path) -> Error {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let names: Vec<String> = fs::read_dir(parent)
        .map(|entries| entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    let wanted = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    match nearest_name(&wanted, names.iter().map(String::as_str)) {
        Some(name) => no_input(path, format!("no such file or directory; did you mean '{name}'?")),
        None => no_input(path, "no such file or directory"),
    }
}

fn file(
    location: Location,
    identity: Option<Identity>,
    format: Option<InputFormat>,
    partitions: Vec<(String, Option<String>)>,
) -> Result<FoundFile> {
    let path = location.path();
    if path.to_str().is_none() {
        // The plan is JSON and errors are lines of text: neither can carry other bytes.
        return Err(Error::Usage(format!("{}: the path is not UTF-8; rename it", path.display())));
    }
    match format.or_else(|| InputFormat::of_path(path)) {
        Some(format) => Ok(FoundFile { location, identity, format, partitions }),
        None => Err(Error::Usage(format!(
            "{}: its name does not tell its format ({KNOWN_EXTENSIONS}); say it with --input-format",
            path.display()
        ))),
    }
}

fn is_hidden(name: &str) -> bool {
    name.starts_with(['_', '.'])
}

fn sort_bytewise(paths: &mut [PathBuf]) {
    paths.sort_by(|a, b| a.as_os_str().as_encoded_bytes().cmp(b.as_os_str().as_encoded_bytes()));
}

fn directory(root: &Path, format: Option<InputFormat>, found: &mut Vec<FoundFile>) -> Result<()> {
    let mut paths = Vec::new();
    walk(root, format, &mut Vec::new(), &mut paths)?;
    if paths.is_empty() {
        return Err(no_input(root, format!("the directory holds no input file ({})", looked_for(format))));
    }
    sort_bytewise(&mut paths);
    for path in paths {
        let partitions = partitions_of(&path, path.strip_prefix(root).unwrap_or(&path))?;
        found.push(file(path.into(), None, format, partitions)?);
    }
    Ok(())
}

fn looked_for(format: Option<InputFormat>) -> String {
    match format {
        Some(_) => "nor any other file whose name does not start with '_' or '.'".to_owned(),
        None => format!("looked for {KNOWN_EXTENSIONS}; for other names give --input-format"),
    }
}

/// Collects the files below `folder`. `above` holds the resolved folders on the way down, so that a
/// link to one of them does not lead round in circles.
fn walk(folder: &Path, format: Option<InputFormat>, above: &mut Vec<PathBuf>, paths: &mut Vec<PathBuf>) -> Result<()> {
    let resolved = fs::canonicalize(folder).map_err(Error::io("read", folder))?;
    if above.contains(&resolved) {
        return Ok(());
    }
    above.push(resolved);
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        if is_hidden(&entry.file_name().to_string_lossy()) {
            continue;
        }
        let path = entry.path();
        let metadata = fs::metadata(&path).map_err(Error::io("read", &path))?;
        if metadata.is_dir() {
            walk(&path, format, above, paths)?;
        } else if metadata.is_file() && (format.is_some() || InputFormat::of_path(&path).is_some()) {
            paths.push(path);
        }
    }
    above.pop();
    Ok(())
}

fn not_a_glob(pattern: &str, error: glob::PatternError) -> Error {
    Error::Usage(format!("{pattern}: not a glob ({}); check its brackets", one_line(error)))
}

/// Whether a name is to be matched, and not only taken as it is.
fn is_glob(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

fn glob_files(pattern: &str, format: Option<InputFormat>, found: &mut Vec<FoundFile>) -> Result<()> {
    let matches = glob::glob(pattern).map_err(|error| not_a_glob(pattern, error))?;
    // Segments before the first wildcard are the user's own words; names are judged from there on.
    let fixed = Path::new(pattern)
        .components()
        .take_while(|part| !is_glob(&part.as_os_str().to_string_lossy()))
        .filter(|part| !matches!(part, Component::CurDir))
        .count();
    let below_fixed = |path: &Path| -> PathBuf {
        path.components().filter(|part| !matches!(part, Component::CurDir)).skip(fixed).collect()
    };
    let mut paths = Vec::new();
    for path in matches {
        let path = path.map_err(|error| {
            let path = error.path().to_owned();
            Error::io("read", path)(error.into())
        })?;
        let hidden = below_fixed(&path).components().any(|part| is_hidden(&part.as_os_str().to_string_lossy()));
        if !hidden && fs::metadata(&path).is_ok_and(|metadata| metadata.is_file()) {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        return Err(no_input(Path::new(pattern), GLOB_MATCHES_NOTHING));
    }
    sort_bytewise(&mut paths);
    paths.dedup();
    for path in paths {
        let partitions = partitions_of(&path, &below_fixed(&path))?;
        found.push(file(path.into(), None, format, partitions)?);
    }
    Ok(())
}

/// The `key=value` folders of `below`, the part of `path` that was searched.
fn partitions_of(path: &Path, below: &Path) -> Result<Vec<(String, Option<String>)>> {
    let mut partitions: Vec<(String, Option<String>)> = Vec::new();
    for part in below.parent().unwrap_or(Path::new("")).components() {
        let segment = part.as_os_str().to_string_lossy();
        let Some((key, value)) = segment.split_once('=').filter(|(key, _)| !key.is_empty()) else { continue };
        let key = percent_decode(key);
        if partitions.iter().any(|(earlier, _)| *earlier == key) {
            return Err(Error::Usage(format!(
                "{}: the path names partition '{key}' twice; rename one of the folders",
                path.display()
            )));
        }
        partitions.push((key, (value != HIVE_NULL).then(|| percent_decode(value))));
    }
    Ok(partitions)
}

/// Undoes `%XX`; what is no such escape, or would not be UTF-8, stays as it is.
fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = (bytes[at] == b'%')
            .then(|| bytes.get(at + 1..at + 3))
            .flatten()
            .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        match escape {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8(decoded).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::error::ExitCode;

    fn tree(names: &[&str]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        folder
    }

    fn names(folder: &TempDir, inputs: &[&str], format: Option<InputFormat>) -> Result<Vec<String>> {
        let inputs: Vec<String> = inputs.iter().map(|input| format!("{}/{input}", folder.path().display())).collect();
        let found = discover(&inputs, format, &Stores::default())?;
        let below = |file: FoundFile| file.path().strip_prefix(folder.path()).unwrap().to_str().unwrap().to_owned();
        Ok(found.into_iter().map(below).collect())
    }

    #[test]
    fn directories_are_walked_in_bytewise_order_without_hidden_names() {
        let folder =
            tree(&["d/b.parquet", "d/a/z.csv", "d/a.csv", "d/_tmp/x.csv", "d/.x.csv", "d/README.md", "d/_SUCCESS"]);
        // '.' sorts before '/': bytes, not segments.
        assert_eq!(names(&folder, &["d"], None).unwrap(), ["d/a.csv", "d/a/z.csv", "d/b.parquet"]);
        assert_eq!(
            names(&folder, &["d"], Some(InputFormat::Csv)).unwrap(),
            ["d/README.md", "d/a.csv", "d/a/z.csv", "d/b.parquet"]
        );
    }

    #[test]
    fn inputs_keep_their_order_and_duplicates() {
        let folder = tree(&["b.csv", "a.csv", "x[1].csv"]);
        assert_eq!(
            names(&folder, &["b.csv", "*.csv", "x[1].csv"], None).unwrap(),
            ["b.csv", "a.csv", "b.csv", "x[1].csv", "x[1].csv"]
        );
    }

    #[test]
    fn globs_skip_hidden_names_and_want_known_extensions() {
        let folder = tree(&["_out/a.csv", "d/_b.csv", "d/c.csv", "d/e.txt", "k=1/a.csv", "k=%20b/a.csv"]);
        assert_eq!(names(&folder, &["*/*.csv"], None).unwrap(), ["d/c.csv", "k=%20b/a.csv", "k=1/a.csv"]);
        // Named outright, a hidden folder is what the user wants.
        assert_eq!(names(&folder, &["_out/*.csv"], None).unwrap(), ["_out/a.csv"]);
        let error = names(&folder, &["d/*"], None).unwrap_err();
        assert!(error.to_string().contains("e.txt") && error.to_string().contains("--input-format"), "{error}");
        let keyed = discover(&[format!("{}/k=*/*.csv", folder.path().display())], None, &Stores::default()).unwrap();
        assert_eq!(keyed[0].partitions, [("k".to_owned(), Some(" b".to_owned()))]);
        let fixed = discover(&[format!("{}/k=1/*.csv", folder.path().display())], None, &Stores::default()).unwrap();
        assert!(fixed[0].partitions.is_empty());
    }

    #[test]
    fn hive_segments_are_decoded() {
        let folder = tree(&["year=2024/city=K%C3%B6ln/a.csv", "year=__HIVE_DEFAULT_PARTITION__/city=a%2Fb/a.csv"]);
        let found = discover(&[folder.path().to_str().unwrap().to_owned()], None, &Stores::default()).unwrap();
        let partition = |key: &str, value: Option<&str>| (key.to_owned(), value.map(str::to_owned));
        assert_eq!(found[0].partitions, [partition("year", Some("2024")), partition("city", Some("Köln"))]);
        assert_eq!(found[1].partitions, [partition("year", None), partition("city", Some("a/b"))]);
        assert_eq!(percent_decode("100%_%zz%E4"), "100%_%zz%E4");
        let twice = tree(&["a=1/a=2/x.csv"]);
        assert!(discover(&[twice.path().to_str().unwrap().to_owned()], None, &Stores::default()).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_a_folder_above_ends_the_walk() {
        let folder = tree(&["d/a.csv"]);
        std::os::unix::fs::symlink(folder.path().join("d"), folder.path().join("d/again")).unwrap();
        assert_eq!(names(&folder, &["d"], None).unwrap(), ["d/a.csv"]);
    }

    #[test]
    fn nothing_there_says_what_to_do() {
        let folder = tree(&["tickets.parquet", "empty/README.md"]);
        for (input, wanted) in [
            ("tickest.parquet", "did you mean 'tickets.parquet'?"),
            ("*.csv", "matches no file"),
            ("empty", ".parquet"),
        ] {
            let error = names(&folder, &[input], None).unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::NoInput);
            assert!(error.to_string().contains(wanted), "{error}");
        }
        let error = discover(&["s3://bucket/a.parquet".to_owned()], None, &Stores::default()).unwrap_err();
        assert!(error.exit_code() == ExitCode::Usage && error.to_string().contains("object stores"), "{error}");
        assert_eq!(discover(&[], None, &Stores::default()).unwrap_err().exit_code(), ExitCode::Usage);
    }
}
