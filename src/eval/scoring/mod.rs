//! From a task's predictions to what can be measured on them: one kind of task a file.

mod classification;
mod generation;
mod multiple_choice;
mod perplexity;
mod regression;
mod tagging;

use arrow::array::{Array, ArrayRef, AsArray, ListArray, RecordBatch, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type};
use serde::Serialize;

use super::metrics::Hits;
use super::metrics::calibration::ReliabilityBin;
use super::metrics::classification::ConfusionMatrix;
use crate::error::{Error, Result};

pub use classification::classification;
pub use generation::generation;
pub use multiple_choice::{CHOICE_COLUMNS, ChoiceColumns, multiple_choice};
pub use perplexity::perplexity;
pub use regression::regression;
pub use tagging::tagging;

/// A task's predictions as they lie in the output, with the names of the columns that matter.
pub struct Predictions<'a> {
    pub rows: &'a RecordBatch,
    /// Put before the names of result columns.
    pub prefix: &'a str,
    /// The column that says what is right; empty where nothing needs to.
    pub truth_column: &'a str,
}

/// Values of some rows, by their numbers.
pub type Evaluate = Box<dyn Fn(&[usize]) -> Vec<f64> + Send + Sync>;

/// The labels of a row with their scores.
type LabelScores = Vec<(String, f64)>;

/// What can be measured on some predictions.
pub struct Outcome {
    /// Rows or documents, which resampling draws from.
    pub rows: usize,
    /// Those among them that have both a prediction and a truth.
    pub compared: usize,
    /// What is measured; the first is what the task is about.
    pub measures: Vec<Measure>,
    /// The measures' values on some of the rows, given by number; a row may come several times.
    pub evaluate: Evaluate,
    /// Whether each row is right; the first measure is then the share of those that are.
    pub correct: Option<Vec<Option<bool>>>,
    /// Classes and the counts of rows by true and predicted class.
    pub confusion: Option<(Vec<String>, ConfusionMatrix)>,
    pub reliability: Option<Vec<ReliabilityBin>>,
}

/// A value that is measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Measure {
    /// As `macro_f1`.
    pub name: &'static str,
    /// The class that it is about; `None` for all of them.
    pub class: Option<String>,
    pub better: Better,
}

/// Which of two values is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    Higher,
    Lower,
    /// It only says how much was measured.
    Neither,
}

impl Measure {
    fn higher(name: &'static str) -> Self {
        Self { name, class: None, better: Better::Higher }
    }

    fn lower(name: &'static str) -> Self {
        Self { name, class: None, better: Better::Lower }
    }

    fn neutral(name: &'static str) -> Self {
        Self { name, class: None, better: Better::Neither }
    }

    /// Precision, recall, F1 and support of each class.
    fn of_classes(classes: &[String]) -> impl Iterator<Item = Measure> + '_ {
        classes.iter().flat_map(|class| {
            let of = |measure: Measure| Measure { class: Some(class.clone()), ..measure };
            [
                of(Self::higher("precision")),
                of(Self::higher("recall")),
                of(Self::higher("f1")),
                of(Self::neutral("support")),
            ]
        })
    }
}

/// The values of [`Measure::of_classes`].
fn class_values(hits: &[Hits]) -> impl Iterator<Item = f64> + '_ {
    hits.iter().flat_map(|hits| [hits.precision(), hits.recall(), hits.f1(), hits.expected as f64])
}

/// 1 for true.
fn share(right: bool) -> f64 {
    f64::from(u8::from(right))
}

impl<'a> Predictions<'a> {
    /// A column of the input.
    fn input(&self, name: &str) -> Result<&'a ArrayRef> {
        let missing = || Error::Internal(format!("the predictions have no column '{name}'"));
        self.rows.column_by_name(name).ok_or_else(missing)
    }

    fn truth(&self) -> Result<&'a ArrayRef> {
        self.input(self.truth_column)
    }

    /// A result column, if there is one.
    fn result(&self, name: &str) -> Option<&'a ArrayRef> {
        self.rows.column_by_name(&format!("{}{name}", self.prefix))
    }

    /// A result column.
    fn needed(&self, name: &str) -> Result<&'a ArrayRef> {
        self.input(&format!("{}{name}", self.prefix))
    }

    /// Refuses a truth column that cannot be compared.
    fn unusable_truth(&self, expected: &str) -> Error {
        let found = self.truth().map(|column| column.data_type().to_string()).unwrap_or_default();
        Error::Usage(format!("truth_column '{}' has type {found}, but {expected} is needed", self.truth_column))
    }

    /// The truth as text.
    fn truth_texts(&self) -> Result<StringArray> {
        let truth = self.truth()?;
        if truth.data_type().is_nested() {
            return Err(self.unusable_truth("text"));
        }
        texts(truth)
    }

    /// The truth as numbers.
    fn truth_numbers(&self) -> Result<Vec<Option<f64>>> {
        let truth = self.truth()?;
        if !truth.data_type().is_numeric() {
            return Err(self.unusable_truth("a number"));
        }
        numbers(truth)
    }
}

fn texts(column: &ArrayRef) -> Result<StringArray> {
    Ok(cast(column, &DataType::Utf8)?.as_string::<i32>().clone())
}

fn numbers(column: &ArrayRef) -> Result<Vec<Option<f64>>> {
    Ok(cast(column, &DataType::Float64)?.as_primitive::<Float64Type>().iter().collect())
}

fn lists(column: &ArrayRef) -> Result<Option<ListArray>> {
    match column.data_type() {
        DataType::List(item) | DataType::LargeList(item) => {
            Ok(Some(cast(column, &DataType::List(item.clone()))?.as_list::<i32>().clone()))
        }
        _ => Ok(None),
    }
}

/// The (label, score) entries of each row.
fn label_scores(column: &ArrayRef) -> Result<Vec<Option<LabelScores>>> {
    let unreadable = || Error::Internal(format!("scores in a {} column", column.data_type()));
    let lists = lists(column)?.ok_or_else(unreadable)?;
    let row = |entries: ArrayRef| -> Result<LabelScores> {
        let entries = entries.as_struct_opt().ok_or_else(unreadable)?;
        let (labels, scores) = (texts(entries.column(0))?, numbers(entries.column(1))?);
        Ok(labels.iter().zip(scores).filter_map(|(label, score)| Some((label?.to_owned(), score?))).collect())
    };
    lists.iter().map(|entries| entries.map(row).transpose()).collect()
}
