//! Which of several answers a model finds likeliest.

use arrow::array::{Array, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, UInt64Type};

use super::{Measure, Outcome, Predictions, numbers, share, texts};
use crate::error::{Error, Result};
use crate::eval::metrics::mean;
use crate::eval::metrics::multiple_choice::{LengthNorm, likeliest};

/// The columns of a dataset that has one row for each choice of each document.
#[derive(Debug, Clone, Copy)]
pub struct ChoiceColumns {
    /// Number of the document; its rows follow each other.
    pub document: &'static str,
    /// The choice without what separates it from its context.
    pub choice: &'static str,
    /// Number of the right choice.
    pub answer: &'static str,
    pub context: &'static str,
    pub continuation: &'static str,
}

/// What the prepared dataset of a multiple-choice task calls its columns.
pub const CHOICE_COLUMNS: ChoiceColumns = ChoiceColumns {
    document: "document",
    choice: "choice",
    answer: "answer",
    context: "context",
    continuation: "continuation",
};

const NORMS: [LengthNorm; 3] = [LengthNorm::None, LengthNorm::Characters, LengthNorm::Bytes];

/// Measures which choice is likeliest; a document with a failed choice is not compared.
///
/// # Errors
/// When a column is missing.
pub fn multiple_choice(predictions: &Predictions) -> Result<Outcome> {
    let column = |name| -> Result<Vec<Option<u64>>> {
        Ok(cast(predictions.input(name)?, &DataType::UInt64)?.as_primitive::<UInt64Type>().iter().collect())
    };
    let (documents, answers) = (column(CHOICE_COLUMNS.document)?, column(CHOICE_COLUMNS.answer)?);
    let choices = texts(predictions.input(CHOICE_COLUMNS.choice)?)?;
    let logprobs = numbers(predictions.needed("logprob")?)?;
    let row_numbers: Vec<usize> = (0..documents.len()).collect();
    let document = |rows: &[usize]| -> Option<[bool; 3]> {
        let choices: Option<Vec<(&str, f64)>> = rows
            .iter()
            .map(|&row| Some((choices.is_valid(row).then(|| choices.value(row))?, logprobs[row]?)))
            .collect();
        let (choices, answer) = (choices?, answers[rows[0]]? as usize);
        Some(NORMS.map(|norm| likeliest(choices.iter().copied(), norm) == Some(answer)))
    };
    let rows: Vec<Option<[bool; 3]>> =
        row_numbers.chunk_by(|&a, &b| documents[a] == documents[b]).map(document).collect();
    if documents.iter().any(Option::is_none) {
        return Err(Error::Internal("a choice without its document".into()));
    }
    let correct = Some(rows.iter().map(|row| row.map(|right| right[0])).collect());
    let (row_count, compared) = (rows.len(), rows.iter().flatten().count());
    let evaluate = move |numbers: &[usize]| {
        let chosen = || numbers.iter().filter_map(|&number| rows[number]);
        (0..NORMS.len()).map(|norm| mean(chosen().map(|right| share(right[norm])))).collect()
    };
    Ok(Outcome {
        rows: row_count,
        compared,
        measures: ["acc", "acc_norm", "acc_bytes"].map(Measure::higher).into(),
        evaluate: Box::new(evaluate),
        correct,
        confusion: None,
        reliability: None,
    })
}
