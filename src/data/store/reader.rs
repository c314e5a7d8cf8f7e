//! Reading a file at any place: what decoders need, over a local file or over ranged requests.
//!
//! An object is read in blocks that are kept while they are recent, because a Parquet decoder goes back and forth between
//! columns. Whoever reads on into the next block gets ever longer runs of blocks with one request.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{ChunkReader, Length};

use super::location::{FailureSlot, Identity};
use super::object::Object;

/// Bytes of a block.
const BLOCK_BYTES: u64 = 1 << 20;
/// Blocks that are kept of one open object: 64 MiB, and a block for each of as many columns.
const MAX_BLOCKS: usize = 64;
/// Blocks of one request at most.
const MAX_RUN: u64 = 8;

/// A file that is open for reading.
#[derive(Debug)]
pub enum Reader {
    /// A local file.
    Local(File),
    /// An object, at a position of this reader's own.
    Object(ObjectReader),
}

impl Reader {
    pub(super) fn of_object(object: Object, identity: Identity, failure: Arc<FailureSlot>) -> Self {
        let blocks = Mutex::default();
        let shared = Arc::new(Shared { object, identity, failure, blocks });
        Reader::Object(ObjectReader { shared, position: 0 })
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Reader::Local(file) => file.read(buffer),
            Reader::Object(object) => object.read(buffer),
        }
    }
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match self {
            Reader::Local(file) => file.seek(to),
            Reader::Object(object) => object.seek(to),
        }
    }
}

impl Length for Reader {
    fn len(&self) -> u64 {
        match self {
            Reader::Local(file) => file.len(),
            Reader::Object(object) => object.shared.identity.size_bytes,
        }
    }
}

impl ChunkReader for Reader {
    type T = ChunkStream;

    fn get_read(&self, start: u64) -> ParquetResult<ChunkStream> {
        Ok(match self {
            Reader::Local(file) => ChunkStream::Local(file.get_read(start)?),
            Reader::Object(object) => {
                ChunkStream::Object(ObjectReader { shared: Arc::clone(&object.shared), position: start })
            }
        })
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        match self {
            Reader::Local(file) => file.get_bytes(start, length),
            Reader::Object(object) => object.shared.bytes(start, length),
        }
    }
}

/// A reader of a Parquet file from some place on.
#[derive(Debug)]
pub enum ChunkStream {
    /// Of a local file.
    Local(BufReader<File>),
    /// Of an object.
    Object(ObjectReader),
}

impl Read for ChunkStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            ChunkStream::Local(file) => file.read(buffer),
            ChunkStream::Object(object) => object.read(buffer),
        }
    }
}

/// A position in an object, whose blocks are shared with other positions.
#[derive(Debug)]
pub struct ObjectReader {
    shared: Arc<Shared>,
    position: u64,
}

#[derive(Debug)]
struct Shared {
    object: Object,
    identity: Identity,
    failure: Arc<FailureSlot>,
    blocks: Mutex<Blocks>,
}

/// The blocks that were read last.
#[derive(Debug, Default)]
struct Blocks {
    kept: Vec<Block>,
    reads: u64,
}

#[derive(Debug)]
struct Block {
    index: u64,
    bytes: Bytes,
    /// Blocks of the request that brought it.
    run: u64,
    /// The number of the read that used it last.
    used: u64,
}

impl Read for ObjectReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || self.position >= self.shared.identity.size_bytes {
            return Ok(0);
        }
        let block = self.shared.block(self.position / BLOCK_BYTES)?;
        let rest = &block[(self.position % BLOCK_BYTES) as usize..];
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        self.position += length as u64;
        Ok(length)
    }
}

impl Seek for ObjectReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.shared.identity.size_bytes.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.position)
    }
}

impl Shared {
    /// The block, which lies within the object and so is never empty.
    fn block(&self, index: u64) -> io::Result<Bytes> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = blocks.recent(index) {
            return Ok(bytes);
        }
        let last = self.identity.size_bytes.div_ceil(BLOCK_BYTES);
        let run = blocks.next_run(index).min(last - index);
        let range = index * BLOCK_BYTES..self.identity.size_bytes.min((index + run) * BLOCK_BYTES);
        let bytes = self.object.read_range(&self.identity, range).map_err(|failure| {
            let error = io::Error::other(failure.clone());
            self.failure.keep(failure);
            error
        })?;
        for offset in 0..run {
            let start = (offset * BLOCK_BYTES) as usize;
            let end = bytes.len().min(start + BLOCK_BYTES as usize);
            // Copied, so that a block that is kept does not keep its whole run.
            blocks.keep(index + offset, Bytes::copy_from_slice(&bytes[start..end]), run);
        }
        Ok(bytes.slice(..bytes.len().min(BLOCK_BYTES as usize)))
    }

    fn bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let size = self.identity.size_bytes;
        if start.checked_add(length as u64).is_none_or(|end| end > size) {
            return Err(ParquetError::EOF(format!("{length} bytes from {start} on, of {size}")));
        }
        if length == 0 {
            return Ok(Bytes::new());
        }
        let first = self.block(start / BLOCK_BYTES)?;
        let within = (start % BLOCK_BYTES) as usize;
        if within + length <= first.len() {
            return Ok(first.slice(within..within + length));
        }
        let mut bytes = Vec::with_capacity(length);
        bytes.extend_from_slice(&first[within..]);
        while bytes.len() < length {
            let next = self.block((start + bytes.len() as u64) / BLOCK_BYTES)?;
            bytes.extend_from_slice(&next[..next.len().min(length - bytes.len())]);
        }
        Ok(bytes.into())
    }
}

impl Blocks {
    fn recent(&mut self, index: u64) -> Option<Bytes> {
        self.reads += 1;
        let block = self.kept.iter_mut().find(|block| block.index == index)?;
        block.used = self.reads;
        Some(block.bytes.clone())
    }

    /// Twice the run before, for whoever reads on from it.
    fn next_run(&self, index: u64) -> u64 {
        let before = self.kept.iter().find(|block| block.index + 1 == index);
        before.map_or(1, |block| (2 * block.run).min(MAX_RUN))
    }

    fn keep(&mut self, index: u64, bytes: Bytes, run: u64) {
        self.kept.retain(|block| block.index != index);
        if self.kept.len() >= MAX_BLOCKS
            && let Some(oldest) = (0..self.kept.len()).min_by_key(|&place| self.kept[place].used)
        {
            self.kept.swap_remove(oldest);
        }
        self.kept.push(Block { index, bytes, run, used: self.reads });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::store::testing::{Fault, FaultyStore, put};
    use proptest::prelude::*;

    /// 5.5 blocks of numbers that tell where they stand.
    fn content() -> Vec<u8> {
        (0..(BLOCK_BYTES * 11 / 2) as usize).map(|at| (at * 31 + (at >> 8) * 7 + (at >> 16)) as u8).collect()
    }

    fn open(store: &Arc<FaultyStore>) -> Reader {
        let location = store.stores().locate("s3://bucket/object").unwrap();
        location.file().unwrap().unwrap().open().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn any_range_is_read_as_it_is(ranges in prop::collection::vec((0usize..5_767_168, 0usize..3_000_000), 1..8)) {
            let content = content();
            let store = FaultyStore::new();
            put(&store, "object", content.clone());
            let mut reader = open(&store);
            for (start, length) in ranges {
                let end = content.len().min(start + length);
                let expected = &content[start..end];
                prop_assert!(reader.get_bytes(start as u64, end - start).unwrap() == expected);
                reader.seek(SeekFrom::Start(start as u64)).unwrap();
                let mut read = vec![0; end - start];
                reader.read_exact(&mut read).unwrap();
                prop_assert!(read == expected);
            }
        }
    }

    #[test]
    fn reading_on_asks_for_longer_and_longer_runs() {
        let store = FaultyStore::new();
        put(&store, "object", content());
        let mut reader = open(&store);
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert!(read == content());
        // Blocks 0, 1-2, 3-5.
        assert_eq!(store.count("get"), 3);
        assert!(reader.get_bytes(5 << 20, 1 << 20).is_err(), "it ends before");
        assert!(reader.get_bytes(u64::MAX, 2).is_err());
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut blocks = Blocks::default();
        for index in 0..1000 {
            blocks.recent(index);
            blocks.keep(index, Bytes::from_static(b"x"), 8);
        }
        assert_eq!(blocks.kept.len(), MAX_BLOCKS);
        assert!(blocks.recent(999).is_some() && blocks.recent(0).is_none());
    }

    #[test]
    fn an_object_that_changes_in_between_is_not_read_on() {
        for honours_conditions in [true, false] {
            let store = FaultyStore::new();
            if !honours_conditions {
                store.fail("get", Fault::IgnoreConditions, 0..usize::MAX);
            }
            put(&store, "object", content());
            let location = store.stores().locate("s3://bucket/object").unwrap();
            let file = location.file().unwrap().unwrap();
            let mut reader = file.open().unwrap();
            let mut half = vec![0; BLOCK_BYTES as usize / 2];
            reader.read_exact(&mut half).unwrap();
            put(&store, "object", vec![0; content().len()]);
            let error = io::copy(&mut reader, &mut io::sink()).unwrap_err();
            let error = file.explain(crate::error::Error::io("read", file.path())(error));
            assert_eq!(error.exit_code(), crate::error::ExitCode::InputData, "{error}");
            assert!(error.to_string().contains("s3://bucket/object: changed"), "{error}");
            assert!(file.verify_unchanged().is_err());
        }
    }
}
