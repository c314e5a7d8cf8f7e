//! Rows come out in the order in which they went in, however many threads compute them, however their lengths lie, and whatever
//! else the machine does meanwhile. Threads change no bit; company changes nothing but the last digits of scores.

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
            assert!(agree(before, &line), "{name}: {before} and {line}");
        }
    }
}

/// Whether two results are the same; scores, whose sums depend on what is computed with them, within 1e-5.
fn agree(a: &serde_json::Value, b: &serde_json::Value) -> bool {
    use serde_json::Value;
    match (a, b) {
        (Value::Number(a), Value::Number(b)) if a.is_f64() || b.is_f64() => {
            (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-5
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| agree(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.keys().eq(b.keys()) && a.values().zip(b.values()).all(|(a, b)| agree(a, b))
        }
        (a, b) => a == b,
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
