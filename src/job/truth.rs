//! `--truth-column`: how well the results agree with what they should be.

use std::collections::BTreeSet;

use arrow::array::{Array, ArrayRef, AsArray, ListArray, StructArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, Int64Type};
use serde::{Deserialize, Serialize};

use crate::data::text_column::as_text;
use crate::error::{Error, Result};
use crate::heads::TaskKind;

/// Sums from which agreement is told; additive over units.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Rows with both a result and a truth.
    pub compared: u64,
    /// Rows whose label is the truth, or entities that are.
    pub correct: u64,
    /// Sum of |value − truth|, for regression.
    pub absolute_error: f64,
    /// Sum of (value − truth)², for regression.
    pub squared_error: f64,
    /// Entities in the results.
    #[serde(default)]
    pub found: u64,
    /// Entities in the truth.
    #[serde(default)]
    pub expected: u64,
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
    /// `entities` against a list of structs with start, end and label (or entity); white space at the ends is no part
    /// of an entity, since a token may begin with the space before its word.
    Entities,
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

    /// How entities compare with a truth column of type `truth`.
    ///
    /// # Errors
    /// [`Error::ColumnType`] when they do not.
    pub fn of_entities(column: &str, truth: &DataType, path: &std::path::Path) -> Result<Self> {
        let fields = match truth {
            DataType::List(item) | DataType::LargeList(item) => match item.data_type() {
                DataType::Struct(fields) => Some(fields),
                _ => None,
            },
            _ => None,
        };
        let has = |name: &str| fields.is_some_and(|fields| fields.find(name).is_some());
        if has("start") && has("end") && (has("label") || has("entity")) {
            return Ok(Self::Entities);
        }
        Err(Error::ColumnType {
            column: column.to_owned(),
            path: path.to_owned(),
            found: truth.to_string(),
            expected: "a list of structs with start, end and label",
            flag: "--truth-column",
        })
    }

    /// Compares the result columns of some rows with their truth; `texts` are what entities lie in.
    ///
    /// # Errors
    /// When the truth column cannot be read as what it was checked to be.
    pub fn compare(self, results: &[ArrayRef], truth: &ArrayRef, texts: Option<&ArrayRef>) -> Result<Agreement> {
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
            Self::Entities => {
                let texts = texts.and_then(as_text).ok_or_else(|| Error::Internal("entities without a text".into()))?;
                for ((found, expected), text) in
                    entities(&results[0])?.into_iter().zip(entities(truth)?).zip(texts.iter())
                {
                    if let (Some(found), Some(expected), Some(text)) = (found, expected, text) {
                        let text: Vec<char> = text.chars().collect();
                        let (found, expected) = (trimmed(found, &text), trimmed(expected, &text));
                        agreement.compared += 1;
                        agreement.correct += found.intersection(&expected).count() as u64;
                        agreement.found += found.len() as u64;
                        agreement.expected += expected.len() as u64;
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
            Self::Entities => {
                let Agreement { correct, found, expected, .. } = *agreement;
                let share = |of: u64| if of == 0 { f64::NAN } else { correct as f64 / of as f64 };
                let (precision, recall, f1) = (share(found), share(expected), 2.0 * share(found + expected));
                (
                    format!(
                        "F1 {f1:.4}, precision {precision:.4}, recall {recall:.4} ({found} entities found, {expected} in '{column}' of {n} rows)"
                    ),
                    serde_json::json!({
                        "column": column, "compared": n, "correct": correct, "found": found, "expected": expected,
                        "precision": precision, "recall": recall, "f1": f1,
                    }),
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
        self.found += other.found;
        self.expected += other.expected;
    }
}

/// First character, the one after the last, label.
pub type LabelledSpan = (usize, usize, String);

/// Each row's entities.
///
/// # Errors
/// When the column is no list of structs with start, end and label (or entity).
pub fn entities(column: &ArrayRef) -> Result<Vec<Option<Vec<LabelledSpan>>>> {
    let unreadable = || Error::Internal(format!("entities in a {} column", column.data_type()));
    let lists: ListArray = match column.data_type() {
        DataType::List(item) | DataType::LargeList(item) => {
            cast(column, &DataType::List(item.clone()))?.as_list::<i32>().clone()
        }
        _ => return Err(unreadable()),
    };
    let row = |list: ArrayRef| -> Result<Vec<LabelledSpan>> {
        let structs: &StructArray = list.as_struct_opt().ok_or_else(unreadable)?;
        let field = |name: &str, data_type: &DataType| -> Result<ArrayRef> {
            Ok(cast(structs.column_by_name(name).ok_or_else(unreadable)?, data_type)?)
        };
        let (starts, ends) = (field("start", &DataType::Int64)?, field("end", &DataType::Int64)?);
        let labels = field("label", &DataType::Utf8).or_else(|_| field("entity", &DataType::Utf8))?;
        let offsets = starts.as_primitive::<Int64Type>().iter().zip(ends.as_primitive::<Int64Type>());
        let spans = offsets.zip(labels.as_string::<i32>()).filter_map(|((start, end), label)| {
            Some((usize::try_from(start?).ok()?, usize::try_from(end?).ok()?, label?.to_owned()))
        });
        Ok(spans.collect())
    };
    lists.iter().map(|list| list.map(row).transpose()).collect()
}

/// Entities without the white space at their ends.
pub fn trimmed(entities: Vec<LabelledSpan>, text: &[char]) -> BTreeSet<LabelledSpan> {
    let is_space = |at: usize| text.get(at).is_some_and(|character| character.is_whitespace());
    let trim = |(mut start, mut end, label): LabelledSpan| {
        while start < end && is_space(start) {
            start += 1;
        }
        while start < end && is_space(end - 1) {
            end -= 1;
        }
        (start, end, label)
    };
    entities.into_iter().map(trim).collect()
}

/// Each row's labels, sorted; entries of a struct list are told by their `label` field.
///
/// # Errors
/// When the column is no list.
pub fn label_sets(column: &ArrayRef) -> Result<Vec<Option<Vec<String>>>> {
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
        let agreement = kind.compare(&results, &truth, None).unwrap();
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
        let agreement = kind.compare(&[sets.clone(), sets.clone(), sets], &truth, None).unwrap();
        assert_eq!((agreement.compared, agreement.correct), (2, 1));
    }

    #[test]
    fn entities_agree_without_the_space_before_them() {
        use arrow::array::{Int64Array, StructArray};
        use arrow::buffer::OffsetBuffer;
        let spans = |entities: &[(i64, i64, &str)], name: &str| -> ArrayRef {
            let structs = StructArray::try_from(vec![
                ("start", Arc::new(Int64Array::from_iter_values(entities.iter().map(|e| e.0))) as ArrayRef),
                ("end", Arc::new(Int64Array::from_iter_values(entities.iter().map(|e| e.1)))),
                (name, Arc::new(StringArray::from_iter_values(entities.iter().map(|e| e.2)))),
            ])
            .unwrap();
            let item = Arc::new(arrow::datatypes::Field::new("item", structs.data_type().clone(), true));
            Arc::new(ListArray::new(item, OffsetBuffer::from_lengths([entities.len()]), Arc::new(structs), None))
        };
        let texts: ArrayRef = Arc::new(StringArray::from(vec!["Zoë met Ada "]));
        let results = [spans(&[(0, 3, "NAME"), (7, 12, "NAME"), (4, 7, "DATE")], "entity")];
        let truth = spans(&[(0, 3, "NAME"), (8, 11, "NAME"), (4, 7, "NAME"), (9, 99, "NAME")], "label");
        let kind = TruthKind::of_entities("t", truth.data_type(), Path::new("x")).unwrap();
        let agreement = kind.compare(&results, &truth, Some(&texts)).unwrap();
        assert_eq!((agreement.correct, agreement.found, agreement.expected), (2, 3, 4));
        let (line, report) = kind.describe("t", &agreement);
        assert!(line.starts_with("F1 0.5714, precision 0.6667, recall 0.5000"), "{line}");
        assert_eq!(report["recall"], 0.5);
        assert!(TruthKind::of_entities("t", &DataType::Utf8, Path::new("x")).is_err());
    }

    #[test]
    fn numbers_are_compared_as_numbers() {
        let results: Vec<ArrayRef> = vec![Arc::new(Float32Array::from(vec![1.0, 3.0]))];
        let truth: ArrayRef = Arc::new(Int32Array::from(vec![2, 1]));
        let kind = TruthKind::of(TaskKind::Regression, "t", truth.data_type(), Path::new("x")).unwrap();
        let agreement = kind.compare(&results, &truth, None).unwrap();
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
