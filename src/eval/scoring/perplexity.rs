//! How surprised a model is by texts.

use super::{Measure, Outcome, Predictions, numbers, texts};
use crate::error::Result;
use crate::eval::metrics::perplexity::TextLikelihood;

/// Measures perplexities; `text_column` is what was scored.
///
/// # Errors
/// When a column is missing.
pub fn perplexity(predictions: &Predictions, text_column: &str) -> Result<Outcome> {
    let texts = texts(predictions.input(text_column)?)?;
    let logprobs = numbers(predictions.needed("logprob")?)?;
    let tokens = numbers(predictions.needed("scored_tokens")?)?;
    let rows = texts.iter().zip(logprobs).zip(tokens);
    let rows: Vec<Option<TextLikelihood>> =
        rows.map(|((text, logprob), tokens)| Some(TextLikelihood::new(text?, logprob?, tokens? as u64))).collect();
    let measures = ["word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity"];
    let (row_count, compared) = (rows.len(), rows.iter().flatten().count());
    let evaluate = move |numbers: &[usize]| {
        let mut total = TextLikelihood::default();
        numbers.iter().filter_map(|&number| rows[number]).for_each(|row| total += row);
        vec![total.word_perplexity(), total.byte_perplexity(), total.bits_per_byte(), total.token_perplexity()]
    };
    Ok(Outcome {
        rows: row_count,
        compared,
        measures: measures.map(Measure::lower).into(),
        evaluate: Box::new(evaluate),
        correct: None,
        confusion: None,
        reliability: None,
    })
}
