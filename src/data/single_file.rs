//! One file out of the parts, as a stream: no more than a batch of rows is held at a time.
//!
//! Parquet column chunks are copied as they are. The other formats are written anew, with dictionaries as plain values
//! in Arrow files (each part has its own) and nested columns as JSON text in CSV. In CSV a null is an empty field, and
//! so is an empty text.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, RecordBatch, StringBuilder, new_empty_array};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use arrow::ipc::reader::FileReader;
use arrow::ipc::writer::FileWriter;
use arrow::json::writer::{EncoderOptions, LineDelimited, WriterBuilder, make_encoder};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use parquet::arrow::ArrowSchemaConverter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::column::writer::ColumnCloseResult;
use parquet::errors::ParquetError;
use parquet::file::metadata::{KeyValue, PageIndexPolicy, ParquetMetaData, ParquetMetaDataReader};
use parquet::file::writer::SerializedFileWriter;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::commit::{TempFile, read_failed, write_failed};
use super::digest::file_sha256;
use super::output::OutputFormat;
use super::part::{KEY_PREFIX, own_keys, writer_properties};
use super::plan_file::{JsonFile, PlanFile, SuccessFile, hex, read_json};
use super::store::{Location, Reader, StoredFile};
use crate::error::{Error, Result, one_line};

/// Whether columns of `schema` can be written as `format`, so that a job does not find out at its end.
///
/// # Errors
/// [`Error::Usage`] that names the column.
pub fn check_format_supports(schema: &SchemaRef, format: OutputFormat) -> Result<()> {
    for field in schema.fields() {
        let problem = parquet_problem(field).or_else(|| match format {
            OutputFormat::Parquet | OutputFormat::Arrow => None,
            OutputFormat::Csv if contains(field.data_type(), &|inner| is_binary(inner)) => {
                Some("CSV has no form for bytes".to_owned())
            }
            OutputFormat::Csv if !field.data_type().is_nested() => {
                let empty = new_empty_array(field.data_type());
                ArrayFormatter::try_new(&empty, &FormatOptions::default()).err().map(one_line)
            }
            OutputFormat::Jsonl | OutputFormat::Csv => {
                let empty = new_empty_array(field.data_type());
                make_encoder(field, &empty, &EncoderOptions::default()).err().map(one_line)
            }
        });
        if let Some(problem) = problem {
            return Err(Error::Usage(format!(
                "column '{}' of type {} cannot be written as {}: {problem}; leave it out with --keep, or choose \
                 another format with --output",
                field.name(),
                field.data_type(),
                format.name()
            )));
        }
    }
    Ok(())
}

/// Parts are Parquet whatever the output is.
fn parquet_problem(field: &FieldRef) -> Option<String> {
    // The converter panics on unions.
    if contains(field.data_type(), &|inner| matches!(inner, DataType::Union(..))) {
        return Some("Parquet has no unions".to_owned());
    }
    let schema = Schema::new(vec![Arc::clone(field)]);
    ArrowSchemaConverter::new().convert(&schema).err().map(one_line)
}

fn is_binary(data_type: &DataType) -> bool {
    use DataType::{Binary, BinaryView, FixedSizeBinary, LargeBinary};
    matches!(data_type, Binary | LargeBinary | BinaryView | FixedSizeBinary(_))
}

/// Whether `found` holds for the type or one inside it.
fn contains(data_type: &DataType, found: &dyn Fn(&DataType) -> bool) -> bool {
    use DataType::*;
    found(data_type)
        || match data_type {
            List(item) | LargeList(item) | ListView(item) | LargeListView(item) | FixedSizeList(item, _) => {
                contains(item.data_type(), found)
            }
            Map(item, _) | RunEndEncoded(_, item) => contains(item.data_type(), found),
            Struct(fields) => fields.iter().any(|field| contains(field.data_type(), found)),
            Dictionary(_, values) => contains(values, found),
            _ => false,
        }
}

/// What makes a finished file recognisable as ours, and as the work of which plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Marks {
    pub plan: PlanFile,
    pub success: SuccessFile,
}

impl Marks {
    fn pairs(&self) -> Result<[(&'static str, String); 4]> {
        let json = |value| serde_json::to_string(&value).map_err(|error| Error::Internal(error.to_string()));
        Ok([
            ("fingerprint", self.plan.fingerprint.clone()),
            ("rows", self.success.rows.to_string()),
            ("plan", json(serde_json::to_value(&self.plan).unwrap_or_default())?),
            ("success", json(serde_json::to_value(&self.success).unwrap_or_default())?),
        ])
    }

    fn from_pairs(pairs: &BTreeMap<String, String>) -> Option<Self> {
        let plan = serde_json::from_str(pairs.get("plan")?).ok()?;
        let success = serde_json::from_str(pairs.get("success")?).ok()?;
        Some(Self { plan, success })
    }
}

/// Writes the rows of `parts`, in their order, into `temp`. All parts have the columns of `schema`.
pub(super) fn assemble(
    parts: &[Location],
    schema: &SchemaRef,
    format: OutputFormat,
    marks: &Marks,
    mut temp: TempFile,
) -> Result<TempFile> {
    let path = temp.path().to_owned();
    match format {
        OutputFormat::Parquet => return concatenate(parts, schema, marks, temp),
        OutputFormat::Arrow => {
            let plain = Arc::new(without_dictionaries(schema));
            let failed = |error| write_failed(&path, &error);
            let mut writer = FileWriter::try_new_buffered(&mut temp, &plain).map_err(failed)?;
            for (key, value) in marks.pairs()? {
                writer.write_metadata(format!("{KEY_PREFIX}{key}"), value);
            }
            for_each_batch(parts, |batch| {
                let columns = batch.columns().iter().zip(plain.fields());
                let columns =
                    columns.map(|(column, field)| Ok(cast(column, field.data_type())?)).collect::<Result<_>>()?;
                writer.write(&with_columns(&plain, columns, batch.num_rows())?).map_err(failed)
            })?;
            writer.finish().map_err(failed)?;
        }
        OutputFormat::Jsonl => {
            let failed = |error| write_failed(&path, &error);
            let builder = WriterBuilder::new().with_explicit_nulls(true);
            let mut writer = builder.build::<_, LineDelimited>(BufWriter::new(&mut temp));
            for_each_batch(parts, |batch| writer.write(batch).map_err(failed))?;
            writer.finish().map_err(failed)?;
            writer.into_inner().flush().map_err(Error::io("write", &path))?;
        }
        OutputFormat::Csv => {
            let failed = |error: csv::Error| Error::io("write", &path)(error.into());
            let mut writer = csv::Writer::from_writer(&mut temp);
            writer.write_record(schema.fields().iter().map(|field| field.name())).map_err(failed)?;
            for_each_batch(parts, |batch| write_csv(&mut writer, batch, &path))?;
            writer.flush().map_err(Error::io("write", &path))?;
        }
    }
    Ok(temp)
}

/// Copies the column chunks of every part: nothing is decoded.
fn concatenate(parts: &[Location], schema: &SchemaRef, marks: &Marks, temp: TempFile) -> Result<TempFile> {
    let path = temp.path().to_owned();
    let failed = |error: ParquetError| write_failed(&path, &error);
    let mut key_values: Vec<KeyValue> = Vec::new();
    for (key, value) in marks.pairs()? {
        key_values.push(KeyValue::new(format!("{KEY_PREFIX}{key}"), value));
    }
    let mut properties = writer_properties(key_values)?;
    parquet::arrow::add_encoded_arrow_schema_to_metadata(schema, &mut properties);
    let columns = ArrowSchemaConverter::new().convert(schema).map_err(failed)?;
    let mut writer =
        SerializedFileWriter::new(temp.handle()?, columns.root_schema_ptr(), Arc::new(properties)).map_err(failed)?;
    for part in parts {
        let part = existing(part)?;
        let (input, metadata) = open_parquet(&part)?;
        if metadata.file_metadata().schema() != columns.root_schema() {
            return Err(Error::corrupt(part.path(), "its columns are not those of this job"));
        }
        for (index, group) in metadata.row_groups().iter().enumerate() {
            let column_index = metadata.column_index().and_then(|groups| groups.get(index));
            let offset_index = metadata.offset_index().and_then(|groups| groups.get(index));
            let mut group_writer = writer.next_row_group().map_err(failed)?;
            for (index, column) in group.columns().iter().enumerate() {
                let close = ColumnCloseResult {
                    bytes_written: column.compressed_size().unsigned_abs(),
                    rows_written: group.num_rows().unsigned_abs(),
                    metadata: column.clone(),
                    bloom_filter: None,
                    column_index: column_index.and_then(|columns| columns.get(index)).cloned(),
                    offset_index: offset_index.and_then(|columns| columns.get(index)).cloned(),
                };
                group_writer.append_column(&input, close).map_err(|error| part.explain(failed(error)))?;
            }
            group_writer.close().map_err(failed)?;
        }
    }
    writer.close().map_err(failed)?;
    Ok(temp)
}

/// The part, which has to be there.
fn existing(part: &Location) -> Result<StoredFile> {
    part.file()?.ok_or_else(|| Error::io("open", part.path())(io::ErrorKind::NotFound.into()))
}

fn open_parquet(file: &StoredFile) -> Result<(Reader, ParquetMetaData)> {
    let reader = file.open()?;
    let metadata = ParquetMetaDataReader::new()
        .with_page_index_policy(PageIndexPolicy::Optional)
        .parse_and_finish(&reader)
        .map_err(|error| file.explain(read_failed(file.path(), &error)))?;
    Ok((reader, metadata))
}

fn for_each_batch(parts: &[Location], mut consume: impl FnMut(&RecordBatch) -> Result<()>) -> Result<()> {
    for part in parts {
        let part = existing(part)?;
        let failed = |error: &(dyn std::error::Error + 'static)| part.explain(read_failed(part.path(), error));
        let reader = ParquetRecordBatchReaderBuilder::try_new(part.open()?).and_then(|builder| builder.build());
        for batch in reader.map_err(|error| failed(&error))? {
            consume(&batch.map_err(|error| failed(&error))?)?;
        }
    }
    Ok(())
}

/// A batch of these columns; the number of rows is given for the case that there are none.
fn with_columns(schema: &SchemaRef, columns: Vec<ArrayRef>, rows: usize) -> Result<RecordBatch> {
    let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(rows));
    Ok(RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options)?)
}

/// The schema with every dictionary as its values: an Arrow file has room for one dictionary per column, and every
/// part has its own.
fn without_dictionaries(schema: &Schema) -> Schema {
    let fields: Vec<FieldRef> = schema.fields().iter().map(plain_field).collect();
    Schema::new_with_metadata(fields, schema.metadata().clone())
}

fn plain_field(field: &FieldRef) -> FieldRef {
    let data_type = plain_type(field.data_type());
    if &data_type == field.data_type() {
        return Arc::clone(field);
    }
    let plain = Field::new(field.name(), data_type, field.is_nullable());
    Arc::new(plain.with_metadata(field.metadata().clone()))
}

fn plain_type(data_type: &DataType) -> DataType {
    use DataType::*;
    match data_type {
        Dictionary(_, values) => plain_type(values),
        List(item) => List(plain_field(item)),
        LargeList(item) => LargeList(plain_field(item)),
        FixedSizeList(item, length) => FixedSizeList(plain_field(item), *length),
        Map(entries, sorted) => Map(plain_field(entries), *sorted),
        Struct(fields) => Struct(fields.iter().map(plain_field).collect()),
        other => other.clone(),
    }
}

/// Writes the rows of a batch as CSV records; nested values are JSON text.
///
/// # Errors
/// When a row cannot be written, to `path`.
pub fn write_csv<W: Write>(writer: &mut csv::Writer<W>, batch: &RecordBatch, path: &Path) -> Result<()> {
    let schema = batch.schema();
    let columns: Vec<ArrayRef> = schema
        .fields()
        .iter()
        .zip(batch.columns())
        .map(|(field, column)| match column.data_type().is_nested() {
            true => nested_as_json(field, column),
            false => Ok(Arc::clone(column)),
        })
        .collect::<Result<_>>()?;
    let options = FormatOptions::default().with_null("").with_display_error(false);
    let formatters = columns.iter().map(|column| ArrayFormatter::try_new(column, &options));
    let formatters: Vec<ArrayFormatter> = formatters.collect::<Result<_, _>>()?;
    let mut field = String::new();
    for row in 0..batch.num_rows() {
        for formatter in &formatters {
            field.clear();
            formatter.value(row).write(&mut field)?;
            writer.write_field(&field).map_err(|error| Error::io("write", path)(error.into()))?;
        }
        writer.write_record(None::<&[u8]>).map_err(|error| Error::io("write", path)(error.into()))?;
    }
    Ok(())
}

fn nested_as_json(field: &FieldRef, column: &ArrayRef) -> Result<ArrayRef> {
    let options = EncoderOptions::default().with_explicit_nulls(true);
    let mut encoder = make_encoder(field, column, &options)?;
    let mut texts = StringBuilder::new();
    let mut text = Vec::new();
    for row in 0..column.len() {
        if encoder.is_null(row) {
            texts.append_null();
            continue;
        }
        text.clear();
        encoder.encode(row, &mut text);
        texts.append_value(String::from_utf8_lossy(&text));
    }
    Ok(Arc::new(texts.finish()))
}

/// What stands at the place of a single-file output.
#[derive(Debug)]
pub(super) enum FinalFile {
    Missing,
    /// A file that we cannot prove to be ours.
    Foreign,
    Ours(Box<Marks>),
}

/// Looks at the file of a single-file output, by what it carries or by the stamp beside it.
pub(super) fn read_final_file(place: &Location, format: OutputFormat, stamp: Option<&Location>) -> Result<FinalFile> {
    let Some(file) = place.file()? else { return Ok(FinalFile::Missing) };
    if !place.is_object() && !place.path().is_file() {
        return Ok(FinalFile::Foreign);
    }
    let marks = match (format, stamp) {
        (OutputFormat::Parquet, _) => match open_parquet(&file) {
            Ok((_, metadata)) => Marks::from_pairs(&own_keys(&metadata)),
            Err(Error::InputCorrupt { .. }) => None,
            Err(error) => return Err(error),
        },
        (OutputFormat::Arrow, _) => arrow_marks(&file)?,
        (_, Some(stamp)) => match read_json::<Stamp>(stamp)?.ours() {
            Some(stamp) if stamp.fits(&file)? => Some(stamp.marks),
            _ => None,
        },
        (_, None) => None,
    };
    Ok(marks.map_or(FinalFile::Foreign, |marks| FinalFile::Ours(Box::new(marks))))
}

fn arrow_marks(file: &StoredFile) -> Result<Option<Marks>> {
    let reader = file.open()?;
    // A file that only calls itself .arrow must be "not ours", whatever its bytes do to the reader.
    let Ok(Ok(reader)) = catch_unwind(AssertUnwindSafe(|| FileReader::try_new_buffered(reader, None))) else {
        return file.check().map(|()| None);
    };
    let pairs = reader.custom_metadata().iter();
    let pairs = pairs.filter_map(|(key, value)| Some((key.strip_prefix(KEY_PREFIX)?.to_owned(), value.clone())));
    Ok(Marks::from_pairs(&pairs.collect()))
}

/// What is kept beside a CSV or JSONL file, which cannot carry anything itself.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Stamp {
    size: u64,
    /// Seconds and nanoseconds.
    mtime: (i64, i64),
    sha256: String,
    marks: Marks,
}

impl Stamp {
    /// The stamp of the finished file that still has its temporary name; renaming changes none of it.
    pub(super) fn of(temp: &TempFile, marks: Marks) -> Result<Self> {
        let mut file = temp.written()?;
        let stat = file.metadata().map_err(Error::io("read", temp.path()))?;
        let mut hash = Sha256::new();
        io::copy(&mut file, &mut hash).map_err(Error::io("read", temp.path()))?;
        let sha256 = hex(&hash.finalize());
        Ok(Self { size: stat.len(), mtime: (stat.mtime(), stat.mtime_nsec()), sha256, marks })
    }

    /// Whether the file is still the one that was stamped. A copy has another time, and is read then; so is an object,
    /// whose time is its store's.
    fn fits(&self, file: &StoredFile) -> Result<bool> {
        if self.size != file.size_bytes() {
            return Ok(false);
        }
        let is_of_time = !file.location().is_object() && {
            let stat = fs::metadata(file.path()).map_err(Error::io("read", file.path()))?;
            self.mtime == (stat.mtime(), stat.mtime_nsec())
        };
        Ok(is_of_time || self.sha256 == file_sha256(file.location())?)
    }
}

/// Whether the stamp's place is free or holds a stamp of ours.
pub(super) fn stamp_is_ours(place: &Location) -> Result<bool> {
    Ok(!matches!(read_json::<Stamp>(place)?, JsonFile::Foreign))
}

#[cfg(test)]
mod tests {
    use super::super::part::{PartFooter, PartWriter};
    use super::*;
    use arrow::array::*;
    use arrow::buffer::OffsetBuffer;
    use arrow::compute::concat_batches;
    use arrow::datatypes::{Float32Type, Int32Type};
    use serde_json::{Value, json};
    use std::fs::File;
    use std::path::PathBuf;
    use tempfile::TempDir;

    /// Every kind of column that results and inputs have, as two parts with nulls.
    fn batches() -> Vec<RecordBatch> {
        let texts = [
            vec![Some("plain"), None, Some("a \"quoted\", text\nof two lines")],
            vec![Some(""), Some("été 🎉"), Some("x")],
        ];
        texts.into_iter().enumerate().map(|(part, texts)| batch_of(part as i32, texts)).collect()
    }

    fn batch_of(part: i32, texts: Vec<Option<&str>>) -> RecordBatch {
        let labels = StringArray::from(vec!["a,b", "c", "d\"e"]);
        let scores = Float32Array::from(vec![Some(0.5), None, Some(f32::from(part as i16))]);
        let pairs = StructArray::from(vec![
            (Arc::new(Field::new("label", DataType::Utf8, true)), Arc::new(labels) as ArrayRef),
            (Arc::new(Field::new("score", DataType::Float32, true)), Arc::new(scores) as ArrayRef),
        ]);
        let item = Arc::new(Field::new("item", pairs.data_type().clone(), true));
        let list = ListArray::new(
            item,
            OffsetBuffer::from_lengths([2, 0, 1]),
            Arc::new(pairs),
            Some(vec![true, false, true].into()),
        );
        let embedding = FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(
            vec![Some(vec![Some(1.0), Some(2.5)]), Some(vec![Some(part as f32), None]), None],
            2,
        );
        let dictionary: DictionaryArray<Int32Type> = texts.iter().copied().collect();
        let mut map = MapBuilder::new(None, StringBuilder::new(), Int32Builder::new());
        for row in 0..3 {
            map.keys().append_value("k");
            map.values().append_value(row);
            map.append(true).unwrap();
        }
        RecordBatch::try_from_iter_with_nullable([
            ("row", Arc::new(Int32Array::from_iter_values(part * 3..part * 3 + 3)) as ArrayRef, false),
            ("text", Arc::new(StringArray::from(texts)), true),
            ("kind", Arc::new(dictionary), true),
            ("labels", Arc::new(list), true),
            ("embedding", Arc::new(embedding), true),
            ("map", Arc::new(map.finish()), true),
        ])
        .unwrap()
    }

    fn marks() -> Marks {
        let plan = PlanFile::new(json!({"a": 1}), Value::Null, json!([]), 3, 2, 6);
        let success = SuccessFile {
            version: "1".to_owned(),
            fingerprint: plan.fingerprint.clone(),
            rows: 6,
            parts: 2,
            summary: Value::Null,
        };
        Marks { plan, success }
    }

    /// The file assembled from one part for each batch.
    fn assembled(dir: &TempDir, batches: &[RecordBatch], schema: &SchemaRef, format: OutputFormat) -> PathBuf {
        let parts: Vec<Location> = batches
            .iter()
            .enumerate()
            .map(|(unit, batch)| {
                let footer = PartFooter::new("f", "r", unit);
                let mut writer = PartWriter::create(&dir.path().into(), unit, Arc::clone(schema), &footer).unwrap();
                writer.write(batch).unwrap();
                writer.finish().unwrap().path.into()
            })
            .collect();
        let place = dir.path().join("final");
        let temp = TempFile::create(dir.path(), "final").unwrap();
        assemble(&parts, schema, format, &marks(), temp).unwrap().publish(&place.clone().into()).unwrap();
        place
    }

    #[test]
    fn parquet_equals_the_parts_one_after_the_other() {
        let dir = TempDir::new().unwrap();
        let batches = batches();
        let schema = batches[0].schema();
        let file = assembled(&dir, &batches, &schema, OutputFormat::Parquet);
        let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(&file).unwrap()).unwrap();
        assert_eq!(reader.schema().fields(), schema.fields());
        assert_eq!(reader.metadata().num_row_groups(), 2);
        let read: Vec<RecordBatch> = reader.build().unwrap().map(Result::unwrap).collect();
        let all = concat_batches(&read[0].schema(), &read).unwrap();
        let expected = concat_batches(&schema, &batches).unwrap();
        for (field, (got, want)) in schema.fields().iter().zip(all.columns().iter().zip(expected.columns())) {
            assert_eq!(plain(got).as_ref(), plain(want).as_ref(), "{}", field.name());
        }
        let FinalFile::Ours(found) = read_final_file(&file.clone().into(), OutputFormat::Parquet, None).unwrap() else {
            panic!()
        };
        assert_eq!(*found, marks());
        let indexed = open_parquet(&Location::from(file).file().unwrap().unwrap()).unwrap().1;
        assert!(indexed.offset_index().is_some(), "the page index is copied too");
    }

    fn plain(column: &ArrayRef) -> ArrayRef {
        cast(column, &plain_type(column.data_type())).unwrap()
    }

    #[test]
    fn arrow_has_every_row_with_dictionaries_as_values() {
        let dir = TempDir::new().unwrap();
        let batches = batches();
        let file = assembled(&dir, &batches, &batches[0].schema(), OutputFormat::Arrow);
        let reader = FileReader::try_new(File::open(&file).unwrap(), None).unwrap();
        assert_eq!(reader.schema().field_with_name("kind").unwrap().data_type(), &DataType::Utf8);
        let read: Vec<RecordBatch> = reader.map(Result::unwrap).collect();
        let all = concat_batches(&read[0].schema(), &read).unwrap();
        let expected = concat_batches(&batches[0].schema(), &batches).unwrap();
        for (got, want) in all.columns().iter().zip(expected.columns()) {
            assert_eq!(got, &plain(want));
        }
        let FinalFile::Ours(found) = read_final_file(&file.clone().into(), OutputFormat::Arrow, None).unwrap() else {
            panic!()
        };
        assert_eq!(*found, marks());
    }

    #[test]
    fn jsonl_has_explicit_nulls() {
        let dir = TempDir::new().unwrap();
        let batches = batches();
        let file = assembled(&dir, &batches, &batches[0].schema(), OutputFormat::Jsonl);
        let text = fs::read_to_string(file).unwrap();
        let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows.len(), 6);
        assert_eq!(
            rows[0],
            json!({"row": 0, "text": "plain", "kind": "plain", "embedding": [1.0, 2.5], "map": {"k": 0},
                   "labels": [{"label": "a,b", "score": 0.5}, {"label": "c", "score": null}]})
        );
        assert_eq!(rows[1]["text"], Value::Null);
        assert!(rows[1].as_object().unwrap().contains_key("labels"));
        assert_eq!(rows[2]["text"], "a \"quoted\", text\nof two lines");
    }

    #[test]
    fn csv_parses_back_with_quotes_and_nested_columns() {
        let dir = TempDir::new().unwrap();
        let batches = batches();
        let file = assembled(&dir, &batches, &batches[0].schema(), OutputFormat::Csv);
        let mut reader = csv::Reader::from_path(file).unwrap();
        assert_eq!(reader.headers().unwrap(), vec!["row", "text", "kind", "labels", "embedding", "map"]);
        let rows: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
        assert_eq!(rows.len(), 6);
        assert_eq!(&rows[2][1], "a \"quoted\", text\nof two lines");
        assert_eq!((&rows[1][1], &rows[1][3], &rows[4][1]), ("", "", "été 🎉"));
        let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(json(&rows[0][3]), json!([{"label": "a,b", "score": 0.5}, {"label": "c", "score": null}]));
        assert_eq!(json(&rows[2][3]), json!([{"label": "d\"e", "score": 0.0}]));
        assert_eq!(json(&rows[4][4]), json!([1.0, null]));
        assert_eq!(json(&rows[4][5]), json!({"k": 1}));
    }

    #[test]
    fn no_rows_still_give_a_header() {
        for format in [OutputFormat::Csv, OutputFormat::Jsonl, OutputFormat::Arrow, OutputFormat::Parquet] {
            let dir = TempDir::new().unwrap();
            let schema = batches()[0].schema();
            let file = assembled(&dir, &[RecordBatch::new_empty(Arc::clone(&schema))], &schema, format);
            match format {
                OutputFormat::Csv => {
                    assert_eq!(fs::read_to_string(file).unwrap(), "row,text,kind,labels,embedding,map\n");
                }
                OutputFormat::Jsonl => assert_eq!(fs::read(file).unwrap(), b""),
                OutputFormat::Arrow => {
                    assert_eq!(
                        FileReader::try_new(File::open(file).unwrap(), None).unwrap().schema().fields().len(),
                        6
                    );
                }
                OutputFormat::Parquet => {
                    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(file).unwrap()).unwrap();
                    assert_eq!(reader.schema().fields(), schema.fields());
                }
            }
        }
    }

    #[test]
    fn columns_that_do_not_fit_are_named_at_once() {
        let check = |data_type: DataType, format| {
            let schema = Arc::new(Schema::new(vec![Field::new("bytes", data_type, true)]));
            check_format_supports(&schema, format)
        };
        let in_list = DataType::List(Arc::new(Field::new("item", DataType::Binary, true)));
        for binary in [DataType::Binary, DataType::FixedSizeBinary(4), in_list] {
            let error = check(binary.clone(), OutputFormat::Csv).unwrap_err();
            assert!(
                matches!(&error, Error::Usage(text) if text.contains("'bytes'") && text.contains("--keep")),
                "{error}"
            );
            check(binary.clone(), OutputFormat::Jsonl).unwrap();
            check(binary, OutputFormat::Parquet).unwrap();
        }
        let union = DataType::Union(arrow::datatypes::UnionFields::empty(), arrow::datatypes::UnionMode::Sparse);
        check(union, OutputFormat::Arrow).unwrap_err();
        for format in [OutputFormat::Csv, OutputFormat::Jsonl, OutputFormat::Arrow, OutputFormat::Parquet] {
            check_format_supports(&batches()[0].schema(), format).unwrap();
        }
    }

    #[test]
    fn what_only_has_the_name_is_foreign() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("x");
        for bytes in [&b""[..], b"ARROW1", b"ARROW1\0\0 and more ARROW1", b"PAR1 and more PAR1"] {
            fs::write(&path, bytes).unwrap();
            for format in [OutputFormat::Arrow, OutputFormat::Parquet, OutputFormat::Csv] {
                assert!(matches!(read_final_file(&path.clone().into(), format, None).unwrap(), FinalFile::Foreign));
            }
        }
    }
}
