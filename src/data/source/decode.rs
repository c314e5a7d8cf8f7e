//! What the four formats share: what a survey finds in a file, and how decoding failures are told.

use std::any::Any;
use std::error::Error as StdError;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;

use super::csv::CellKinds;
use super::jsonl::Members;
use crate::error::{Error, Result, one_line};

/// Rows between two recorded byte offsets of a text file.
pub(crate) const OFFSET_ROWS: u64 = 4096;
/// What a compressed page or buffer may unpack to whatever its size: far above what writers cut by default.
pub(crate) const MAX_UNPACKED_BYTES: u64 = 256 << 20;
/// A larger one, such as a single huge value, is believed where it is no better packed than this.
pub(crate) const MAX_LARGE_RATIO: u64 = 16;

/// The decoded batches of a file, from the row that it was opened at.
pub(crate) type Batches = Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>> + Send>;

/// What one pass over a file's metadata, or a text file's lines, finds.
#[derive(Debug)]
pub(crate) struct Survey {
    pub rows: u64,
    /// The size of a row on average, in the largest of the file's row groups where it has some.
    pub bytes_per_row: u64,
    pub layout: Layout,
    pub columns: Columns,
}

/// A file's columns: typed by the file, or seen in its text and to be typed over all files together.
#[derive(Debug)]
pub(crate) enum Columns {
    Typed(SchemaRef),
    Csv(Vec<(String, CellKinds)>),
    Jsonl(Members),
}

/// Where in a file decoding can start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Layout {
    /// The first row of each row group.
    Parquet { group_starts: Vec<u64> },
    /// The first row of each record batch.
    ArrowFile { batch_starts: Vec<u64> },
    /// The first row and byte offset of each record batch, and the messages that are not batches:
    /// the schema and dictionaries, which a reader must have seen before.
    ArrowStream { batches: Vec<(u64, u64)>, preamble: Vec<Range<u64>> },
    /// The byte offset of every [`OFFSET_ROWS`]th row.
    Lines { offsets: Vec<u64> },
}

impl Layout {
    /// The part of the file that holds `row`, for error messages.
    pub fn place(&self, row: u64) -> String {
        self.places(row, 1)
    }

    /// As [`Layout::place`], for as many `rows` from this one on: a decoder reads across row groups.
    pub fn places(&self, row: u64, rows: u64) -> String {
        let index = |starts: &[u64]| starts.partition_point(|&start| start <= row).saturating_sub(1);
        match self {
            Layout::Parquet { group_starts } => {
                let last = group_starts.partition_point(|&start| start < row.saturating_add(rows)).saturating_sub(1);
                match index(group_starts) {
                    first if first < last => format!(", row groups {first} to {last}"),
                    first => format!(", row group {first}"),
                }
            }
            Layout::ArrowFile { batch_starts } => format!(", record batch {}", index(batch_starts)),
            Layout::ArrowStream { batches, .. } => {
                let batch = batches.partition_point(|&(start, _)| start <= row).saturating_sub(1);
                format!(", record batch {batch}")
            }
            Layout::Lines { .. } => format!(", after row {row}"),
        }
    }
}

/// Runs `decode` on input that may be damaged or hostile: its errors and panics become ours, with the
/// file and the place in it.
///
/// # Errors
///
/// [`Error::Io`] where the operating system failed, [`Error::InputCorrupt`] for everything else.
pub(crate) fn guarded<T, E: StdError + 'static>(
    path: &Path,
    place: impl FnOnce() -> String,
    decode: impl FnOnce() -> Result<T, E>,
) -> Result<T> {
    // What a panic left half-done is not looked at again: callers drop the decoder on any error.
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(match io_cause(&error) {
            Some(cause) => Error::io("read", path)(cause),
            None => corrupt_at(path, place(), error),
        }),
        Err(panic) => Err(corrupt_at(path, place(), panic_message(panic.as_ref()))),
    }
}

/// Refuses what claims to unpack to more memory than it is worth: a decoder allocates all of it before it looks.
pub(crate) fn check_expansion(what: &str, packed_bytes: u64, unpacked_bytes: u64) -> Result<(), String> {
    if unpacked_bytes <= MAX_UNPACKED_BYTES || unpacked_bytes / MAX_LARGE_RATIO <= packed_bytes {
        return Ok(());
    }
    Err(format!(
        "{what} claims to unpack from {packed_bytes} to {unpacked_bytes} bytes; over {MAX_UNPACKED_BYTES}, at most \
         {MAX_LARGE_RATIO} times its packed size is believed"
    ))
}

/// [`Error::InputCorrupt`] at a place such as ", row group 3".
pub(crate) fn corrupt_at(path: &Path, place: String, message: impl ToString) -> Error {
    Error::InputCorrupt { path: path.to_owned(), place, message: one_line(message) }
}

/// The operating system's failure behind a decoder's error; running out of bytes is the file's fault.
fn io_cause(error: &(dyn StdError + 'static)) -> Option<io::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return error.raw_os_error().map(io::Error::from_raw_os_error);
        }
        cause = error.source();
    }
    None
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let message = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("its content cannot be decoded ({})", message.unwrap_or("the decoder gave up"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ExitCode;

    #[test]
    fn panics_and_errors_name_file_and_place() {
        let place = || ", row group 3".to_owned();
        let path = Path::new("a.parquet");
        let panicked = guarded(path, place, || -> Result<(), ArrowError> { panic!("index out of bounds") });
        let panicked = panicked.unwrap_err().to_string();
        assert!(panicked.contains("a.parquet, row group 3") && panicked.contains("index out of bounds"), "{panicked}");
        let failed = guarded(path, place, || Err::<(), _>(ArrowError::ParseError("bad\nmore".to_owned()))).unwrap_err();
        assert_eq!(failed.exit_code(), ExitCode::InputData);
        let disk = io::Error::from_raw_os_error(5);
        let failed = guarded(path, place, || Err::<(), _>(ArrowError::IoError("x".to_owned(), disk))).unwrap_err();
        assert_eq!(failed.exit_code(), ExitCode::Io);
        let short = io::Error::from(io::ErrorKind::UnexpectedEof);
        let failed = guarded(path, place, || Err::<(), _>(ArrowError::IoError("x".to_owned(), short))).unwrap_err();
        assert_eq!(failed.exit_code(), ExitCode::InputData);
    }

    #[test]
    fn large_and_well_packed_is_not_believed() {
        let limit = MAX_UNPACKED_BYTES;
        check_expansion("a page", 1, limit).unwrap();
        check_expansion("a page", limit / 8, limit * 2).unwrap();
        let refused = check_expansion("a page", 40, i32::MAX as u64).unwrap_err();
        assert!(refused.starts_with("a page claims to unpack from 40 to 2147483647 bytes"), "{refused}");
    }

    #[test]
    fn places_are_counted_from_zero() {
        let layout = Layout::Parquet { group_starts: vec![0, 10, 10, 20] };
        assert_eq!(layout.place(9), ", row group 0");
        assert_eq!(layout.place(10), ", row group 2");
        assert_eq!(layout.place(99), ", row group 3");
        assert_eq!(layout.places(5, 5), ", row group 0");
        assert_eq!(layout.places(5, 6), ", row groups 0 to 2");
    }
}
