//! Whole jobs over an object store, by a client that the library's user brings.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array, StringArray};
use parquet::arrow::ArrowWriter;

use super::*;
use crate::data::sink::OnExisting;
use crate::data::store::testing::{Fault, FaultyStore, put};
use crate::error::{ExitCode, Result};

const ROWS: usize = 600;
const UNITS: usize = 12;

/// A Parquet file of texts.
fn texts(rows: usize, word: &str) -> Vec<u8> {
    let texts: Vec<String> = (0..rows).map(|row| format!("{word} ").repeat(1 + row * 7 % 13)).collect();
    let column = Arc::new(StringArray::from(texts)) as Arc<dyn Array>;
    let batch = arrow::array::RecordBatch::try_from_iter([("text", column)]).unwrap();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

fn spec(store: &Arc<FaultyStore>, input: &str, output: &str) -> JobSpec {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/checkpoints/cls-window-sharded");
    let text = format!(
        "command = \"classify\"\nmodel = \"{model}\"\ninput = [\"{input}\"]\noutput = \"{output}\"\nunit_rows = {}\n",
        ROWS / UNITS
    );
    let file = JobFile::parse(Path::new("job.toml"), "/".into(), &text).unwrap();
    let spec = file.job(&Variables::new(Default::default())).unwrap().spec;
    JobSpec { stores: store.stores(), ..spec }
}

fn run_spec(spec: JobSpec) -> Result<RunReport> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(run(spec, Arc::new(RunControl::default())))
}

/// Where the rows of a CSV output are, whatever store they are in.
fn csv(store: &FaultyStore, key: &str) -> Vec<u8> {
    store.content().into_iter().find(|(found, _)| found == key).unwrap().1
}

#[test]
fn a_job_over_objects_gives_what_it_gives_over_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("in.parquet"), texts(ROWS, "some words")).unwrap();
    let store = FaultyStore::new();
    put(&store, "in/a.parquet", texts(ROWS, "some words"));
    run_spec(spec(&store, &path("in.parquet"), &path("out.csv"))).unwrap();
    let whole = std::fs::read(path("out.csv")).unwrap();
    run_spec(spec(&store, "s3://bucket/in", "s3://bucket/out.csv")).unwrap();
    assert!(csv(&store, "out.csv") == whole);
    let again = run_spec(spec(&store, "s3://bucket/in", "s3://bucket/out.csv")).unwrap();
    assert_eq!(again.status, "nothing_to_do");

    // A store that is lost in mid-job, and comes back.
    store.fail("any", Fault::Dead, 28..usize::MAX);
    let error = run_spec(spec(&store, "s3://bucket/in", "s3://bucket/lost.csv")).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::TryAgain, "{error}");
    store.heal();
    let report = run_spec(spec(&store, "s3://bucket/in", "s3://bucket/lost.csv")).unwrap();
    let resumed = report.details.unwrap().units_resumed;
    assert!(resumed > 0 && resumed < UNITS as u64, "{resumed}");
    assert!(csv(&store, "lost.csv") == whole);
}

#[test]
fn an_input_that_is_replaced_while_the_job_runs_stops_it() {
    let store = FaultyStore::new();
    put(&store, "in.parquet", texts(ROWS, "some words"));
    let job = || spec(&store, "s3://bucket/in.parquet", "s3://bucket/out");
    // After the plan and two parts.
    store.replace_after_puts(3, "in.parquet", texts(ROWS, "other words"));
    let error = run_spec(job()).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::InputData, "{error}");
    assert!(error.to_string().contains("s3://bucket/in.parquet: changed"), "{error}");
    let parts = store.keys().iter().filter(|key| key.contains("part-")).count();
    assert!((2..UNITS).contains(&parts), "{parts}");
    assert_eq!(run_spec(job()).unwrap_err().exit_code(), ExitCode::InputData);
    put(&store, "in.parquet", texts(ROWS, "other words"));
    let redone = JobSpec { on_existing: OnExisting::Overwrite, ..job() };
    assert_eq!(run_spec(redone).unwrap().details.unwrap().rows_out, ROWS as u64);
}
