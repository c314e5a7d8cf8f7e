//! Where results go: a directory of Parquet parts, or one file.

use std::path::{Path, PathBuf};

use super::store::{Location, Stores};
use crate::error::Result;

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
    /// A directory, or a prefix of an object store, that holds the parts and is the result.
    Directory(Location),
    /// One file or object, assembled from parts that are kept beside it until then.
    File {
        /// The file that will appear.
        place: Location,
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
        let is_folder = path.is_dir();
        Self::of(path.into(), is_folder)
    }

    /// The same of a path or the URL of an object store; a prefix with objects below it is a directory.
    ///
    /// # Errors
    /// As [`Stores::locate`], and [`Error::Store`](crate::Error::Store) where the store cannot be asked.
    pub fn locate(path: &Path, stores: &Stores) -> Result<Self> {
        // What is not UTF-8 is no URL.
        let Some(text) = path.to_str() else { return Ok(Self::new(path)) };
        let place = stores.locate(text)?;
        let may_be_file = place.is_object() && OutputFormat::of_path(path).is_some() && !text.ends_with('/');
        let is_folder = if may_be_file { place.is_folder()? } else { path.is_dir() };
        Ok(Self::of(place, is_folder))
    }

    fn of(place: Location, is_folder: bool) -> Self {
        let said_directory = place.path().as_os_str().as_encoded_bytes().ends_with(b"/") || is_folder;
        match OutputFormat::of_path(place.path()) {
            Some(format) if !said_directory => Self::File { place, format },
            _ => Self::Directory(place),
        }
    }

    /// The path as it was given.
    pub fn path(&self) -> &Path {
        match self {
            Self::Directory(place) | Self::File { place, .. } => place.path(),
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
    pub fn parts_dir(&self) -> Location {
        match self {
            Self::Directory(place) => place.clone(),
            Self::File { place, .. } => beside(place, ".mistral-batch"),
        }
    }

    /// The small file beside a CSV or JSONL output that lets us recognise it as ours: `.NAME.mistral-batch.json`.
    ///
    /// None for outputs that carry the fingerprint themselves.
    pub fn stamp_place(&self) -> Option<Location> {
        match self {
            Self::File { place, format: OutputFormat::Jsonl | OutputFormat::Csv } => {
                Some(beside(place, ".mistral-batch.json"))
            }
            _ => None,
        }
    }
}

fn beside(place: &Location, ending: &str) -> Location {
    place.with_name(&format!(".{}{ending}", place.name()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::store::testing::{FaultyStore, put};

    #[test]
    fn the_ending_decides_unless_a_directory_is_there() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("out.parquet");
        let place = Location::from(file.clone());
        assert_eq!(OutputTarget::new(&file), OutputTarget::File { place, format: OutputFormat::Parquet });
        assert_eq!(OutputTarget::new(&file).parts_dir().path(), temp.path().join(".out.parquet.mistral-batch"));
        std::fs::create_dir(&file).unwrap();
        assert_eq!(OutputTarget::new(&file), OutputTarget::Directory(file.clone().into()));
        assert_eq!(OutputTarget::new(&file).parts_dir().path(), file);
        assert_eq!(OutputTarget::new("new.csv/"), OutputTarget::Directory(Path::new("new.csv/").into()));
        assert_eq!(OutputTarget::new("results"), OutputTarget::Directory(Path::new("results").into()));
        let stamp = OutputTarget::new("a/x.CSV").stamp_place();
        assert_eq!(stamp, Some(Path::new("a/.x.CSV.mistral-batch.json").into()));
        assert_eq!(OutputTarget::new("x.arrow").stamp_place(), None);
    }

    #[test]
    fn the_same_holds_in_an_object_store() {
        let store = FaultyStore::new();
        let target = |url: &str| OutputTarget::locate(Path::new(url), &store.stores()).unwrap();
        let file = target("s3://bucket/a/x.csv");
        assert!(matches!(&file, OutputTarget::File { format: OutputFormat::Csv, place } if place.is_object()));
        assert_eq!(file.stamp_place().unwrap().path(), Path::new("s3://bucket/a/.x.csv.mistral-batch.json"));
        assert_eq!(file.parts_dir().path(), Path::new("s3://bucket/a/.x.csv.mistral-batch"));
        assert_eq!(file.parts_dir().object().unwrap().key().as_ref(), "a/.x.csv.mistral-batch");
        assert!(matches!(target("s3://bucket/a/x.csv/"), OutputTarget::Directory(_)));
        assert!(matches!(target("s3://bucket"), OutputTarget::Directory(_)));
        put(&store, "a/x.csv/part.csv", "x");
        assert!(matches!(target("s3://bucket/a/x.csv"), OutputTarget::Directory(_)));
    }
}
