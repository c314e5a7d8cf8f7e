//! The content of a Parquet page, looked at before it is decoded where the decoder would allocate what it claims: streams that unpack
//! to more than the header says, and the counts of values before texts in delta encodings.

use std::borrow::Cow;
use std::io::{self, Read};

use parquet::basic::Compression;

use super::thrift::{invalid, varint};

/// Values of a delta encoding in a byte: blocks of equal values have no bits for them. DuckDB's blocks of 2,048 come to 227.
const MAX_VALUES_PER_BYTE: u64 = 1024;

/// The encodings that are looked at, as parquet.thrift numbers them.
mod encoding {
    pub const RLE: i64 = 3;
    pub const BIT_PACKED: i64 = 4;
    pub const DELTA_LENGTH_BYTE_ARRAY: i64 = 6;
    pub const DELTA_BYTE_ARRAY: i64 = 7;
}

/// What a page's header says of its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PageClaim {
    pub unpacked_bytes: u64,
    pub layout: PageLayout,
}

/// How a page's content is laid out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PageLayout {
    /// Everything is compressed; levels, as far as the column has any, begin with their length or are packed by bits.
    Data { values: u64, encoding: i64, definition_encoding: i64, repetition_encoding: i64 },
    /// Levels of this length come first and are never compressed.
    DataV2 { values: u64, encoding: i64, levels_bytes: u64, is_compressed: bool },
    /// A dictionary, or what the decoder does not read.
    Other,
}

/// What a column chunk's metadata says of its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    pub compression: Compression,
    pub max_definition_level: i16,
    pub max_repetition_level: i16,
}

/// Refuses content that would take more memory than its header says.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidData`] for such content, and for what cannot be unpacked.
pub(super) fn check_content(claim: &PageClaim, chunk: &Chunk, content: &[u8]) -> io::Result<()> {
    let (levels_bytes, is_compressed) = match claim.layout {
        PageLayout::DataV2 { levels_bytes, is_compressed, .. } => (levels_bytes, is_compressed),
        PageLayout::Data { .. } | PageLayout::Other => (0, true),
    };
    let compression = if is_compressed { chunk.compression } else { Compression::UNCOMPRESSED };
    let streamed = matches!(compression, Compression::GZIP(_) | Compression::BROTLI(_) | Compression::LZ4);
    let delta = match claim.layout {
        PageLayout::Data { values, encoding, .. } | PageLayout::DataV2 { values, encoding, .. } => {
            matches!(encoding, encoding::DELTA_LENGTH_BYTE_ARRAY | encoding::DELTA_BYTE_ARRAY)
                .then_some((encoding, values))
        }
        PageLayout::Other => None,
    };
    if !streamed && delta.is_none() {
        return Ok(());
    }
    let levels_bytes = usize::try_from(levels_bytes).map_err(|_| cut_short())?;
    let packed = content.get(levels_bytes..).ok_or_else(cut_short)?;
    let unpacked_bytes = claim.unpacked_bytes.checked_sub(levels_bytes as u64).ok_or_else(cut_short)?;
    let unpacked = unpack(compression, packed, unpacked_bytes)?;
    let Some((encoding, page_values)) = delta else { return Ok(()) };
    let Some(unpacked) = unpacked else {
        return Err(invalid(
            "texts in a delta encoding are not read from the deprecated LZ4 compression; write them as LZ4_RAW",
        ));
    };
    let values = match claim.layout {
        PageLayout::Data { definition_encoding, repetition_encoding, .. } => {
            let rest = after_levels(&unpacked, chunk.max_repetition_level, repetition_encoding, page_values)?;
            after_levels(rest, chunk.max_definition_level, definition_encoding, page_values)?
        }
        _ => &unpacked,
    };
    if values.is_empty() {
        return Ok(()); // a page of nulls
    }
    let most = page_values.min((values.len() as u64).saturating_mul(MAX_VALUES_PER_BYTE));
    let rest = after_delta_block(values, most)?;
    if encoding == encoding::DELTA_BYTE_ARRAY {
        after_delta_block(rest, most)?; // the lengths of suffixes, behind those of prefixes
    }
    Ok(())
}

/// The content, unless it is more than `limit` bytes; none for LZ4's streams, which are only measured.
fn unpack(compression: Compression, packed: &[u8], limit: u64) -> io::Result<Option<Cow<'_, [u8]>>> {
    // "A page with no values has no stream": the decoder does not look for one either.
    if limit == 0 && compression != Compression::UNCOMPRESSED {
        return Ok(Some(Cow::Borrowed(&[])));
    }
    let capacity = usize::try_from(limit).map_err(|_| cut_short())?;
    let damaged = |error: &dyn std::fmt::Display| invalid(format!("a page does not unpack: {error}"));
    Ok(Some(Cow::Owned(match compression {
        Compression::UNCOMPRESSED => return Ok(Some(Cow::Borrowed(packed))),
        Compression::GZIP(_) => read_within(flate2::read::MultiGzDecoder::new(packed), limit)?,
        Compression::BROTLI(_) => read_within(brotli::Decompressor::new(packed, 4096), limit)?,
        Compression::LZ4 => {
            // One of three forms that the decoder tries; the two others have an exact size.
            return match read_within(lz4_flex::frame::FrameDecoder::new(packed), limit) {
                Err(error) if is_excess(&error) => Err(error),
                _ => Ok(None),
            };
        }
        Compression::SNAPPY => {
            let length = snap::raw::decompress_len(packed).map_err(|error| damaged(&error))?;
            if length > capacity {
                return Err(excess(limit));
            }
            snap::raw::Decoder::new().decompress_vec(packed).map_err(|error| damaged(&error))?
        }
        Compression::ZSTD(_) => zstd::bulk::decompress(packed, capacity).map_err(|error| damaged(&error))?,
        Compression::LZ4_RAW => lz4_flex::block::decompress(packed, capacity).map_err(|error| damaged(&error))?,
        other => return Err(invalid(format!("pages in the compression {other} are not read"))),
    })))
}

fn read_within(stream: impl Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    stream.take(limit.saturating_add(1)).read_to_end(&mut unpacked)?;
    if unpacked.len() as u64 > limit { Err(excess(limit)) } else { Ok(unpacked) }
}

#[derive(Debug, thiserror::Error)]
#[error("a page unpacks to more than the {0} bytes that its header claims")]
struct Excess(u64);

fn excess(limit: u64) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Excess(limit))
}

fn is_excess(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Excess>())
}

/// What follows the levels of a first-version data page.
fn after_levels(content: &[u8], max_level: i16, encoding: i64, values: u64) -> io::Result<&[u8]> {
    if max_level == 0 {
        return Ok(content);
    }
    let length = match encoding {
        encoding::RLE => {
            let (length, _) = content.split_first_chunk::<4>().ok_or_else(cut_short)?;
            u64::from(u32::from_le_bytes(*length)) + 4
        }
        encoding::BIT_PACKED => {
            let bits = u64::from(u16::BITS - max_level.unsigned_abs().leading_zeros());
            (values * bits).div_ceil(8)
        }
        other => return Err(invalid(format!("levels in the encoding {other} are not read"))),
    };
    usize::try_from(length).ok().and_then(|length| content.get(length..)).ok_or_else(cut_short)
}

/// What follows numbers in DELTA_BINARY_PACKED, of which there may be `most`.
///
/// The layout is that of Parquet's `Encodings.md`: block size, mini blocks of a block, number of values and first value, then
/// blocks of a smallest delta, a width in bits for each mini block, and the mini blocks as far as values go.
fn after_delta_block(content: &[u8], most: u64) -> io::Result<&[u8]> {
    let mut rest = content;
    let (block_values, mini_blocks, values) = (uleb(&mut rest)?, uleb(&mut rest)?, uleb(&mut rest)?);
    uleb(&mut rest)?; // the first value
    if values > most {
        return Err(invalid(format!("texts in a delta encoding claim {values} values, where at most {most} can be")));
    }
    let mini_block_values = block_values.checked_div(mini_blocks).unwrap_or(0);
    let mut missing = values.saturating_sub(1);
    if missing > 0 && (mini_block_values == 0 || mini_blocks > rest.len() as u64) {
        return Err(invalid(format!(
            "texts in a delta encoding have {mini_blocks} mini blocks for {block_values} values"
        )));
    }
    while missing > 0 {
        uleb(&mut rest)?; // the smallest delta
        let (widths, mut after) = rest.split_at_checked(mini_blocks as usize).ok_or_else(cut_short)?;
        for &width in widths {
            if missing == 0 {
                break;
            }
            let length = mini_block_values.saturating_mul(u64::from(width)) / 8;
            // The last mini block may end with the content.
            after = usize::try_from(length).ok().and_then(|length| after.get(length..)).unwrap_or(&[]);
            missing = missing.saturating_sub(mini_block_values);
        }
        rest = after;
    }
    Ok(rest)
}

fn uleb(rest: &mut &[u8]) -> io::Result<u64> {
    varint(|| {
        let (&byte, after) = rest.split_first().ok_or_else(cut_short)?;
        *rest = after;
        Ok(byte)
    })
}

fn cut_short() -> io::Error {
    invalid("a page ends before what its header announces")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn check(compression: Compression, layout: PageLayout, unpacked_bytes: u64, content: &[u8]) -> Result<(), String> {
        let chunk = Chunk { compression, max_definition_level: 1, max_repetition_level: 0 };
        check_content(&PageClaim { unpacked_bytes, layout }, &chunk, content).map_err(|error| error.to_string())
    }

    fn data(values: u64, encoding: i64) -> PageLayout {
        PageLayout::Data { values, encoding, definition_encoding: encoding::RLE, repetition_encoding: encoding::RLE }
    }

    /// Blocks of 128 values in 4 mini blocks, as parquet writes them, that hold the same number `values` times.
    fn equal_numbers(values: u64) -> Vec<u8> {
        let mut bytes = vec![0x80, 1, 4];
        let mut left = values;
        while left >= 0x80 {
            bytes.push(left as u8 | 0x80);
            left >>= 7;
        }
        bytes.extend([left as u8, 6]);
        bytes.extend((1..values).step_by(128).flat_map(|_| [0; 5]));
        bytes
    }

    #[test]
    fn streams_that_unpack_to_more_than_their_page_are_stopped() {
        let bomb = vec![0u8; 10 << 20];
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&bomb).unwrap();
        let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
        lz4.write_all(&bomb).unwrap();
        let mut brotli = Vec::new();
        brotli::CompressorWriter::new(&mut brotli, 4096, 1, 20).write_all(&bomb).unwrap();
        let streams = [
            (Compression::GZIP(Default::default()), gzip.finish().unwrap()),
            (Compression::BROTLI(Default::default()), brotli),
            (Compression::LZ4, lz4.finish().unwrap()),
        ];
        for (compression, packed) in streams {
            let exact = bomb.len() as u64;
            assert_eq!(check(compression, PageLayout::Other, exact, &packed), Ok(()), "{compression}");
            let message = check(compression, PageLayout::Other, exact - 1, &packed).unwrap_err();
            assert!(message.contains("unpacks to more than the 10485759 bytes"), "{compression}: {message}");
        }
    }

    #[test]
    fn counts_before_texts_in_delta_encodings_are_not_believed_beyond_the_pages_values() {
        let levels = [2, 0, 0, 0, 10, 1];
        for (encoding, numbers) in [(encoding::DELTA_LENGTH_BYTE_ARRAY, 1), (encoding::DELTA_BYTE_ARRAY, 2)] {
            let page = |claims: &[u64]| -> Vec<u8> {
                levels.iter().copied().chain(claims.iter().flat_map(|&claim| equal_numbers(claim))).collect()
            };
            for values in [1, 2, 33, 128, 129, 130, 1000] {
                let honest = page(&vec![values; numbers]);
                let bytes = honest.len() as u64;
                assert_eq!(
                    check(Compression::UNCOMPRESSED, data(values, encoding), bytes, &honest),
                    Ok(()),
                    "{values}"
                );
                let fewer = check(Compression::UNCOMPRESSED, data(values - 1, encoding), bytes, &honest);
                assert!(fewer.unwrap_err().contains(&format!("claim {values} values")), "{values}");
                let packed = lz4_flex::block::compress(&honest);
                assert_eq!(check(Compression::LZ4_RAW, data(values, encoding), bytes, &packed), Ok(()));
            }
            let mut claims = vec![5; numbers];
            claims[numbers - 1] = 1 << 40; // the last of them: behind blocks that are walked
            let mut forged = page(&claims[..numbers - 1]);
            forged.extend([0x80, 1, 4, 0x80, 0x80, 0x80, 0x80, 0x80, 0x20, 6]);
            let message = check(Compression::UNCOMPRESSED, data(1 << 31, encoding), 1 << 20, &forged).unwrap_err();
            assert!(message.contains("claim 1099511627776 values"), "{message}");
        }
        // Nulls alone have no values, and no numbers before them.
        assert_eq!(check(Compression::UNCOMPRESSED, data(9, encoding::DELTA_BYTE_ARRAY), 6, &levels), Ok(()));
    }

    #[test]
    fn levels_of_the_second_version_come_first_and_are_not_compressed() {
        let numbers = equal_numbers(40);
        let layout = |values, is_compressed| PageLayout::DataV2 {
            values,
            encoding: encoding::DELTA_LENGTH_BYTE_ARRAY,
            levels_bytes: 3,
            is_compressed,
        };
        let packed = snap::raw::Encoder::new().compress_vec(&numbers).unwrap();
        let unpacked_bytes = 3 + numbers.len() as u64;
        for (is_compressed, content) in [(true, &packed), (false, &numbers)] {
            let content = [&[9, 9, 9], &content[..]].concat();
            assert_eq!(check(Compression::SNAPPY, layout(40, is_compressed), unpacked_bytes, &content), Ok(()));
            assert!(check(Compression::SNAPPY, layout(39, is_compressed), unpacked_bytes, &content).is_err());
        }
        assert!(check(Compression::SNAPPY, layout(40, true), 2, &packed).is_err(), "levels longer than the page");
    }

    #[test]
    fn no_bytes_make_the_check_panic_or_run_on() {
        use proptest::prelude::*;
        let compressions = [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::LZ4_RAW, Compression::LZ4];
        proptest!(|(content in prop::collection::vec(any::<u8>(), 0..60), which in 0usize..4, values in 0u64..1 << 31, kind in 2i64..9)| {
            let _ = check(compressions[which], data(values, kind), content.len() as u64, &content);
        });
    }
}
