//! `--truth-column`: how well the results agree with what they should be.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::heads::TaskKind;

/// Sums from which agreement is told; additive over units.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Rows with both a result and a truth.
    pub compared: u64,
    /// Rows whose label is the truth.
    pub correct: u64,
    /// Sum of |value − truth|, for regression.
    pub absolute_error: f64,
    /// Sum of (value − truth)², for regression.
    pub squared_error: f64,
}

/// Compares results with the truth column, batch by batch.
#[derive(Debug, Clone, Copy)]
pub enum TruthKind {
    /// `predicted_label` against text (or anything that reads as text).
    Label,
    /// The set of `predicted_labels` against a list of texts.
    LabelSet,
    /// `predicted_value` against a number.
    Number,
}

impl TruthKind {
    /// How results of `task` compare with a truth column of type `truth`.
    ///
    /// # Errors
    /// [`Error::ColumnType`] when they do not.
    pub fn of(task: TaskKind, column: &str, truth: &DataType, path: &std::path::Path) -> Result<Self> {
        let (kind, expected) = match task {
            TaskKind::Regression if truth.is_numeric() => (Some(Self::Number), ""),
            TaskKind::Regression => (None, "a number"),
            TaskKind::MultiLabel => match truth {
                DataType::List(_) | DataType::LargeList(_) => (Some(Self::LabelSet), ""),
                _ => (None, "a list of labels"),
            },
            TaskKind::SingleLabel if truth.is_nested() || truth.is_null() => (None, "a label"),
            TaskKind::SingleLabel => (Some(Self::Label), ""),
        };
        kind.ok_or_else(|| Error::ColumnType {
            column: column.to_owned(),
            path: path.to_owned(),
            found: truth.to_string(),
            expected,
            flag: "--truth-column",
        })
    }

    /// Compares the result columns of some rows with their truth.
    ///
    /// # Errors
    /// When the truth column cannot be read as what it was checked to be.
    pub fn compare(self, results: &[ArrayRef], truth: &ArrayRef) -> Result<Agreement> {
        let mut agreement = Agreement::default();
        match self {
            Self::Label => {
                let truth = cast(truth, &DataType::Utf8)?;
                for (label, truth) in results[0].as_string::<i32>().iter().zip(truth.as_string::<i32>()) {
                    if let (Some(label), Some(truth)) = (label, truth) {
                        agreement.compared += 1;
                        agreement.correct += u64::from(label == truth);
                    }
                }
            }
            Self::LabelSet => {
                let (sets, truths) = (label_sets(&results[2])?, label_sets(truth)?);
                for (set, truth) in sets.into_iter().zip(truths) {
                    if let (Some(set), Some(truth)) = (set, truth) {
                        agreement.compared += 1;
                        agreement.correct += u64::from(set == truth);
                    }
                }
            }
            Self::Number => {
                let truth = cast(truth, &DataType::Float64)?;
                let values = cast(&results[0], &DataType::Float64)?;
                let values = values.as_primitive::<Float64Type>().iter();
                for (value, truth) in values.zip(truth.as_primitive::<Float64Type>()) {
                    if let (Some(value), Some(truth)) = (value, truth) {
                        agreement.compared += 1;
                        agreement.absolute_error += (value - truth).abs();
                        agreement.squared_error += (value - truth).powi(2);
                    }
                }
            }
        }
        Ok(agreement)
    }

    /// One line for the summary, and its numbers for the report.
    pub fn describe(self, column: &str, agreement: &Agreement) -> (String, serde_json::Value) {
        let n = agreement.compared;
        let share = |sum: f64| if n == 0 { f64::NAN } else { sum / n as f64 };
        match self {
            Self::Label | Self::LabelSet => {
                let accuracy = share(agreement.correct as f64);
                (
                    format!("accuracy {accuracy:.4} ({} of {n} rows agree with '{column}')", agreement.correct),
                    serde_json::json!({"column": column, "compared": n, "correct": agreement.correct, "accuracy": accuracy}),
                )
            }
            Self::Number => {
                let (mae, rmse) = (share(agreement.absolute_error), share(agreement.squared_error).sqrt());
                (
                    format!("mean absolute error {mae:.4}, RMSE {rmse:.4} ({n} rows compared with '{column}')"),
                    serde_json::json!({"column": column, "compared": n, "mean_absolute_error": mae, "rmse": rmse}),
                )
            }
        }
    }
}

impl std::ops::AddAssign for Agreement {
    fn add_assign(&mut self, other: Self) {
        self.compared += other.compared;
        self.correct += other.correct;
        self.absolute_error += other.absolute_error;
        self.squared_error += other.squared_error;
    }
}

/// Each row's labels, sorted; entries of a struct list are told by their `label` field.
fn label_sets(column: &ArrayRef) -> Result<Vec<Option<Vec<String>>>> {
    let item = match column.data_type() {
        DataType::List(item) | DataType::LargeList(item) => item,
        other => return Err(Error::Internal(format!("labels in a {other} column"))),
    };
    let lists = cast(column, &DataType::List(item.clone()))?;
    let lists = lists.as_list::<i32>();
    let row = |list: ArrayRef| -> Result<Vec<String>> {
        let labels = match list.as_struct_opt() {
            Some(entries) => entries.column(0).clone(),
            None => list,
        };
        let labels = cast(&labels, &DataType::Utf8)?;
        let mut labels: Vec<String> = labels.as_string::<i32>().iter().flatten().map(str::to_owned).collect();
        labels.sort_unstable();
        Ok(labels)
    };
    lists.iter().map(|list| list.map(row).transpose()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{DictionaryArray, Float32Array, Int32Array, ListArray, StringArray};
    use arrow::datatypes::Int32Type;
    use std::path::Path;
    use std::sync::Arc;

    #[test]
    fn labels_are_counted_where_both_sides_are_known() {
        let results: Vec<ArrayRef> = vec![Arc::new(StringArray::from(vec![Some("a"), Some("b"), None, Some("c")]))];
        let truth: ArrayRef =
            Arc::new(vec![Some("a"), Some("a"), Some("a"), None].into_iter().collect::<DictionaryArray<Int32Type>>());
        let kind = TruthKind::of(TaskKind::SingleLabel, "t", truth.data_type(), Path::new("x")).unwrap();
        let agreement = kind.compare(&results, &truth).unwrap();
        assert_eq!((agreement.compared, agreement.correct), (2, 1));
        assert!(kind.describe("t", &agreement).0.starts_with("accuracy 0.5000 (1 of 2"));
    }

    #[test]
    fn label_sets_do_not_depend_on_order() {
        let mut builder = arrow::array::ListBuilder::new(arrow::array::StringBuilder::new());
        builder.append_value([Some("x"), Some("y")]);
        builder.append_value([Some("x")]);
        let sets: ArrayRef = Arc::new(builder.finish());
        let mut builder = arrow::array::ListBuilder::new(arrow::array::StringBuilder::new());
        builder.append_value([Some("y"), Some("x")]);
        builder.append_value([Some("z")]);
        let truth: ArrayRef = Arc::new(builder.finish());
        let kind = TruthKind::of(TaskKind::MultiLabel, "t", truth.data_type(), Path::new("x")).unwrap();
        let agreement = kind.compare(&[sets.clone(), sets.clone(), sets], &truth).unwrap();
        assert_eq!((agreement.compared, agreement.correct), (2, 1));
    }

    #[test]
    fn numbers_are_compared_as_numbers() {
        let results: Vec<ArrayRef> = vec![Arc::new(Float32Array::from(vec![1.0, 3.0]))];
        let truth: ArrayRef = Arc::new(Int32Array::from(vec![2, 1]));
        let kind = TruthKind::of(TaskKind::Regression, "t", truth.data_type(), Path::new("x")).unwrap();
        let agreement = kind.compare(&results, &truth).unwrap();
        assert_eq!((agreement.absolute_error, agreement.squared_error), (3.0, 5.0));
    }

    #[test]
    fn a_truth_of_the_wrong_type_is_refused_before_the_run() {
        let lists = ListArray::new_null(Arc::new(arrow::datatypes::Field::new("item", DataType::Utf8, true)), 1);
        for (task, truth) in [
            (TaskKind::SingleLabel, lists.data_type().clone()),
            (TaskKind::MultiLabel, DataType::Utf8),
            (TaskKind::Regression, DataType::Utf8),
        ] {
            let error = TruthKind::of(task, "t", &truth, Path::new("x")).unwrap_err();
            assert_eq!(error.exit_code(), crate::ExitCode::Usage);
        }
    }
}
