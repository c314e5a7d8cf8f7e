//! Whole jobs: order, company, resuming, reports, and what each part says of itself.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch, StringArray};
use arrow::compute::take_record_batch;
use arrow::datatypes::Int64Type;
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

use super::support::*;

/// Rows of very different lengths, with an id each.
fn dataset(rows: usize) -> RecordBatch {
    let words = ["cat", "invoice", "the", "Hello", "naïve", "password", "😀", "2024-01-01", "</s>", "refund"];
    let text = |i: usize| {
        let length = [1, 3, 40, 7, 0, 90, 15][i % 7] + i % 5;
        (0..length).map(|k| words[(i * 31 + k * 17) % words.len()]).collect::<Vec<_>>().join(" ")
    };
    let texts: StringArray = (0..rows).map(|i| (i % 11 != 10).then(|| text(i))).collect();
    let ids = Int64Array::from_iter_values(0..rows as i64);
    RecordBatch::try_from_iter_with_nullable(vec![
        ("id", Arc::new(ids) as ArrayRef, false),
        ("text", Arc::new(texts) as ArrayRef, true),
    ])
    .unwrap()
}

fn classify(scratch: &Scratch, input: &RecordBatch, name: &str, extra: &[&str]) -> RecordBatch {
    let path = scratch.path(&format!("{name}.parquet"));
    write_parquet(&path, input, 1000);
    let (input, output, model) =
        (path.to_str().unwrap().to_owned(), scratch.arg(name), checkpoint("cls-window-sharded"));
    let mut args = vec!["classify", "-i", &input, "-o", &output, "--model", &model];
    args.extend(extra);
    succeed(&args);
    read_parquet(&output)
}

/// Scores by id.
fn by_id(results: &RecordBatch) -> Vec<(i64, Option<f32>, Option<String>)> {
    let ids = results.column_by_name("id").unwrap().as_primitive::<Int64Type>().values();
    let mut rows: Vec<_> = ids
        .iter()
        .zip(floats(results, "predicted_score"))
        .zip(strings(results, "predicted_label"))
        .map(|((id, score), label)| (*id, score, label))
        .collect();
    rows.sort_by_key(|row| row.0);
    rows
}

fn assert_same(a: &RecordBatch, b: &RecordBatch) {
    for (a, b) in by_id(a).into_iter().zip(by_id(b)) {
        assert_eq!((a.0, a.1.is_some()), (b.0, b.1.is_some()));
        if let (Some(x), Some(y)) = (a.1, b.1) {
            assert!((x - y).abs() < 1e-5, "row {}: {x} and {y}", a.0);
        }
        assert_eq!(a.2, b.2, "row {}", a.0);
    }
}

#[test]
fn company_order_budget_and_threads_do_not_change_a_result() {
    let scratch = Scratch::new();
    let input = dataset(300);
    let usual = classify(&scratch, &input, "usual", &[]);
    assert_eq!(usual.num_rows(), 300);
    assert_eq!(usual.column_by_name("id"), input.column_by_name("id"), "in order");
    // A budget of one token: every row runs alone.
    assert_same(&usual, &classify(&scratch, &input, "alone", &["--max-batch-tokens", "1"]));
    assert_same(&usual, &classify(&scratch, &input, "large", &["--max-batch-tokens", "64k"]));
    assert_same(&usual, &classify(&scratch, &input, "units", &["--unit-rows", "13"]));
    assert_same(&usual, &classify(&scratch, &input, "one-thread", &["--threads", "1"]));
    let shuffled: arrow::array::UInt32Array = (0..300u32).map(|i| (i * 173 + 41) % 300).collect::<Vec<_>>().into();
    let shuffled = take_record_batch(&input, &shuffled).unwrap();
    let results = classify(&scratch, &shuffled, "shuffled", &[]);
    assert_eq!(results.column_by_name("id"), shuffled.column_by_name("id"), "in the order of the input");
    assert_same(&usual, &results);
}

#[test]
fn rows_out_equal_rows_in() {
    let scratch = Scratch::new();
    for rows in [0, 1, 100_000] {
        let words = ["a", "b c", "d e f"];
        let texts: StringArray = (0..rows).map(|i| Some(words[i % 3])).collect();
        let ids = Int64Array::from_iter_values(0..rows as i64);
        let input =
            RecordBatch::try_from_iter(vec![("id", Arc::new(ids) as ArrayRef), ("text", Arc::new(texts) as ArrayRef)])
                .unwrap();
        let results = classify(&scratch, &input, &format!("rows-{rows}"), &["--keep", "id"]);
        assert_eq!(results.num_rows(), rows);
        assert_eq!(results.column_by_name("id"), input.column_by_name("id"));
        assert_eq!(strings(&results, "predicted_label").iter().filter(|label| label.is_some()).count(), rows);
        assert_eq!(
            column_names(&results),
            ["id", "predicted_label", "predicted_score", "num_tokens", "truncated", "error"]
        );
    }
    let parts = std::fs::read_dir(scratch.path("rows-100000")).unwrap().count();
    assert_eq!(parts, 100_000_usize.div_ceil(4096) + 2, "one part a unit, a plan, and the mark of success");
}

#[test]
fn a_resumed_job_keeps_its_parts_and_ends_bit_identical() {
    let scratch = Scratch::new();
    let input = dataset(200);
    let flags = ["--unit-rows", "32", "--truth-column", "text"];
    classify(&scratch, &input, "whole", &flags);
    // A killed run: some parts, no mark of success.
    let copy = scratch.path("killed");
    std::fs::create_dir(&copy).unwrap();
    for name in ["_plan.json", "part-000000.parquet", "part-000003.parquet"] {
        std::fs::copy(scratch.path("whole").join(name), copy.join(name)).unwrap();
    }
    let inode = |name: &str| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(copy.join(name)).unwrap());
    let kept = [inode("part-000000.parquet"), inode("part-000003.parquet")];
    let (input, output, model) =
        (scratch.arg("whole.parquet"), scratch.arg("killed"), checkpoint("cls-window-sharded"));
    let mut args = vec!["classify", "-i", &input, "-o", &output, "--model", &model];
    args.extend(flags);
    assert!(fail(73, &args).contains("--resume"));
    args.push("--resume");
    let summary = succeed(&args);
    assert!(summary.contains("7 units (2 from an earlier run)"), "{summary}");
    assert!(summary.contains("200 rows in, 200 rows out"), "the summary is of the whole output: {summary}");
    assert_eq!(kept, [inode("part-000000.parquet"), inode("part-000003.parquet")], "no unit is computed twice");
    assert_eq!(read_parquet(&copy), read_parquet(scratch.path("whole")));
    assert!(succeed(&args).contains("nothing to do"));
}

#[test]
fn another_job_does_not_take_an_output() {
    let scratch = Scratch::new();
    let input = dataset(20);
    classify(&scratch, &input, "out", &[]);
    let (path, output, model) = (scratch.arg("out.parquet"), scratch.arg("out"), checkpoint("cls-window-sharded"));
    let other = ["classify", "-i", &path, "-o", &output, "--model", &model, "--max-length", "16"];
    fail(73, &other);
    let message = fail(78, &[&other[..], &["--resume"]].concat());
    assert!(message.contains("max_length"), "{message}");
    succeed(&[&other[..], &["--overwrite"]].concat());
    let other_budget = [&other[..], &["--max-batch-tokens", "64"]].concat();
    assert!(succeed(&other_budget).contains("nothing to do"), "a budget is no other job");
    write_parquet(&scratch.path("out.parquet"), &dataset(21), 1000);
    assert!(fail(65, &other).contains("out.parquet"));
}

#[test]
fn sigint_stops_cleanly_and_the_job_resumes() {
    let scratch = Scratch::new();
    let input = scratch.path("in.parquet");
    write_parquet(&input, &dataset(20_000), 1000);
    let (input, output, model) =
        (input.to_str().unwrap().to_owned(), scratch.arg("out"), checkpoint("cls-window-sharded"));
    let args = ["classify", "-i", &input, "-o", &output, "--model", &model, "--unit-rows", "100", "--progress", "none"];
    let child = program(&args).stderr(std::process::Stdio::piped()).spawn().unwrap();
    while !scratch.path("out/part-000001.parquet").exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let killed = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let stopped = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&stopped.stderr);
    assert_eq!(stopped.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("--resume"), "{stderr}");
    assert!(!scratch.path("out/_SUCCESS.json").exists());
    let summary = succeed(&[&args[..], &["--resume"]].concat());
    assert!(summary.contains("from an earlier run"), "{summary}");
    assert_eq!(read_parquet(&output).num_rows(), 20_000);
}

#[test]
fn parts_and_the_mark_of_success_say_what_they_are() {
    let scratch = Scratch::new();
    classify(&scratch, &dataset(50), "out", &["--unit-rows", "30"]);
    let part = std::fs::File::open(scratch.path("out/part-000001.parquet")).unwrap();
    let reader = SerializedFileReader::new(part).unwrap();
    let metadata = reader.metadata().file_metadata();
    let value = |key: &str| {
        let pairs = metadata.key_value_metadata().unwrap();
        pairs
            .iter()
            .find(|pair| pair.key == format!("mistral_batch.{key}"))
            .and_then(|pair| pair.value.clone())
            .unwrap()
    };
    assert_eq!(
        (value("unit"), value("rows"), value("dtype"), value("sliding_window")),
        ("1".into(), "20".into(), "f32".into(), "16".into())
    );
    assert_eq!(value("version"), env!("CARGO_PKG_VERSION"));
    assert!(value("model").ends_with("cls-window-sharded"));
    for key in ["fingerprint", "config_sha256", "weights_sha256", "tokenizer_sha256"] {
        assert_eq!(value(key).len(), 64, "{key}");
    }
    let compression = reader.metadata().row_group(0).column(0).compression();
    assert!(matches!(compression, parquet::basic::Compression::ZSTD(_)), "{compression:?}");
    let success: Value =
        serde_json::from_str(&std::fs::read_to_string(scratch.path("out/_SUCCESS.json")).unwrap()).unwrap();
    assert_eq!((success["rows"].as_u64(), success["parts"].as_u64()), (Some(50), Some(2)));
    assert_eq!(success["fingerprint"], value("fingerprint"));
}

#[test]
fn the_report_is_written_also_when_the_run_fails() {
    let scratch = Scratch::new();
    let report = scratch.arg("report.json");
    let read =
        || serde_json::from_str::<Value>(&std::fs::read_to_string(scratch.path("report.json")).unwrap()).unwrap();
    classify(&scratch, &dataset(22), "out", &["--report", &report]);
    let done = read();
    assert_eq!((&done["status"], &done["exit_code"]), (&"done".into(), &0.into()));
    let details = &done["details"];
    assert_eq!((&details["rows_in"], &details["rows_out"], &details["rows_null"]), (&22.into(), &22.into(), &2.into()));
    assert!(details["tokens"].as_u64().unwrap() > 0 && details["tokens_per_second"].as_f64().unwrap() > 0.0);
    fail(66, &["classify", "-i", "/nowhere", "-o", "x", "--model", &checkpoint("cls-nopad"), "--report", &report]);
    let failed = read();
    assert_eq!((&failed["status"], &failed["exit_code"]), (&"failed".into(), &66.into()));
    assert!(failed["error"].as_str().unwrap().contains("/nowhere"));
}

#[test]
fn progress_is_machine_readable_or_silent_as_asked() {
    let scratch = Scratch::new();
    write_parquet(&scratch.path("in.parquet"), &dataset(30), 10);
    let (input, model) = (scratch.arg("in.parquet"), checkpoint("cls-nopad"));
    let json =
        succeed(&["classify", "-i", &input, "-o", &scratch.arg("json"), "--model", &model, "--progress", "json"]);
    let events: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = events.last().unwrap();
    assert_eq!((&last["event"], &last["report"]["details"]["rows_out"]), (&"end".into(), &30.into()));
    assert_eq!(succeed(&["classify", "-i", &input, "-o", &scratch.arg("quiet"), "--model", &model, "-q"]), "");
}

#[test]
fn flags_come_from_the_environment_and_the_command_line_wins() {
    let scratch = Scratch::new();
    let input = scratch
        .parquet("in.parquet", vec![("body", Arc::new(StringArray::from(vec!["some text that is long enough"])))]);
    let output = scratch.arg("out");
    let result = program(&["classify", "--max-length", "6"])
        .env("MISTRAL_BATCH_INPUT", &input)
        .env("MISTRAL_BATCH_OUTPUT", &output)
        .env("MISTRAL_BATCH_MODEL", checkpoint("cls-nopad"))
        .env("MISTRAL_BATCH_TEXT_COLUMN", "body")
        .env("MISTRAL_BATCH_MAX_LENGTH", "4")
        .env("MISTRAL_BATCH_QUIET", "true")
        .output()
        .unwrap();
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    assert_eq!(counts(&read_parquet(&output), "num_tokens"), [Some(6)]);
    assert!(result.stderr.is_empty());
}

#[test]
fn inspect_tells_what_a_checkpoint_is() {
    let output = run(&["inspect", &checkpoint("cls-window-sharded")]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    for fact in [
        "MistralForSequenceClassification",
        "SingleLabel",
        "negative, neutral, positive",
        "16 positions",
        "F32",
        "model-00001-of-00003",
    ] {
        assert!(text.contains(fact), "{fact}:\n{text}");
    }
    let output = run(&["inspect", "--json", &checkpoint("lm-full-tied-bf16")]);
    let facts: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&facts["architecture"], &facts["sliding_window"]), (&"MistralForCausalLM".into(), &Value::Null));
    assert_eq!(facts["stored_dtype"], "BF16");
    assert!(facts["memory_bytes"]["weights"].as_u64() > Some(0));
    fail(78, &["inspect", "/nowhere"]);
}

#[test]
fn completions_are_printed_for_every_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(&["completions", shell]);
        assert!(
            output.status.success() && String::from_utf8(output.stdout).unwrap().contains("truth-column"),
            "{shell}"
        );
    }
}
