//! Inputs in an object store are read as files are.

use std::fs;
use std::sync::Arc;

use super::tests::{all, assert_same_rows, files, read, table, units, write_parquet};
use super::*;
use crate::data::dataset::DatasetOptions;
use crate::data::store::testing::{Fault, FaultyStore, put, remove};
use crate::error::ExitCode;

fn open(store: &Arc<FaultyStore>, input: &str) -> Result<Arc<Dataset>> {
    let inputs = vec![format!("s3://bucket/{input}")];
    Dataset::open(&DatasetOptions { inputs, stores: store.stores(), ..DatasetOptions::default() }).map(Arc::new)
}

/// One object of each format, with its rows.
fn objects(rows: usize) -> (Arc<FaultyStore>, Vec<(String, RecordBatch)>) {
    let folder = tempfile::tempdir().unwrap();
    let store = FaultyStore::new();
    let files = files(&folder, rows, 7).into_iter().map(|(path, expected)| {
        let key = format!("in/{}", path.file_name().unwrap().to_str().unwrap());
        put(&store, &key, fs::read(&path).unwrap());
        (key, expected)
    });
    let files = files.collect();
    (store, files)
}

#[test]
fn every_format_from_any_unit_on() {
    let (store, objects) = objects(100);
    for (key, expected) in objects {
        let dataset = open(&store, &key).unwrap();
        let windows = read(&dataset, units(&dataset, 30), &all(9));
        let found = concat_batches(&dataset.schema, windows.iter().map(|window| &window.batch)).unwrap();
        assert_same_rows(&found, &expected);
        let resumed = read(&dataset, units(&dataset, 30).split_off(2), &all(9));
        let found = concat_batches(&dataset.schema, resumed.iter().map(|window| &window.batch)).unwrap();
        assert_same_rows(&found, &expected.slice(60, 40));
    }
}

#[test]
fn columns_far_apart_are_read_in_few_requests() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    // Texts that do not compress, so that the columns of the one row group lie megabytes apart.
    let mut state = 1u64;
    let mut texts = || -> ArrayRef {
        let text = |_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            format!("{state:016x}").repeat(6)
        };
        Arc::new(StringArray::from_iter_values((0..40_000).map(text)))
    };
    let batch = RecordBatch::try_from_iter([("a", texts()), ("b", texts()), ("c", texts())]).unwrap();
    write_parquet(&path, &batch, 40_000, 500);
    let store = FaultyStore::new();
    let content = fs::read(&path).unwrap();
    let mebibytes = content.len() >> 20;
    assert!(mebibytes > 9, "{mebibytes}");
    put(&store, "a.parquet", content);
    let dataset = open(&store, "a.parquet").unwrap();
    let before = store.count("get");
    let windows = read(&dataset, units(&dataset, 4096), &all(1000));
    let found = concat_batches(&dataset.schema, windows.iter().map(|window| &window.batch)).unwrap();
    assert_eq!(found.columns(), batch.columns());
    let requests = store.count("get") - before;
    assert!(requests <= 2 * mebibytes, "{requests} requests for {mebibytes} MiB");
}

#[test]
fn the_plan_knows_objects_by_size_and_etag() {
    let (store, objects) = objects(20);
    let stamp = |key: &str| serde_json::to_value(open(&store, key).unwrap().files[0].stamp()).unwrap();
    for (key, _) in objects {
        let stamp = stamp(&key);
        assert_eq!(stamp["path"], format!("s3://bucket/{key}"));
        assert!(stamp["etag"].is_string() && stamp.get("modified_ns").is_none(), "{stamp}");
        assert_eq!(stamp["rows"], 20);
    }
}

#[test]
fn an_object_that_changes_is_not_committed() {
    let (store, objects) = objects(100);
    for (key, _) in objects {
        let content = store.content().into_iter().find(|(found, _)| *found == key).unwrap().1;
        // Replaced or removed, before the first byte of the unit or after some of it.
        for (gone, windows_before) in [(false, 0), (false, 1), (true, 0), (true, 1)] {
            put(&store, &key, content.clone());
            let dataset = open(&store, &key).unwrap();
            let mut reader = WindowReader::new(Arc::clone(&dataset), units(&dataset, 100), all(30)).unwrap();
            for _ in 0..windows_before {
                assert!(!reader.next().unwrap().unwrap().last);
            }
            match gone {
                true => remove(&store, &key),
                false => put(&store, &key, content.clone()),
            }
            let error = reader.find_map(Result::err).unwrap();
            assert!(matches!(error, Error::InputChanged { .. }), "{key}: {error}");
            assert!(error.to_string().contains(&key), "{error}");
            assert!(reader.next().is_none());
        }
    }
}

#[test]
fn a_store_that_fails_is_no_damaged_file() {
    let (store, objects) = objects(100);
    for (key, _) in objects {
        for (fault, code) in [(Fault::Unavailable, ExitCode::TryAgain), (Fault::Denied, ExitCode::Unavailable)] {
            store.fail("get", fault, 0..usize::MAX);
            let error = open(&store, &key).unwrap_err();
            assert_eq!(error.exit_code(), code, "{key}: {error}");
            store.heal();
            let dataset = open(&store, &key).unwrap();
            store.fail("get", fault, 0..usize::MAX);
            let reader = WindowReader::new(Arc::clone(&dataset), units(&dataset, 30), all(30)).unwrap();
            let error = reader.collect::<Result<Vec<_>>>().unwrap_err();
            assert_eq!(error.exit_code(), code, "{key}: {error}");
            assert!(error.to_string().contains(&format!("s3://bucket/{key}")), "{error}");
            store.heal();
        }
    }
    for kind in ["list", "head"] {
        store.fail(kind, Fault::Unavailable, 0..usize::MAX);
        assert_eq!(open(&store, "in").unwrap_err().exit_code(), ExitCode::TryAgain);
        store.heal();
    }
}

#[test]
fn a_prefix_of_partitions_is_one_dataset() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    write_parquet(&path, &table(10), 10, 10);
    let store = FaultyStore::new();
    for year in [2024, 2025] {
        put(&store, &format!("in/year={year}/a.parquet"), fs::read(&path).unwrap());
    }
    let dataset = open(&store, "in").unwrap();
    assert_eq!(dataset.total_rows(), 20);
    let windows = read(&dataset, units(&dataset, 10), &all(10));
    let year = |window: &Window| arrow::util::display::array_value_to_string(window.batch.columns().last().unwrap(), 0);
    let years: Vec<String> = windows.iter().map(|window| year(window).unwrap()).collect();
    assert_eq!(years, ["2024", "2025"]);
}
