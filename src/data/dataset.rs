//! A dataset: the files behind the inputs, their rows, and the one schema that they share.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::data::discover::{FoundFile, discover};
use crate::data::drift::merge_fields;
use crate::data::format::InputFormat;
use crate::data::source::csv::CellKinds;
use crate::data::source::decode::{Columns, Layout, Survey};
use crate::data::source::jsonl::{Conflict, Members};
use crate::data::source::{arrow_ipc, csv, jsonl, parquet};
use crate::error::{Error, Result};

/// Decoded batches aim at this many bytes.
const READ_BYTES: u64 = 8 << 20;
/// The most rows of a decoded batch.
const MAX_READ_ROWS: u64 = 1024;

/// What to open, and how.
#[derive(Debug, Clone, Default)]
pub struct DatasetOptions {
    /// Files, directories and globs, in the order of their rows.
    pub inputs: Vec<String>,
    /// The format of every file; by extension where it is `None`.
    pub format: Option<InputFormat>,
    /// Columns of CSV and JSONL that are text whatever their values look like.
    pub text_columns: Vec<String>,
}

/// One input file, as it was when the dataset was opened.
#[derive(Debug, Clone)]
pub struct InputFile {
    /// Where it is, as the user wrote it.
    pub path: PathBuf,
    /// How it is decoded.
    pub format: InputFormat,
    /// Its size.
    pub size_bytes: u64,
    /// When it was last modified, in nanoseconds since 1970.
    pub modified_ns: i64,
    /// Its number of rows.
    pub rows: u64,
    /// Rows per decoded batch, from the average size of a row: about 8 MiB, 1 to 1024 rows.
    pub read_rows: usize,
    /// The values of the dataset's partition columns for this file, `None` for null.
    pub partitions: Vec<Option<String>>,
    /// The file's own columns in its own order, in the dataset's types.
    pub(crate) schema: SchemaRef,
    pub(crate) layout: Layout,
}

/// What the plan keeps of a file, to tell later whether it is still the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    /// Where it is, as the user wrote it.
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// When it was last modified, in nanoseconds since 1970.
    pub modified_ns: i64,
    /// Its number of rows.
    pub rows: u64,
}

impl InputFile {
    /// The file's stamp for the plan.
    pub fn stamp(&self) -> FileStamp {
        FileStamp {
            path: self.path.clone(),
            size_bytes: self.size_bytes,
            modified_ns: self.modified_ns,
            rows: self.rows,
        }
    }
}

/// Input files that agree on their columns.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The files in the order of their rows; at least one.
    pub files: Vec<InputFile>,
    /// The columns of the first file in its order, then the partition columns. A column is nullable
    /// where it is in any file. Field metadata is the first file's; the schema's own is left out.
    pub schema: SchemaRef,
    /// How many of the schema's last columns come from the files' paths.
    pub partition_columns: usize,
}

impl Dataset {
    /// Decodes batches of fewer rows than [`InputFile::read_rows`] has, in proportion, where `bytes` are less than usual.
    pub fn limit_reads(&mut self, bytes: usize) {
        let share = (bytes as u64).min(READ_BYTES);
        for file in &mut self.files {
            file.read_rows = (file.read_rows as u64 * share / READ_BYTES).max(1) as usize;
        }
    }

    /// Finds the files and reads every file's schema and number of rows: the footers of Parquet and
    /// Arrow files, the headers of Arrow streams, all of CSV and JSONL files.
    ///
    /// # Errors
    ///
    /// [`Error::NoInput`], [`Error::InputCorrupt`], [`Error::SchemaDrift`] where two files disagree,
    /// [`Error::Usage`] where a partition key is a column too, [`Error::Io`].
    pub fn open(options: &DatasetOptions) -> Result<Dataset> {
        let found = discover(&options.inputs, options.format)?;
        let (names, partition_values) = partitions(&found)?;
        // Surveys run in parallel, but the first bad file in the order of the rows is the one reported.
        let surveys: Vec<Result<(u64, i64, Survey)>> = found.par_iter().map(survey).collect();
        let surveys = surveys.into_iter().collect::<Result<Vec<_>>>()?;
        let paths: Vec<&Path> = found.iter().map(|file| file.path.as_path()).collect();
        let own_columns =
            own_columns(&paths, surveys.iter().map(|(_, _, survey)| &survey.columns), &options.text_columns)?;
        let merged = agree(&paths, &own_columns)?;
        for name in &names {
            if merged.iter().any(|field| field.name() == name) {
                return Err(Error::Usage(format!(
                    "{}: '{name}' is both a column of the file and a folder '{name}=…' on its path; \
                     rename the folders, or list the files without a directory",
                    paths[0].display()
                )));
            }
        }

        let types: HashMap<&str, &Field> = merged.iter().map(|field| (field.name().as_str(), field)).collect();
        let mut files: Vec<InputFile> = Vec::with_capacity(found.len());
        for (((file, (size_bytes, modified_ns, survey)), own), partitions) in
            found.iter().zip(surveys).zip(&own_columns).zip(&partition_values)
        {
            let fields = own.iter().flatten().filter_map(|field| types.get(field.name().as_str()).copied().cloned());
            let schema = Schema::new(fields.collect::<Vec<_>>());
            // Ten thousand files mostly have one schema.
            let schema = match files.last() {
                Some(last) if *last.schema == schema => Arc::clone(&last.schema),
                _ => Arc::new(schema),
            };
            files.push(InputFile {
                path: file.path.clone(),
                format: file.format,
                size_bytes,
                modified_ns,
                rows: survey.rows,
                read_rows: (READ_BYTES / survey.bytes_per_row.max(1)).clamp(1, MAX_READ_ROWS) as usize,
                partitions: partitions.clone(),
                schema,
                layout: survey.layout,
            });
        }
        let partition_columns = names.len();
        let partition_fields =
            names.into_iter().enumerate().map(|(place, name)| partition_field(name, place, &partition_values));
        let fields: Vec<Field> = merged.into_iter().chain(partition_fields).collect();
        Ok(Dataset { files, schema: Arc::new(Schema::new(fields)), partition_columns })
    }

    /// The rows of all files.
    pub fn total_rows(&self) -> u64 {
        self.files.iter().map(|file| file.rows).fold(0, u64::saturating_add)
    }

    /// Checks that a file still has the size and time of modification that it was opened with.
    ///
    /// # Errors
    ///
    /// [`Error::InputChanged`] where it has not, or is gone.
    pub fn verify_unchanged(&self, file: usize) -> Result<()> {
        let Some(file) = self.files.get(file) else {
            return Err(Error::Internal(format!("file {file} of {} was asked for", self.files.len())));
        };
        let changed = |message: String| Error::InputChanged { path: file.path.clone(), message };
        let (size_bytes, modified_ns) = match stat(&file.path) {
            Ok(now) => now,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(changed("it is gone".to_owned())),
            Err(error) => return Err(Error::io("read", &file.path)(error)),
        };
        if size_bytes != file.size_bytes {
            return Err(changed(format!("it had {} bytes, now {size_bytes}", file.size_bytes)));
        }
        if modified_ns != file.modified_ns {
            return Err(changed("it was written to".to_owned()));
        }
        Ok(())
    }

    /// The column `name`, which the user gave with `flag`.
    ///
    /// # Errors
    ///
    /// [`Error::ColumnMissing`] with the nearest name.
    pub fn column(&self, name: &str, flag: &'static str) -> Result<&Field> {
        let available = || self.schema.fields().iter().map(|field| field.name().as_str());
        let path = self.files.first().map(|file| file.path.as_path()).unwrap_or(Path::new(""));
        self.schema.field_with_name(name).map_err(|_| Error::column_missing(name, path, flag, available()))
    }
}

fn stat(path: &Path) -> io::Result<(u64, i64)> {
    let metadata = fs::metadata(path)?;
    let modified = metadata.modified()?;
    let nanoseconds = match modified.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |before| -before),
    };
    Ok((metadata.len(), nanoseconds))
}

/// The stamp is taken first, so that a change during the survey is seen later.
fn survey(file: &FoundFile) -> Result<(u64, i64, Survey)> {
    let (size_bytes, modified_ns) = stat(&file.path).map_err(Error::io("read", &file.path))?;
    let survey = match file.format {
        InputFormat::Parquet => parquet::survey(&file.path)?,
        InputFormat::Arrow => arrow_ipc::survey(&file.path)?,
        InputFormat::Csv => csv::survey(&file.path)?,
        InputFormat::Jsonl => jsonl::survey(&file.path)?,
    };
    Ok((size_bytes, modified_ns, survey))
}

/// Each file's columns in its own order. The types of CSV and JSONL columns are those that hold the
/// values of all files of that format. `None` is a text file without any line.
fn own_columns<'a>(
    paths: &[&Path],
    surveyed: impl Iterator<Item = &'a Columns> + Clone,
    text_columns: &[String],
) -> Result<Vec<Option<Vec<Field>>>> {
    let mut csv_kinds: HashMap<&str, CellKinds> = HashMap::new();
    let mut members = Members::default();
    let mut objects: Vec<(&Path, &Members)> = Vec::new();
    for (path, columns) in paths.iter().zip(surveyed.clone()) {
        match columns {
            Columns::Typed(_) => {}
            Columns::Csv(columns) => {
                for (name, kinds) in columns {
                    let merged = csv_kinds.entry(name).or_default();
                    *merged = merged.merge(*kinds);
                }
            }
            Columns::Jsonl(own) => {
                members.join(own.clone()).map_err(|conflict| drift_of(conflict, own, path, &objects))?;
                objects.push((path, own));
            }
        }
    }
    let object_fields = members.fields(text_columns);
    let resolve = |(path, columns): (&&Path, &Columns)| {
        let fields: Vec<Field> = match columns {
            // A text file without any line says nothing about columns.
            Columns::Csv(columns) if columns.is_empty() => return Ok(None),
            Columns::Jsonl(_) if object_fields.is_empty() => return Ok(None),
            Columns::Typed(schema) => schema.fields().iter().map(|field| field.as_ref().clone()).collect(),
            Columns::Jsonl(_) => object_fields.clone(),
            Columns::Csv(columns) => {
                let data_type = |name: &str| match csv_kinds.get(name) {
                    Some(kinds) if !text_columns.iter().any(|text| text == name) => kinds.data_type(),
                    _ => DataType::Utf8,
                };
                columns.iter().map(|(name, _)| Field::new(name, data_type(name), true)).collect()
            }
        };
        unique_names(path, &fields)?;
        Ok(Some(fields))
    };
    paths.iter().zip(surveyed).map(resolve).collect()
}

/// The drift between a JSONL file and the earliest one that it does not fit.
fn drift_of(conflict: Conflict, own: &Members, path: &Path, earlier: &[(&Path, &Members)]) -> Error {
    let clash = earlier.iter().find_map(|(first, members)| {
        let mut joined = (*members).clone();
        joined.join(own.clone()).err().map(|conflict| (*first, conflict))
    });
    let (first, conflict) = clash.unwrap_or((path, conflict));
    Error::SchemaDrift {
        first: first.to_owned(),
        second: path.to_owned(),
        column: conflict.column,
        first_type: conflict.first.to_owned(),
        second_type: conflict.second.to_owned(),
    }
}

fn unique_names(path: &Path, fields: &[Field]) -> Result<()> {
    let mut names: Vec<&str> = fields.iter().map(|field| field.name().as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => {
            Err(Error::Usage(format!("{}: two columns are named '{}'; rename one of them", path.display(), pair[0])))
        }
        None => Ok(()),
    }
}

/// The columns of all files, in the order of the first file that has any.
fn agree(paths: &[&Path], own_columns: &[Option<Vec<Field>>]) -> Result<Vec<Field>> {
    let mut files = own_columns.iter().enumerate().filter_map(|(file, fields)| Some((file, fields.as_ref()?)));
    let Some((first, fields)) = files.next() else { return Ok(Vec::new()) };
    let mut merged = fields.clone();
    let places: HashMap<String, usize> =
        merged.iter().enumerate().map(|(place, field)| (field.name().clone(), place)).collect();
    for (file, fields) in files {
        let drift = |column: &str, first_type: String, second_type: String| Error::SchemaDrift {
            first: paths[first].to_owned(),
            second: paths[file].to_owned(),
            column: column.to_owned(),
            first_type,
            second_type,
        };
        let missing = || "missing".to_owned();
        let mut present = vec![false; merged.len()];
        for field in fields {
            let Some(&place) = places.get(field.name()) else {
                return Err(drift(field.name(), missing(), field.data_type().to_string()));
            };
            present[place] = true;
            merged[place] = merge_fields(&merged[place], field).ok_or_else(|| {
                drift(field.name(), merged[place].data_type().to_string(), field.data_type().to_string())
            })?;
        }
        if let Some(place) = present.iter().position(|present| !present) {
            let field = &merged[place];
            return Err(drift(field.name(), field.data_type().to_string(), missing()));
        }
    }
    Ok(merged)
}

/// One file's values of the partition keys, `None` for null.
type PartitionValues = Vec<Option<String>>;

/// The partition keys, and each file's values in the order of the keys.
fn partitions(found: &[FoundFile]) -> Result<(Vec<String>, Vec<PartitionValues>)> {
    let Some(first) = found.first() else { return Ok((Vec::new(), Vec::new())) };
    let keys: Vec<String> = first.partitions.iter().map(|(key, _)| key.clone()).collect();
    let drift = |column: &str, file: &FoundFile, first_type: &str, second_type: &str| Error::SchemaDrift {
        first: first.path.clone(),
        second: file.path.clone(),
        column: column.to_owned(),
        first_type: first_type.to_owned(),
        second_type: second_type.to_owned(),
    };
    let (folder, none) = ("a partition folder", "missing");
    let mut values = Vec::with_capacity(found.len());
    for file in found {
        if let Some((key, _)) = file.partitions.iter().find(|(key, _)| !keys.contains(key)) {
            return Err(drift(key, file, none, folder));
        }
        let value = |key: &String| {
            let partition = file.partitions.iter().find(|(own, _)| own == key);
            partition.map(|(_, value)| value.clone()).ok_or_else(|| drift(key, file, folder, none))
        };
        values.push(keys.iter().map(value).collect::<Result<Vec<_>>>()?);
    }
    Ok((keys, values))
}

/// A partition column is Int64 where every value is written as an integer is, otherwise text.
fn partition_field(name: String, place: usize, values: &[PartitionValues]) -> Field {
    let mut column = values.iter().map(|values| values[place].as_deref());
    let nullable = column.clone().any(|value| value.is_none());
    let any = column.clone().any(|value| value.is_some());
    let integers = column.all(|value| value.is_none_or(is_canonical_integer));
    let data_type = if any && integers { DataType::Int64 } else { DataType::Utf8 };
    Field::new(name, data_type, nullable)
}

/// Whether the text is what an integer prints as: `7`, and not `07` or `+7`.
fn is_canonical_integer(text: &str) -> bool {
    text.parse::<i64>().is_ok_and(|number| number.to_string() == text)
}

#[cfg(test)]
mod tests;
