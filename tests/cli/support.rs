//! Running the program and looking at what it wrote.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::compute::concat_batches;
use arrow::datatypes::{Float32Type, UInt32Type};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::properties::WriterProperties;

pub fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

pub fn checkpoint(name: &str) -> String {
    project(&format!("tests/goldens/checkpoints/{name}")).to_str().unwrap().to_owned()
}

/// The checkpoint of the sample data.
pub fn tickets() -> (String, String) {
    let path = |name: &str| project(name).to_str().unwrap().to_owned();
    (path("sample-data/models/ticket-classifier"), path("sample-data/tickets.parquet"))
}

/// A command line of the program, in an environment without settings of the machine.
pub fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mistral-batch"));
    let is_ours = |name: &str| ["MISTRAL_BATCH_", "HF_", "OPENLINEAGE_"].iter().any(|prefix| name.starts_with(prefix));
    for (name, _) in std::env::vars().filter(|(name, _)| is_ours(name)) {
        command.env_remove(name);
    }
    command.args(args);
    command
}

pub fn run(args: &[&str]) -> Output {
    program(args).output().unwrap()
}

/// Runs the program, which must succeed; returns what it wrote to standard error.
#[track_caller]
pub fn succeed(args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{args:?} exited with {:?}:\n{stderr}", output.status.code());
    stderr
}

/// Runs the program, which must fail with this exit code; returns its message, which must be one line.
#[track_caller]
pub fn fail(code: i32, args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}:\n{stderr}");
    assert!(output.stdout.is_empty(), "results or messages on standard output");
    let message = stderr.strip_prefix("error: ").unwrap_or_else(|| panic!("not an error message: {stderr}"));
    assert_eq!(message.trim_end().lines().count(), 1, "more than one line: {stderr}");
    message.trim_end().to_owned()
}

/// A scratch folder with shorthands for what tests put there.
pub struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn arg(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Writes a Parquet file of the given columns and returns its path as an argument.
    pub fn parquet(&self, name: &str, columns: Vec<(&str, ArrayRef)>) -> String {
        let batch = RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true))).unwrap();
        write_parquet(&self.path(name), &batch, 1024);
        self.arg(name)
    }

    /// Writes a Parquet file with one text column named `text`.
    pub fn texts<'a>(&self, name: &str, texts: impl IntoIterator<Item = Option<&'a str>>) -> String {
        self.parquet(name, vec![("text", Arc::new(texts.into_iter().collect::<StringArray>()))])
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        if let Some(parent) = self.path(name).parent() {
            std::fs::create_dir_all(parent).unwrap();
        }
        std::fs::write(self.path(name), content).unwrap();
        self.arg(name)
    }

    /// A copy of a golden checkpoint that a test may damage.
    pub fn checkpoint(&self, name: &str) -> PathBuf {
        let copy = self.path(name);
        std::fs::create_dir_all(&copy).unwrap();
        for entry in std::fs::read_dir(checkpoint(name)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
        copy
    }
}

pub fn write_parquet(path: &Path, batch: &RecordBatch, row_group_rows: usize) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(row_group_rows)).build();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
}

/// The rows of a Parquet file, or of a folder of parts in the order of their names.
pub fn read_parquet(path: impl AsRef<Path>) -> RecordBatch {
    let path = path.as_ref();
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        files = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "parquet"));
        files.sort();
    }
    let mut batches = Vec::new();
    let mut schema = None;
    for file in files {
        let builder = ParquetRecordBatchReaderBuilder::try_new(std::fs::File::open(file).unwrap()).unwrap();
        schema.get_or_insert(builder.schema().clone());
        batches.extend(builder.build().unwrap().map(Result::unwrap));
    }
    let rows = concat_batches(&schema.unwrap(), &batches).unwrap();
    // Without the footer's keys, which the reader hands on as the schema's: two parts of one unit differ in them.
    let schema = rows.schema().as_ref().clone().with_metadata(Default::default());
    RecordBatch::try_new(Arc::new(schema), rows.columns().to_vec()).unwrap()
}

pub fn strings(batch: &RecordBatch, column: &str) -> Vec<Option<String>> {
    batch.column_by_name(column).unwrap().as_string::<i32>().iter().map(|s| s.map(str::to_owned)).collect()
}

pub fn floats(batch: &RecordBatch, column: &str) -> Vec<Option<f32>> {
    batch.column_by_name(column).unwrap().as_primitive::<Float32Type>().iter().collect()
}

pub fn counts(batch: &RecordBatch, column: &str) -> Vec<Option<u32>> {
    batch.column_by_name(column).unwrap().as_primitive::<UInt32Type>().iter().collect()
}

pub fn flags(batch: &RecordBatch, column: &str) -> Vec<Option<bool>> {
    batch.column_by_name(column).unwrap().as_boolean().iter().collect()
}

/// Each row of a List<Struct{label, score}> column.
pub fn label_scores(batch: &RecordBatch, column: &str) -> Vec<Option<Vec<(String, f32)>>> {
    let lists = batch.column_by_name(column).unwrap().as_list::<i32>();
    let row = |entries: ArrayRef| {
        let entries = entries.as_struct();
        let labels = entries.column(0).as_string::<i32>();
        let scores = entries.column(1).as_primitive::<Float32Type>();
        labels.iter().zip(scores).map(|(l, s)| (l.unwrap().to_owned(), s.unwrap())).collect()
    };
    (0..lists.len()).map(|i| lists.is_valid(i).then(|| row(lists.value(i)))).collect()
}

pub fn column_names(batch: &RecordBatch) -> Vec<String> {
    batch.schema().fields().iter().map(|field| field.name().clone()).collect()
}
