//! `generate` with `--choices`, `--json-schema` and `--regex`.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, StructArray};
use arrow::datatypes::{DataType, Field};
use serde_json::Value;

use super::support::*;

const SCHEMA: &str = r#"{"type": "object", "properties": {"n": {"type": "integer"}, "why": {"type": "string", "maxLength": 5}},
    "required": ["n", "why"], "additionalProperties": false}"#;

fn prompts(scratch: &Scratch) -> String {
    let texts: Vec<String> = (0..30).map(|i| "The cat sat. ".repeat(i % 4) + &format!("Row {i}")).collect();
    scratch.texts("in.parquet", texts.iter().map(|text| Some(text.as_str())))
}

fn args<'a>(input: &'a str, output: &'a str, model: &'a str, extra: &[&'a str]) -> Vec<&'a str> {
    [&["generate", "-i", input, "-o", output, "--model", model][..], extra].concat()
}

#[test]
fn completions_keep_to_choices_schema_and_pattern() {
    let scratch = Scratch::new();
    let (input, model) = (prompts(&scratch), checkpoint("lm-window"));
    let schema = scratch.write("answer.json", SCHEMA);
    let drawn = ["--temperature", "1.5", "--seed", "3"];
    let run = |name: &str, extra: &[&str]| {
        let output = scratch.arg(name);
        succeed(&args(&input, &output, &model, &[&drawn[..], extra].concat()));
        let results = read_parquet(&output);
        assert!(strings(&results, "error").iter().all(Option::is_none), "{:?}", strings(&results, "error"));
        results
    };
    let choices = run("choices", &["--choices", "yes,no,naïve", "--choice", "well, perhaps"]);
    let mut seen: Vec<String> = strings(&choices, "completion").into_iter().flatten().collect();
    seen.sort();
    seen.dedup();
    assert!(seen.iter().all(|text| ["yes", "no", "naïve", "well, perhaps"].contains(&&text[..])), "{seen:?}");
    assert!(seen.len() > 2, "{seen:?}");

    let json = run("json", &["--json-schema", &schema, "--max-tokens", "200", "--n", "3"]);
    let samples = json.column_by_name("completions").unwrap().as_list::<i32>();
    let mut texts = 0;
    for row in 0..samples.len() {
        let entries = samples.value(row);
        for text in entries.as_struct().column(0).as_string::<i32>().iter().flatten() {
            let value: Value = serde_json::from_str(text).unwrap();
            assert!(value["n"].is_number() && value["why"].as_str().unwrap().chars().count() <= 5, "{value}");
            assert_eq!(value.as_object().unwrap().len(), 2);
            texts += 1;
        }
    }
    assert_eq!(texts, 90);

    let pattern = ["--regex", r"[A-Z]{2}-[0-9]{3}", "--logprobs"];
    let matching = run("regex", &pattern);
    for text in strings(&matching, "completion").into_iter().flatten() {
        let bytes = text.as_bytes();
        assert_eq!((bytes.len(), bytes[2]), (6, b'-'), "{text}");
        assert!(bytes[..2].iter().all(u8::is_ascii_uppercase) && bytes[3..].iter().all(u8::is_ascii_digit), "{text}");
    }
    let reasons = strings(&matching, "finish_reason");
    assert!(reasons.iter().all(|reason| reason.as_deref() == Some("stop")));
    // Other company, the same bits.
    for (name, extra) in [("units", ["--unit-rows", "4"]), ("tokens", ["--max-batch-tokens", "24"])] {
        assert!(run(name, &[&pattern[..], &extra].concat()) == matching, "{name}");
    }
}

#[test]
fn a_cut_completion_is_an_error_of_its_row() {
    let scratch = Scratch::new();
    let (input, output, model) = (prompts(&scratch), scratch.arg("out"), checkpoint("lm-window"));
    let limits: ArrayRef = Arc::new((0..30).map(|row| (row % 2 == 0).then_some(4)).collect::<Int64Array>());
    let own = StructArray::from(vec![(Arc::new(Field::new("max_tokens", DataType::Int64, true)), limits)]);
    let texts = read_parquet(&input).column(0).clone();
    let input = scratch.parquet("own.parquet", vec![("text", texts), ("own", Arc::new(own))]);
    succeed(&args(&input, &output, &model, &["--regex", "[0-9]{20}", "--params-column", "own", "--max-tokens", "30"]));
    let results = read_parquet(&output);
    for row in 0..30 {
        let (completion, error) = (&strings(&results, "completion")[row], &strings(&results, "error")[row]);
        match row % 2 {
            0 => assert!(
                completion.is_none() && error.as_ref().unwrap().starts_with("cut at max_tokens (4)"),
                "{error:?}"
            ),
            _ => assert_eq!((completion.as_ref().unwrap().len(), error), (20, &None)),
        }
    }
    // Too short for a choice: told before anything runs, and for a row's own limit in its row.
    let message =
        fail(64, &args(&input, &scratch.arg("no"), &model, &["--choices", "alpha,beta", "--max-tokens", "3"]));
    assert!(message.contains("--max-tokens is 3") && message.contains("can take 6 tokens"), "{message}");
    let output = scratch.arg("choices");
    succeed(&args(&input, &output, &model, &["--choices", "alpha,beta", "--params-column", "own"]));
    let errors = strings(&read_parquet(&output), "error");
    assert!(errors[0].as_ref().unwrap().contains("own.max_tokens is 4") && errors[1].is_none(), "{errors:?}");
}

#[test]
fn grammars_are_checked_first_and_are_part_of_the_job_by_content() {
    let scratch = Scratch::new();
    let (input, output, model) = (prompts(&scratch), scratch.arg("out"), checkpoint("lm-window"));
    let wrong = |extra: &[&str]| fail(64, &args(&input, &output, &model, extra));
    let broken = scratch.write("broken.json", "{\"type\": \"object\",\n \"properties\": }");
    let message = wrong(&["--json-schema", &broken]);
    assert!(message.contains("broken.json") && message.contains("line 2 column 16"), "{message}");
    let unknown = scratch.write("unknown.json", r#"{"type": "array", "uniqueItems": true}"#);
    let message = wrong(&["--json-schema", &unknown]);
    assert!(message.contains("unknown.json") && message.contains("uniqueItems"), "{message}");
    assert!(wrong(&["--json-schema", &scratch.arg("none.json")]).contains("none.json"));
    let message = wrong(&["--regex", "a(b"]);
    assert!(message.contains("--regex: unclosed group"), "{message}");
    assert!(wrong(&["--choices", "a,,b"]).contains("--choices: a choice is empty"));
    assert!(!scratch.path("out").exists());

    let here = scratch.write("here.json", SCHEMA);
    let flags = |schema| ["--max-tokens", "99", "--limit", "3", "--json-schema", schema];
    succeed(&args(&input, &output, &model, &flags(&here)));
    // The same schema elsewhere, laid out in another way, is the same job; another one is not.
    let there = scratch.write("there/moved.json", SCHEMA.replace(": ", ":  \n"));
    assert!(succeed(&args(&input, &output, &model, &flags(&there))).contains("nothing to do"));
    let other = scratch.write("here.json", SCHEMA.replace("5", "6"));
    let message = fail(78, &args(&input, &output, &model, &[&flags(&other)[..], &["--resume"]].concat()));
    assert!(message.contains("grammar"), "{message}");
    let twice = run(&args(&input, &output, &model, &["--regex", "a", "--choices", "a"]));
    assert_eq!(twice.status.code(), Some(64));
}
