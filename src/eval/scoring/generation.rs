//! Completions beside the texts that they should be.

use regex::Regex;

use super::{Measure, Outcome, Predictions, share, texts};
use crate::error::Result;
use crate::eval::metrics::answers::{extract, normalized_match, token_f1};
use crate::eval::metrics::bleu::BleuCounts;
use crate::eval::metrics::chrf::ChrfCounts;
use crate::eval::metrics::mean;
use crate::eval::metrics::rouge::rouge_l;

struct AnsweredRow {
    exact: bool,
    normalized: bool,
    token_f1: f64,
    rouge_l: f64,
    bleu: BleuCounts,
    chrf: ChrfCounts,
}

/// Measures completions, or what `pattern` finds in them; a completion in which it finds nothing is an empty answer.
///
/// # Errors
/// [`crate::Error::Usage`] when the truth column is no text.
pub fn generation(predictions: &Predictions, pattern: Option<&Regex>) -> Result<Outcome> {
    let truths = predictions.truth_texts()?;
    let completions = texts(predictions.needed("completion")?)?;
    let row = |(truth, completion): (Option<&str>, Option<&str>)| {
        let (truth, completion) = (truth?, completion?);
        let answer = pattern.map_or(completion, |pattern| extract(pattern, completion).unwrap_or(""));
        Some(AnsweredRow {
            exact: truth == answer,
            normalized: normalized_match(truth, answer),
            token_f1: token_f1(truth, answer),
            rouge_l: rouge_l(truth, answer),
            bleu: BleuCounts::new(truth, answer),
            chrf: ChrfCounts::new(truth, answer),
        })
    };
    let rows: Vec<Option<AnsweredRow>> = truths.iter().zip(&completions).map(row).collect();
    let measures = ["exact_match", "normalized_match", "token_f1", "rouge_l", "bleu", "chrf"];
    let correct = Some(rows.iter().map(|row| row.as_ref().map(|row| row.exact)).collect());
    let (row_count, compared) = (rows.len(), rows.iter().flatten().count());
    let evaluate = move |numbers: &[usize]| {
        let chosen = || numbers.iter().filter_map(|&number| rows[number].as_ref());
        let (mut bleu, mut chrf) = (BleuCounts::default(), ChrfCounts::default());
        for row in chosen() {
            bleu += row.bleu;
            chrf += row.chrf;
        }
        vec![
            mean(chosen().map(|row| share(row.exact))),
            mean(chosen().map(|row| share(row.normalized))),
            mean(chosen().map(|row| row.token_f1)),
            mean(chosen().map(|row| row.rouge_l)),
            bleu.score(),
            chrf.score(),
        ]
    };
    Ok(Outcome {
        rows: row_count,
        compared,
        measures: measures.map(Measure::higher).into(),
        evaluate: Box::new(evaluate),
        correct,
        confusion: None,
        reliability: None,
    })
}
