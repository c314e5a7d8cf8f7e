//! One unit's results as a Parquet part. The part is the commit record: its footer says whose it is, which unit it
//! holds and how many rows, and nothing else does.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::{KeyValue, ParquetMetaData, ParquetMetaDataReader};
use parquet::file::properties::WriterProperties;

use super::commit::{Published, TempFile, fault_point, nonce, read_failed, write_failed};
use super::store::{Location, StoredFile};
use crate::error::{Error, Result};

/// What the keys of ours in a Parquet footer begin with.
pub const KEY_PREFIX: &str = "mistral_batch.";
/// Most rows in a row group.
const MAX_ROW_GROUP_ROWS: usize = 1_048_576;
/// Encoded bytes after which a row group is closed; what is buffered for it stays near twice this.
const MAX_ROW_GROUP_BYTES: usize = 64 << 20;
/// The level at which zstd still writes faster than a model infers.
const ZSTD_LEVEL: i32 = 3;

/// What a part's footer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartFooter {
    /// The fingerprint of the job's settings.
    pub fingerprint: String,
    /// [`PlanFile::rows_digest`](super::plan_file::PlanFile::rows_digest): which inputs, cut into which units.
    pub rows_digest: String,
    /// The unit's number.
    pub unit: usize,
    /// Rows in the part. Counted by the writer: what stands here before is not looked at.
    pub rows: u64,
    /// Drawn for each attempt: settles whether a publication with a lost reply was ours. Drawn by the writer.
    pub nonce: String,
    /// Anything else, under `mistral_batch.KEY`.
    pub extra: BTreeMap<String, String>,
}

impl PartFooter {
    /// The footer of a part that is still to be written.
    pub fn new(fingerprint: &str, rows_digest: &str, unit: usize) -> Self {
        let (fingerprint, rows_digest) = (fingerprint.to_owned(), rows_digest.to_owned());
        Self { fingerprint, rows_digest, unit, rows: 0, nonce: nonce(), extra: BTreeMap::new() }
    }

    /// Whether both are of the same unit of the same job over the same inputs.
    pub fn same_unit(&self, other: &PartFooter) -> bool {
        (&self.fingerprint, &self.rows_digest, self.unit) == (&other.fingerprint, &other.rows_digest, other.unit)
    }

    fn key_values(&self) -> Vec<KeyValue> {
        let own = [
            ("fingerprint", self.fingerprint.clone()),
            ("rows_digest", self.rows_digest.clone()),
            ("unit", self.unit.to_string()),
            ("rows", self.rows.to_string()),
            ("nonce", self.nonce.clone()),
        ];
        let extra = self.extra.iter().map(|(key, value)| (key.as_str(), value.clone()));
        own.into_iter().chain(extra).map(|(key, value)| KeyValue::new(format!("{KEY_PREFIX}{key}"), value)).collect()
    }
}

/// A part that stands in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommittedPart {
    /// Where it is.
    pub path: PathBuf,
    /// The unit that it holds.
    pub unit: usize,
    /// Its rows.
    pub rows: u64,
}

/// The name of a unit's part: lexicographic order is row order.
pub fn part_name(unit: usize) -> String {
    format!("part-{unit:06}.parquet")
}

/// The unit of a part's name.
pub(super) fn unit_of_name(name: &str) -> Option<usize> {
    let digits = name.strip_prefix("part-")?.strip_suffix(".parquet")?;
    let unit = digits.parse().ok()?;
    (part_name(unit) == name).then_some(unit)
}

/// Writes one part under a temporary name; dropped before [`PartWriter::finish`], it leaves nothing behind.
///
/// It buffers at most one row group: encoded columns of about 64 MiB, or 1,048,576 rows.
pub struct PartWriter {
    writer: ArrowWriter<File>,
    temp: TempFile,
    dir: Location,
    footer: PartFooter,
}

impl PartWriter {
    /// Begins the part of `unit` in `dir`, with zstd-compressed columns of `schema`.
    ///
    /// # Errors
    /// [`Error::CannotCreate`] or [`Error::Io`] when the file cannot be made.
    pub fn create(dir: &Location, unit: usize, schema: SchemaRef, footer: &PartFooter) -> Result<Self> {
        fault_point("before-write");
        let temp = TempFile::create_in(dir, &part_name(unit))?;
        let writer = ArrowWriter::try_new(temp.handle()?, schema, Some(writer_properties(Vec::new())?))
            .map_err(|error| write_failed(temp.path(), &error))?;
        Ok(Self { writer, temp, dir: dir.clone(), footer: PartFooter { unit, rows: 0, ..footer.clone() } })
    }

    /// Appends rows.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among it.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        let place = || self.dir.join(&part_name(self.footer.unit));
        self.writer.write(batch).map_err(|error| write_failed(place().path(), &error))?;
        self.footer.rows += batch.num_rows() as u64;
        Ok(())
    }

    /// Adds `mistral_batch.<key>` to the footer that [`PartWriter::finish`] writes.
    pub fn set_extra(&mut self, key: &str, value: &str) {
        self.footer.extra.insert(key.to_owned(), value.to_owned());
    }

    /// Writes the footer, fsyncs and publishes. A part of the same unit with as many rows that is there already is as
    /// good: ours is dropped then. It may be ours, too, published by a request whose reply was lost.
    ///
    /// # Errors
    /// [`Error::CannotCreate`] when something else stands in the part's place, [`Error::Io`] or [`Error::Store`]
    /// otherwise.
    pub fn finish(mut self) -> Result<CommittedPart> {
        let place = self.dir.join(&part_name(self.footer.unit));
        for key_value in self.footer.key_values() {
            self.writer.append_key_value_metadata(key_value);
        }
        self.writer.close().map_err(|error| write_failed(place.path(), &error))?;
        fault_point("after-write");
        if self.temp.publish(&place)? == Published::AlreadyThere {
            let there = place.file()?.map(|there| read_part_footer(&there)).transpose()?.flatten();
            if !there.is_some_and(|there| there.same_unit(&self.footer) && there.rows == self.footer.rows) {
                return Err(Error::CannotCreate {
                    path: place.path().to_owned(),
                    message: "is there already and not this unit's; move it away, or choose another --output"
                        .to_owned(),
                });
            }
        }
        Ok(CommittedPart { path: place.path().to_owned(), unit: self.footer.unit, rows: self.footer.rows })
    }
}

/// How every Parquet file of ours is written.
pub(super) fn writer_properties(key_values: Vec<KeyValue>) -> Result<WriterProperties> {
    let level = ZstdLevel::try_new(ZSTD_LEVEL).map_err(|error| Error::Internal(error.to_string()))?;
    Ok(WriterProperties::builder()
        .set_compression(Compression::ZSTD(level))
        .set_created_by(format!("mistral-batch {}", env!("CARGO_PKG_VERSION")))
        .set_max_row_group_row_count(Some(MAX_ROW_GROUP_ROWS))
        .set_max_row_group_bytes(Some(MAX_ROW_GROUP_BYTES))
        .set_key_value_metadata((!key_values.is_empty()).then_some(key_values))
        .build())
}

/// What a part's footer says; None when it is Parquet, but not a part of ours.
///
/// # Errors
/// [`Error::InputCorrupt`] when it is no Parquet file, or its rows are not as many as its footer says; [`Error::Io`],
/// [`Error::Store`].
pub fn read_part_footer(part: &StoredFile) -> Result<Option<PartFooter>> {
    let (path, reader) = (part.path(), part.open()?);
    let metadata = ParquetMetaDataReader::new().parse_and_finish(&reader);
    let metadata = metadata.map_err(|error| part.explain(read_failed(path, &error)))?;
    let mut keys = own_keys(&metadata);
    let mut take = |key: &str| keys.remove(key);
    let (Some(fingerprint), Some(rows_digest), Some(unit), Some(rows), Some(nonce)) =
        (take("fingerprint"), take("rows_digest"), take("unit"), take("rows"), take("nonce"))
    else {
        return Ok(None);
    };
    let (Ok(unit), Ok(rows)) = (unit.parse(), rows.parse::<u64>()) else { return Ok(None) };
    let stored = metadata.file_metadata().num_rows();
    if u64::try_from(stored) != Ok(rows) {
        return Err(Error::corrupt(path, format!("it holds {stored} rows where its footer says {rows}")));
    }
    Ok(Some(PartFooter { fingerprint, rows_digest, unit, rows, nonce, extra: keys }))
}

/// The key-value pairs of ours in a Parquet footer, without their prefix.
pub(super) fn own_keys(metadata: &ParquetMetaData) -> BTreeMap<String, String> {
    let pairs = metadata.file_metadata().key_value_metadata().into_iter().flatten();
    pairs.filter_map(|pair| Some((pair.key.strip_prefix(KEY_PREFIX)?.to_owned(), pair.value.clone()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{ArrayRef, Int32Array};
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
    use std::fs;
    use std::path::Path;
    use std::sync::Arc;

    fn batch(values: Vec<i32>) -> RecordBatch {
        RecordBatch::try_from_iter([("x", Arc::new(Int32Array::from(values)) as ArrayRef)]).unwrap()
    }

    fn write(dir: &Path, footer: &PartFooter, values: Vec<i32>) -> Result<CommittedPart> {
        let batch = batch(values);
        let mut writer = PartWriter::create(&dir.into(), footer.unit, batch.schema(), footer)?;
        writer.write(&batch)?;
        writer.finish()
    }

    fn read(path: &Path) -> Result<Option<PartFooter>> {
        read_part_footer(&Location::from(path).file()?.unwrap())
    }

    #[test]
    fn the_footer_says_whose_part_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let mut footer = PartFooter::new("f", "r", 7);
        footer.extra.insert("source".to_owned(), "a.parquet".to_owned());
        let part = write(dir.path(), &footer, vec![1, 2, 3]).unwrap();
        assert_eq!(part, CommittedPart { path: dir.path().join("part-000007.parquet"), unit: 7, rows: 3 });
        assert_eq!(read(&part.path).unwrap().unwrap(), PartFooter { rows: 3, ..footer });
        let file = File::open(&part.path).unwrap();
        let metadata = ParquetMetaDataReader::new().parse_and_finish(&file).unwrap();
        let created_by = metadata.file_metadata().created_by().unwrap();
        assert_eq!(created_by, format!("mistral-batch {}", env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn a_part_without_rows_has_the_schema() {
        let dir = tempfile::tempdir().unwrap();
        let part = write(dir.path(), &PartFooter::new("f", "r", 0), vec![]).unwrap();
        assert_eq!(part.rows, 0);
        let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(&part.path).unwrap()).unwrap();
        assert_eq!(reader.schema().fields(), batch(vec![]).schema().fields());
        assert_eq!(read(&part.path).unwrap().unwrap().rows, 0);
    }

    #[test]
    fn dropping_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let batch = batch(vec![1]);
        let mut writer =
            PartWriter::create(&dir.path().into(), 0, batch.schema(), &PartFooter::new("f", "r", 0)).unwrap();
        writer.write(&batch).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        drop(writer);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_part_that_is_there_is_kept_if_it_is_the_same_unit() {
        let dir = tempfile::tempdir().unwrap();
        let first = write(dir.path(), &PartFooter::new("f", "r", 0), vec![1, 2]).unwrap();
        let bytes = fs::read(&first.path).unwrap();
        assert_eq!(write(dir.path(), &PartFooter::new("f", "r", 0), vec![1, 2]).unwrap(), first);
        for (footer, values) in [
            (PartFooter::new("other", "r", 0), vec![1, 2]),
            (PartFooter::new("f", "other", 0), vec![1, 2]),
            (PartFooter::new("f", "r", 0), vec![1]),
        ] {
            let error = write(dir.path(), &footer, values).unwrap_err();
            assert!(matches!(error, Error::CannotCreate { .. }), "{error}");
        }
        assert_eq!(fs::read(&first.path).unwrap(), bytes);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn foreign_and_damaged_files_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let foreign = dir.path().join("foreign.parquet");
        let mut writer = ArrowWriter::try_new(File::create(&foreign).unwrap(), batch(vec![]).schema(), None).unwrap();
        writer.write(&batch(vec![1])).unwrap();
        writer.close().unwrap();
        assert_eq!(read(&foreign).unwrap(), None);
        for damage in [&b""[..], b"PAR1", b"not parquet at all, but long enough"] {
            fs::write(&foreign, damage).unwrap();
            assert!(matches!(read(&foreign), Err(Error::InputCorrupt { .. })));
        }
    }

    #[test]
    fn names_are_in_row_order() {
        assert_eq!(part_name(12), "part-000012.parquet");
        assert_eq!(unit_of_name("part-000012.parquet"), Some(12));
        for other in ["part-12.parquet", "part-000012.parquet.bak", "part-+00012.parquet", "x.parquet"] {
            assert_eq!(unit_of_name(other), None, "{other}");
        }
    }
}
