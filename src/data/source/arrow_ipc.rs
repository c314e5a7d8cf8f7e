//! Arrow IPC files and streams. Record batches are decoded whole, as their writer cut them.
//!
//! A survey reads message headers only, and of compressed buffers the sizes that they claim. It checks every length against
//! the size of the file, since the decoder allocates what it is told to.

use std::io::{BufReader, Cursor, Read, Seek, SeekFrom};
use std::ops::Range;
use std::sync::Arc;

use arrow::datatypes::Schema;
use arrow::error::ArrowError;
use arrow::ipc::convert::fb_to_schema;
use arrow::ipc::reader::{FileReader, StreamReader, read_footer_length};
use arrow::ipc::{Block, Message, MessageHeader, RecordBatch, root_as_footer, root_as_message};

use super::decode::{Batches, Columns, Layout, Survey, check_expansion, guarded};
use crate::data::store::{Reader, StoredFile};
use crate::error::Result;

/// The first bytes of the file format; a stream has none.
const FILE_MAGIC: &[u8; 6] = b"ARROW1";
/// The magic at the end, after the four bytes of the footer's length.
const TRAILER_BYTES: u64 = 10;
const CONTINUATION: [u8; 4] = [0xff; 4];
/// The unpacked size before each compressed buffer; -1 for one that is stored as it is.
const SIZE_PREFIX_BYTES: u64 = 8;

/// Reads the footer or, in a stream, the headers of all messages.
///
/// # Errors
///
/// [`Error::InputCorrupt`](crate::Error::InputCorrupt) for damaged files, [`Error::Io`](crate::Error::Io) where the file cannot be read.
pub(crate) fn survey(stored: &StoredFile) -> Result<Survey> {
    let mut file = stored.open()?;
    guarded(stored.path(), String::new, || {
        let size = file.seek(SeekFrom::End(0))?;
        file.rewind()?;
        let mut magic = Vec::new();
        Read::by_ref(&mut file).take(FILE_MAGIC.len() as u64).read_to_end(&mut magic)?;
        let (schema, rows, layout) = match magic == FILE_MAGIC {
            true => survey_file(&mut file, size)?,
            false => survey_stream(file, size)?,
        };
        let bytes_per_row = size.checked_div(rows).unwrap_or(0);
        Ok::<_, ArrowError>(Survey { rows, bytes_per_row, layout, columns: Columns::Typed(Arc::new(schema)) })
    })
}

/// Decodes from the record batch that holds `first_row`; the second value is that batch's first row.
///
/// # Errors
///
/// As [`survey`].
pub(crate) fn open(stored: &StoredFile, layout: &Layout, columns: &[&str], first_row: u64) -> Result<(Batches, u64)> {
    let mut file = stored.open()?;
    guarded(stored.path(), String::new, || match layout {
        Layout::ArrowStream { batches, preamble } => {
            let batch = batches.partition_point(|&(start, _)| start <= first_row).saturating_sub(1);
            let (start, offset) = batches.get(batch).copied().unwrap_or((0, 0));
            let mut file = BufReader::new(file);
            let mut head = Vec::new();
            for message in preamble.iter().filter(|message| message.end <= offset) {
                file.seek(SeekFrom::Start(message.start))?;
                Read::by_ref(&mut file).take(message.end - message.start).read_to_end(&mut head)?;
            }
            file.seek(SeekFrom::Start(offset))?;
            let projection = projection(&StreamReader::try_new(head.as_slice(), None)?.schema(), columns);
            let reader = StreamReader::try_new(Cursor::new(head).chain(file), Some(projection))?;
            Ok((Box::new(reader) as Batches, start))
        }
        Layout::ArrowFile { batch_starts } => {
            let batch = batch_starts.partition_point(|&start| start <= first_row).saturating_sub(1);
            let schema = FileReader::try_new_buffered(&mut file, None)?.schema();
            let mut reader = FileReader::try_new_buffered(file, Some(projection(&schema, columns)))?;
            if reader.num_batches() != batch_starts.len() {
                return Err(broken("it has other record batches than before"));
            }
            reader.set_index(batch)?;
            Ok((Box::new(reader) as Batches, batch_starts[batch]))
        }
        Layout::Parquet { .. } | Layout::Lines { .. } => Err(broken("it was not surveyed as Arrow")),
    })
}

fn projection(schema: &Schema, columns: &[&str]) -> Vec<usize> {
    let fields = schema.fields().iter().enumerate();
    fields.filter(|(_, field)| columns.contains(&field.name().as_str())).map(|(index, _)| index).collect()
}

fn broken(message: &str) -> ArrowError {
    ArrowError::IpcError(message.to_owned())
}

fn survey_file(file: &mut Reader, size: u64) -> Result<(Schema, u64, Layout), ArrowError> {
    if size < TRAILER_BYTES {
        return Err(broken("it ends before its footer"));
    }
    let mut trailer = [0; TRAILER_BYTES as usize];
    file.seek(SeekFrom::End(-(TRAILER_BYTES as i64)))?;
    file.read_exact(&mut trailer)?;
    let length = read_footer_length(trailer)? as u64;
    if length > size - TRAILER_BYTES {
        return Err(broken("its footer is longer than the file"));
    }
    let mut footer = vec![0; length as usize];
    file.seek(SeekFrom::Start(size - TRAILER_BYTES - length))?;
    file.read_exact(&mut footer)?;
    let footer = root_as_footer(&footer).map_err(|error| broken(&format!("its footer is damaged ({error})")))?;
    let schema = fb_to_schema(footer.schema().ok_or_else(|| broken("its footer has no schema"))?);

    let fits = |offset: i64, metadata: i32, body: i64| {
        let parts = [u64::try_from(offset).ok(), u64::try_from(metadata).ok(), u64::try_from(body).ok()];
        let end = parts.into_iter().try_fold(0u64, |sum, part| sum.checked_add(part?));
        end.is_some_and(|end| end <= size)
    };
    for block in footer.dictionaries().into_iter().flatten() {
        if !fits(block.offset(), block.metaDataLength(), block.bodyLength()) {
            return Err(broken("a dictionary lies outside the file"));
        }
        let metadata = block_metadata(file, block)?;
        check_buffers(file, message_of(&metadata)?, body_of(block))?;
    }
    let mut rows = 0u64;
    let mut batch_starts = Vec::new();
    for block in footer.recordBatches().into_iter().flatten() {
        if !fits(block.offset(), block.metaDataLength(), block.bodyLength()) {
            return Err(broken("a record batch lies outside the file"));
        }
        let metadata = block_metadata(file, block)?;
        let message = message_of(&metadata)?;
        batch_starts.push(rows);
        rows = batch_rows(message, rows)?;
        check_buffers(file, message, body_of(block))?;
    }
    Ok((schema, rows, Layout::ArrowFile { batch_starts }))
}

/// The message of a block that lies inside the file.
fn block_metadata(file: &mut Reader, block: &Block) -> Result<Vec<u8>, ArrowError> {
    file.seek(SeekFrom::Start(block.offset() as u64))?;
    let mut metadata = vec![0; block.metaDataLength() as usize];
    file.read_exact(&mut metadata)?;
    let prefix = if metadata.starts_with(&CONTINUATION) { 8 } else { 4 };
    metadata.drain(..prefix.min(metadata.len()));
    Ok(metadata)
}

fn body_of(block: &Block) -> Range<u64> {
    let start = block.offset() as u64 + block.metaDataLength() as u64;
    start..start + block.bodyLength() as u64
}

fn message_of(metadata: &[u8]) -> Result<Message<'_>, ArrowError> {
    root_as_message(metadata).map_err(|error| broken(&format!("a message is damaged ({error})")))
}

/// Refuses a message whose compressed buffers claim more than they can unpack to.
fn check_buffers(file: &mut (impl Read + Seek), message: Message<'_>, body: Range<u64>) -> Result<(), ArrowError> {
    let dictionary = message.header_as_dictionary_batch().and_then(|dictionary| dictionary.data());
    let batch: Option<RecordBatch<'_>> = message.header_as_record_batch().or(dictionary);
    let Some(batch) = batch.filter(|batch| batch.compression().is_some()) else { return Ok(()) };
    for buffer in batch.buffers().into_iter().flatten() {
        let length = u64::try_from(buffer.length()).unwrap_or(u64::MAX);
        let start = u64::try_from(buffer.offset()).ok().and_then(|offset| body.start.checked_add(offset));
        let Some(start) = start.filter(|start| start.checked_add(length).is_some_and(|end| end <= body.end)) else {
            return Err(broken("a buffer lies outside its record batch"));
        };
        if length > SIZE_PREFIX_BYTES {
            let mut prefix = [0; SIZE_PREFIX_BYTES as usize];
            file.seek(SeekFrom::Start(start))?;
            file.read_exact(&mut prefix)?;
            let unpacked = u64::try_from(i64::from_le_bytes(prefix)).unwrap_or(0);
            check_expansion("a buffer", length, unpacked).map_err(|message| broken(&message))?;
        }
    }
    Ok(())
}

/// `rows` and those of the record batch that this message announces.
fn batch_rows(message: Message<'_>, rows: u64) -> Result<u64, ArrowError> {
    let batch = message.header_as_record_batch().ok_or_else(|| broken("a message is not a record batch"))?;
    let length = u64::try_from(batch.length()).map_err(|_| broken("a record batch of a negative length"))?;
    rows.checked_add(length).ok_or_else(|| broken("more rows than can be counted"))
}

fn survey_stream(file: Reader, size: u64) -> Result<(Schema, u64, Layout), ArrowError> {
    let mut file = BufReader::new(file);
    let mut rows = 0u64;
    let mut batches = Vec::new();
    let mut preamble: Vec<Range<u64>> = Vec::new();
    let mut schema = None;
    let mut start = 0;
    while let Some(metadata) = next_metadata(&mut file, start, size)? {
        let message = root_as_message(&metadata.bytes).map_err(|error| match schema {
            None => broken("neither an Arrow file nor a stream"),
            Some(_) => broken(&format!("a message is damaged ({error})")),
        })?;
        let end = u64::try_from(message.bodyLength()).ok().and_then(|body| metadata.end.checked_add(body));
        let end = end.filter(|&end| end <= size).ok_or_else(|| broken("it ends within a message"))?;
        check_buffers(&mut file, message, metadata.end..end)?;
        match message.header_type() {
            MessageHeader::RecordBatch => {
                batches.push((rows, start));
                rows = batch_rows(message, rows)?;
            }
            header => {
                if header == MessageHeader::Schema {
                    schema = message.header_as_schema().map(fb_to_schema);
                }
                preamble.push(start..end);
            }
        }
        start = end;
    }
    let schema = schema.ok_or_else(|| broken("neither an Arrow file nor a stream"))?;
    Ok((schema, rows, Layout::ArrowStream { batches, preamble }))
}

struct Metadata {
    bytes: Vec<u8>,
    /// Where the message's body starts.
    end: u64,
}

/// The metadata of the message at `start`, or `None` at the end of the stream.
fn next_metadata(file: &mut BufReader<Reader>, start: u64, size: u64) -> Result<Option<Metadata>, ArrowError> {
    if start >= size {
        return Ok(None);
    }
    file.seek(SeekFrom::Start(start))?;
    let mut word = [0; 4];
    file.read_exact(&mut word)?;
    let mut head = 4;
    if word == CONTINUATION {
        file.read_exact(&mut word)?;
        head = 8;
    }
    let length = u32::from_le_bytes(word);
    if length == 0 {
        return Ok(None);
    }
    let end = start + head + u64::from(length);
    if end > size {
        return Err(broken("neither an Arrow file nor a stream, or it ends within a message"));
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact(&mut bytes)?;
    Ok(Some(Metadata { bytes, end }))
}
