//! The output in an object store that fails in every way that one can.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::Int32Type;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use super::OnExisting::{Overwrite, Refuse, Resume, ResumeIfOurs};
use super::tests::{
    ENDINGS, batch, nothing_to_do, open, other_inputs, other_job, plan, refused, run_half, run_to_end, schema, work,
    write_unit,
};
use super::*;
use crate::ExitCode;
use crate::data::store::testing::{Fault, FaultyStore, put};

fn target(store: &Arc<FaultyStore>, ending: &str) -> OutputTarget {
    OutputTarget::locate(Path::new(&format!("s3://bucket/out/{ending}")), &store.stores()).unwrap()
}

fn each_target(test: impl Fn(&Arc<FaultyStore>, &OutputTarget)) {
    for ending in ENDINGS {
        let store = FaultyStore::new();
        test(&store, &target(&store, ending));
    }
}

/// What a run makes, or the error that stops it.
fn try_run(target: &OutputTarget, on_existing: OnExisting) -> Result<()> {
    let sink = match open(target, plan(), on_existing)? {
        Opened::Work(sink) => sink,
        Opened::NothingToDo(_) => return Ok(()),
    };
    for unit in 0..2 {
        if !sink.finished_units().contains_key(&unit) {
            let mut part = sink.part(unit)?;
            part.write(&batch(&[unit as i32 * 2, unit as i32 * 2 + 1]))?;
            part.finish()?;
        }
    }
    sink.complete(Value::Null)
}

/// The rows of a finished output.
fn rows(target: &OutputTarget) -> Vec<i32> {
    let places = match target {
        OutputTarget::Directory(dir) => (0..2).map(|unit| dir.join(&part_name(unit))).collect::<Vec<_>>(),
        OutputTarget::File { place, .. } => vec![place.clone()],
    };
    let mut rows = Vec::new();
    for place in places {
        let file = place.file().unwrap().unwrap();
        match target.format() {
            OutputFormat::Parquet => {
                let reader = ParquetRecordBatchReaderBuilder::try_new(file.open().unwrap()).unwrap().build().unwrap();
                let batches: Vec<RecordBatch> = reader.map(|batch| batch.unwrap()).collect();
                rows.extend(batches.iter().flat_map(|batch| batch.column(0).as_primitive::<Int32Type>().values()));
            }
            OutputFormat::Arrow => {
                let reader = arrow::ipc::reader::FileReader::try_new(file.open().unwrap(), None).unwrap();
                let batches: Vec<RecordBatch> = reader.map(|batch| batch.unwrap()).collect();
                rows.extend(batches.iter().flat_map(|batch| batch.column(0).as_primitive::<Int32Type>().values()));
            }
            OutputFormat::Jsonl | OutputFormat::Csv => {
                let text = String::from_utf8(place.read().unwrap().unwrap().to_vec()).unwrap();
                let number = |line: &str| line.trim_matches(|byte: char| !byte.is_ascii_digit()).parse::<i32>().ok();
                rows.extend(text.lines().filter_map(number));
            }
        }
    }
    rows
}

/// The output is whole, holds every row once, and nothing is left beside it.
fn assert_whole(store: &Arc<FaultyStore>, target: &OutputTarget, context: &str) {
    assert_eq!(rows(target), [0, 1, 2, 3], "{context}");
    let expected = match target {
        OutputTarget::Directory(_) => vec![SUCCESS_NAME, PLAN_NAME, "part-000000.parquet", "part-000001.parquet"],
        OutputTarget::File { .. } if target.stamp_place().is_some() => vec!["stamp", "file"],
        OutputTarget::File { .. } => vec!["file"],
    };
    assert_eq!(store.keys().len(), expected.len(), "{context}: {:?}", store.keys());
    nothing_to_do(open(target, plan(), Refuse));
}

#[test]
fn the_table_of_what_an_output_may_hold() {
    each_target(|store, target| {
        run_half(target, plan());
        refused(open(target, plan(), Refuse), ExitCode::CannotCreate, "--resume");
        refused(open(target, other_inputs(), Resume), ExitCode::InputData, "in.parquet: changed");
        refused(open(target, other_job(), Resume), ExitCode::Config, "settings.max_length");
        refused(open(target, other_job(), Refuse), ExitCode::CannotCreate, "settings.max_length");
        for on_existing in [Resume, ResumeIfOurs] {
            let sink = work(target, plan(), on_existing);
            assert_eq!(sink.finished_units().keys().collect::<Vec<_>>(), [&1]);
        }
        run_to_end(target, plan(), Resume);
        assert_whole(store, target, "resumed");
        for on_existing in [Refuse, Resume, ResumeIfOurs] {
            assert_eq!(nothing_to_do(open(target, plan(), on_existing)).rows, 4);
            refused(open(target, other_inputs(), on_existing), ExitCode::InputData, "in.parquet: changed");
        }
        run_half(target, other_job_after_overwrite(target));
        run_to_end(target, plan(), Overwrite);
        assert_whole(store, target, "redone");
    });
}

/// Redoes the output as another job, and leaves that unfinished.
fn other_job_after_overwrite(target: &OutputTarget) -> PlanFile {
    work(target, other_job(), Overwrite);
    run_to_end(target, other_job(), Resume);
    refused(open(target, plan(), Refuse), ExitCode::CannotCreate, "holds another job");
    work(target, plan(), Overwrite);
    let dir = target.parts_dir();
    remove(&[dir.join(PLAN_NAME)]).unwrap();
    plan()
}

#[test]
fn objects_that_are_not_ours_stay() {
    each_target(|store, target| {
        let key = match target {
            OutputTarget::Directory(_) => "out/dir/notes.txt".to_owned(),
            OutputTarget::File { place, .. } => place.object().unwrap().key().to_string(),
        };
        put(store, &key, "mine");
        put(store, "out/dir/.hidden", "mine too");
        for on_existing in [Refuse, Resume, Overwrite, ResumeIfOurs] {
            refused(open(target, plan(), on_existing), ExitCode::CannotCreate, &key);
        }
        assert_eq!(store.keys().len(), 2, "nothing was written or deleted");
        crate::data::store::testing::remove(store, &key);
        run_to_end(target, plan(), Refuse);
        run_to_end(target, plan(), Overwrite);
        assert!(store.keys().contains(&"out/dir/.hidden".to_owned()));
    });
    // A part of nobody we know, among ours.
    let store = FaultyStore::new();
    let target = target(&store, "dir");
    run_to_end(&target, plan(), Refuse);
    put(&store, "out/dir/part-000007.parquet", "PAR1 of somebody PAR1");
    refused(open(&target, plan(), Overwrite), ExitCode::CannotCreate, "part-000007.parquet");
    assert_eq!(store.keys().len(), 5);
}

#[test]
fn a_lost_reply_is_settled_by_what_is_there() {
    for fault in [Fault::LostReply, Fault::LostThenRefused] {
        each_target(|store, target| {
            for put in 0.. {
                let fresh = FaultyStore::new();
                let target = OutputTarget::locate(target.path(), &fresh.stores()).unwrap();
                fresh.fail("put", fault, put..put + 1);
                let result = try_run(&target, Refuse);
                let sent = fresh.count("put");
                fresh.heal();
                if put >= sent {
                    break;
                }
                // A stamp is put over what is there, which a client tries again by itself.
                if let (Err(error), true) = (&result, target.stamp_place().is_some()) {
                    assert_eq!(error.exit_code(), ExitCode::TryAgain, "{error}");
                    try_run(&target, Resume).unwrap();
                } else {
                    result.unwrap();
                }
                assert_whole(&fresh, &target, &format!("{fault:?} of put {put}"));
            }
            assert!(store.keys().is_empty());
        });
    }
}

#[test]
fn a_request_in_flight_that_comes_to_nothing_is_waited_for() {
    let store = FaultyStore::new();
    let target = target(&store, "dir");
    store.fail("put", Fault::Conflict, 1..3);
    try_run(&target, Refuse).unwrap();
    assert_whole(&store, &target, "after 409");
}

/// The store is lost at every request in turn, with that request done or not; then the run is resumed.
#[test]
fn a_run_that_dies_at_any_request_is_resumed() {
    for last in [Fault::Dead, Fault::LostReply] {
        each_target(|_, target| {
            for request in 0.. {
                let store = FaultyStore::new();
                let located = OutputTarget::locate(target.path(), &store.stores()).unwrap();
                store.fail("any", last, request..request + 1);
                store.fail("any", Fault::Dead, request + 1..usize::MAX);
                let context = format!("{last:?} at request {request} of {}", target.path().display());
                let result = try_run(&located, Refuse);
                let sent = store.count("any");
                store.heal();
                match result {
                    Ok(()) => {
                        assert_whole(&store, &located, &context);
                        if sent <= request {
                            break;
                        }
                    }
                    Err(error) => {
                        assert_eq!(error.exit_code(), ExitCode::TryAgain, "{context}: {error}");
                        for (key, content) in store.content() {
                            if unit_of_name(key.rsplit('/').next().unwrap()).is_some() {
                                assert!(content.ends_with(b"PAR1"), "{context}: half of {key} can be seen");
                            }
                        }
                        try_run(&located, Resume).unwrap();
                        assert_whole(&store, &located, &context);
                    }
                }
            }
        });
    }
}

#[test]
fn a_listing_that_is_behind_costs_work_and_no_rows() {
    each_target(|store, target| {
        run_half(target, plan());
        store.fail("list", Fault::ListsLate, 0..usize::MAX);
        refused(open(target, plan(), Refuse), ExitCode::CannotCreate, "--resume");
        // The part that it does not list is computed once more, and its place is taken.
        let sink = work(target, plan(), Resume);
        assert!(sink.finished_units().is_empty());
        (0..2).for_each(|unit| write_unit(&sink, unit));
        sink.complete(Value::Null).unwrap();
        store.heal();
        assert_eq!(rows(target), [0, 1, 2, 3]);
        nothing_to_do(open(target, plan(), Refuse));
    });
}

#[test]
fn two_runs_at_once_give_one_result() {
    each_target(|store, target| {
        let first = work(target, plan(), Refuse);
        let second = work(target, plan(), Resume);
        write_unit(&first, 0);
        write_unit(&second, 0);
        write_unit(&second, 1);
        second.complete(Value::Null).unwrap();
        // The first one goes on, and finds everything done.
        write_unit(&first, 1);
        first.complete(Value::Null).unwrap();
        assert_whole(store, target, "two runs");
    });
    // Two that found nothing at once: one of them has its plan there, and the other is told to come again.
    let store = FaultyStore::new();
    let target = target(&store, "dir");
    publish_plan(&target.parts_dir(), &plan()).unwrap();
    let error = publish_plan(&target.parts_dir(), &plan()).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::TryAgain, "{error}");
}

#[test]
fn another_jobs_part_is_not_replaced() {
    let store = FaultyStore::new();
    let target = target(&store, "dir");
    let sink = work(&target, plan(), Refuse);
    let theirs = PartFooter::new(&other_job().fingerprint, &other_job().rows_digest(), 0);
    PartWriter::create(&target.parts_dir(), 0, schema(), &theirs).unwrap().finish().unwrap();
    let before = store.content();
    let mut part = sink.part(0).unwrap();
    part.write(&batch(&[0, 1])).unwrap();
    let error = part.finish().unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::CannotCreate, "{error}");
    assert!(store.content() == before);
}

#[test]
fn refusals_say_what_to_do() {
    let store = FaultyStore::new();
    let target = target(&store, "dir");
    store.fail("put", Fault::Denied, 0..usize::MAX);
    let error = try_run(&target, Refuse).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::Unavailable);
    assert!(error.to_string().contains("s3://bucket/out/dir/_plan.json"), "{error}");
    assert!(error.to_string().contains("AWS_"), "{error}");
    store.heal();
    store.fail("put", Fault::Unavailable, 0..usize::MAX);
    let error = try_run(&target, Refuse).unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("503"), "{error}");
    assert!(store.keys().is_empty());
}
