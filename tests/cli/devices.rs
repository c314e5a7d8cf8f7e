//! Where a job computes: what is refused, and several replicas that share the work.

use super::support::*;

/// The lines of a JSONL output of `command` on `device`.
fn lines(device: &str, command: &[&str]) -> Vec<String> {
    let scratch = Scratch::new();
    let output = scratch.arg("out.jsonl");
    let args = [command, &["-o", &output, "--device", device]].concat();
    let summary = succeed(&args);
    assert!(summary.contains(if device == "cpu" { "on the CPU" } else { "on 2 × the CPU" }), "{summary}");
    std::fs::read_to_string(output).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn two_replicas_give_what_one_gives_in_the_same_order() {
    let (model, input) = tickets();
    // Small batches, so that both replicas have many.
    let classify = ["classify", "-i", &input, "--model", &model, "--limit", "400", "--max-batch-tokens", "256"];
    assert_eq!(lines("cpu", &classify), lines("cpu,cpu", &classify));
}

#[test]
fn two_replicas_complete_from_one_queue() {
    let rows: Vec<String> = (0..60).map(|row| format!("Row {row} of many: {}", "word ".repeat(row % 7))).collect();
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", rows.iter().map(|row| Some(row.as_str())));
    let model = checkpoint("lm-window");
    let generate = [
        "generate",
        "-i",
        &input,
        "--model",
        &model,
        "--max-tokens",
        "12",
        "--temperature",
        "0.7",
        "--n",
        "2",
        "--max-batch-tokens",
        "64",
        "--unit-rows",
        "25",
    ];
    let one = lines("cpu", &generate);
    assert_eq!(one, lines("cpu,cpu", &generate));
    assert_eq!(one.len(), 60);
}

#[test]
fn a_device_that_is_none_is_a_usage_error() {
    let (model, input) = tickets();
    for device in ["gpu", "cpu,cuda:0", "cuda:0,cuda:0"] {
        let scratch = Scratch::new();
        let output = scratch.arg("out");
        let done = run(&["classify", "-i", &input, "-o", &output, "--model", &model, "--device", device]);
        assert_eq!(done.status.code(), Some(64), "{device}");
    }
}
