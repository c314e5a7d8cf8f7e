//! Labels of texts.

use std::collections::{BTreeMap, BTreeSet};

use super::{Measure, Outcome, Predictions, class_values, label_scores, numbers, share, texts};
use crate::error::{Error, Result};
use crate::eval::metrics::calibration::{expected_calibration_error, log_loss, reliability_bins};
use crate::eval::metrics::classification::ConfusionMatrix;
use crate::eval::metrics::{Hits, macro_f1, mean, micro_f1, multi_label};
use crate::heads::ClassifyOptions;
use crate::job::truth::label_sets;

/// What a text was labelled and what its label is.
struct LabelledRow {
    truth: usize,
    predicted: usize,
    /// The score of the predicted label.
    confidence: f64,
    /// The score of the true label, where all scores are known.
    truth_score: f64,
}

/// Measures labels, or sets of labels of a multi-label checkpoint.
///
/// Below `threshold` a single label is no prediction (the row is not compared, and `coverage` falls), and one of
/// several labels is not predicted.
///
/// # Errors
/// [`Error::Usage`] when the checkpoint or the truth column does not fit the task.
pub fn classification(predictions: &Predictions, threshold: Option<f32>, bins: usize) -> Result<Outcome> {
    if predictions.result("predicted_value").is_some() {
        return Err(Error::Usage(
            "a regression checkpoint gives numbers, not labels; use a task of kind regression".into(),
        ));
    }
    match predictions.result("predicted_labels") {
        Some(_) => label_set_outcome(predictions, threshold),
        None => label_outcome(predictions, threshold, bins),
    }
}

fn label_outcome(predictions: &Predictions, threshold: Option<f32>, bins: usize) -> Result<Outcome> {
    let truths = predictions.truth_texts()?;
    let labels = texts(predictions.needed("predicted_label")?)?;
    let confidences = numbers(predictions.needed("predicted_score")?)?;
    let scores = label_scores(predictions.needed("predicted_scores")?)?;
    let class_names: BTreeSet<&str> = truths.iter().chain(labels.iter()).flatten().collect();
    let class_of: BTreeMap<&str, usize> = class_names.iter().enumerate().map(|(class, name)| (*name, class)).collect();
    let class_names: Vec<String> = class_names.into_iter().map(str::to_owned).collect();

    let threshold = f64::from(threshold.unwrap_or(f32::NEG_INFINITY));
    let rows = truths.iter().zip(&labels).zip(confidences).zip(&scores);
    let rows: Vec<Option<LabelledRow>> = rows
        .map(|(((truth, label), confidence), scores)| {
            let (truth, label, confidence) = (truth?, label?, confidence.filter(|score| *score >= threshold)?);
            let scores = scores.as_deref().unwrap_or_default();
            let truth_score = scores.iter().find(|(name, _)| name == truth).map_or(0.0, |(_, score)| *score);
            Some(LabelledRow { truth: class_of[truth], predicted: class_of[label], confidence, truth_score })
        })
        .collect();
    let with_truth: Vec<bool> = truths.iter().map(|truth| truth.is_some()).collect();
    // Raw logits are no probabilities, and have no calibration.
    let are_probabilities = rows.iter().flatten().all(|row| (0.0..=1.0).contains(&row.confidence));

    let measures = ["accuracy", "macro_f1", "micro_f1", "matthews_correlation"].map(Measure::higher);
    let measures = measures.into_iter().chain(["expected_calibration_error", "log_loss"].map(Measure::lower));
    let measures: Vec<Measure> =
        measures.chain([Measure::neutral("coverage")]).chain(Measure::of_classes(&class_names)).collect();

    let compared = rows.iter().flatten().count();
    let all = rows.iter().flatten();
    let confusion = ConfusionMatrix::new(class_names.len(), all.clone().map(|row| (row.truth, row.predicted)));
    let is_right = |row: &LabelledRow| row.truth == row.predicted;
    let reliability = are_probabilities.then(|| reliability_bins(all.map(|row| (row.confidence, is_right(row))), bins));
    let correct = Some(rows.iter().map(|row| row.as_ref().map(is_right)).collect());
    let (row_count, classes) = (rows.len(), class_names.len());
    let evaluate = move |numbers: &[usize]| {
        let chosen = || numbers.iter().filter_map(|&number| rows[number].as_ref());
        let matrix = ConfusionMatrix::new(classes, chosen().map(|row| (row.truth, row.predicted)));
        let hits = matrix.hits();
        let (calibration_error, loss) = if are_probabilities {
            let bins = reliability_bins(chosen().map(|row| (row.confidence, row.truth == row.predicted)), bins);
            (expected_calibration_error(&bins), log_loss(chosen().map(|row| row.truth_score)))
        } else {
            (f64::NAN, f64::NAN)
        };
        let known = numbers.iter().filter(|&&number| with_truth[number]);
        let coverage = mean(known.map(|&number| share(rows[number].is_some())));
        let (macro_f1, micro_f1) = (macro_f1(&hits), micro_f1(&hits));
        let overall =
            [matrix.accuracy(), macro_f1, micro_f1, matrix.matthews_correlation(), calibration_error, loss, coverage];
        overall.into_iter().chain(class_values(&hits)).collect()
    };
    Ok(Outcome {
        rows: row_count,
        compared,
        measures,
        evaluate: Box::new(evaluate),
        correct,
        confusion: Some((class_names, confusion)),
        reliability,
    })
}

fn label_set_outcome(predictions: &Predictions, threshold: Option<f32>) -> Result<Outcome> {
    let truth = predictions.truth()?;
    if super::lists(truth)?.is_none() {
        return Err(predictions.unusable_truth("a list of labels"));
    }
    let threshold = f64::from(threshold.unwrap_or(ClassifyOptions::default().threshold));
    let truths = label_sets(truth)?;
    let scores = label_scores(predictions.needed("predicted_scores")?)?;
    let named = scores.iter().flatten().flatten().map(|(label, _)| label.as_str());
    let class_names: BTreeSet<&str> = truths.iter().flatten().flatten().map(String::as_str).chain(named).collect();
    let class_of: BTreeMap<&str, usize> = class_names.iter().enumerate().map(|(class, name)| (*name, class)).collect();
    let class_names: Vec<String> = class_names.into_iter().map(str::to_owned).collect();

    type Sets = (BTreeSet<usize>, BTreeSet<usize>);
    let rows: Vec<Option<Sets>> = truths
        .iter()
        .zip(&scores)
        .map(|(truth, scores)| {
            let over = scores.as_ref()?.iter().filter(|(_, score)| *score >= threshold);
            let truth = truth.as_ref()?.iter().map(|label| class_of[label.as_str()]).collect();
            Some((truth, over.map(|(label, _)| class_of[label.as_str()]).collect()))
        })
        .collect();

    let measures = ["subset_accuracy", "micro_f1", "macro_f1"].map(Measure::higher);
    let measures = measures.into_iter().chain(Measure::of_classes(&class_names)).collect();
    let is_right = |(truth, predicted): &Sets| truth == predicted;
    let correct = Some(rows.iter().map(|row| row.as_ref().map(is_right)).collect());
    let (row_count, compared) = (rows.len(), rows.iter().flatten().count());
    let classes = class_names.len();
    let evaluate = move |numbers: &[usize]| {
        let chosen = || numbers.iter().filter_map(|&number| rows[number].as_ref());
        let hits: Vec<Hits> = multi_label::hits(classes, chosen().map(|(truth, predicted)| (truth, predicted)));
        let equal = mean(chosen().map(|row| share(is_right(row))));
        [equal, micro_f1(&hits), macro_f1(&hits)].into_iter().chain(class_values(&hits)).collect()
    };
    let evaluate = Box::new(evaluate);
    Ok(Outcome { rows: row_count, compared, measures, evaluate, correct, confusion: None, reliability: None })
}
