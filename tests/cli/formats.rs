//! Every input and output format, folders, filters and limits.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, DictionaryArray, Int64Array, LargeStringArray, RecordBatch, StringArray, StringViewArray,
};
use arrow::datatypes::{Int32Type, Int64Type};

use super::support::*;

const TEXTS: [Option<&str>; 5] =
    [Some("The cat sat on the mat."), None, Some(""), Some("Hello, \"world\"\nagain"), Some("naïve 😀")];

fn classify(input: &str, output: &str, extra: &[&str]) -> String {
    let model = checkpoint("cls-window-sharded");
    let mut args = vec!["classify", "-i", input, "-o", output, "--model", &model];
    args.extend(extra);
    succeed(&args)
}

/// Labels and scores of [`TEXTS`] from a plain Parquet file.
fn expected(scratch: &Scratch) -> (Vec<Option<String>>, Vec<Option<f32>>) {
    let input = scratch.texts("expected-in.parquet", TEXTS);
    classify(&input, &scratch.arg("expected"), &[]);
    let results = read_parquet(scratch.path("expected"));
    (strings(&results, "predicted_label"), floats(&results, "predicted_score"))
}

#[test]
fn every_type_of_text_column_gives_the_same_results() {
    let scratch = Scratch::new();
    let (labels, scores) = expected(&scratch);
    assert_eq!(labels.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true, true, true]);
    let columns: [(&str, ArrayRef); 3] = [
        ("large", Arc::new(LargeStringArray::from_iter(TEXTS))),
        ("view", Arc::new(StringViewArray::from_iter(TEXTS))),
        ("dictionary", Arc::new(TEXTS.into_iter().collect::<DictionaryArray<Int32Type>>())),
    ];
    for (name, column) in columns {
        let data_type = column.data_type().clone();
        let input = scratch.parquet(&format!("{name}.parquet"), vec![("text", column)]);
        classify(&input, &scratch.arg(name), &[]);
        let results = read_parquet(scratch.path(name));
        assert_eq!(strings(&results, "predicted_label"), labels, "{name}");
        assert_eq!(floats(&results, "predicted_score"), scores, "{name}");
        assert_eq!(results.column_by_name("text").unwrap().data_type(), &data_type, "the column is kept as it was");
    }
}

#[test]
fn csv_jsonl_and_arrow_are_read_like_parquet() {
    let scratch = Scratch::new();
    let (labels, _) = expected(&scratch);
    let jsonl: String = TEXTS
        .iter()
        .enumerate()
        .map(|(i, text)| serde_json::json!({"id": i, "text": text}).to_string() + "\n")
        .collect();
    let jsonl = scratch.write("in.jsonl", jsonl);
    let batch =
        RecordBatch::try_from_iter(vec![("text", Arc::new(StringArray::from_iter(TEXTS)) as ArrayRef)]).unwrap();
    let arrow = scratch.arg("in.arrow");
    let mut writer =
        arrow::ipc::writer::FileWriter::try_new(std::fs::File::create(&arrow).unwrap(), &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    let stream = scratch.arg("in.arrows");
    let mut writer =
        arrow::ipc::writer::StreamWriter::try_new(std::fs::File::create(&stream).unwrap(), &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    for (name, input) in [("jsonl", jsonl), ("arrow", arrow), ("stream", stream)] {
        classify(&input, &scratch.arg(name), &["--input-format", if name == "jsonl" { "jsonl" } else { "arrow" }]);
        assert_eq!(strings(&read_parquet(scratch.path(name)), "predicted_label"), labels, "{name}");
    }
    // In CSV an empty cell is null, and so the empty text is, too.
    let csv = scratch
        .write("in.csv", "id,text\n0,The cat sat on the mat.\n1,\n2,\n3,\"Hello, \"\"world\"\"\nagain\"\n4,naïve 😀\n");
    classify(&csv, &scratch.arg("csv"), &[]);
    let results = read_parquet(scratch.path("csv"));
    let from_csv = strings(&results, "predicted_label");
    assert_eq!((from_csv.len(), &from_csv[0], &from_csv[2], &from_csv[3]), (5, &labels[0], &None, &labels[3]));
    assert_eq!(results.column_by_name("id").unwrap().as_primitive::<Int64Type>().values(), &[0, 1, 2, 3, 4]);
}

#[test]
fn single_files_of_every_format_hold_the_same_rows() {
    let scratch = Scratch::new();
    let (labels, scores) = expected(&scratch);
    let input = scratch.texts("in.parquet", TEXTS);
    for extension in ["parquet", "arrow", "jsonl", "csv"] {
        let name = format!("single.{extension}");
        classify(&input, &scratch.arg(&name), &["--top-k", "2", "--unit-rows", "2"]);
        assert!(scratch.path(&name).is_file(), "{name}");
        assert!(!scratch.path(&format!(".{name}.mistral-batch")).exists(), "the work folder is gone");
    }
    let parquet = read_parquet(scratch.path("single.parquet"));
    assert_eq!(strings(&parquet, "predicted_label"), labels);
    let reader =
        arrow::ipc::reader::FileReader::try_new(std::fs::File::open(scratch.path("single.arrow")).unwrap(), None)
            .unwrap();
    let batches: Vec<_> = reader.map(Result::unwrap).collect();
    assert_eq!(
        strings(&arrow::compute::concat_batches(&batches[0].schema(), &batches).unwrap(), "predicted_label"),
        labels
    );
    let jsonl = std::fs::read_to_string(scratch.path("single.jsonl")).unwrap();
    for (i, line) in jsonl.lines().enumerate() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(row["predicted_label"].as_str(), labels[i].as_deref());
        assert_eq!(row["predicted_score"].as_f64().map(|score| score as f32), scores[i]);
        assert_eq!(row["predicted_scores"].as_array().map(Vec::len), scores[i].map(|_| 2));
    }
    assert_eq!(jsonl.lines().count(), TEXTS.len());
    let csv = std::fs::read_to_string(scratch.path("single.csv")).unwrap();
    assert!(
        csv.starts_with("text,predicted_label,predicted_score,predicted_scores,num_tokens,truncated,error\n"),
        "{csv}"
    );
}

#[test]
fn folders_globs_and_several_inputs_come_in_order() {
    let scratch = Scratch::new();
    for (name, texts) in [
        ("data/lang=en/b.parquet", ["b1", "b2"]),
        ("data/lang=de/a.parquet", ["a1", "a2"]),
        ("data/lang=en/c.parquet", ["c1", "c2"]),
    ] {
        scratch.texts(name, texts.map(Some));
    }
    scratch.write("data/_SUCCESS.json", "{}");
    classify(&scratch.arg("data"), &scratch.arg("out"), &["--keep", "text,lang"]);
    let results = read_parquet(scratch.path("out"));
    let texts: Vec<_> = strings(&results, "text").into_iter().flatten().collect();
    assert_eq!(texts, ["a1", "a2", "b1", "b2", "c1", "c2"]);
    let languages: Vec<_> = strings(&results, "lang").into_iter().flatten().collect();
    assert_eq!(languages, ["de", "de", "en", "en", "en", "en"]);

    let model = checkpoint("cls-window-sharded");
    let (last, glob) = (scratch.arg("data/lang=en/c.parquet"), scratch.arg("data/*/[ab].parquet"));
    fail(65, &["classify", "-i", &last, "-i", &glob, "-o", &scratch.arg("mixed"), "--model", &model]);
    let glob = scratch.arg("data/lang=en/*.parquet");
    let first = scratch.arg("data/lang=de/a.parquet");
    succeed(&["classify", "-i", &glob, "-i", &first, "-o", &scratch.arg("ordered"), "--model", &model]);
    let texts: Vec<_> = strings(&read_parquet(scratch.path("ordered")), "text").into_iter().flatten().collect();
    assert_eq!(texts, ["b1", "b2", "c1", "c2", "a1", "a2"]);
}

fn numbered(scratch: &Scratch, rows: i64) -> String {
    let texts: StringArray =
        (0..rows).map(|i| Some(format!("text number {i} {}", "x ".repeat((i * 7 % 13) as usize)))).collect();
    let ids = Int64Array::from_iter_values(0..rows);
    scratch.parquet("numbered.parquet", vec![("id", Arc::new(ids)), ("text", Arc::new(texts))])
}

fn ids(results: &RecordBatch) -> Vec<i64> {
    results.column_by_name("id").unwrap().as_primitive::<Int64Type>().values().to_vec()
}

#[test]
fn where_and_limit_choose_rows_across_units() {
    let scratch = Scratch::new();
    let input = numbered(&scratch, 100);
    let choose = |name: &str, extra: &[&str]| {
        let mut args = vec!["--unit-rows", "7", "--keep", "id"];
        args.extend(extra);
        let summary = classify(&input, &scratch.arg(name), &args);
        let chosen = ids(&read_parquet(scratch.path(name)));
        assert!(summary.contains(&format!("{} rows in, {} rows out", chosen.len(), chosen.len())), "{summary}");
        chosen
    };
    assert_eq!(choose("limit", &["--limit", "10"]), (0..10).collect::<Vec<_>>());
    assert_eq!(choose("where", &["--where", "id % 10 = 3"]), (3..100).step_by(10).collect::<Vec<_>>());
    assert_eq!(choose("both", &["--where", "id % 10 = 3 AND length(text) > 5", "-L", "4"]), [3, 13, 23, 33]);
    assert_eq!(choose("more", &["--where", "id >= 95", "-L", "50"]), (95..100).collect::<Vec<_>>());
    assert!(choose("none", &["--where", "id < 0"]).is_empty());
}

#[test]
fn keep_drops_columns_and_the_text_need_not_be_kept() {
    let scratch = Scratch::new();
    let input = numbered(&scratch, 3);
    classify(&input, &scratch.arg("out"), &["--keep", "id"]);
    let names = column_names(&read_parquet(scratch.path("out")));
    assert_eq!(names, ["id", "predicted_label", "predicted_score", "num_tokens", "truncated", "error"]);
    classify(&input, &scratch.arg("bare"), &["--keep", ""]);
    assert_eq!(column_names(&read_parquet(scratch.path("bare")))[0], "predicted_label");
}

#[test]
fn long_texts_are_cut_left_right_or_in_chunks() {
    let scratch = Scratch::new();
    let long = "one two three four five six seven eight nine ten eleven twelve thirteen";
    let input = scratch.texts("in.parquet", [Some(long), Some("short")]);
    let run = |name: &str, extra: &[&str]| {
        classify(&input, &scratch.arg(name), extra);
        let results = read_parquet(scratch.path(name));
        (flags(&results, "truncated"), counts(&results, "num_tokens"), floats(&results, "predicted_score"))
    };
    let (whole_truncated, whole_tokens, whole) = run("whole", &[]);
    assert_eq!(whole_truncated, [Some(false), Some(false)]);
    let (truncated, tokens, right) = run("right", &["--max-length", "12"]);
    assert_eq!((truncated, tokens[0]), (vec![Some(true), Some(false)], Some(12)));
    let (truncated, tokens, left) = run("left", &["--max-length", "12", "--overflow", "truncate-left"]);
    assert_eq!((truncated, tokens[0]), (vec![Some(true), Some(false)], Some(12)));
    let (truncated, tokens, chunked) = run("chunk", &["--max-length", "12", "--overflow", "chunk", "--stride", "4"]);
    assert_eq!(truncated, [Some(false), Some(false)]);
    assert!(tokens[0] > whole_tokens[0], "overlapping chunks are more tokens than the text");
    assert!(right[0] != left[0] && right[0] != whole[0] && chunked[0] != right[0]);
    for short in [right[1], left[1], chunked[1]] {
        assert!((short.unwrap() - whole[1].unwrap()).abs() < 1e-5, "a short text stays as it is");
    }
}
