//! What stands between a Parquet file and its decoder: claims that no honest file makes are refused, since the decoder allocates
//! what it is told to, and the operating system's errors are kept, since the decoder turns them into text.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::datatypes::{DataType, Schema};
use arrow::error::ArrowError;
use bytes::Bytes;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::errors::ParquetError;
use parquet::file::metadata::{FooterTail, ParquetMetaData, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length};

use super::decode::check_expansion;
use super::page_content::{Chunk, PageClaim, PageLayout, check_content};
use super::thrift::{Event, invalid, walk};

/// Magic, and length of the metadata before it.
const FOOTER_BYTES: u64 = 8;
/// A page header, statistics of long values included; other readers draw the same line.
const MAX_PAGE_HEADER_BYTES: u64 = 16 << 20;
/// Groups inside each other: a decoder walks them on its stack.
const MAX_SCHEMA_DEPTH: usize = 100;
/// A value of fixed width takes that much memory for each null too.
const MAX_FIXED_WIDTH_BYTES: u64 = 16 << 20;

/// The ids of the fields that are looked at, as parquet.thrift numbers them.
mod field {
    /// `FileMetaData.schema`, then `SchemaElement.num_children`.
    pub const SCHEMA: i16 = 2;
    pub const NUM_CHILDREN: i16 = 5;
    /// `PageHeader.uncompressed_page_size` and `.compressed_page_size`.
    pub const UNPACKED: i16 = 2;
    pub const PACKED: i16 = 3;
    /// `PageHeader.data_page_header`, `.dictionary_page_header` and `.data_page_header_v2`.
    pub const DATA: i16 = 5;
    pub const DICTIONARY: i16 = 7;
    pub const DATA_V2: i16 = 8;
    /// Of each of the three.
    pub const NUM_VALUES: i16 = 1;
    /// `DataPageHeader.encoding`, `.definition_level_encoding` and `.repetition_level_encoding`.
    pub const ENCODING: i16 = 2;
    pub const DEFINITION_ENCODING: i16 = 3;
    pub const REPETITION_ENCODING: i16 = 4;
    /// `DataPageHeaderV2.encoding`, `.definition_levels_byte_length`, `.repetition_levels_byte_length` and `.is_compressed`.
    pub const ENCODING_V2: i16 = 4;
    pub const DEFINITION_BYTES: i16 = 5;
    pub const REPETITION_BYTES: i16 = 6;
    pub const IS_COMPRESSED: i16 = 7;
}

/// Reads the footer of a Parquet file.
///
/// # Errors
///
/// Where it cannot be read, is damaged, or claims what a file of its size cannot hold.
pub(super) fn load_metadata<R: ChunkReader>(reader: &R) -> Result<ArrowReaderMetadata, ParquetError> {
    let size = reader.len();
    let start = size.checked_sub(FOOTER_BYTES).ok_or_else(|| broken("it is too short to be a Parquet file"))?;
    let tail: [u8; FOOTER_BYTES as usize] = reader
        .get_bytes(start, FOOTER_BYTES as usize)?
        .as_ref()
        .try_into()
        .map_err(|_| broken("it ends before its footer"))?;
    let tail = FooterTail::try_new(&tail)?;
    if tail.is_encrypted_footer() {
        return Err(broken("its footer is encrypted; decrypt it first"));
    }
    let length = tail.metadata_length();
    let start = start.checked_sub(length as u64).ok_or_else(|| broken("its footer is longer than the file"))?;
    let footer = reader.get_bytes(start, length)?;
    check_footer(&footer)?;
    let metadata = ArrowReaderMetadata::try_new(
        Arc::new(ParquetMetaDataReader::decode_metadata(&footer)?),
        ArrowReaderOptions::new(),
    )?;
    check_widths(metadata.schema())?;
    Ok(metadata)
}

/// Refuses a footer whose lists or schema could not be decoded in the memory of its own size, or on the stack.
fn check_footer(footer: &[u8]) -> Result<(), ParquetError> {
    // Children that are still to come in each open group; a leaf says nothing or 0.
    let mut open: Vec<u64> = Vec::new();
    let mut children = 0u64;
    walk(footer, footer.len() as u64, &mut |path, event| {
        match (path, event) {
            ([field::SCHEMA, field::NUM_CHILDREN], Event::Integer(number)) => {
                children = u64::try_from(number as i32).map_err(|_| invalid("a group has fewer columns than none"))?;
                if children > footer.len() as u64 {
                    return Err(invalid(format!("a group has {children} columns, more than there are bytes")));
                }
            }
            ([field::SCHEMA], Event::End) => {
                if let Some(siblings) = open.last_mut() {
                    *siblings = siblings.saturating_sub(1);
                }
                if children > 0 {
                    open.push(children);
                }
                if open.len() > MAX_SCHEMA_DEPTH {
                    return Err(invalid(format!("its columns are nested deeper than {MAX_SCHEMA_DEPTH} levels")));
                }
                while open.last() == Some(&0) {
                    open.pop();
                }
                children = 0;
            }
            _ => {}
        }
        Ok(())
    })
    .map_err(ParquetError::from)
}

fn check_widths(schema: &Schema) -> Result<(), ParquetError> {
    for field in schema.fields() {
        let width = fixed_width_bytes(field.data_type());
        if width > MAX_FIXED_WIDTH_BYTES {
            return Err(broken(&format!("a value of column '{}' takes {width} bytes whatever it is", field.name())));
        }
    }
    Ok(())
}

/// The bytes of a row that do not depend on its values: what even a null takes.
pub(super) fn fixed_width_bytes(data_type: &DataType) -> u64 {
    match data_type {
        DataType::FixedSizeBinary(width) => u64::try_from(*width).unwrap_or(0),
        DataType::FixedSizeList(item, size) => {
            u64::try_from(*size).unwrap_or(0).saturating_mul(fixed_width_bytes(item.data_type()).max(1))
        }
        DataType::Struct(fields) => {
            let widths = fields.iter().map(|field| fixed_width_bytes(field.data_type()));
            widths.fold(0, u64::saturating_add)
        }
        other => other.primitive_width().unwrap_or(0) as u64,
    }
}

/// The first failure below a decoder that was no damage that the decoder found itself.
#[derive(Debug, Clone, Default)]
pub(super) struct FirstFailure(Arc<Mutex<Option<ParquetError>>>);

impl FirstFailure {
    /// Keeps the error, and returns one that says the same for a decoder to pass on as text.
    fn keep(&self, error: ParquetError) -> ParquetError {
        let told = broken(&error.to_string());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        told
    }

    /// What a decoder's error came from, if it came from below.
    pub fn behind(&self, error: ArrowError) -> ArrowError {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(cause) => ArrowError::ExternalError(Box::new(cause)),
            None => error,
        }
    }
}

/// A file whose pages are looked at before they are decoded.
///
/// The decoder asks for a reader at each page header, and for bytes at each page's content.
pub(super) struct CheckedPages<R> {
    inner: R,
    failure: FirstFailure,
    /// By the place of their first page.
    chunks: BTreeMap<u64, Chunk>,
    claims: Claims,
}

/// What the headers read last say, by the place of the content that follows them.
type Claims = Arc<Mutex<BTreeMap<u64, PageClaim>>>;

impl<R: ChunkReader> CheckedPages<R> {
    pub fn new(inner: R, metadata: &ParquetMetaData, failure: FirstFailure) -> Self {
        let columns = metadata.row_groups().iter().flat_map(|group| group.columns());
        let chunks = columns.map(|column| {
            let description = column.column_descr();
            let chunk = Chunk {
                compression: column.compression(),
                max_definition_level: description.max_def_level(),
                max_repetition_level: description.max_rep_level(),
            };
            let first = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
            (u64::try_from(first).unwrap_or(0), chunk)
        });
        Self { inner, failure, chunks: chunks.collect(), claims: Claims::default() }
    }
}

impl<R: ChunkReader> Length for CheckedPages<R> {
    fn len(&self) -> u64 {
        self.inner.len()
    }
}

impl<R: ChunkReader> ChunkReader for CheckedPages<R> {
    type T = PageHeader<R::T>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        let rest = self.inner.get_read(start).map_err(|error| self.failure.keep(error))?;
        Ok(PageHeader { rest, start, failure: self.failure.clone(), claims: self.claims.clone(), head: None })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        if start.checked_add(length as u64).is_none_or(|end| end > self.inner.len()) {
            return Err(ParquetError::EOF(format!("{length} bytes at {start} lie beyond the end of the file")));
        }
        let content = self.inner.get_bytes(start, length).map_err(|error| self.failure.keep(error))?;
        let claim = self.claims.lock().unwrap_or_else(PoisonError::into_inner).remove(&start);
        if let (Some(claim), Some((_, chunk))) = (claim, self.chunks.range(..=start).next_back()) {
            check_content(&claim, chunk, &content)?;
        }
        Ok(content)
    }
}

/// The bytes of a page header, checked before the first of them is handed on.
pub(super) struct PageHeader<R> {
    rest: R,
    start: u64,
    failure: FirstFailure,
    claims: Claims,
    /// What the check has read, and how much of it was handed on. The decoder also opens readers that it never reads.
    head: Option<(Vec<u8>, usize)>,
}

impl<R: Read> Read for PageHeader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (head, taken) = match &mut self.head {
            Some(head) => head,
            None => {
                let mut head = Vec::new();
                let input = Tee { input: &mut self.rest, copy: &mut head };
                let claim = check_page_header(input).map_err(|error| self.keep(error))?;
                let content = self.start.saturating_add(head.len() as u64);
                self.claims.lock().unwrap_or_else(PoisonError::into_inner).insert(content, claim);
                self.head.insert((head, 0))
            }
        };
        if *taken < head.len() {
            let count = (head.len() - *taken).min(buffer.len());
            buffer[..count].copy_from_slice(&head[*taken..*taken + count]);
            *taken += count;
            return Ok(count);
        }
        self.rest.read(buffer).map_err(|error| self.keep(error))
    }
}

impl<R> PageHeader<R> {
    fn keep(&self, error: io::Error) -> io::Error {
        io::Error::new(error.kind(), self.failure.keep(error.into()).to_string())
    }
}

struct Tee<'a, R> {
    input: R,
    copy: &'a mut Vec<u8>,
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.copy.extend_from_slice(&buffer[..count]);
        Ok(count)
    }
}

/// Refuses a page that claims to unpack to more than it can, or a dictionary of more values than bytes.
fn check_page_header(input: impl Read) -> io::Result<PageClaim> {
    let mut header = HeaderFields::default();
    walk(input, MAX_PAGE_HEADER_BYTES, &mut |path, event| {
        match event {
            // The decoder cuts numbers to 32 bits too, and of a field that is there twice takes the last.
            Event::Integer(number) => header.keep(path, i64::from(number as i32)),
            Event::Truth(truth) => header.keep(path, i64::from(truth)),
            Event::End => {}
        }
        Ok(())
    })?;
    let unpacked = header.natural(&[field::UNPACKED]);
    check_expansion("a page", header.natural(&[field::PACKED]), unpacked).map_err(invalid)?;
    let dictionary = header.natural(&[field::DICTIONARY, field::NUM_VALUES]);
    if dictionary > unpacked {
        return Err(invalid(format!("a dictionary claims {dictionary} values in {unpacked} bytes")));
    }
    let kinds =
        [field::DATA, field::DICTIONARY, field::DATA_V2].map(|kind| header.get(&[kind, field::NUM_VALUES]).is_some());
    if kinds.into_iter().filter(|&is_there| is_there).count() > 1 {
        return Err(invalid("a page's header is of two kinds at once"));
    }
    let layout = if kinds[0] {
        PageLayout::Data {
            values: header.natural(&[field::DATA, field::NUM_VALUES]),
            encoding: header.get(&[field::DATA, field::ENCODING]).unwrap_or(-1),
            definition_encoding: header.get(&[field::DATA, field::DEFINITION_ENCODING]).unwrap_or(-1),
            repetition_encoding: header.get(&[field::DATA, field::REPETITION_ENCODING]).unwrap_or(-1),
        }
    } else if kinds[2] {
        let levels = [field::DEFINITION_BYTES, field::REPETITION_BYTES];
        PageLayout::DataV2 {
            values: header.natural(&[field::DATA_V2, field::NUM_VALUES]),
            encoding: header.get(&[field::DATA_V2, field::ENCODING_V2]).unwrap_or(-1),
            levels_bytes: levels.into_iter().map(|levels| header.natural(&[field::DATA_V2, levels])).sum(),
            is_compressed: header.get(&[field::DATA_V2, field::IS_COMPRESSED]) != Some(0),
        }
    } else {
        PageLayout::Other
    };
    Ok(PageClaim { unpacked_bytes: unpacked, layout })
}

/// The numbers of a page header, by their path. Statistics have none, so they are few.
#[derive(Default)]
struct HeaderFields(HashMap<Vec<i16>, i64>);

impl HeaderFields {
    fn keep(&mut self, path: &[i16], number: i64) {
        let kinds = [field::DATA, field::DICTIONARY, field::DATA_V2];
        if path.len() == 1 || (path.len() == 2 && kinds.contains(&path[0])) {
            self.0.insert(path.to_vec(), number);
        }
    }

    fn get(&self, path: &[i16]) -> Option<i64> {
        self.0.get(path).copied()
    }

    /// 0 for what is not there, or less.
    fn natural(&self, path: &[i16]) -> u64 {
        self.get(path).and_then(|number| u64::try_from(number).ok()).unwrap_or(0)
    }
}

fn broken(message: &str) -> ParquetError {
    ParquetError::General(message.to_owned())
}
