//! `generate --params-column`: settings that rows bring themselves.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float32Array, Float64Array, Int64Array, ListBuilder, NullArray,
    StringArray, StringBuilder, StructArray, UInt64Array,
};
use arrow::buffer::NullBuffer;
use arrow::datatypes::{Field, Fields};

use super::support::*;

const PROMPTS: [&str; 8] = ["The cat", "A dog runs", "The cat", "One", "Two", "The cat", "A dog runs", "End"];

fn params(fields: Vec<(&str, ArrayRef)>, valid: Option<Vec<bool>>) -> ArrayRef {
    let (names, arrays): (Vec<_>, Vec<_>) = fields.into_iter().unzip();
    let fields: Fields =
        names.iter().zip(&arrays).map(|(name, array)| Field::new(*name, array.data_type().clone(), true)).collect();
    Arc::new(StructArray::new(fields, arrays, valid.map(NullBuffer::from)))
}

fn input(scratch: &Scratch, name: &str, params: ArrayRef) -> String {
    let texts: StringArray = PROMPTS.iter().map(|text| Some(*text)).collect();
    let rows: Int64Array = (0..8).map(Some).collect();
    scratch.parquet(name, vec![("text", Arc::new(texts)), ("row", Arc::new(rows)), ("own", params)])
}

fn generate(scratch: &Scratch, input: &str, output: &str, flags: &[&str]) -> arrow::array::RecordBatch {
    let (output, model) = (scratch.arg(output), checkpoint("lm-window"));
    let common = ["generate", "-i", input, "-o", &output, "--model", &model];
    succeed(&[&common[..], flags].concat());
    read_parquet(&output)
}

/// Each row with its own settings gives what a job of these settings gives for that row, alone and in a batch.
#[test]
fn a_row_with_its_own_settings_is_a_job_of_these_settings() {
    let scratch = Scratch::new();
    let own = params(
        vec![
            ("max_tokens", Arc::new(Int64Array::from(vec![None, Some(4), None, Some(9), None, Some(2), None, None]))),
            (
                "temperature",
                Arc::new(Float64Array::from(vec![None, None, Some(0.9), Some(1.2), None, Some(0.7), Some(0.0), None])),
            ),
            (
                "seed",
                Arc::new(UInt64Array::from(vec![None, None, Some(11), Some(u64::MAX), None, None, Some(3), None])),
            ),
            ("top_k", Arc::new(Int64Array::from(vec![None, None, Some(20), None, None, None, None, None]))),
            ("min_p", Arc::new(Float32Array::from(vec![None, None, None, Some(0.02), None, None, None, None]))),
            ("repetition_penalty", Arc::new(Int64Array::from(vec![None, None, None, None, Some(2), None, None, None]))),
            ("stop", Arc::new(StringArray::from(vec![None, None, None, None, None, None, None, Some("e")]))),
            ("presence_penalty", Arc::new(NullArray::new(8))),
        ],
        Some(vec![false, true, true, true, true, true, true, true]),
    );
    let input = input(&scratch, "in.parquet", own);
    let defaults = ["--max-tokens", "7", "--temperature", "0.8", "--seed", "5"];
    let flags = [&defaults[..], &["--params-column", "own"]].concat();
    let together = generate(&scratch, &input, "together", &flags);
    assert!(strings(&together, "error").iter().all(Option::is_none));
    let completions = strings(&together, "completion");

    // The same settings as flags; the last --flag counts.
    let as_flags: [&[&str]; 8] = [
        &["--max-tokens", "7", "--temperature", "0.8", "--seed", "5"],
        &["--max-tokens", "4", "--temperature", "0.8", "--seed", "5"],
        &["--max-tokens", "7", "--temperature", "0.9", "--seed", "11", "--top-k", "20"],
        &["--max-tokens", "9", "--temperature", "1.2", "--seed", "18446744073709551615", "--min-p", "0.02"],
        &["--max-tokens", "7", "--temperature", "0.8", "--seed", "5", "--repetition-penalty", "2"],
        &["--max-tokens", "2", "--temperature", "0.7", "--seed", "5"],
        &["--max-tokens", "7", "--temperature", "0", "--seed", "3"],
        &["--max-tokens", "7", "--temperature", "0.8", "--seed", "5", "--stop", "e"],
    ];
    for (row, settings) in as_flags.iter().enumerate() {
        let filter = format!("row = {row}");
        let alone = [&flags[..], &["--where", &filter]].concat();
        let alone = generate(&scratch, &input, &format!("alone-{row}"), &alone);
        assert_eq!(strings(&alone, "completion")[0], completions[row], "row {row} alone");
        let plain =
            generate(&scratch, &input, &format!("plain-{row}"), &[settings, &["--where", &filter][..]].concat());
        assert_eq!(strings(&plain, "completion")[0], completions[row], "row {row} as a job");
    }
    // Rows 0, 2 and 5 have one prompt and differ in their settings.
    assert_ne!(completions[0], completions[2]);

    // The column may be left out of the output, and takes part in what the job is.
    let kept = generate(&scratch, &input, "kept", &[&flags[..], &["--keep", "row"]].concat());
    assert_eq!(strings(&kept, "completion"), completions);
    assert!(kept.column_by_name("own").is_none());
    let (output, model) = (scratch.arg("kept"), checkpoint("lm-window"));
    let another = ["generate", "-i", &input, "-o", &output, "--model", &model, "--keep", "row", "--resume"];
    let message = fail(78, &[&another[..], &defaults].concat());
    assert!(message.contains("params_column"), "{message}");
}

#[test]
fn lists_and_switches_override_the_jobs() {
    let scratch = Scratch::new();
    let model = checkpoint("lm-window");
    let plain = input(&scratch, "plain.parquet", params(vec![("ignore_eos", Arc::new(NullArray::new(8)))], None));
    let flags = ["--max-tokens", "12", "--ignore-eos", "--params-column", "own"];
    let plain = generate(&scratch, &plain, "plain", &flags);
    assert!(strings(&plain, "finish_reason").iter().all(|reason| reason.as_deref() == Some("length")));
    let completions: Vec<String> = strings(&plain, "completion").into_iter().flatten().collect();
    let nth = |row: usize, n: usize| completions[row].chars().nth(n).unwrap().to_string();

    let mut stops = ListBuilder::new(StringBuilder::new());
    for row in 0..8 {
        match row {
            0 => stops.append_value([Some("no such text".to_owned()), Some(nth(0, 4))]),
            1 => stops.append_value(Vec::<Option<String>>::new()),
            _ => stops.append_null(),
        }
    }
    let ignore_eos: BooleanArray = (0..8).map(|row| (row == 3).then_some(true)).collect();
    let own = params(vec![("stop", Arc::new(stops.finish())), ("ignore_eos", Arc::new(ignore_eos))], None);
    let input = input(&scratch, "lists.parquet", own);
    let every_token: Vec<String> = (0..768).map(|id: u32| id.to_string()).collect();
    let ids = every_token.join(",");
    let (stop, output) = (nth(1, 3), scratch.arg("lists"));
    let flags = ["--max-tokens", "12", "--stop", &stop, "--params-column", "own", "--stop-token-ids", &ids];
    succeed(&[&["generate", "-i", &input, "-o", &output, "--model", &model][..], &flags].concat());
    let results = read_parquet(&output);
    let tokens = counts(&results, "completion_tokens");
    assert_eq!(tokens[2], Some(1), "any token ends the others' completions");
    assert_eq!(tokens[3], Some(12), "ignore_eos leaves no token that ends this one's");

    let flags = ["--max-tokens", "12", "--ignore-eos", "--stop", &stop, "--params-column", "own"];
    let results = generate(&scratch, &input, "stops", &flags);
    let results = strings(&results, "completion");
    assert_eq!(results[0].as_deref(), completions[0].split(&nth(0, 4)).next());
    assert_eq!(results[1].as_ref(), Some(&completions[1]), "an empty list takes the job's stop strings away");
    assert_eq!(results[4].as_deref(), completions[4].split(&stop).next(), "a null leaves them");
}

#[test]
fn bad_values_fail_their_rows_and_bad_fields_the_job() {
    let scratch = Scratch::new();
    let model = checkpoint("lm-window");
    let mut stops = ListBuilder::new(StringBuilder::new());
    (0..8).for_each(|row| match row {
        5 => stops.append_value([None::<&str>]),
        6 => stops.append_value([Some("")]),
        _ => stops.append_null(),
    });
    let own = params(
        vec![
            ("temperature", Arc::new(Float64Array::from(vec![-1.0, 0.0, f64::NAN, 0.0, 0.0, 0.0, 0.0, 0.5]))),
            ("max_tokens", Arc::new(Int64Array::from(vec![3, 0, 3, -7, 3, 3, 3, 3]))),
            ("min_tokens", Arc::new(Int64Array::from(vec![0, 0, 0, 0, 4, 0, 0, 0]))),
            ("stop", Arc::new(stops.finish())),
        ],
        None,
    );
    let bad = input(&scratch, "bad.parquet", own);
    let results = generate(&scratch, &bad, "bad", &["--params-column", "own"]);
    let errors = strings(&results, "error");
    for (row, wanted) in [
        (0, "own.temperature is -1"),
        (1, "own.max_tokens is 0"),
        (2, "own.temperature is NaN"),
        (3, "own.max_tokens is -7; it has to be 0 or more"),
        (4, "own.min_tokens is 4, more than the 3 tokens"),
        (5, "own.stop holds a null"),
        (6, "own.stop holds an empty text"),
    ] {
        assert!(errors[row].as_ref().unwrap().starts_with(wanted), "{:?}", errors[row]);
        assert!(strings(&results, "completion")[row].is_none());
    }
    assert_eq!((errors[7].as_ref(), counts(&results, "completion_tokens")[7]), (None, Some(3)));

    let refused = |own: ArrayRef| {
        let (input, output) = (input(&scratch, "refused.parquet", own), scratch.arg("refused"));
        fail(64, &["generate", "-i", &input, "-o", &output, "--model", &model, "--params-column", "own"])
    };
    let zeros: ArrayRef = Arc::new(Int64Array::from(vec![0; 8]));
    let message = refused(params(vec![("temprature", zeros.clone())], None));
    assert!(message.contains("'temprature'") && message.contains("did you mean 'temperature'?"), "{message}");
    let message = refused(params(vec![("zzz", zeros.clone())], None));
    assert!(message.contains("max_tokens, min_tokens"), "{message}");
    let message = refused(params(vec![("temperature", Arc::new(StringArray::from(vec!["0"; 8])))], None));
    assert!(message.contains("Utf8") && message.contains("a number is needed"), "{message}");
    let message = refused(params(vec![("max_tokens", Arc::new(Float64Array::from(vec![1.0; 8])))], None));
    assert!(message.contains("Float64") && message.contains("an integer is needed"), "{message}");
    assert!(refused(zeros).contains("a struct is needed"));
    let (bad, output) = (scratch.arg("bad.parquet"), scratch.arg("none"));
    let message = fail(64, &["generate", "-i", &bad, "-o", &output, "--model", &model, "--params-column", "owm"]);
    assert!(message.contains("did you mean 'own'?") && message.contains("--params-column"), "{message}");
    assert!(!scratch.path("refused").exists());
}

/// Structs come from JSON, too, with whole numbers where a fraction could stand.
#[test]
fn settings_from_json_lines() {
    let scratch = Scratch::new();
    let input = scratch.write(
        "in.jsonl",
        r#"{"text":"The cat","own":{"temperature":1,"max_tokens":5}}
{"text":"The cat","own":{"max_tokens":2,"stop":null}}
{"text":"The cat"}
"#,
    );
    let results = generate(&scratch, &input, "out", &["--params-column", "own", "--max-tokens", "3", "--ignore-eos"]);
    assert_eq!(counts(&results, "completion_tokens"), [Some(5), Some(2), Some(3)]);
    assert!(results.column_by_name("own").unwrap().as_struct().column_by_name("temperature").is_some());
}
