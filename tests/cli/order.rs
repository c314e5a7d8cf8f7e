//! Rows come out in the order in which they went in, to the bit the same, however many threads compute them, however their lengths
//! lie, and whatever else the machine does meanwhile.

use std::collections::BTreeMap;
use std::process::Stdio;

use super::support::*;

const ROWS: usize = 700;

/// Texts whose lengths are as unkind as they get to a packer, or to a pipeline of stages.
fn distributions() -> [(&'static str, Vec<String>); 4] {
    let mixed = |row: usize| format!("{} row {}", "some words ".repeat(row * 13 % 29), row % 400);
    let mut sorted: Vec<String> = (0..ROWS).map(mixed).collect();
    sorted.sort_by_key(String::len);
    let reversed = sorted.iter().rev().cloned().collect();
    let mut giant: Vec<String> = (0..ROWS).map(|row| format!("row {row}")).collect();
    giant[ROWS / 3] = "a very long text ".repeat(300);
    [
        ("equal", (0..ROWS).map(|row| format!("row number {:04}", row % 300)).collect()),
        ("giant", giant),
        ("sorted", sorted),
        ("reversed", reversed),
    ]
}

/// Runs every distribution with 1, 2 and 8 threads, all at once; each text's result, by distribution.
fn run_all(scratch: &Scratch, args: &[&str]) {
    let mut by_text: BTreeMap<String, serde_json::Value> = BTreeMap::new();
    for (name, texts) in distributions() {
        let input = scratch.texts(&format!("{name}.parquet"), texts.iter().map(|text| Some(text.as_str())));
        let runs = ["1", "2", "8"].map(|threads| {
            let output = scratch.arg(&format!("{name}-{threads}.jsonl"));
            let common = ["-i", &input, "-o", &output, "--threads", threads, "--unit-rows", "150", "-q"];
            let run = program(&[args, &common].concat()).stderr(Stdio::piped()).spawn().unwrap();
            (output, run)
        });
        let outputs = runs.map(|(output, run)| {
            let ended = run.wait_with_output().unwrap();
            assert!(ended.status.success(), "{name}: {}", String::from_utf8_lossy(&ended.stderr));
            std::fs::read_to_string(output).unwrap()
        });
        assert!(outputs[0] == outputs[1] && outputs[0] == outputs[2], "{name}: threads changed the output");
        let lines: Vec<serde_json::Value> =
            outputs[0].lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), ROWS, "{name}");
        for (line, text) in lines.into_iter().zip(&texts) {
            assert_eq!(line["text"].as_str(), Some(text.as_str()), "{name}: rows are out of order");
            assert!(line["error"].is_null(), "{name}: {line}");
            // Whatever company and place it has, the same text gets the same result.
            let before = by_text.entry(text.clone()).or_insert_with(|| line.clone());
            assert_eq!(*before, line, "{name}");
        }
    }
}

#[test]
fn a_head_gives_the_same_bytes_with_any_number_of_threads_and_any_lengths() {
    let scratch = Scratch::new();
    let model = checkpoint("cls-window-sharded");
    run_all(&scratch, &["classify", "--model", &model, "--top-k", "all"]);
}

#[test]
fn completions_are_the_same_bytes_with_any_number_of_threads_and_any_lengths() {
    let scratch = Scratch::new();
    let model = checkpoint("lm-window");
    run_all(&scratch, &["generate", "--model", &model, "--max-tokens", "6"]);
}
