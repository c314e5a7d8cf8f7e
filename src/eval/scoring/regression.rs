//! Numbers of texts.

use super::{Measure, Outcome, Predictions, numbers};
use crate::error::{Error, Result};
use crate::eval::metrics::regression::{mean_absolute_error, mean_squared_error, pearson, spearman};

/// Measures the numbers of a regression checkpoint.
///
/// # Errors
/// [`Error::Usage`] when the checkpoint or the truth column does not fit the task.
pub fn regression(predictions: &Predictions) -> Result<Outcome> {
    let values = predictions.result("predicted_value").ok_or_else(|| {
        Error::Usage("the checkpoint gives labels, not numbers; use a task of kind classification".into())
    })?;
    let rows = predictions.truth_numbers()?.into_iter().zip(numbers(values)?);
    let rows: Vec<Option<(f64, f64)>> = rows.map(|(truth, predicted)| truth.zip(predicted)).collect();
    let errors = ["mean_squared_error", "mean_absolute_error"].map(Measure::lower);
    let measures = errors.into_iter().chain(["pearson", "spearman"].map(Measure::higher)).collect();
    let (row_count, compared) = (rows.len(), rows.iter().flatten().count());
    let evaluate = move |numbers: &[usize]| {
        let chosen: Vec<(f64, f64)> = numbers.iter().filter_map(|&number| rows[number]).collect();
        vec![mean_squared_error(&chosen), mean_absolute_error(&chosen), pearson(&chosen), spearman(&chosen)]
    };
    let evaluate = Box::new(evaluate);
    Ok(Outcome { rows: row_count, compared, measures, evaluate, correct: None, confusion: None, reliability: None })
}
