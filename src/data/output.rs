//! Where results go: a directory of Parquet parts, or one file.

use std::path::{Path, PathBuf};

/// The format of a single-file output, told by the ending of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputFormat {
    /// `.parquet`
    Parquet,
    /// `.arrow`: the Arrow IPC file format.
    Arrow,
    /// `.jsonl`: one JSON object a line.
    Jsonl,
    /// `.csv`: with a header; nested columns are JSON text.
    Csv,
}

impl OutputFormat {
    /// The format that the ending of `path` names, if it names one.
    pub fn of_path(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "parquet" => Some(Self::Parquet),
            "arrow" => Some(Self::Arrow),
            "jsonl" => Some(Self::Jsonl),
            "csv" => Some(Self::Csv),
            _ => None,
        }
    }

    /// The format's name as messages give it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Parquet => "Parquet",
            Self::Arrow => "Arrow",
            Self::Jsonl => "JSONL",
            Self::Csv => "CSV",
        }
    }
}

/// What `--output` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputTarget {
    /// A directory that holds the parts and is the result.
    Directory(PathBuf),
    /// One file, assembled from parts that are kept beside it until then.
    File {
        /// The file that will appear.
        path: PathBuf,
        /// What it will hold.
        format: OutputFormat,
    },
}

impl OutputTarget {
    /// A single file where the path ends in `.parquet`, `.arrow`, `.jsonl` or `.csv`, else a directory of parts.
    ///
    /// A directory that is there already stays one whatever its name, and so does a path with a slash at its end:
    /// other engines write directories called `x.parquet`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let said_directory = path.as_os_str().as_encoded_bytes().ends_with(b"/") || path.is_dir();
        match OutputFormat::of_path(&path) {
            Some(format) if !said_directory => Self::File { path, format },
            _ => Self::Directory(path),
        }
    }

    /// The path as it was given.
    pub fn path(&self) -> &Path {
        match self {
            Self::Directory(path) | Self::File { path, .. } => path,
        }
    }

    /// What the output's files hold; a directory's parts are Parquet.
    pub fn format(&self) -> OutputFormat {
        match self {
            Self::Directory(_) => OutputFormat::Parquet,
            Self::File { format, .. } => *format,
        }
    }

    /// Where plan and parts live: the directory itself, or `.NAME.mistral-batch/` beside a single file.
    pub fn parts_dir(&self) -> PathBuf {
        match self {
            Self::Directory(path) => path.clone(),
            Self::File { path, .. } => beside(path, ".mistral-batch"),
        }
    }

    /// The small file beside a CSV or JSONL output that lets us recognise it as ours: `.NAME.mistral-batch.json`.
    ///
    /// None for outputs that carry the fingerprint themselves.
    pub fn stamp_path(&self) -> Option<PathBuf> {
        match self {
            Self::File { path, format: OutputFormat::Jsonl | OutputFormat::Csv } => {
                Some(beside(path, ".mistral-batch.json"))
            }
            _ => None,
        }
    }
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(ending);
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ending_decides_unless_a_directory_is_there() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("out.parquet");
        assert_eq!(OutputTarget::new(&file), OutputTarget::File { path: file.clone(), format: OutputFormat::Parquet });
        assert_eq!(OutputTarget::new(&file).parts_dir(), temp.path().join(".out.parquet.mistral-batch"));
        std::fs::create_dir(&file).unwrap();
        assert_eq!(OutputTarget::new(&file), OutputTarget::Directory(file.clone()));
        assert_eq!(OutputTarget::new(&file).parts_dir(), file);
        assert_eq!(OutputTarget::new("new.csv/"), OutputTarget::Directory("new.csv/".into()));
        assert_eq!(OutputTarget::new("results"), OutputTarget::Directory("results".into()));
        assert_eq!(OutputTarget::new("a/x.CSV").stamp_path(), Some("a/.x.CSV.mistral-batch.json".into()));
        assert_eq!(OutputTarget::new("x.arrow").stamp_path(), None);
    }
}
