//! Evaluation sweeps.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray, ListBuilder, RecordBatch, StringArray, StringBuilder, UInt32Array};
use arrow::datatypes::{Float64Type, UInt64Type};
use serde_json::Value;

use super::support::*;

/// Values of `runs.parquet` for all classes together, by cell, task and metric.
fn value(runs: &RecordBatch, cell: u64, task: &str, metric: &str) -> f64 {
    let column = |name| strings(runs, name);
    let (tasks, metrics, classes) = (column("task"), column("metric"), column("class"));
    let cells = runs.column_by_name("cell").unwrap().as_primitive::<UInt64Type>();
    let values = runs.column_by_name("value").unwrap().as_primitive::<Float64Type>();
    let row = (0..runs.num_rows()).find(|&row| {
        cells.value(row) == cell
            && tasks[row].as_deref() == Some(task)
            && metrics[row].as_deref() == Some(metric)
            && classes[row].is_none()
    });
    values.value(row.unwrap_or_else(|| panic!("no {metric} of {task} in cell {cell}")))
}

/// Runs a sweep of the repository into a scratch folder.
fn sample_sweep(scratch: &Scratch, name: &str) -> (String, RecordBatch) {
    let file = project(&format!("jobs/sweeps/{name}.toml"));
    let set = format!("out={}", scratch.arg("out"));
    let stderr = succeed(&["eval", file.to_str().unwrap(), "--set", &set]);
    let out = scratch.path("out").join(name);
    let report = std::fs::read_to_string(out.join("report.html")).unwrap();
    for from_outside in ["<script", "src=", "href=", "@import", "url("] {
        assert!(!report.contains(from_outside), "the report holds {from_outside}");
    }
    assert!(report.contains("<svg") && report.ends_with("</html>\n"));
    (stderr, read_parquet(out.join("runs.parquet")))
}

#[test]
fn tickets_are_as_accurate_as_transformers_says_and_thresholds_share_predictions() {
    let scratch = Scratch::new();
    let (stderr, runs) = sample_sweep(&scratch, "tickets");
    assert!(
        stderr.contains("4 runs of 2 different predictions (0 from an earlier run), weights loaded 1 times"),
        "{stderr}"
    );
    assert!((value(&runs, 0, "topics", "accuracy") - 0.989).abs() < 1e-9);
    assert_eq!(value(&runs, 0, "topics", "coverage"), 1.0);
    assert!(value(&runs, 1, "topics", "accuracy") > value(&runs, 0, "topics", "accuracy"));
    assert!(value(&runs, 1, "topics", "coverage") < 1.0);

    let comparisons = read_parquet(scratch.path("out/tickets/comparisons.parquet"));
    assert_eq!(comparisons.num_rows(), 6);
    let (again, runs_again) = sample_sweep(&scratch, "tickets");
    assert!(again.contains("2 different predictions (2 from an earlier run), weights loaded 0 times"), "{again}");
    assert_eq!(runs, runs_again);
}

#[test]
fn entities_are_found_as_the_command_finds_them() {
    let scratch = Scratch::new();
    let (_, runs) = sample_sweep(&scratch, "pii");
    assert_eq!(format!("{:.4}", value(&runs, 0, "entities", "micro_f1")), "0.9264");
    assert_eq!(format!("{:.4}", value(&runs, 0, "entities", "recall")), "0.9280");
}

#[test]
fn a_language_model_writes_chooses_and_reads() {
    let scratch = Scratch::new();
    let (_, runs) = sample_sweep(&scratch, "sorting");
    assert_eq!(value(&runs, 0, "write", "exact_match"), 1.0);
    assert!(value(&runs, 1, "write", "exact_match") < 1.0, "temperature 1.5 changes nothing");
    assert_eq!(value(&runs, 4, "choose", "acc"), 1.0);
    assert!(value(&runs, 6, "read", "token_perplexity") > 1.0);
}

#[test]
fn choices_are_those_of_the_goldens() {
    for name in ["lm-window", "lm-full-tied-bf16"] {
        let path = project(&format!("tests/goldens/goldens/{name}.json"));
        let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let documents = golden["multiple_choice"].as_array().unwrap();
        let mut choices = ListBuilder::new(StringBuilder::new());
        for document in documents {
            let of = document["choices"].as_array().unwrap();
            choices.append_value(of.iter().map(|choice| choice["choice"].as_str()));
        }
        let text = |key: &str| documents.iter().map(|document| document[key].as_str()).collect::<StringArray>();
        let best = documents.iter().map(|document| document["best"].as_u64().map(|best| best as u32));
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("context", Arc::new(text("context"))),
            ("choices", Arc::new(choices.finish())),
            ("best", Arc::new(best.collect::<UInt32Array>())),
        ];
        let scratch = Scratch::new();
        scratch.parquet("in.parquet", columns);
        let sweep = format!(
            "output = 'out'\nresamples = 10\n[settings]\nmodel = '{}'\ntext_column = 'context'\n[[task]]\nname = 'goldens'\n\
             kind = 'multiple_choice'\ninput = ['in.parquet']\nchoices_column = 'choices'\ntruth_column = 'best'\n\
             choice_delimiter = ''\n",
            checkpoint(name)
        );
        succeed(&["eval", &scratch.write("sweep.toml", sweep)]);
        let runs = read_parquet(scratch.path("out/runs.parquet"));
        assert_eq!(value(&runs, 0, "goldens", "acc"), 1.0, "{name}");

        let folder = strings(&runs, "predictions")[0].clone().unwrap();
        let predictions = read_parquet(scratch.path("out").join(folder));
        let ours = predictions.column_by_name("logprob").unwrap().as_primitive::<Float64Type>();
        let theirs = documents.iter().flat_map(|document| document["choices"].as_array().unwrap());
        let mut compared = 0;
        for (ours, choice) in ours.iter().zip(theirs) {
            let theirs = choice["loglikelihood_f64"].as_f64().unwrap();
            assert!((ours.unwrap() - theirs).abs() < 1e-3, "{name} {choice}: {ours:?}");
            compared += 1;
        }
        assert_eq!(compared, predictions.num_rows());
    }
}

/// A sweep of two checkpoints and two limits over small units.
fn killed_sweep(scratch: &Scratch, output: &str) -> String {
    let models = ["cls-window-sharded", "cls-nopad"].map(|name| format!("'{}'", checkpoint(name))).join(", ");
    scratch.write(
        &format!("{output}.toml"),
        format!(
            "output = '{output}'\nresamples = 20\n[settings]\nunit_rows = 100\n[matrix]\nmodel = [{models}]\nmax_length = [20, 40]\n\
             threshold = [0.0, 0.5]\n[[task]]\nname = 'labels'\nkind = 'classification'\ninput = ['in.parquet']\n\
             truth_column = 'truth'\n"
        ),
    )
}

/// All but what a clock says and where files lie.
fn results_of(output: &Path) -> RecordBatch {
    let runs = read_parquet(output.join("runs.parquet"));
    let kept: Vec<usize> = (0..runs.num_columns())
        .filter(|&column| !["seconds", "tokens_per_second"].contains(&runs.schema().field(column).name().as_str()))
        .collect();
    runs.project(&kept).unwrap()
}

#[test]
fn a_sweep_that_is_killed_and_resumed_is_one_that_was_not() {
    let scratch = Scratch::new();
    let texts: Vec<String> = (0..1500).map(|row| "some words ".repeat(1 + row * 13 % 17) + &row.to_string()).collect();
    let truth = ["positive", "negative", "neutral"];
    scratch.parquet(
        "in.parquet",
        vec![
            ("text", Arc::new(StringArray::from_iter_values(&texts)) as ArrayRef),
            ("truth", Arc::new(StringArray::from_iter_values((0..texts.len()).map(|row| truth[row % 3])))),
        ],
    );
    succeed(&["eval", &killed_sweep(&scratch, "whole")]);
    let sweep = killed_sweep(&scratch, "killed");
    let mut kills = 0;
    for attempt in 0u64.. {
        assert!(attempt < 200, "the sweep never ends");
        let mut child = program(&["eval", &sweep, "-q"]).spawn().unwrap();
        // Later each time, so that it is stopped in every stage and ends at last.
        std::thread::sleep(Duration::from_millis(5 + attempt * 23));
        if child.try_wait().unwrap().is_some() {
            break;
        }
        child.kill().unwrap();
        kills += i32::from(child.wait().unwrap().code().is_none());
    }
    assert!(kills >= 3, "it was killed {kills} times only");
    succeed(&["eval", &sweep]);
    let (whole, killed) = (results_of(&scratch.path("whole")), results_of(&scratch.path("killed")));
    assert_eq!(whole, killed);
    let tables = ["whole", "killed"].map(|name| read_parquet(scratch.path(name).join("comparisons.parquet")));
    assert_eq!(tables[0], tables[1]);
    for folder in strings(&whole, "predictions").into_iter().flatten() {
        let [whole, killed] = ["whole", "killed"].map(|name| read_parquet(scratch.path(name).join(&folder)));
        assert_eq!(whole, killed);
    }
}

#[test]
fn a_wrong_sweep_is_refused_with_what_to_do() {
    let scratch = Scratch::new();
    let (model, input) = tickets();
    let write = |settings: &str, task: &str| {
        let text = format!(
            "output = 'out'\n[settings]\nmodel = '{model}'\nlimit = 5\n{settings}\n[[task]]\nname = 'topics'\n\
             kind = 'classification'\ninput = ['{input}']\n{task}\n"
        );
        scratch.write("sweep.toml", text)
    };
    let truth = "truth_column = 'topic'";
    for (settings, task, says) in [
        ("[matirx]\na = [1]", truth, "did you mean 'matrix'?"),
        ("max_lenght = 4", truth, "did you mean 'max_length'?"),
        ("temperature = 1.0", truth, "has no key 'temperature'"),
        ("", "truth_column = 'topci'", "did you mean 'topic'?"),
        ("", "", "needs a truth_column"),
        ("threshold = 'high'", truth, "topics"),
        ("", "truth_column = 'topic'\n[task.matrix]\nthreads = [1, 2]", "set it in [settings]"),
        ("text_column = 'txet'", truth, "did you mean 'text'?"),
    ] {
        let message = fail(78, &["eval", &write(settings, task)]);
        assert!(message.contains(says), "{settings} {task}: {message}");
        assert!(!scratch.path("out").join("runs.parquet").exists());
    }
    fail(78, &["eval", &scratch.arg("nothing.toml")]);
    let sweep = write("", truth);
    succeed(&["eval", &sweep, "--dry-run"]);
    scratch.write("out/mine.txt", "not a sweep's");
    assert!(fail(73, &["eval", &sweep]).contains("not a sweep's"));
}
