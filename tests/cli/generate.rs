//! `generate` through the command line.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{Float32Type, UInt32Type};
use serde_json::Value;

use super::support::*;

fn golden(name: &str) -> Value {
    let text = std::fs::read_to_string(project(&format!("tests/goldens/goldens/{name}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn generate(input: &str, output: &str, model: &str, extra: &[&str]) -> String {
    let mut args = vec!["generate", "-i", input, "-o", output, "--model", model];
    args.extend(extra);
    succeed(&args)
}

#[test]
fn greedy_completions_equal_those_of_transformers() {
    for name in ["lm-window", "lm-full-tied-bf16"] {
        let scratch = Scratch::new();
        for case in golden(name)["generation"].as_array().unwrap() {
            let options = &case["options"];
            if options.get("num_beams").is_some() {
                continue; // beam search is not offered
            }
            let case_name = case["name"].as_str().unwrap();
            let prompts: Vec<_> = case["prompts"].as_array().unwrap().iter().map(Value::as_str).collect();
            let input = scratch.texts("in.parquet", prompts);
            let output = scratch.arg(case_name);
            let eos = options["eos_token_id"].as_array().unwrap();
            let eos: Vec<_> = eos.iter().map(Value::to_string).collect();
            let (ids, max_tokens) = (eos.join(","), options["max_new_tokens"].to_string());
            let mut flags = vec!["--max-tokens", &max_tokens];
            flags.extend(if eos.is_empty() { vec!["--ignore-eos"] } else { vec!["--stop-token-ids", &ids] });
            let settings = [
                ("repetition_penalty", "--repetition-penalty"),
                ("no_repeat_ngram_size", "--no-repeat-ngram-size"),
                ("min_new_tokens", "--min-tokens"),
            ]
            .map(|(key, flag)| (options.get(key).map(Value::to_string), flag));
            for (value, flag) in &settings {
                flags.extend(value.as_ref().map(|value| [*flag, value]).into_iter().flatten());
            }
            generate(&input, &output, &checkpoint(name), &flags);
            let results = read_parquet(&output);
            let completions = strings(&results, "completion");
            let tokens = counts(&results, "completion_tokens");
            for (row, expected) in case["one_by_one_text"].as_array().unwrap().iter().enumerate() {
                assert_eq!(completions[row].as_deref(), expected.as_str(), "{name} {case_name} row {row}");
                assert_eq!(tokens[row].unwrap() as usize, case["one_by_one"][row].as_array().unwrap().len());
            }
        }
    }
}

#[test]
fn the_sorter_sorts_chats_and_prompts_alike() {
    let scratch = Scratch::new();
    let path = |name: &str| project(name).to_str().unwrap().to_owned();
    let (input, model) = (path("sample-data/sorting.parquet"), path("sample-data/models/digit-sorter"));
    let chats = scratch.arg("chats");
    let summary = generate(&input, &chats, &model, &["--chat-column", "messages", "--truth-column", "answer"]);
    assert!(summary.contains("accuracy 1.0000 (500 of 500"), "{summary}");
    let expected = read_parquet(project("sample-data/sorting-expected.parquet"));
    let results = read_parquet(&chats);
    assert_eq!(strings(&results, "completion"), strings(&expected, "completion"));
    assert!(strings(&results, "finish_reason").iter().all(|reason| reason.as_deref() == Some("stop")));
}

/// Prompts of many lengths, with nulls, in an order that tells.
fn prompts(rows: usize) -> RecordBatch {
    let text = |i: usize| "The cat sat on the mat. ".repeat(i * 7 % 5) + &format!("Row {i}");
    let texts: StringArray = (0..rows).map(|i| (i % 9 != 4).then(|| text(i))).collect();
    let ids = Int64Array::from_iter_values(0..rows as i64);
    RecordBatch::try_from_iter_with_nullable(vec![
        ("id", Arc::new(ids) as ArrayRef, false),
        ("text", Arc::new(texts) as ArrayRef, true),
    ])
    .unwrap()
}

#[test]
fn drawn_completions_depend_on_row_and_seed_and_on_nothing_else() {
    let scratch = Scratch::new();
    let input = scratch.path("in.parquet");
    write_parquet(&input, &prompts(60), 1000);
    let (input, model) = (input.to_str().unwrap().to_owned(), checkpoint("lm-window"));
    let drawn = |name: &str, extra: &[&str]| {
        let mut flags =
            vec!["--max-tokens", "24", "--temperature", "0.9", "--top-p", "0.95", "--seed", "5", "--logprobs"];
        flags.extend(extra);
        generate(&input, &scratch.arg(name), &model, &flags);
        read_parquet(scratch.path(name))
    };
    let usual = drawn("usual", &[]);
    assert_eq!(usual.column_by_name("id"), prompts(60).column_by_name("id"), "in order");
    for (row, completion) in strings(&usual, "completion").iter().enumerate() {
        assert_eq!(completion.is_none(), row % 9 == 4, "a null prompt has no completion");
    }
    // Small units, little memory, few prompt tokens a step: other company for every row, the same bits.
    for (name, extra) in [
        ("units", &["--unit-rows", "7"][..]),
        ("memory", &["--kv-cache-memory", "128k"]),
        ("prefill", &["--max-batch-tokens", "32"]),
        ("one-thread", &["--threads", "1"]),
    ] {
        assert!(drawn(name, extra) == usual, "{name}");
    }
    // The plain way of batching: the same texts, by other arithmetic.
    let plain = drawn("static", &["--batching", "static"]);
    for column in ["completion", "finish_reason", "error"] {
        assert_eq!(strings(&plain, column), strings(&usual, column));
    }
    let filtered = drawn("filtered", &["--where", "id % 3 = 1"]);
    let ids = filtered.column_by_name("id").unwrap().as_primitive::<arrow::datatypes::Int64Type>().values();
    let all = strings(&usual, "completion");
    let expected: Vec<_> = ids.iter().map(|id| all[*id as usize].clone()).collect();
    assert_eq!(strings(&filtered, "completion"), expected, "a row's number is its own, whatever is filtered");

    let several = drawn("several", &["--n", "3"]);
    let completions = several.column_by_name("completions").unwrap().as_list::<i32>();
    let mut differing = 0;
    for (row, first) in strings(&several, "completion").into_iter().enumerate() {
        assert_eq!(first, all[row], "the first of several is the one of one");
        if completions.is_valid(row) {
            let texts = completions.value(row);
            let texts: Vec<_> =
                texts.as_struct().column(0).as_string::<i32>().iter().flatten().map(str::to_owned).collect();
            assert_eq!((texts.len(), texts.first()), (3, first.as_ref()));
            differing += usize::from(texts[0] != texts[1] && texts[1] != texts[2]);
        }
    }
    assert!(differing > 40, "samples of a row are drawn apart");
}

#[test]
fn logprobs_stop_strings_and_lengths_are_told() {
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", [Some("The cat sat on the mat.")]);
    let model = checkpoint("lm-window");
    generate(&input, &scratch.arg("plain"), &model, &["--max-tokens", "10", "--logprobs", "--ignore-eos"]);
    let plain = read_parquet(scratch.path("plain"));
    assert_eq!(strings(&plain, "finish_reason"), [Some("length".to_owned())]);
    let tokens = plain.column_by_name("token_logprobs").unwrap().as_list::<i32>().value(0);
    let tokens = tokens.as_struct();
    assert_eq!(tokens.len(), 10);
    assert!(tokens.column(2).as_primitive::<Float32Type>().values().iter().all(|logprob| *logprob <= 0.0));
    assert!(tokens.column(1).as_primitive::<UInt32Type>().values().iter().all(|id| *id < 768));

    let text = strings(&plain, "completion").remove(0).unwrap();
    let stop: String = text.chars().skip(3).take(2).collect();
    generate(&input, &scratch.arg("stopped"), &model, &["--max-tokens", "10", "--ignore-eos", "--stop", &stop]);
    let stopped = read_parquet(scratch.path("stopped"));
    assert_eq!(strings(&stopped, "finish_reason"), [Some("stop".to_owned())]);
    assert_eq!(strings(&stopped, "completion")[0].as_deref(), text.split(&stop).next());
}

#[test]
fn mistakes_are_told_before_anything_is_computed() {
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", [Some("a")]);
    let (output, model) = (scratch.arg("out"), checkpoint("lm-window"));
    let with = |extra: &[&str]| {
        let mut args = vec!["generate", "-i", &input, "-o", &output, "--model", &model];
        args.extend(extra);
        fail(64, &args)
    };
    assert!(with(&["--temperature=-1"]).contains("temperature"));
    assert!(with(&["--top-p", "0"]).contains("top-p"));
    assert!(with(&["--min-tokens", "9", "--max-tokens", "3"]).contains("min-tokens"));
    assert!(with(&["--n", "2"]).contains("--temperature"));
    assert!(with(&["--overflow", "chunk"]).contains("chunk"));
    let classifier = checkpoint("cls-nopad");
    let message = fail(78, &["generate", "-i", &input, "-o", &output, "--model", &classifier]);
    assert!(
        message.contains("MistralForSequenceClassification") && message.contains("MistralForCausalLM"),
        "{message}"
    );
    assert!(!scratch.path("out").exists());

    // A prompt whose cache is over the limit fails its row, and the others go on.
    let input = scratch.texts("long.parquet", [Some("short"), Some(&"long ".repeat(200))]);
    let flags = ["--kv-cache-memory", "64k", "--max-tokens", "4"];
    generate(&input, &scratch.arg("rows"), &checkpoint("lm-full-tied-bf16"), &flags);
    let results = read_parquet(scratch.path("rows"));
    assert!(strings(&results, "completion")[0].is_some());
    assert!(strings(&results, "error")[1].as_ref().unwrap().contains("key/value cache"));
}

#[test]
fn a_resumed_generation_ends_bit_identical() {
    let scratch = Scratch::new();
    let input = scratch.path("in.parquet");
    write_parquet(&input, &prompts(40), 1000);
    let (input, model) = (input.to_str().unwrap().to_owned(), checkpoint("lm-full-tied-bf16"));
    let flags = ["--unit-rows", "10", "--max-tokens", "12", "--temperature", "1.0"];
    generate(&input, &scratch.arg("whole"), &model, &flags);
    let killed = scratch.path("killed");
    std::fs::create_dir(&killed).unwrap();
    for name in ["_plan.json", "part-000001.parquet"] {
        std::fs::copy(scratch.path("whole").join(name), killed.join(name)).unwrap();
    }
    generate(&input, &scratch.arg("killed"), &model, &[&flags[..], &["--resume"]].concat());
    assert!(read_parquet(&killed) == read_parquet(scratch.path("whole")));
}
