//! The other heads, through the command line: results equal to transformers', and what their flags promise.

use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch, StringArray};
use arrow::datatypes::{Float32Type, Float64Type, UInt32Type};
use safetensors::SafeTensors;
use serde_json::Value;

use super::goldens::golden;
use super::support::*;

/// Runs a command on `texts` with a golden checkpoint.
fn run_on(command: &str, name: &str, texts: &[Option<&str>], extra: &[&str]) -> RecordBatch {
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", texts.iter().copied());
    let (output, model) = (scratch.arg("out"), checkpoint(name));
    // A small budget, so that rows share batches with rows of other lengths.
    let mut args = vec![command, "-i", &input, "-o", &output, "--model", &model, "--max-batch-tokens", "256"];
    args.extend(extra);
    succeed(&args);
    let results = read_parquet(&output);
    assert_eq!(results.num_rows(), texts.len());
    results
}

/// Runs a command on a golden set's texts.
fn run_golden(command: &str, name: &str, extra: &[&str]) -> (Vec<Value>, RecordBatch) {
    let rows = golden(name);
    let texts: Vec<_> = rows.iter().map(|row| row["text"].as_str()).collect();
    let results = run_on(command, name, &texts, extra);
    for (row, tokens) in rows.iter().zip(counts(&results, "num_tokens")) {
        assert_eq!(tokens.unwrap() as usize, row["input_ids"].as_array().unwrap().len());
    }
    assert!(strings(&results, "error").iter().all(Option::is_none));
    (rows, results)
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

#[track_caller]
fn all_close(ours: &[f32], theirs: &[f64], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert!((f64::from(*ours) - theirs).abs() < tolerance(), "{what}: {ours}, transformers has {theirs}");
    }
}

fn embeddings(batch: &RecordBatch) -> Vec<Option<Vec<f32>>> {
    let column = batch.column_by_name("embedding").unwrap().as_fixed_size_list();
    column.iter().map(|row| row.map(|row| row.as_primitive::<Float32Type>().values().to_vec())).collect()
}

fn length(vector: &[f32]) -> f32 {
    vector.iter().map(|value| value * value).sum::<f32>().sqrt()
}

#[test]
fn embeddings_equal_transformers_for_each_pooling() {
    for (flags, key) in [
        (&[][..], "last_pooled_f64"),
        (&["--pooling", "mean"], "mean_pooled_f64"),
        (&["--pooling", "mean", "--normalize"], "mean_pooled_unit_f64"),
    ] {
        let (rows, results) = run_golden("embed", "embedder", flags);
        for (i, (row, ours)) in rows.iter().zip(embeddings(&results)).enumerate() {
            all_close(&ours.unwrap(), &numbers(&row[key]), &format!("row {i} {key}"));
        }
    }
}

#[test]
fn last_embeddings_equal_the_f32_hidden_states() {
    let arrays = std::fs::read(project("tests/goldens/goldens/embedder.safetensors")).unwrap();
    let arrays = SafeTensors::deserialize(&arrays).unwrap();
    let (rows, results) = run_golden("embed", "embedder", &["--pooling", "last"]);
    for (i, (row, ours)) in rows.iter().zip(embeddings(&results)).enumerate() {
        let name = row["last_hidden_state_f32"].as_str().unwrap().strip_prefix('@').unwrap();
        let tensor = arrays.tensor(name).unwrap();
        let values: Vec<f64> =
            tensor.data().chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()).into()).collect();
        let ours = ours.unwrap();
        all_close(&ours, &values[values.len() - ours.len()..], &format!("row {i}"));
    }
}

#[test]
fn an_appended_eos_is_the_literal_one_and_counts_towards_the_limit() {
    let texts = ["Hello world", "", "one two three four five six seven eight nine"];
    let literal: Vec<String> = texts.iter().map(|text| format!("{text}</s>")).collect();
    let literal: Vec<_> = literal.iter().map(|text| Some(text.as_str())).collect();
    let texts = texts.map(Some);
    let appended = run_on("embed", "embedder", &texts, &["--append-eos"]);
    let expected = run_on("embed", "embedder", &literal, &[]);
    assert_eq!(counts(&appended, "num_tokens"), counts(&expected, "num_tokens"));
    for (ours, expected) in embeddings(&appended).into_iter().zip(embeddings(&expected)) {
        all_close(&ours.unwrap(), &expected.unwrap().into_iter().map(f64::from).collect::<Vec<_>>(), "eos");
    }

    let limited = run_on("embed", "embedder", &texts, &["--append-eos", "--max-length", "8"]);
    assert_eq!(counts(&limited, "num_tokens"), [Some(8), Some(2), Some(8)]);
    assert_eq!(flags(&limited, "truncated"), [Some(false), Some(false), Some(true)]);
    let chunked = ["--append-eos", "--max-length", "8", "--overflow", "chunk", "--stride", "0"];
    let chunked = run_on("embed", "embedder", &texts, &chunked);
    // Each chunk has a BOS and an EOS of its own.
    let whole = counts(&expected, "num_tokens")[2].unwrap() - 2;
    assert_eq!(counts(&chunked, "num_tokens")[2], Some(whole + 2 * whole.div_ceil(6)));
}

#[test]
fn a_long_texts_embedding_is_scaled_after_its_chunks_were_joined() {
    let rows = golden("embedder");
    let long = rows.last().unwrap()["text"].as_str();
    let texts = [long, None, Some("short")];
    let flags_given = ["--overflow", "chunk", "--max-length", "64", "--pooling", "mean", "--normalize"];
    let results = run_on("embed", "embedder", &texts, &flags_given);
    let ours = embeddings(&results);
    assert!((length(ours[0].as_ref().unwrap()) - 1.0).abs() < 1e-5);
    assert_eq!(ours[1], None);
    assert!(counts(&results, "num_tokens")[0].unwrap() > 365);
    assert!(flags(&results, "truncated").iter().all(|truncated| *truncated == Some(false)));
}

#[test]
fn embeddings_are_written_in_every_format() {
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", [Some("a"), None]);
    let model = checkpoint("embedder");
    for name in ["out.jsonl", "out.csv", "out.arrow", "out.parquet"] {
        let output = scratch.arg(name);
        succeed(&["embed", "-i", &input, "-o", &output, "--model", &model]);
        assert!(std::fs::metadata(output).unwrap().len() > 64 * 4, "{name}");
    }
    let lines = std::fs::read_to_string(scratch.path("out.jsonl")).unwrap();
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!(first["embedding"].as_array().unwrap().len(), 64);
}

#[test]
fn a_command_refuses_checkpoints_of_other_classes() {
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", [Some("a")]);
    let output = scratch.arg("out");
    for (command, name, found, wanted) in [
        ("embed", "cls-nopad", "MistralForSequenceClassification", "needs a MistralModel or a MistralForCausalLM"),
        ("score", "embedder", "is a MistralModel", "needs a MistralForCausalLM"),
        ("tag", "lm-window", "is a MistralForCausalLM", "needs a MistralForTokenClassification"),
    ] {
        let message = fail(78, &[command, "-i", &input, "-o", &output, "--model", &checkpoint(name)]);
        assert!(message.contains(found) && message.contains(wanted), "{message}");
    }
    assert!(!scratch.path("out").exists());
}

#[test]
fn results_that_are_no_predictions_have_no_truth() {
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", [Some("a")]);
    let output = scratch.arg("out");
    for (command, name) in [("embed", "embedder"), ("score", "lm-window")] {
        let model = checkpoint(name);
        let message = fail(64, &[command, "-i", &input, "-o", &output, "--model", &model, "--truth-column", "text"]);
        assert!(message.contains(&format!("--truth-column does not fit {command}")), "{message}");
    }
}

const LANGUAGE_MODELS: [&str; 2] = ["lm-window", "lm-full-tied-bf16"];

fn doubles(batch: &RecordBatch, column: &str) -> Vec<Option<f64>> {
    batch.column_by_name(column).unwrap().as_primitive::<Float64Type>().iter().collect()
}

/// Each row's tokens with their ids and log-probabilities.
fn token_logprobs(batch: &RecordBatch) -> Vec<Option<Vec<(String, u32, f32)>>> {
    let lists = batch.column_by_name("token_logprobs").unwrap().as_list::<i32>();
    let row = |entries: arrow::array::ArrayRef| {
        let entries = entries.as_struct();
        let tokens = entries.column(0).as_string::<i32>();
        let ids = entries.column(1).as_primitive::<UInt32Type>();
        let logprobs = entries.column(2).as_primitive::<Float32Type>();
        (0..entries.len()).map(|i| (tokens.value(i).to_owned(), ids.value(i), logprobs.value(i))).collect()
    };
    lists.iter().map(|list| list.map(row)).collect()
}

#[track_caller]
fn relatively_close(ours: f64, theirs: f64, what: &str) {
    assert!((ours - theirs).abs() <= tolerance() * theirs.abs().max(1.0), "{what}: {ours}, transformers has {theirs}");
}

#[test]
fn log_likelihoods_of_texts_equal_transformers() {
    for name in LANGUAGE_MODELS {
        let (rows, results) = run_golden("score", name, &["--logprobs"]);
        let (logprobs, perplexities) = (doubles(&results, "logprob"), doubles(&results, "perplexity"));
        let (scored, tokens) = (counts(&results, "scored_tokens"), token_logprobs(&results));
        for (i, row) in rows.iter().enumerate() {
            let what = format!("{name} row {i}");
            relatively_close(logprobs[i].unwrap(), -row["nll_sum_f64"].as_f64().unwrap(), &what);
            let ids = row["input_ids"].as_array().unwrap();
            assert_eq!(scored[i].unwrap() as usize, ids.len() - 1, "{what}");
            let tokens = tokens[i].as_ref().unwrap();
            let ours: Vec<f32> = tokens.iter().map(|(_, _, logprob)| *logprob).collect();
            all_close(&ours, &numbers(&row["token_logprobs_f64"]), &what);
            assert!(
                tokens.iter().zip(&ids[1..]).all(|((_, ours, _), theirs)| u64::from(*ours) == theirs.as_u64().unwrap())
            );
            match row["perplexity_f64"].as_f64() {
                Some(theirs) => relatively_close(perplexities[i].unwrap(), theirs, &what),
                None => assert_eq!(perplexities[i], None, "{what}"),
            }
        }
        let hello = rows.iter().position(|row| row["text"] == "Hello world").unwrap();
        let pieces: String = tokens[hello].as_ref().unwrap().iter().map(|(token, ..)| token.as_str()).collect();
        assert_eq!(pieces, "▁Hello▁world");
    }
}

/// Scores columns `context` and `continuation`.
fn score_pairs(name: &str, pairs: &[(Option<&str>, Option<&str>)], extra: &[&str]) -> RecordBatch {
    let scratch = Scratch::new();
    let contexts: StringArray = pairs.iter().map(|(context, _)| *context).collect();
    let continuations: StringArray = pairs.iter().map(|(_, continuation)| *continuation).collect();
    let input = scratch.parquet("in.parquet", vec![("q", Arc::new(contexts)), ("a", Arc::new(continuations))]);
    let (output, model) = (scratch.arg("out"), checkpoint(name));
    let mut args = vec!["score", "-i", &input, "-o", &output, "--model", &model];
    args.extend(["--context-column", "q", "--continuation-column", "a"]);
    args.extend(extra);
    succeed(&args);
    read_parquet(&output)
}

#[test]
fn log_likelihoods_of_continuations_equal_transformers() {
    for name in LANGUAGE_MODELS {
        let text = std::fs::read_to_string(project(&format!("tests/goldens/goldens/{name}.json"))).unwrap();
        let questions = serde_json::from_str::<Value>(&text).unwrap()["multiple_choice"].as_array().unwrap().clone();
        let choices: Vec<(&Value, &Value)> = questions
            .iter()
            .flat_map(|question| question["choices"].as_array().unwrap().iter().map(move |choice| (question, choice)))
            .collect();
        let pairs: Vec<_> = choices
            .iter()
            .map(|(question, choice)| (question["context"].as_str(), choice["choice"].as_str()))
            .collect();
        let results = score_pairs(name, &pairs, &["--max-batch-tokens", "64"]);
        let perplexities = doubles(&results, "perplexity");
        for (i, (_, choice)) in choices.iter().enumerate() {
            let what = format!("{name} choice {i}");
            assert_eq!(counts(&results, "scored_tokens")[i].unwrap() as u64, choice["scored_tokens"].as_u64().unwrap());
            let ids = choice["input_ids"].as_array().unwrap().len();
            assert_eq!(counts(&results, "num_tokens")[i].unwrap() as usize, ids, "{what}");
            let logprob = doubles(&results, "logprob")[i].unwrap();
            relatively_close(logprob, choice["loglikelihood_f64"].as_f64().unwrap(), &what);
            relatively_close(perplexities[i].unwrap(), (-choice["per_token_f64"].as_f64().unwrap()).exp(), &what);
        }
    }
}

#[test]
fn a_long_context_is_shortened_and_its_continuation_kept() {
    let pairs = [
        (Some("The capital of France is"), Some(" Paris")),
        (Some("The capital of France is"), None),
        (None, Some(" Paris")),
        (Some("a"), Some("")),
    ];
    let results = score_pairs("lm-window", &pairs, &["--max-length", "8"]);
    assert_eq!(counts(&results, "scored_tokens"), [Some(3), None, None, Some(0)]);
    assert_eq!(counts(&results, "num_tokens"), [Some(8), None, None, Some(2)]);
    assert_eq!(flags(&results, "truncated")[0], Some(true));
    assert_eq!(doubles(&results, "logprob")[1..], [None, None, Some(0.0)]);
    assert_eq!(doubles(&results, "perplexity")[3], None);
    assert_eq!(column_names(&results)[..2], ["q", "a"]);

    let results = score_pairs("lm-window", &pairs[..1], &["--max-length", "8", "--overflow", "error"]);
    assert_eq!(doubles(&results, "logprob"), [None]);
    assert_eq!(strings(&results, "error")[0].as_deref(), Some("the text has 15 tokens, over the limit of 8"));
}

#[test]
fn a_text_scores_the_same_alone_and_in_a_batch() {
    let texts = ["Hello world", "a", "The cat sat on the mat.", "one two three four"].map(Some);
    let together = doubles(&run_on("score", "lm-window", &texts, &[]), "logprob");
    for (text, together) in texts.iter().zip(together) {
        let alone = doubles(&run_on("score", "lm-window", &[*text], &[]), "logprob")[0].unwrap();
        assert!((alone - together.unwrap()).abs() < 1e-5, "{text:?}");
    }
}

#[test]
fn flags_of_score_that_make_no_sense_are_64() {
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", [Some("a")]);
    let (output, model) = (scratch.arg("out"), checkpoint("lm-window"));
    let args = ["score", "-i", &input, "-o", &output, "--model", &model];
    let with = |extra: &[&'static str]| [&args[..], extra].concat();
    let pair = ["--context-column", "text", "--continuation-column", "text"];
    assert!(fail(64, &with(&["--overflow", "chunk"])).contains("does not fit score"));
    assert!(fail(64, &with(&[&pair[..], &["--overflow", "truncate-right"]].concat())).contains("truncate-left"));
    let message = fail(64, &with(&["--context-column", "text", "--continuation-column", "answer"]));
    assert!(message.contains("no column 'answer'") && message.contains("--continuation-column"), "{message}");
    assert_eq!(run(&with(&pair[..2])).status.code(), Some(64), "a context without a continuation");
}

/// An entity: label, score, start, end, word.
type Tag = (String, f32, u32, u32, String);

/// Each row of a List<Struct{entity, score, start, end, word}> column.
fn tags(batch: &RecordBatch) -> Vec<Option<Vec<Tag>>> {
    let lists = batch.column_by_name("entities").unwrap().as_list::<i32>();
    let row = |entries: arrow::array::ArrayRef| {
        let entries = entries.as_struct();
        let text = |field: &str| entries.column_by_name(field).unwrap().as_string::<i32>();
        let offset = |field: &str| entries.column_by_name(field).unwrap().as_primitive::<UInt32Type>();
        let (labels, words, starts, ends) = (text("entity"), text("word"), offset("start"), offset("end"));
        let scores = entries.column_by_name("score").unwrap().as_primitive::<Float32Type>();
        let entry = |i| {
            (labels.value(i).to_owned(), scores.value(i), starts.value(i), ends.value(i), words.value(i).to_owned())
        };
        (0..entries.len()).map(entry).collect()
    };
    lists.iter().map(|list| list.map(row)).collect()
}

#[test]
fn entities_equal_the_pipelines_for_each_aggregation() {
    for aggregation in ["none", "simple", "first", "average", "max"] {
        let (rows, results) = run_golden("tag", "tagger-bio", &["--aggregation", aggregation]);
        let mut compared = 0;
        for (i, (row, ours)) in rows.iter().zip(tags(&results)).enumerate() {
            let Some(theirs) = row["pipeline_entities"].get(aggregation) else {
                assert_eq!(ours.unwrap(), [], "a text without tokens");
                continue;
            };
            let (ours, theirs) = (ours.unwrap(), theirs.as_array().unwrap());
            assert_eq!(ours.len(), theirs.len(), "{aggregation} row {i}: {ours:?}");
            for ((label, score, start, end, word), theirs) in ours.iter().zip(theirs) {
                let key = if aggregation == "none" { "entity" } else { "entity_group" };
                assert_eq!(Some(label.as_str()), theirs[key].as_str(), "{aggregation} row {i}");
                let offsets = (theirs["start"].as_u64().unwrap(), theirs["end"].as_u64().unwrap());
                assert_eq!((u64::from(*start), u64::from(*end)), offsets, "{aggregation} row {i}");
                assert_eq!(Some(word.as_str()), theirs["word"].as_str(), "{aggregation} row {i}");
                assert!((f64::from(*score) - theirs["score"].as_f64().unwrap()).abs() < tolerance());
                compared += 1;
            }
        }
        assert!(compared > 20, "{aggregation}: {compared}");
    }
}

#[test]
fn token_labels_equal_the_logits() {
    let (rows, results) = run_golden("tag", "tagger-bio", &["--aggregation", "none", "--ignore-labels", ""]);
    for (row, ours) in rows.iter().zip(tags(&results)) {
        // The first token is the BOS, which is not part of the text.
        let theirs = row["labels"].as_array().unwrap()[1..].iter();
        let logits = row["logits_f64"].as_array().unwrap()[1..].iter();
        let ours = ours.unwrap();
        assert_eq!(ours.len(), theirs.len());
        for ((label, score, ..), (their_label, logits)) in ours.iter().zip(theirs.zip(logits)) {
            assert_eq!(Some(label.as_str()), their_label.as_str());
            let logits = numbers(logits);
            let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
            let best = logits.iter().copied().fold(f64::MIN, f64::max).exp() / total;
            assert!((f64::from(*score) - best).abs() < tolerance());
        }
    }
}

#[test]
fn ignored_labels_are_left_out() {
    let texts = [Some("Ada Larsen flew to Paris on 3 March."), None];
    let all = run_on("tag", "tagger-bio", &texts, &["--ignore-labels", ""]);
    let some = run_on("tag", "tagger-bio", &texts, &["--ignore-labels", "O,PER"]);
    let expected: Vec<_> =
        tags(&all)[0].clone().unwrap().into_iter().filter(|tag| !["O", "PER"].contains(&tag.0.as_str())).collect();
    assert_eq!(tags(&some), [Some(expected.clone()), None]);
    assert!(!expected.is_empty());
}

fn pii() -> (String, String) {
    let path = |name: &str| project(name).to_str().unwrap().to_owned();
    (path("sample-data/models/pii-tagger"), path("sample-data/pii.parquet"))
}

#[test]
fn sample_entities_equal_transformers() {
    let (model, input) = pii();
    let scratch = Scratch::new();
    let output = scratch.arg("out");
    let args = ["token-classify", "-i", &input, "-o", &output, "--model", &model, "--truth-column"];
    let summary = succeed(&[&args[..], &["spans"]].concat());
    assert!(summary.contains("F1 0.") && summary.contains("in 'spans' of 600 rows"), "{summary}");
    let results = read_parquet(&output);
    let expected = read_parquet(project("sample-data/pii-expected.parquet"));
    assert_eq!(results.column_by_name("id"), expected.column_by_name("id"));
    let lists = expected.column_by_name("entities").unwrap().as_list::<i32>();
    for (i, ours) in tags(&results).into_iter().enumerate() {
        let theirs = lists.value(i);
        let theirs = theirs.as_struct();
        let labels = theirs.column(0).as_string::<i32>();
        let scores = theirs.column(1).as_primitive::<Float32Type>();
        let (starts, ends) =
            (theirs.column(2).as_primitive::<UInt32Type>(), theirs.column(3).as_primitive::<UInt32Type>());
        let ours = ours.unwrap();
        assert_eq!(ours.len(), labels.len(), "row {i}");
        for (j, (label, score, start, end, _)) in ours.iter().enumerate() {
            assert_eq!((label.as_str(), *start, *end), (labels.value(j), starts.value(j), ends.value(j)), "row {i}");
            assert!((score - scores.value(j)).abs() < 1e-4, "row {i}");
        }
    }
}

#[test]
fn a_truth_that_is_not_entities_is_64() {
    let (model, input) = pii();
    let scratch = Scratch::new();
    let output = scratch.arg("out");
    let args = ["tag", "-i", &input, "-o", &output, "--model", &model, "--truth-column"];
    assert!(fail(64, &[&args[..], &["id"]].concat()).contains("a list of structs with start, end and label"));
    let message = fail(64, &[&args[..], &["spans", "--aggregation", "none"]].concat());
    assert!(message.contains("--aggregation none"), "{message}");
}

/// The texts of the sample data in one long text after another, 12 of them each.
fn long_letters() -> Vec<String> {
    let texts = strings(&read_parquet(pii().1), "text");
    texts.chunks(12).take(8).map(|texts| texts.iter().flatten().cloned().collect::<Vec<_>>().join("\r\n")).collect()
}

#[test]
fn windows_lose_and_double_nothing_at_their_seams() {
    let (model, _) = pii();
    let letters = long_letters();
    let scratch = Scratch::new();
    let input = scratch.texts("in.parquet", letters.iter().map(|text| Some(text.as_str())));
    let tag = |name: &str, extra: &[&str]| {
        let output = scratch.arg(name);
        succeed(&[&["tag", "-i", &input, "-o", &output, "--model", &model], extra].concat());
        read_parquet(&output)
    };
    let whole = tag("whole", &[]);
    let windows = tag("windows", &["--max-length", "200", "--stride", "80"]);
    assert!(counts(&windows, "num_tokens").iter().zip(counts(&whole, "num_tokens")).all(|(a, b)| *a > b));
    assert!(flags(&windows, "truncated").iter().all(|truncated| *truncated == Some(false)));
    let places = |batch: &RecordBatch| -> Vec<Vec<(String, u32, u32, String)>> {
        let place = |(label, _, start, end, word): Tag| (label, start, end, word);
        tags(batch).into_iter().map(|row| row.unwrap().into_iter().map(place).collect()).collect()
    };
    // Later windows see less of the text before them, so a few entities differ; none stands there twice.
    let (mut same, mut all) = (0, 0);
    for (windows, whole) in places(&windows).into_iter().zip(places(&whole)) {
        assert!(windows.windows(2).all(|pair| pair[0].2 <= pair[1].1), "entities overlap");
        same += whole.iter().filter(|entity| windows.contains(entity)).count();
        all += whole.len();
    }
    assert!(all > 100 && same * 10 > all * 9, "{same} of {all}");

    // Every token is there once, however narrow the windows and whatever the aggregation.
    let tokens = |name, extra: &[&str]| {
        let batch = tag(name, &[&["--aggregation", "none", "--ignore-labels", ""], extra].concat());
        places(&batch)
            .into_iter()
            .map(|row| row.into_iter().map(|(_, start, end, word)| (start, end, word)).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    assert_eq!(tokens("tokens", &[]), tokens("narrow", &["--max-length", "16", "--stride", "5"]));

    let cut = tag("cut", &["--max-length", "16", "--overflow", "truncate-right"]);
    assert!(flags(&cut, "truncated").iter().all(|truncated| *truncated == Some(true)));
    assert_eq!(counts(&cut, "num_tokens")[0], Some(16));
}

/// Every question of the sample data is embedded as transformers embeds it, and all but one lie nearest to their article.
#[test]
fn sample_embeddings_equal_transformers_and_find_articles() {
    let path = |name: &str| project(&format!("sample-data/{name}")).to_str().unwrap().to_owned();
    let (input, model) = (path("questions.parquet"), path("models/article-finder"));
    let scratch = Scratch::new();
    let output = scratch.arg("vectors.parquet");
    succeed(&["embed", "-i", &input, "-o", &output, "--model", &model, "--pooling", "mean", "--normalize"]);
    let results = read_parquet(&output);
    let expected = embeddings(&read_parquet(path("questions-expected.parquet")));
    let vectors: Vec<Vec<f32>> = embeddings(&results).into_iter().map(Option::unwrap).collect();
    for (row, (ours, theirs)) in vectors.iter().zip(&expected).enumerate() {
        let theirs: Vec<f64> = theirs.as_ref().unwrap().iter().map(|&value| value.into()).collect();
        all_close(ours, &theirs, &format!("row {row}"));
    }
    let (kinds, articles, ids) = (strings(&results, "kind"), strings(&results, "article"), strings(&results, "id"));
    let places = |kind: &str| (0..vectors.len()).filter(|&row| kinds[row].as_deref() == Some(kind)).collect::<Vec<_>>();
    let cosine = |a: usize, b: usize| vectors[a].iter().zip(&vectors[b]).map(|(a, b)| a * b).sum::<f32>();
    let found = places("question").into_iter().filter(|&question| {
        let nearest =
            places("article").into_iter().max_by(|&a, &b| cosine(question, a).total_cmp(&cosine(question, b)));
        ids[nearest.unwrap()] == articles[question]
    });
    assert_eq!((vectors.len(), found.count()), (330, 299));
}

/// Answers of the sample data are as likely as transformers finds them, and the right one is the likeliest.
#[test]
fn sample_answers_are_ranked_as_by_transformers() {
    let path = |name: &str| project(&format!("sample-data/{name}")).to_str().unwrap().to_owned();
    let (input, model) = (path("sorting-choices.parquet"), path("models/digit-sorter"));
    let scratch = Scratch::new();
    let output = scratch.arg("ranked.parquet");
    let columns = ["--context-column", "context", "--continuation-column", "continuation"];
    succeed(&[&["score", "-i", &input, "-o", &output, "--model", &model][..], &columns].concat());
    let (results, expected) = (read_parquet(&output), read_parquet(path("sorting-choices-expected.parquet")));
    assert_eq!(counts(&results, "scored_tokens"), counts(&expected, "scored_tokens"));
    let (ours, theirs) = (doubles(&results, "logprob"), doubles(&expected, "logprob"));
    for (row, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        relatively_close(ours.unwrap(), theirs.unwrap(), &format!("row {row}"));
    }
    let right = flags(&results, "right");
    let best = (0..100).filter(|question| {
        let answers = question * 3..question * 3 + 3;
        let best = answers.max_by(|&a, &b| ours[a].unwrap().total_cmp(&ours[b].unwrap()));
        right[best.unwrap()] == Some(true)
    });
    assert_eq!((ours.len(), best.count()), (300, 100));
}
