//! Every metric against the library that defines it; `tests/goldens/metrics/make_goldens.py` says which and how.

use std::collections::BTreeSet;

use serde_json::Value;

use super::bleu::BleuCounts;
use super::bootstrap::{Bootstrap, split_mix};
use super::chrf::ChrfCounts;
use super::classification::ConfusionMatrix;
use super::perplexity::TextLikelihood;
use super::tagging::{BioMode, Span};
use super::*;

fn golden(name: &str) -> Value {
    let path = format!("{}/tests/goldens/metrics/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap()
}

fn floats(value: &Value) -> Vec<f64> {
    list(value).iter().map(|v| v.as_f64().unwrap()).collect()
}

fn indices(value: &Value) -> Vec<usize> {
    list(value).iter().map(|v| v.as_u64().unwrap() as usize).collect()
}

#[track_caller]
fn assert_close(ours: f64, theirs: &Value, what: &str) {
    let theirs = theirs.as_f64().unwrap();
    assert!((ours - theirs).abs() <= 1e-12 * (1.0 + theirs.abs()), "{what}: {ours}, not {theirs}");
}

#[track_caller]
fn assert_hits(hits: &[Hits], golden: &Value) {
    for (class, hits) in hits.iter().enumerate() {
        assert_close(hits.precision(), &golden["precision"][class], "precision");
        assert_close(hits.recall(), &golden["recall"][class], "recall");
        assert_close(hits.f1(), &golden["f1"][class], "f1");
        assert_eq!(golden["support"][class], hits.expected);
    }
    assert_close(macro_f1(hits), &golden["macro_f1"], "macro F1");
    assert_close(micro_f1(hits), &golden["micro_f1"], "micro F1");
}

#[test]
fn classification_equals_scikit_learn() {
    for case in list(&golden("classification")["cases"]) {
        let classes = case["classes"].as_u64().unwrap() as usize;
        let rows = indices(&case["truth"]).into_iter().zip(indices(&case["predicted"]));
        let matrix = ConfusionMatrix::new(classes, rows);
        for truth in 0..classes {
            for predicted in 0..classes {
                assert_eq!(case["confusion"][truth][predicted], matrix.count(truth, predicted));
            }
        }
        assert_close(matrix.accuracy(), &case["accuracy"], "accuracy");
        assert_hits(&matrix.hits(), case);
        assert_close(matrix.matthews_correlation(), &case["mcc"], "MCC");
        assert_close(calibration::log_loss(floats(&case["probabilities_of_truth"])), &case["log_loss"], "log loss");
    }
    assert!(ConfusionMatrix::new(2, []).accuracy().is_nan());
}

#[test]
fn calibration_equals_scikit_learn() {
    for case in list(&golden("calibration")["cases"]) {
        let right = list(&case["right"]).iter().map(|right| right.as_bool().unwrap());
        let rows = floats(&case["confidence"]).into_iter().zip(right);
        let bins = calibration::reliability_bins(rows, case["bins"].as_u64().unwrap() as usize);
        let counts: Vec<u64> = bins.iter().map(|bin| bin.rows).collect();
        assert_eq!(case["counts"], serde_json::json!(counts));
        for (place, bin) in bins.iter().filter(|bin| bin.rows > 0).enumerate() {
            assert_close(bin.accuracy, &case["bin_accuracy"][place], "accuracy of a bin");
            assert_close(bin.confidence, &case["bin_confidence"][place], "confidence of a bin");
        }
        assert_close(calibration::expected_calibration_error(&bins), &case["ece"], "ECE");
    }
}

#[test]
fn multi_label_equals_scikit_learn() {
    for case in list(&golden("multi_label")["cases"]) {
        let sets = |name: &str| -> Vec<BTreeSet<usize>> {
            list(&case[name]).iter().map(|row| indices(row).into_iter().collect()).collect()
        };
        let (truth, predicted) = (sets("truth"), sets("predicted"));
        let classes = case["classes"].as_u64().unwrap() as usize;
        assert_hits(&multi_label::hits(classes, truth.iter().zip(&predicted)), case);
        let equal = mean(truth.iter().zip(&predicted).map(|(t, p)| f64::from(u8::from(t == p))));
        assert_close(equal, &case["subset_accuracy"], "subset accuracy");
    }
}

#[test]
fn tagging_equals_seqeval() {
    for case in list(&golden("tagging")["cases"]) {
        let rows = |side: &str, mode: BioMode| -> Vec<BTreeSet<Span>> {
            let tags = |row: &Value| list(row).iter().map(|tag| tag.as_str().unwrap().to_owned()).collect::<Vec<_>>();
            let spans = |row| tagging::spans_of_tags(tags(row).iter().map(String::as_str), mode).unwrap();
            list(&case[side]).iter().map(|row| spans(row).into_iter().collect()).collect()
        };
        for (mode, name) in [(BioMode::Conll, "conll"), (BioMode::Strict, "strict")] {
            let (truth, predicted) = (rows("truth", mode), rows("predicted", mode));
            let hits = tagging::hits(truth.iter().zip(&predicted));
            let golden = &case[name];
            for (label, hits) in &hits {
                assert_close(hits.precision(), &golden[label]["precision"], "precision");
                assert_close(hits.recall(), &golden[label]["recall"], "recall");
                assert_close(hits.f1(), &golden[label]["f1-score"], "F1");
                assert_close(hits.expected as f64, &golden[label]["support"], "support");
            }
            let hits: Vec<Hits> = hits.into_values().collect();
            assert_close(micro_f1(&hits), &golden["micro avg"]["f1-score"], "micro F1");
            assert_close(macro_f1(&hits), &golden["macro avg"]["f1-score"], "macro F1");
        }
        let entities: Vec<Vec<Span>> = serde_json::from_value(case["conll_entities"].clone()).unwrap();
        for (ours, theirs) in rows("truth", BioMode::Conll).iter().zip(entities) {
            assert_eq!(ours, &theirs.into_iter().collect());
        }
    }
    assert!(tagging::spans_of_tags(["O", "PER"], BioMode::Strict).unwrap_err().contains("'PER'"));
}

#[test]
fn regression_equals_scikit_learn_and_scipy() {
    for case in list(&golden("regression")["cases"]) {
        let rows: Vec<_> = floats(&case["truth"]).into_iter().zip(floats(&case["predicted"])).collect();
        assert_close(regression::mean_squared_error(&rows), &case["mse"], "MSE");
        assert_close(regression::mean_absolute_error(&rows), &case["mae"], "MAE");
        assert_close(regression::pearson(&rows), &case["pearson"], "Pearson");
        assert_close(regression::spearman(&rows), &case["spearman"], "Spearman");
    }
    assert!(regression::pearson(&[(1.0, 2.0), (1.0, 3.0)]).is_nan());
}

#[test]
fn generation_equals_squad_rouge_score_and_sacrebleu() {
    let golden = golden("generation");
    let (mut bleu, mut chrf, mut exact) = (BleuCounts::default(), ChrfCounts::default(), Vec::new());
    for row in list(&golden["rows"]) {
        let (truth, predicted) = (row["truth"].as_str().unwrap(), row["predicted"].as_str().unwrap());
        let normalized = [truth, predicted].map(answers::normalize);
        assert_eq!(row["normalized"], serde_json::json!(normalized));
        assert_eq!(answers::normalized_match(truth, predicted), normalized[0] == normalized[1]);
        assert_close(answers::token_f1(truth, predicted), &row["token_f1"], predicted);
        assert_close(rouge::rouge_l(truth, predicted), &row["rouge_l"], predicted);
        let (row_bleu, row_chrf) = (BleuCounts::new(truth, predicted), ChrfCounts::new(truth, predicted));
        assert_close(row_bleu.score(), &row["bleu"], predicted);
        assert_close(row_chrf.score(), &row["chrf"], predicted);
        bleu += row_bleu;
        chrf += row_chrf;
        exact.push(f64::from(u8::from(truth == predicted)));
    }
    let corpus = &golden["corpus"];
    assert_eq!(corpus["bleu_counts"], serde_json::json!(bleu.correct));
    assert_eq!(corpus["bleu_totals"], serde_json::json!(bleu.total));
    assert_eq!(corpus["bleu_hypothesis"], bleu.hypothesis_tokens);
    assert_eq!(corpus["bleu_reference"], bleu.reference_tokens);
    assert_close(bleu.score(), &corpus["bleu"], "BLEU");
    assert_close(chrf.score(), &corpus["chrf"], "chrF");
    assert_close(mean(exact), &corpus["exact_match"], "exact match");
}

#[test]
fn extraction_equals_lm_evaluation_harness() {
    for case in list(&golden("generation")["extraction"]) {
        let pattern = regex::Regex::new(case["pattern"].as_str().unwrap()).unwrap();
        let found = answers::extract(&pattern, case["text"].as_str().unwrap());
        assert_eq!(found.unwrap_or("[none]"), case["found"], "{case}");
    }
}

#[test]
fn multiple_choice_equals_lm_evaluation_harness() {
    use multiple_choice::{LengthNorm, likeliest};
    let mut differing = 0;
    for document in list(&golden("multiple_choice")["documents"]) {
        let logprobs = floats(&document["logprobs"]);
        let best = |norm| {
            let choices = list(&document["choices"]).iter().map(|choice| choice.as_str().unwrap());
            likeliest(choices.zip(logprobs.iter().copied()), norm).unwrap()
        };
        assert_eq!(document["none"], best(LengthNorm::None));
        assert_eq!(document["characters"], best(LengthNorm::Characters));
        assert_eq!(document["bytes"], best(LengthNorm::Bytes));
        differing += usize::from(best(LengthNorm::Bytes) != best(LengthNorm::Characters));
    }
    assert!(differing > 0, "bytes and characters are not told apart");
    assert_eq!(likeliest([], LengthNorm::None), None);
}

#[test]
fn perplexity_equals_lm_evaluation_harness() {
    let golden = golden("perplexity");
    let mut total = TextLikelihood::default();
    for row in list(&golden["rows"]) {
        let text = row["text"].as_str().unwrap();
        let row_total = TextLikelihood::new(text, row["logprob"].as_f64().unwrap(), row["tokens"].as_u64().unwrap());
        assert_eq!(
            (row["words"].as_u64(), row["bytes"].as_u64()),
            (Some(row_total.words), Some(row_total.bytes)),
            "{row}"
        );
        total += row_total;
    }
    assert_close(total.word_perplexity(), &golden["word_perplexity"], "per word");
    assert_close(total.byte_perplexity(), &golden["byte_perplexity"], "per byte");
    assert_close(total.token_perplexity(), &golden["token_perplexity"], "per token");
    assert_close(total.bits_per_byte(), &golden["bits_per_byte"], "bits per byte");
}

#[test]
fn the_bootstrap_equals_numpy_on_the_same_draws_and_scipy_on_others() {
    let golden = golden("bootstrap");
    let (values, other) = (floats(&golden["values"]), floats(&golden["other"]));
    let seed = golden["seed"].as_u64().unwrap();
    let bootstrap = Bootstrap { resamples: golden["resamples"].as_u64().unwrap(), confidence: 0.95, seed };
    let means_of = |bootstrap: Bootstrap, values: &[f64]| {
        let mean_of = |rows: &[usize]| vec![mean(rows.iter().map(|&row| values[row]))];
        bootstrap.values(values.len(), 1, &mean_of).remove(0)
    };
    let means = means_of(bootstrap, &values);
    for (ours, theirs) in means.iter().zip(list(&golden["means"])) {
        assert_close(*ours, theirs, "mean of a resample");
    }
    for (confidence, name) in [(0.95, "interval_95"), (0.8, "interval_80")] {
        let (low, high) = Bootstrap { confidence, ..bootstrap }.interval(&means).unwrap();
        assert_close(low, &golden[name][0], name);
        assert_close(high, &golden[name][1], name);
    }

    let many = Bootstrap { resamples: 20_000, ..bootstrap };
    let (first, second) = (means_of(many, &values), means_of(many, &other));
    let (low, high) = many.interval(&first).unwrap();
    let theirs = floats(&golden["scipy_interval_95"]);
    assert!((low - theirs[0]).abs() < 2e-3 && (high - theirs[1]).abs() < 2e-3, "{low} {high} {theirs:?}");

    let p = significance::paired_bootstrap(&first, &second);
    let permutation = golden["scipy_permutation_p"].as_f64().unwrap();
    assert!(p / permutation > 0.5 && p / permutation < 2.0, "{p} and {permutation}");
    assert_eq!(significance::paired_bootstrap(&first, &first), 1.0);
    assert_eq!(many.interval(&[f64::NAN]), None);
}

#[test]
fn draws_differ_by_seed_resample_and_place() {
    let firsts: BTreeSet<u64> = (0..1000).map(split_mix).collect();
    assert_eq!(firsts.len(), 1000);
    let bootstrap = |seed| Bootstrap { resamples: 3, confidence: 0.95, seed };
    let squares = |rows: &[usize]| vec![rows.iter().map(|&row| (row * row) as f64).sum()];
    let sums = |seed| bootstrap(seed).values(1000, 1, &squares).remove(0);
    let (one, two) = (sums(1), sums(2));
    assert_eq!(one, sums(1));
    assert!(one[0] != one[1] && one[1] != one[2] && one[0] != two[0]);
}

#[test]
fn mcnemar_equals_the_binomial_test_of_scipy() {
    for case in list(&golden("bootstrap")["mcnemar"]) {
        let p = significance::mcnemar_exact(case[0].as_u64().unwrap(), case[1].as_u64().unwrap());
        let theirs = case[2].as_f64().unwrap();
        assert!((p - theirs).abs() <= 1e-9 * theirs, "{case}: {p}");
    }
}
