//! Entities of texts.

use std::collections::BTreeSet;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::DataType;

use super::{Measure, Outcome, Predictions, class_values, lists, numbers, texts};
use crate::error::{Error, Result};
use crate::eval::metrics::tagging::{BioMode, Span, hits, spans_of_tags};
use crate::eval::metrics::{Hits, macro_f1, micro_f1};
use crate::job::truth::{entities, trimmed};

type SpanSets = (BTreeSet<Span>, BTreeSet<Span>);

/// Measures entities of at least `threshold`'s score; `text_column` is what they lie in.
///
/// The truth is a list of {start, end, label (or entity)} in characters, or a list of BIO tags, one for each word between
/// white space. White space at an entity's ends is no part of it.
///
/// # Errors
/// [`Error::Usage`] when the truth column is neither, or a row of it has other tags or another number of them than words.
pub fn tagging(predictions: &Predictions, text_column: &str, threshold: Option<f32>, mode: BioMode) -> Result<Outcome> {
    let texts = texts(predictions.input(text_column)?)?;
    let truth = predictions.truth()?;
    let found = entities(predictions.needed("entities")?)?;
    let scores = entity_scores(predictions.needed("entities")?)?;
    let truths = match lists(truth)?.map(|lists| lists.value_type()) {
        Some(DataType::Struct(_)) => entities(truth)?,
        Some(item) if !item.is_nested() => tagged_words(predictions, truth, &texts, mode)?,
        _ => return Err(predictions.unusable_truth("a list of {start, end, label}, or of BIO tags,")),
    };
    let threshold = f64::from(threshold.unwrap_or(f32::NEG_INFINITY));
    let rows: Vec<Option<SpanSets>> = texts
        .iter()
        .zip(truths)
        .zip(found.into_iter().zip(scores))
        .map(|((text, truth), (found, scores))| {
            let text: Vec<char> = text?.chars().collect();
            let over = found?.into_iter().zip(scores?).filter(|(_, score)| *score >= threshold);
            Some((trimmed(truth?, &text), trimmed(over.map(|(span, _)| span).collect(), &text)))
        })
        .collect();

    let all = hits(rows.iter().flatten().map(|(truth, found)| (truth, found)));
    let classes: Vec<String> = all.into_keys().collect();
    let measures = ["micro_f1", "macro_f1", "precision", "recall"].map(Measure::higher);
    let measures = measures.into_iter().chain(Measure::of_classes(&classes)).collect();
    let (row_count, compared) = (rows.len(), rows.iter().flatten().count());
    // Hits add up over rows, so that a resample costs no comparison of spans.
    let by_row: Vec<Option<Vec<Hits>>> = rows
        .iter()
        .map(|row| {
            let of_row = hits(row.iter().map(|(truth, found)| (truth, found)));
            let class = |class| of_row.get(class).copied().unwrap_or_default();
            row.as_ref().map(|_| classes.iter().map(class).collect())
        })
        .collect();
    let class_count = classes.len();
    let evaluate = move |numbers: &[usize]| {
        let mut hits = vec![Hits::default(); class_count];
        for row in numbers.iter().filter_map(|&number| by_row[number].as_ref()) {
            hits.iter_mut().zip(row).for_each(|(sum, row)| *sum += *row);
        }
        let mut total = Hits::default();
        hits.iter().for_each(|class| total += *class);
        let overall = [micro_f1(&hits), macro_f1(&hits), total.precision(), total.recall()];
        overall.into_iter().chain(class_values(&hits)).collect()
    };
    let evaluate = Box::new(evaluate);
    Ok(Outcome { rows: row_count, compared, measures, evaluate, correct: None, confusion: None, reliability: None })
}

/// The scores of each row's entities, in their order.
fn entity_scores(column: &ArrayRef) -> Result<Vec<Option<Vec<f64>>>> {
    let unreadable = || Error::Internal(format!("entities in a {} column", column.data_type()));
    let row = |entities: ArrayRef| -> Result<Vec<f64>> {
        let entities = entities.as_struct_opt().ok_or_else(unreadable)?;
        let scores = numbers(entities.column_by_name("score").ok_or_else(unreadable)?)?;
        Ok(scores.into_iter().map(|score| score.unwrap_or(f64::NAN)).collect())
    };
    lists(column)?.ok_or_else(unreadable)?.iter().map(|entities| entities.map(row).transpose()).collect()
}

/// The spans of BIO tags, one a word, in characters.
fn tagged_words(
    predictions: &Predictions,
    truth: &ArrayRef,
    rows: &arrow::array::StringArray,
    mode: BioMode,
) -> Result<Vec<Option<Vec<Span>>>> {
    let wrong = |row: usize, message: String| {
        Error::Usage(format!("truth_column '{}', row {row}: {message}", predictions.truth_column))
    };
    let lists = lists(truth)?.ok_or_else(|| predictions.unusable_truth("a list"))?;
    let row = |(row, (tags, text)): (usize, (Option<ArrayRef>, Option<&str>))| -> Result<Option<Vec<Span>>> {
        let (Some(tags), Some(text)) = (tags, text) else { return Ok(None) };
        let tags = texts(&tags)?;
        let words = word_spans(text);
        if tags.len() != words.len() {
            return Err(wrong(row, format!("{} tags for {} words", tags.len(), words.len())));
        }
        let spans = spans_of_tags(tags.iter().map(|tag| tag.unwrap_or("O")), mode);
        let spans = spans.map_err(|message| wrong(row, message))?;
        Ok(Some(spans.into_iter().map(|(from, to, label)| (words[from].0, words[to - 1].1, label)).collect()))
    };
    lists.iter().zip(rows).enumerate().map(row).collect()
}

/// First character and the one after the last of each word between white space.
fn word_spans(text: &str) -> Vec<(usize, usize)> {
    let mut words: Vec<(usize, usize)> = Vec::new();
    let mut inside = false;
    for (place, character) in text.chars().enumerate() {
        match words.last_mut() {
            _ if character.is_whitespace() => inside = false,
            Some(word) if inside => word.1 = place + 1,
            _ => {
                words.push((place, place + 1));
                inside = true;
            }
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::word_spans;

    #[test]
    fn words_are_counted_in_characters() {
        assert_eq!(word_spans(" Zoë\tmet \u{3000}Ada."), [(1, 4), (5, 8), (10, 14)]);
        assert_eq!(word_spans(" "), []);
    }
}
