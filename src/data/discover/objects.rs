//! Inputs in object stores.

use std::path::{Path, PathBuf};

use glob::{MatchOptions, Pattern};
use object_store::path::Path as Key;

use super::{
    FoundFile, GLOB_MATCHES_NOTHING, file, is_glob, is_hidden, looked_for, no_input, not_a_glob, partitions_of,
};
use crate::data::format::InputFormat;
use crate::data::store::{Identity, Location, Object};
use crate::error::Result;

/// What a wildcard stands for in a path.
const LIKE_PATHS: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: false };

/// The objects behind `input`: the one of that key, else those below the prefix, else those whose keys match the glob.
pub(super) fn find(input: &Location, format: Option<InputFormat>, found: &mut Vec<FoundFile>) -> Result<()> {
    let Some(object) = input.object() else { return Ok(()) };
    let text = input.path().to_string_lossy().into_owned();
    let key = object.key();
    if !key.is_root() && !text.ends_with('/') {
        if let Some(identity) = input.answered("read", object.head())? {
            found.push(file(input.clone(), Some(identity), format, Vec::new())?);
            return Ok(());
        }
        if is_glob(key.as_ref()) {
            return matching(input, object, format, found);
        }
    }
    let below = input.answered("list", object.below())?;
    if below.is_empty() {
        return Err(no_input(input.path(), "no such object, and none below that prefix"));
    }
    let searched = key.parts_count();
    let keep = |key: &Key| format.is_some() || InputFormat::of_path(Path::new(key.as_ref())).is_some();
    let taken = taken(below, searched, keep);
    if taken.is_empty() {
        return Err(no_input(input.path(), format!("the prefix holds no input file ({})", looked_for(format))));
    }
    add(taken, searched, format, found)
}

fn matching(input: &Location, object: &Object, format: Option<InputFormat>, found: &mut Vec<FoundFile>) -> Result<()> {
    let text = input.path().to_string_lossy();
    let pattern = Pattern::new(object.key().as_ref()).map_err(|error| not_a_glob(&text, error))?;
    // Segments before the first wildcard are the user's own words; names are judged from there on.
    let fixed: Key = object.key().parts().take_while(|part| !is_glob(part.as_ref())).collect();
    let searched = fixed.parts_count();
    let below = input.answered("list", object.with_key(fixed).below())?;
    let taken = taken(below, searched, |key| pattern.matches_with(key.as_ref(), LIKE_PATHS));
    if taken.is_empty() {
        return Err(no_input(input.path(), GLOB_MATCHES_NOTHING));
    }
    add(taken, searched, format, found)
}

/// Those of the objects that `keep` wants and whose names are not hidden, in bytewise order. An object whose key ends
/// with a slash stands for a folder.
fn taken(
    mut objects: Vec<(Object, Identity)>,
    searched: usize,
    keep: impl Fn(&Key) -> bool,
) -> Vec<(Object, Identity)> {
    objects.retain(|(object, _)| {
        let mut names = object.key().parts().skip(searched);
        keep(object.key()) && !names.any(|name| is_hidden(name.as_ref()))
    });
    objects.sort_by(|(a, _), (b, _)| a.key().cmp(b.key()));
    objects
}

/// Adds objects with the partitions of the part of their keys that was searched.
fn add(
    objects: Vec<(Object, Identity)>,
    searched: usize,
    format: Option<InputFormat>,
    found: &mut Vec<FoundFile>,
) -> Result<()> {
    for (object, identity) in objects {
        let below: PathBuf = object.key().parts().skip(searched).map(|part| part.as_ref().to_owned()).collect();
        let location = Location::at(object);
        let partitions = partitions_of(location.path(), &below)?;
        found.push(file(location, Some(identity), format, partitions)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::discover;
    use super::*;
    use crate::data::store::testing::{FaultyStore, put};
    use crate::error::ExitCode;

    fn find_all(keys: &[&str], input: &str, format: Option<InputFormat>) -> Result<Vec<FoundFile>> {
        let store = FaultyStore::new();
        keys.iter().for_each(|key| put(&store, key, "x"));
        discover(&[format!("s3://bucket/{input}")], format, &store.stores())
    }

    fn names(keys: &[&str], input: &str) -> Result<Vec<String>> {
        let found = find_all(keys, input, None)?;
        Ok(found.iter().map(|file| file.path().to_str().unwrap().to_owned()).collect())
    }

    #[test]
    fn a_key_a_prefix_or_a_glob() {
        let keys = ["d/b.parquet", "d/a/z.csv", "d/a.csv", "d/_tmp/x.csv", "d/.x.csv", "d/README.md", "da.csv"];
        let all = ["s3://bucket/d/a.csv", "s3://bucket/d/a/z.csv", "s3://bucket/d/b.parquet"];
        assert_eq!(names(&keys, "d").unwrap(), all);
        assert_eq!(names(&keys, "d/").unwrap(), all);
        assert_eq!(names(&keys, "").unwrap().len(), 4);
        assert_eq!(names(&keys, "d/a.csv").unwrap(), ["s3://bucket/d/a.csv"]);
        assert_eq!(names(&keys, "d/*.csv").unwrap(), ["s3://bucket/d/a.csv"]);
        assert_eq!(names(&keys, "**/*.csv").unwrap(), [all[0], all[1], "s3://bucket/da.csv"]);
        assert_eq!(names(&keys, "d/_tmp/*").unwrap(), ["s3://bucket/d/_tmp/x.csv"]);
        // An object that is there is taken as it is named.
        assert_eq!(names(&["x[1].csv", "x1.csv"], "x[1].csv").unwrap(), ["s3://bucket/x[1].csv"]);
        assert_eq!(names(&["x1.csv"], "x[1].csv").unwrap(), ["s3://bucket/x1.csv"]);
    }

    #[test]
    fn partitions_are_keys_of_the_part_that_was_searched() {
        let keys = ["in/year=2024/city=K%C3%B6ln/a.csv", "in/year=2025/city=Bonn/a.csv"];
        let found = find_all(&keys, "in", None).unwrap();
        let partition = |key: &str, value: &str| (key.to_owned(), Some(value.to_owned()));
        assert_eq!(found[0].partitions, [partition("year", "2024"), partition("city", "Köln")]);
        assert_eq!(found[0].path(), Path::new("s3://bucket/in/year=2024/city=K%C3%B6ln/a.csv"));
        let below = find_all(&keys, "in/year=2025", None).unwrap();
        assert_eq!(below[0].partitions, [partition("city", "Bonn")]);
        let globbed = find_all(&keys, "in/year=*/city=Bonn/*.csv", None).unwrap();
        assert_eq!(globbed[0].partitions, [partition("year", "2025"), partition("city", "Bonn")]);
    }

    #[test]
    fn nothing_there_is_no_input() {
        for (input, says) in [("x.csv", "no such object"), ("*.csv", "matches no file"), ("d", ".parquet")] {
            let error = find_all(&["d/README.md"], input, None).unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::NoInput);
            assert!(error.to_string().contains(says), "{error}");
        }
        assert_eq!(find_all(&["d/README.md"], "d", Some(InputFormat::Csv)).unwrap().len(), 1);
    }
}
