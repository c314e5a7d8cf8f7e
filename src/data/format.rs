//! The file formats that a dataset can be in, and how a file's name tells them.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The format of an input file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InputFormat {
    /// Apache Parquet.
    Parquet,
    /// Arrow IPC, the file and the stream format alike; the first bytes tell which.
    Arrow,
    /// Comma-separated values with a header row; tab-separated where the name ends in `.tsv`.
    Csv,
    /// One JSON object per line.
    Jsonl,
}

/// Every extension that names a format, for messages.
pub const KNOWN_EXTENSIONS: &str =
    ".parquet, .pq, .arrow, .arrows, .feather, .ipc, .csv, .tsv, .jsonl, .ndjson, .json-lines";

impl InputFormat {
    /// The format that the extension of `path` names, in any case.
    pub fn of_path(path: &Path) -> Option<InputFormat> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "parquet" | "pq" => Some(InputFormat::Parquet),
            "arrow" | "arrows" | "feather" | "ipc" => Some(InputFormat::Arrow),
            "csv" | "tsv" => Some(InputFormat::Csv),
            "jsonl" | "ndjson" | "json-lines" => Some(InputFormat::Jsonl),
            _ => None,
        }
    }

    /// The format's name, as `--input-format` takes it.
    pub fn name(self) -> &'static str {
        match self {
            InputFormat::Parquet => "parquet",
            InputFormat::Arrow => "arrow",
            InputFormat::Csv => "csv",
            InputFormat::Jsonl => "jsonl",
        }
    }
}

impl fmt::Display for InputFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for InputFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        [InputFormat::Parquet, InputFormat::Arrow, InputFormat::Csv, InputFormat::Jsonl]
            .into_iter()
            .find(|format| format.name() == name)
            .ok_or_else(|| Error::Usage(format!("no input format '{name}': choose parquet, arrow, csv or jsonl")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_name_formats_in_any_case() {
        for (path, format) in [
            ("a/b.parquet", Some(InputFormat::Parquet)),
            ("b.PQ", Some(InputFormat::Parquet)),
            ("b.feather", Some(InputFormat::Arrow)),
            ("b.tsv", Some(InputFormat::Csv)),
            ("b.json-lines", Some(InputFormat::Jsonl)),
            ("b.json", None),
            ("parquet", None),
        ] {
            assert_eq!(InputFormat::of_path(Path::new(path)), format, "{path}");
        }
    }

    #[test]
    fn names_read_back() {
        for format in [InputFormat::Parquet, InputFormat::Arrow, InputFormat::Csv, InputFormat::Jsonl] {
            assert_eq!(format.name().parse::<InputFormat>().unwrap(), format);
            assert_eq!(serde_json::to_string(&format).unwrap(), format!("\"{format}\""));
        }
        assert!("xml".parse::<InputFormat>().unwrap_err().to_string().contains("jsonl"));
    }
}
