//! CSV and TSV files with a header row.
//!
//! One pass over a file counts its rows, records where every [`OFFSET_ROWS`]th starts and notes which
//! types each column's cells could have. It parses with the same machine as the decoder, so quoted
//! newlines, blank lines (which are no rows) and Windows line ends agree. An empty cell is null.
//!
//! Types are inferred as arrow infers them, over all rows of all files, but a type is chosen only
//! where every cell can be decoded as it, and `007` is text: read as a number it would come out as `7`.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use arrow::compute::kernels::cast_utils::Parser;
use arrow::csv::ReaderBuilder;
use arrow::datatypes::{DataType, Date32Type, Float64Type, Int64Type, SchemaRef, TimeUnit, TimestampNanosecondType};
use arrow::error::ArrowError;
use csv::{ByteRecord, ErrorKind};

use super::decode::{Batches, Columns, Layout, OFFSET_ROWS, Survey, corrupt_at, guarded};
use crate::error::{Error, Result};

const BUFFER_BYTES: usize = 1 << 20;

/// The kinds of cells seen in a column, as bits; none for a column without values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CellKinds(u16);

impl CellKinds {
    const BOOLEAN: u16 = 1;
    const INTEGER: u16 = 1 << 1;
    const FLOAT: u16 = 1 << 2;
    const DATE: u16 = 1 << 3;
    const SECONDS: u16 = 1 << 4;
    const MILLISECONDS: u16 = 1 << 5;
    const MICROSECONDS: u16 = 1 << 6;
    const NANOSECONDS: u16 = 1 << 7;
    const TEXT: u16 = 1 << 8;
    const NUMBERS: u16 = Self::INTEGER | Self::FLOAT;
    const TIMES: u16 = Self::DATE | Self::SECONDS | Self::MILLISECONDS | Self::MICROSECONDS | Self::NANOSECONDS;

    fn observe(&mut self, cell: &str) {
        // Text once, text for ever: long columns of prose cost one comparison a cell.
        if !cell.is_empty() && self.0 & Self::TEXT == 0 {
            self.0 |= kind_of(cell);
        }
    }

    /// The kinds of both.
    pub fn merge(self, other: CellKinds) -> CellKinds {
        CellKinds(self.0 | other.0)
    }

    /// The type that every cell can be decoded as.
    pub fn data_type(self) -> DataType {
        match self.0 {
            Self::BOOLEAN => DataType::Boolean,
            Self::INTEGER => DataType::Int64,
            kinds if kinds != 0 && kinds & !Self::NUMBERS == 0 => DataType::Float64,
            Self::DATE => DataType::Date32,
            kinds if kinds != 0 && kinds & !Self::TIMES == 0 => {
                let unit = match kinds {
                    _ if kinds & Self::NANOSECONDS != 0 => TimeUnit::Nanosecond,
                    _ if kinds & Self::MICROSECONDS != 0 => TimeUnit::Microsecond,
                    _ if kinds & Self::MILLISECONDS != 0 => TimeUnit::Millisecond,
                    _ => TimeUnit::Second,
                };
                DataType::Timestamp(unit, None)
            }
            _ => DataType::Utf8,
        }
    }
}

/// The narrowest kind whose decoder takes `cell`.
fn kind_of(cell: &str) -> u16 {
    let bytes = cell.as_bytes();
    let unsigned = bytes.strip_prefix(b"-").unwrap_or(bytes);
    match unsigned.first() {
        Some(b't' | b'T' | b'f' | b'F') if cell.eq_ignore_ascii_case("true") || cell.eq_ignore_ascii_case("false") => {
            CellKinds::BOOLEAN
        }
        Some(b'0'..=b'9' | b'.') => {
            if unsigned.iter().all(u8::is_ascii_digit) {
                let padded = unsigned.len() > 1 && unsigned[0] == b'0';
                if !padded && Int64Type::parse(cell).is_some() { CellKinds::INTEGER } else { CellKinds::TEXT }
            } else if is_date(bytes) {
                time_kind(cell)
            } else if unsigned.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-'))
                && Float64Type::parse(cell).is_some()
            {
                CellKinds::FLOAT
            } else {
                CellKinds::TEXT
            }
        }
        _ if matches!(cell, "NaN" | "nan" | "inf" | "-inf") => CellKinds::FLOAT,
        _ => CellKinds::TEXT,
    }
}

/// Whether the cell starts as `2026-01-31`.
fn is_date(cell: &[u8]) -> bool {
    cell.len() >= 10
        && cell[..10].iter().enumerate().all(|(at, byte)| match at {
            4 | 7 => *byte == b'-',
            _ => byte.is_ascii_digit(),
        })
}

fn time_kind(cell: &str) -> u16 {
    if cell.len() == 10 {
        return if Date32Type::parse(cell).is_some() { CellKinds::DATE } else { CellKinds::TEXT };
    }
    // Nanoseconds have the shortest range: what fits there fits every unit.
    if TimestampNanosecondType::parse(cell).is_none() {
        return CellKinds::TEXT;
    }
    let fraction = cell.as_bytes().get(19..).and_then(|rest| rest.strip_prefix(b".")).unwrap_or_default();
    match fraction.iter().take_while(|byte| byte.is_ascii_digit()).count() {
        0 => CellKinds::SECONDS,
        1..=3 => CellKinds::MILLISECONDS,
        4..=6 => CellKinds::MICROSECONDS,
        7..=9 => CellKinds::NANOSECONDS,
        _ => CellKinds::TEXT,
    }
}

fn delimiter(path: &Path) -> u8 {
    match path.extension() {
        Some(extension) if extension.eq_ignore_ascii_case("tsv") => b'\t',
        _ => b',',
    }
}

/// Reads the whole file once.
///
/// # Errors
///
/// [`Error::InputCorrupt`] with the line for rows of another length than the header and for bytes that
/// are not UTF-8, [`Error::Io`] where the file cannot be read.
pub(crate) fn survey(path: &Path) -> Result<Survey> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let size = file.metadata().map_err(Error::io("read", path))?.len();
    let mut reader =
        csv::ReaderBuilder::new().delimiter(delimiter(path)).buffer_capacity(BUFFER_BYTES).from_reader(file);
    let header = reader.byte_headers().map_err(|error| corrupt(path, error))?.clone();
    let mut columns = Vec::with_capacity(header.len());
    for name in &header {
        columns.push((utf8(path, name, 1)?.to_owned(), CellKinds::default()));
    }
    let mut offsets = Vec::new();
    let mut rows = 0u64;
    let mut record = ByteRecord::new();
    let mut last = (0, 0);
    while reader.read_byte_record(&mut record).map_err(|error| corrupt(path, error))? {
        let (byte, line) = record.position().map_or((0, 0), |position| (position.byte(), position.line()));
        if rows.is_multiple_of(OFFSET_ROWS) {
            offsets.push(byte);
        }
        last = (byte, line);
        rows += 1;
        for (cell, (_, kinds)) in record.iter().zip(&mut columns) {
            kinds.observe(utf8(path, cell, line)?);
        }
    }
    if rows > 0 {
        let (byte, line) = last;
        let mut file = reader.into_inner();
        let mut text = Vec::new();
        file.seek(SeekFrom::Start(byte)).and_then(|_| file.read_to_end(&mut text)).map_err(Error::io("read", path))?;
        if ends_in_quotes(&text, delimiter(path)) {
            return Err(corrupt_at(path, format!(", line {line}"), "the file ends within a quoted cell"));
        }
    }
    let bytes_per_row = size.checked_div(rows).unwrap_or(0);
    Ok(Survey { rows, bytes_per_row, layout: Layout::Lines { offsets }, columns: Columns::Csv(columns) })
}

/// Whether the last record is cut off in a quoted cell, which the reader takes for closed.
fn ends_in_quotes(record: &[u8], delimiter: u8) -> bool {
    let (mut quoted, mut begins) = (false, true);
    let mut bytes = record.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match (quoted, byte) {
            (true, b'"') if bytes.peek() == Some(&b'"') => drop(bytes.next()),
            (true, byte) => quoted = byte != b'"',
            (false, byte) => {
                quoted = begins && byte == b'"';
                begins = byte == delimiter || matches!(byte, b'\r' | b'\n');
            }
        }
    }
    quoted
}

fn utf8<'a>(path: &Path, cell: &'a [u8], line: u64) -> Result<&'a str> {
    std::str::from_utf8(cell)
        .map_err(|_| corrupt_at(path, format!(", line {line}"), "a cell is not UTF-8; convert the file with iconv"))
}

fn corrupt(path: &Path, error: csv::Error) -> Error {
    match error.into_kind() {
        ErrorKind::Io(source) => Error::io("read", path)(source),
        ErrorKind::UnequalLengths { pos, expected_len, len } => {
            let place = pos.map(|pos| format!(", line {}", pos.line())).unwrap_or_default();
            corrupt_at(path, place, format!("the row has {len} cells, but the header has {expected_len}"))
        }
        kind => corrupt_at(path, String::new(), format!("not CSV ({kind:?})")),
    }
}

/// Decodes from the nearest recorded row at or before `first_row`; the second value is that row.
///
/// `schema` is the whole file's, in the order of its header.
///
/// # Errors
///
/// [`Error::InputCorrupt`], [`Error::Io`].
pub(crate) fn open(
    path: &Path,
    offsets: &[u64],
    schema: &SchemaRef,
    columns: &[&str],
    batch_rows: usize,
    first_row: u64,
) -> Result<(Batches, u64)> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let fields = schema.fields().iter().enumerate();
    let projection =
        fields.filter(|(_, field)| columns.contains(&field.name().as_str())).map(|(index, _)| index).collect();
    let recorded = (first_row / OFFSET_ROWS).min(offsets.len().saturating_sub(1) as u64);
    let offset = offsets.get(recorded as usize).copied().unwrap_or(0);
    guarded(path, String::new, || {
        file.seek(SeekFrom::Start(offset))?;
        // The line end, which is no row, keeps the parser from taking a row that starts with a byte
        // order mark for the start of a file.
        let bytes = b"\n".as_slice().chain(BufReader::with_capacity(BUFFER_BYTES, file));
        let reader = ReaderBuilder::new(schema.clone())
            .with_header(false)
            .with_delimiter(delimiter(path))
            .with_batch_size(batch_rows)
            .with_projection(projection)
            .build_buffered(bytes)?;
        Ok::<_, ArrowError>((Box::new(reader) as Batches, recorded * OFFSET_ROWS))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inferred(cells: &[&str]) -> DataType {
        let mut kinds = CellKinds::default();
        cells.iter().for_each(|cell| kinds.observe(cell));
        kinds.data_type()
    }

    #[test]
    fn a_type_is_one_that_every_cell_decodes_as() {
        let stamp = |unit| DataType::Timestamp(unit, None);
        for (cells, data_type) in [
            (vec!["1", "-2", ""], DataType::Int64),
            (vec!["1", "2.5", "1e3", "NaN"], DataType::Float64),
            (vec!["true", "False"], DataType::Boolean),
            (vec!["true", "1"], DataType::Utf8),
            (vec!["007"], DataType::Utf8),
            (vec!["0", "-0.5"], DataType::Float64),
            (vec!["99999999999999999999"], DataType::Utf8),
            (vec!["٣"], DataType::Utf8),
            (vec!["2026-01-31"], DataType::Date32),
            (vec!["2026-13-31"], DataType::Utf8),
            (vec!["2026-01-31 10:00:00", "2026-01-31"], stamp(TimeUnit::Second)),
            (vec!["2026-01-31T10:00:00.123", "2026-01-31T10:00:00Z"], stamp(TimeUnit::Millisecond)),
            (vec!["2026-01-31T10:00:00.1234567"], stamp(TimeUnit::Nanosecond)),
            (vec!["2026-01-31 10:00:00 or so"], DataType::Utf8),
            (vec!["1.2.3"], DataType::Utf8),
            (vec!["-"], DataType::Utf8),
            (vec!["1-2"], DataType::Utf8),
            (vec!["", ""], DataType::Utf8),
            (vec![], DataType::Utf8),
        ] {
            assert_eq!(inferred(&cells), data_type, "{cells:?}");
        }
    }
}
