//! Results equal to transformers', through the command line.

use serde_json::Value;

use super::support::*;

pub fn golden(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(project(&format!("tests/goldens/goldens/{name}.json"))).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    golden["rows"].as_array().unwrap().clone()
}

/// Classifies a golden set's texts with extra flags.
fn classify(name: &str, extra: &[&str]) -> (Vec<Value>, arrow::array::RecordBatch) {
    let rows = golden(name);
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", rows.iter().map(|row| row["text"].as_str()));
    let output = scratch.arg("out");
    let model = checkpoint(name);
    // A small budget, so that rows share batches with rows of other lengths.
    let mut args = vec!["classify", "-i", &input, "-o", &output, "--model", &model, "--max-batch-tokens", "256"];
    args.extend(extra);
    succeed(&args);
    let results = read_parquet(&output);
    assert_eq!(results.num_rows(), rows.len());
    (rows, results)
}

fn close(ours: f32, theirs: &Value, what: &str) {
    let theirs = theirs.as_f64().unwrap();
    assert!((f64::from(ours) - theirs).abs() < tolerance(), "{what}: {ours}, transformers has {theirs}");
}

#[test]
fn labels_and_scores_equal_the_pipelines() {
    for name in ["cls-window-sharded", "cls-nopad", "cls-pad-is-eos", "cls-multilabel-bf16"] {
        let (rows, results) = classify(name, &["--top-k", "all"]);
        let (labels, scores) = (strings(&results, "predicted_label"), floats(&results, "predicted_score"));
        let all = label_scores(&results, "predicted_scores");
        let tokens = counts(&results, "num_tokens");
        for (i, row) in rows.iter().enumerate() {
            let theirs = row["pipeline_all_scores"].as_array().unwrap();
            let ours = all[i].as_ref().unwrap();
            assert_eq!(ours.len(), theirs.len());
            for theirs in theirs {
                let label = theirs["label"].as_str().unwrap();
                let (_, score) = ours.iter().find(|(ours, _)| ours == label).unwrap();
                close(*score, &theirs["score"], &format!("{name} row {i} label {label}"));
            }
            assert!(ours.is_sorted_by(|a, b| a.1 >= b.1), "best first");
            assert_eq!(labels[i].as_deref(), theirs[0]["label"].as_str(), "{name} row {i}");
            close(scores[i].unwrap(), &theirs[0]["score"], &format!("{name} row {i}"));
            assert_eq!(tokens[i].unwrap() as usize, row["input_ids"].as_array().unwrap().len());
        }
        assert!(flags(&results, "truncated").iter().all(|truncated| *truncated == Some(false)));
        assert!(strings(&results, "error").iter().all(Option::is_none));
    }
}

#[test]
fn logits_equal_those_of_f32_and_f64() {
    for name in ["cls-window-sharded", "cls-nopad", "cls-pad-is-eos", "cls-multilabel-bf16"] {
        let (rows, results) = classify(name, &["--top-k", "all", "--function-to-apply", "none"]);
        let config: Value =
            serde_json::from_str(&std::fs::read_to_string(format!("{}/config.json", checkpoint(name))).unwrap())
                .unwrap();
        for (i, (row, ours)) in rows.iter().zip(label_scores(&results, "predicted_scores")).enumerate() {
            for (label, logit) in ours.unwrap() {
                let index = config["label2id"][&label].as_u64().unwrap() as usize;
                close(logit, &row["logits_f32"][index], &format!("{name} row {i} {label}"));
                close(logit, &row["logits_f64"][index], &format!("{name} row {i} {label}"));
            }
        }
    }
}

#[test]
fn products_in_f16_are_asked_for_and_near_transformers() {
    let mut largest = 0f64;
    for name in ["cls-window-sharded", "cls-nopad", "cls-pad-is-eos", "cls-multilabel-bf16"] {
        let (mut squares, mut count) = (0f64, 0);
        let (rows, results) = classify(name, &["--dtype", "f16", "--top-k", "all", "--function-to-apply", "none"]);
        let config = std::fs::read_to_string(format!("{}/config.json", checkpoint(name))).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        for (i, (row, ours)) in rows.iter().zip(label_scores(&results, "predicted_scores")).enumerate() {
            for (label, logit) in ours.unwrap() {
                let index = config["label2id"][&label].as_u64().unwrap() as usize;
                let difference = (f64::from(logit) - row["logits_f64"][index].as_f64().unwrap()).abs();
                // One row in a hundred multiplies the same roundings.
                assert!(difference < 4e-2, "{name} row {i} {label}: {difference}");
                largest = largest.max(difference);
                squares += difference * difference;
                count += 1;
            }
        }
        let root_mean_square = (squares / f64::from(count)).sqrt();
        assert!(root_mean_square < 7e-3, "{name}: {root_mean_square}");
    }
    assert!(largest > 1e-4, "--dtype f16 changed nothing: {largest}");
}

#[test]
fn another_precision_is_another_job_and_bf16_is_none_of_the_cpus() {
    let (model, input) = tickets();
    let scratch = Scratch::new();
    let output = scratch.arg("out");
    let args = ["classify", "-i", &input, "-o", &output, "--model", &model, "--limit", "20", "--dtype"];
    let with = |dtype: &'static str, rest: &[&'static str]| [&args[..], &[dtype], rest].concat();
    succeed(&with("f32", &[]));
    succeed(&with("auto", &[]));
    assert!(fail(78, &with("f16", &["--resume"])).contains("dtype"));
    assert!(fail(64, &with("bf16", &["--overwrite"])).contains("--dtype f16"));
}

#[test]
fn regression_gives_the_raw_value() {
    let (rows, results) = classify("cls-regression-f16", &[]);
    for (i, (row, value)) in rows.iter().zip(floats(&results, "predicted_value")).enumerate() {
        close(value.unwrap(), &row["logits_f32"][0], &format!("row {i}"));
        close(value.unwrap(), &row["logits_f64"][0], &format!("row {i}"));
    }
    assert!(results.column_by_name("predicted_label").is_none());
}

#[test]
fn multi_label_lists_every_label_over_the_threshold() {
    let (rows, results) = classify("cls-multilabel-bf16", &["--threshold", "0.45"]);
    let mut over = 0;
    for (row, ours) in rows.iter().zip(label_scores(&results, "predicted_labels")) {
        let theirs = row["pipeline_all_scores"].as_array().unwrap().iter();
        let theirs: Vec<_> = theirs.filter(|s| s["score"].as_f64().unwrap() >= 0.45).map(|s| &s["label"]).collect();
        let ours = ours.unwrap();
        assert_eq!(ours.iter().map(|(label, _)| label.as_str()).collect::<Vec<_>>(), theirs);
        over += ours.len();
    }
    assert!(over > 0 && over < 4 * rows.len(), "the threshold decides something");
}

#[test]
fn sample_data_equal_transformers_predictions_and_the_accuracy_is_told() {
    let (model, input) = tickets();
    let scratch = Scratch::new();
    let output = scratch.arg("out");
    let summary = succeed(&["classify", "-i", &input, "-o", &output, "--model", &model, "--truth-column", "topic"]);
    assert!(summary.contains("accuracy 0.9890 (989 of 1000 rows agree with 'topic')"), "{summary}");
    let results = read_parquet(&output);
    let expected = read_parquet(project("sample-data/tickets-expected.parquet"));
    assert_eq!(results.column_by_name("id"), read_parquet(&input).column_by_name("id"), "in the input's order");
    assert_eq!(strings(&results, "predicted_label"), strings(&expected, "label"));
    let expected_scores =
        arrow::compute::cast(expected.column_by_name("score").unwrap(), &arrow::datatypes::DataType::Float32).unwrap();
    let expected_scores =
        arrow::array::AsArray::as_primitive::<arrow::datatypes::Float32Type>(&expected_scores).clone();
    for (ours, theirs) in floats(&results, "predicted_score").iter().zip(&expected_scores) {
        assert!(f64::from((ours.unwrap() - theirs.unwrap()).abs()) < tolerance());
    }
}
