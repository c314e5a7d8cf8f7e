//! A sweep's results, and the two tables that they are written to.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray, UInt64Array};
use parquet::arrow::ArrowWriter;
use parquet::errors::ParquetError;
use serde_json::{Map, Value};

use super::metrics::bootstrap::Bootstrap;
use super::metrics::calibration::ReliabilityBin;
use super::metrics::classification::ConfusionMatrix;
use super::metrics::significance::{mcnemar_exact, paired_bootstrap};
use super::scoring::{Measure, Outcome};
use super::spec::TaskKind;
use crate::data::commit::{TempFile, parent_of, write_failed};
use crate::error::Result;

/// Everything that a sweep found.
pub struct SweepResults {
    pub title: String,
    /// How intervals were drawn.
    pub bootstrap: Bootstrap,
    /// The settings of the matrix, by name.
    pub keys: Vec<String>,
    /// One entry for each task and cell, tasks in the order of the file.
    pub runs: Vec<TaskRun>,
    /// Every pair of cells of each task.
    pub comparisons: Vec<Comparison>,
}

/// A task in a cell of the matrix.
pub struct TaskRun {
    pub task: String,
    pub kind: TaskKind,
    pub cell: usize,
    /// The cell's settings of the matrix.
    pub settings: Map<String, Value>,
    /// The folder of its predictions, relative to the sweep's.
    pub predictions: String,
    /// The fingerprint of the job that made them.
    pub fingerprint: String,
    pub cost: PredictionCost,
    /// Rows or documents, those compared, and what became of the rest.
    pub rows: usize,
    pub compared: usize,
    pub values: Vec<MeasuredValue>,
    pub confusion: Option<(Vec<String>, ConfusionMatrix)>,
    pub reliability: Option<Vec<ReliabilityBin>>,
    /// Whether each row is right, and the first measure's resampled values: what other cells are compared with.
    correct: Option<Vec<Option<bool>>>,
    resampled: Vec<f64>,
}

/// What predictions took, as their job noted it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PredictionCost {
    pub rows_failed: u64,
    pub rows_truncated: u64,
    pub tokens: u64,
    pub seconds: f64,
    pub tokens_per_second: f64,
}

/// A measure's value on a task's rows.
pub struct MeasuredValue {
    pub measure: Measure,
    pub value: f64,
    pub interval: Option<(f64, f64)>,
}

/// Two cells of a task, on the same rows, by the task's first measure.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    pub task: String,
    pub measure: &'static str,
    pub first: usize,
    pub second: usize,
    /// The second cell's value less the first one's.
    pub difference: f64,
    /// `mcnemar_exact` or `paired_bootstrap`.
    pub test: &'static str,
    pub p_value: f64,
}

impl TaskRun {
    /// Measures an outcome on all rows and on resamples of them.
    pub fn measured(mut self, outcome: Outcome, bootstrap: &Bootstrap) -> Self {
        let everything: Vec<usize> = (0..outcome.rows).collect();
        let values = (outcome.evaluate)(&everything);
        let mut resampled = bootstrap.values(outcome.rows, values.len(), &*outcome.evaluate);
        self.values = outcome
            .measures
            .into_iter()
            .zip(values)
            .zip(&resampled)
            .map(|((measure, value), resampled)| {
                let interval = if value.is_nan() { None } else { bootstrap.interval(resampled) };
                MeasuredValue { measure, value, interval }
            })
            .collect();
        (self.rows, self.compared) = (outcome.rows, outcome.compared);
        (self.confusion, self.reliability, self.correct) = (outcome.confusion, outcome.reliability, outcome.correct);
        if !resampled.is_empty() {
            self.resampled = resampled.swap_remove(0);
        }
        self
    }

    /// A run whose outcome is to be [`TaskRun::measured`].
    pub fn new(
        task: String,
        kind: TaskKind,
        cell: usize,
        settings: Map<String, Value>,
        predictions: String,
        fingerprint: String,
        cost: PredictionCost,
    ) -> Self {
        Self {
            task,
            kind,
            cell,
            settings,
            predictions,
            fingerprint,
            cost,
            rows: 0,
            compared: 0,
            values: Vec::new(),
            confusion: None,
            reliability: None,
            correct: None,
            resampled: Vec::new(),
        }
    }

    /// The task's first measure.
    pub fn headline(&self) -> Option<&MeasuredValue> {
        self.values.first()
    }

    /// How this cell compares with another one of the same task; `None` where they do not have the same rows.
    fn compare(&self, second: &TaskRun) -> Option<Comparison> {
        let (ours, theirs) = (self.headline()?, second.headline()?);
        if self.rows != second.rows || ours.measure != theirs.measure {
            return None;
        }
        let (test, p_value) = match (&self.correct, &second.correct) {
            (Some(first), Some(second)) => {
                let pairs = || first.iter().zip(second);
                // A row that only one cell compared tells nothing about the other.
                let only_first = pairs().filter(|pair| matches!(pair, (Some(true), Some(false)))).count();
                let only_second = pairs().filter(|pair| matches!(pair, (Some(false), Some(true)))).count();
                ("mcnemar_exact", mcnemar_exact(only_first as u64, only_second as u64))
            }
            _ if self.resampled.is_empty() => return None,
            _ => ("paired_bootstrap", paired_bootstrap(&self.resampled, &second.resampled)),
        };
        Some(Comparison {
            task: self.task.clone(),
            measure: ours.measure.name,
            first: self.cell,
            second: second.cell,
            difference: theirs.value - ours.value,
            test,
            p_value,
        })
    }
}

/// Compares every pair of cells of each task.
pub fn comparisons(runs: &[TaskRun]) -> Vec<Comparison> {
    let mut comparisons = Vec::new();
    for (place, first) in runs.iter().enumerate() {
        let others = runs[place + 1..].iter().filter(|run| run.task == first.task);
        comparisons.extend(others.filter_map(|second| first.compare(second)));
    }
    comparisons
}

/// The columns of `runs.parquet` before those of the matrix.
pub const RUN_COLUMNS: [&str; 18] = [
    "cell",
    "task",
    "kind",
    "metric",
    "class",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "rows",
    "rows_failed",
    "rows_truncated",
    "tokens",
    "seconds",
    "tokens_per_second",
    "predictions",
    "fingerprint",
    "version",
];

impl SweepResults {
    /// One row for each cell, task and measure; the settings of the matrix are columns behind [`RUN_COLUMNS`].
    ///
    /// # Errors
    /// When a column cannot be built.
    pub fn runs_table(&self) -> Result<RecordBatch> {
        let rows: Vec<(&TaskRun, &MeasuredValue)> =
            self.runs.iter().flat_map(|run| run.values.iter().map(move |value| (run, value))).collect();
        let number = |of: &dyn Fn(&TaskRun, &MeasuredValue) -> u64| -> ArrayRef {
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|(run, value)| of(run, value))))
        };
        let text = |of: &dyn Fn(&TaskRun, &MeasuredValue) -> Option<String>| -> ArrayRef {
            Arc::new(rows.iter().map(|(run, value)| of(run, value)).collect::<StringArray>())
        };
        let float = |of: &dyn Fn(&TaskRun, &MeasuredValue) -> Option<f64>| -> ArrayRef {
            Arc::new(rows.iter().map(|(run, value)| of(run, value).filter(|v| !v.is_nan())).collect::<Float64Array>())
        };
        let fixed: [ArrayRef; RUN_COLUMNS.len()] = [
            number(&|run, _| run.cell as u64),
            text(&|run, _| Some(run.task.clone())),
            text(&|run, _| Some(run.kind.name().to_owned())),
            text(&|_, value| Some(value.measure.name.to_owned())),
            text(&|_, value| value.measure.class.clone()),
            float(&|_, value| Some(value.value)),
            float(&|_, value| value.interval.map(|interval| interval.0)),
            float(&|_, value| value.interval.map(|interval| interval.1)),
            number(&|run, _| run.compared as u64),
            number(&|run, _| run.rows as u64),
            number(&|run, _| run.cost.rows_failed),
            number(&|run, _| run.cost.rows_truncated),
            number(&|run, _| run.cost.tokens),
            float(&|run, _| Some(run.cost.seconds)),
            float(&|run, _| Some(run.cost.tokens_per_second)),
            text(&|run, _| Some(run.predictions.clone())),
            text(&|run, _| Some(run.fingerprint.clone())),
            text(&|_, _| Some(env!("CARGO_PKG_VERSION").to_owned())),
        ];
        let matrix = self.keys.iter().map(|key| {
            let values: Vec<Option<&Value>> = rows.iter().map(|(run, _)| run.settings.get(key)).collect();
            (key.clone(), setting_column(&values), true)
        });
        let fixed = RUN_COLUMNS.iter().zip(fixed).map(|(name, column)| ((*name).to_owned(), column, true));
        Ok(RecordBatch::try_from_iter_with_nullable(fixed.chain(matrix))?)
    }

    /// One row for each pair of cells of each task.
    ///
    /// # Errors
    /// When a column cannot be built.
    pub fn comparisons_table(&self) -> Result<RecordBatch> {
        let text = |of: fn(&Comparison) -> &str| -> ArrayRef {
            Arc::new(StringArray::from_iter_values(self.comparisons.iter().map(of)))
        };
        let number = |of: fn(&Comparison) -> usize| -> ArrayRef {
            Arc::new(UInt64Array::from_iter_values(self.comparisons.iter().map(|comparison| of(comparison) as u64)))
        };
        let float = |of: fn(&Comparison) -> f64| -> ArrayRef {
            Arc::new(
                self.comparisons.iter().map(|pair| Some(of(pair)).filter(|v| !v.is_nan())).collect::<Float64Array>(),
            )
        };
        Ok(RecordBatch::try_from_iter_with_nullable([
            ("task", text(|comparison| &comparison.task), true),
            ("metric", text(|comparison| comparison.measure), true),
            ("first_cell", number(|comparison| comparison.first), true),
            ("second_cell", number(|comparison| comparison.second), true),
            ("difference", float(|comparison| comparison.difference), true),
            ("test", text(|comparison| comparison.test), true),
            ("p_value", float(|comparison| comparison.p_value), true),
        ])?)
    }
}

/// A setting's values as whole numbers, numbers, booleans, or else text.
fn setting_column(values: &[Option<&Value>]) -> ArrayRef {
    let all = |fits: fn(&Value) -> bool| values.iter().flatten().all(|value| fits(value));
    let values = values.iter();
    if all(Value::is_i64) {
        Arc::new(values.map(|value| value.and_then(Value::as_i64)).collect::<Int64Array>())
    } else if all(Value::is_number) {
        Arc::new(values.map(|value| value.and_then(Value::as_f64)).collect::<Float64Array>())
    } else if all(Value::is_boolean) {
        Arc::new(values.map(|value| value.and_then(Value::as_bool)).collect::<BooleanArray>())
    } else {
        Arc::new(values.map(|value| value.map(setting_text)).collect::<StringArray>())
    }
}

/// A setting's value as a person would write it.
pub fn setting_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Puts a table at `place`, whole or not at all.
///
/// # Errors
/// [`Error::CannotCreate`] or [`Error::Io`].
pub fn write_table(place: &Path, table: &RecordBatch) -> Result<()> {
    replace_file(place, |file| {
        let failed = |error: ParquetError| write_failed(place, &error);
        let mut writer = ArrowWriter::try_new(file, table.schema(), None).map_err(failed)?;
        writer.write(table).map_err(failed)?;
        writer.close().map_err(failed)?;
        Ok(())
    })
}

/// Puts a file at `place`, whole or not at all, over what stands there.
///
/// # Errors
/// [`Error::CannotCreate`] or [`Error::Io`], and what `write` gives.
pub fn replace_file(place: &Path, write: impl FnOnce(File) -> Result<()>) -> Result<()> {
    let name = place.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let temp = TempFile::create(parent_of(place), &name)?;
    write(temp.handle()?)?;
    temp.replace(place)
}
