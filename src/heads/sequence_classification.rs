//! MistralForSequenceClassification: one set of label scores per text.
//!
//! Pooling as `GenericForSequenceClassification` (transformers 5.23, `modeling_layers.py`), scores as its
//! text-classification pipeline (`pipelines/text_classification.py`).

use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, Float32Builder, ListBuilder, StringArray, StringBuilder, StructBuilder};
use arrow::datatypes::{DataType, Field, Fields};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{Head, HeadOutput, best_label, check_architecture, softmax};
use crate::batch::PackedBatch;
use crate::error::{Error, Result};
use crate::kernels;
use crate::model::{Architecture, Checkpoint, MistralModel, ProblemType};
use crate::text::TokenDetail;

/// What turns logits into scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FunctionToApply {
    /// Each label on its own.
    Sigmoid,
    /// Labels share a total of one.
    Softmax,
    /// The raw logits.
    None,
}

/// What the result columns look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
    /// `predicted_label`, `predicted_score`.
    SingleLabel,
    /// The same, and `predicted_labels` with every label over the threshold.
    MultiLabel,
    /// `predicted_value`.
    Regression,
}

/// How many labels `predicted_scores` lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TopK {
    All,
    #[serde(untagged)]
    N(usize),
}

/// Settings of `classify` that shape its results.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassifyOptions {
    /// Instead of what the checkpoint's problem type implies.
    pub function_to_apply: Option<FunctionToApply>,
    /// Adds `predicted_scores`, best first.
    pub top_k: Option<TopK>,
    /// The score from which a multi-label checkpoint's label is predicted.
    pub threshold: f32,
}

impl Default for ClassifyOptions {
    fn default() -> Self {
        Self { function_to_apply: None, top_k: None, threshold: 0.5 }
    }
}

/// The head of a MistralForSequenceClassification checkpoint.
#[derive(Debug)]
pub struct SequenceClassification {
    /// `[labels, hidden]`, without a bias.
    score: Tensor,
    labels: Vec<String>,
    pad_token_id: Option<u32>,
    task: TaskKind,
    function: FunctionToApply,
    options: ClassifyOptions,
}

impl SequenceClassification {
    /// Reads the head's weights.
    ///
    /// # Errors
    /// [`Error::Config`] when the checkpoint has another head or its `score.weight` is unusable, [`Error::Usage`] when
    /// an option does not fit its problem type.
    pub fn load(checkpoint: &Checkpoint, options: ClassifyOptions, device: &Device) -> Result<Self> {
        let config = &checkpoint.config;
        let (task, function) = Self::plan(checkpoint, &options)?;
        Ok(Self {
            score: checkpoint.hidden_matrix("score.weight", &[config.num_labels(), config.hidden_size], device)?,
            labels: config.labels.clone(),
            pad_token_id: config.pad_token_id,
            task,
            function,
            options,
        })
    }

    /// What the checkpoint's results will be, without reading a weight.
    ///
    /// # Errors
    /// As [`SequenceClassification::load`], but for the weights.
    pub fn plan(checkpoint: &Checkpoint, options: &ClassifyOptions) -> Result<(TaskKind, FunctionToApply)> {
        let config = &checkpoint.config;
        check_architecture(checkpoint, "classify", &[Architecture::SequenceClassification])?;
        let task = match config.problem_type {
            // Several regression targets keep their names: they are listed like labels.
            Some(ProblemType::Regression) if config.num_labels() == 1 => TaskKind::Regression,
            Some(ProblemType::MultiLabelClassification) => TaskKind::MultiLabel,
            _ => TaskKind::SingleLabel,
        };
        if task == TaskKind::Regression && options.top_k.is_some() {
            return Err(Error::Usage(
                "--top-k does not fit a regression checkpoint: it has one value, not labels".into(),
            ));
        }
        let function = options.function_to_apply.unwrap_or(match config.problem_type {
            Some(ProblemType::Regression) => FunctionToApply::None,
            Some(ProblemType::MultiLabelClassification) => FunctionToApply::Sigmoid,
            _ if config.num_labels() == 1 => FunctionToApply::Sigmoid,
            _ => FunctionToApply::Softmax,
        });
        Ok((task, function))
    }

    /// The result columns of a task, in order.
    pub fn fields_of(task: TaskKind, options: &ClassifyOptions) -> Vec<Field> {
        let mut fields = match task {
            TaskKind::Regression => vec![Field::new("predicted_value", DataType::Float32, true)],
            TaskKind::SingleLabel | TaskKind::MultiLabel => vec![
                Field::new("predicted_label", DataType::Utf8, true),
                Field::new("predicted_score", DataType::Float32, true),
            ],
        };
        if task == TaskKind::MultiLabel {
            fields.push(Field::new("predicted_labels", scores_type(), true));
        }
        if options.top_k.is_some() {
            fields.push(Field::new("predicted_scores", scores_type(), true));
        }
        fields
    }

    /// The token whose hidden state is scored: the rightmost id that is not `pad_token_id`, read from the ids.
    ///
    /// So with pad == eos a text that ends in a literal `</s>` pools earlier, as in transformers. Without a pad id it is
    /// the last token; when all are padding, the first.
    fn pooled_index(&self, input_ids: &[u32]) -> usize {
        match self.pad_token_id {
            Some(pad) => input_ids.iter().rposition(|&id| id != pad).unwrap_or(0),
            None => input_ids.len() - 1,
        }
    }
}

impl Head for SequenceClassification {
    fn fields(&self) -> Vec<Field> {
        Self::fields_of(self.task, &self.options)
    }

    fn forward(&self, model: &MistralModel, batch: &PackedBatch, _: &[&TokenDetail]) -> Result<Vec<HeadOutput>> {
        let pooled: Vec<u32> = (0..batch.num_sequences())
            .map(|b| {
                let range = batch.range(b);
                (range.start + self.pooled_index(&batch.input_ids[range])) as u32
            })
            .collect();
        let hidden_states = model.forward_at(batch, &pooled)?; // [B, hidden]
        let logits = kernels::project(&hidden_states, &self.score)?; // [B, labels]
        Ok(logits.into_iter().map(HeadOutput::Values).collect())
    }

    /// Logits become scores; chunks of one text count alike: their scores are averaged.
    fn merge(&self, chunks: Vec<HeadOutput>) -> HeadOutput {
        let mut scores: Vec<Vec<f32>> = chunks.iter().map(|chunk| apply(self.function, chunk.values())).collect();
        if scores.len() == 1 {
            return HeadOutput::Values(scores.swap_remove(0));
        }
        let mean = |label: usize| scores.iter().map(|scores| scores[label]).sum::<f32>() / scores.len() as f32;
        HeadOutput::Values((0..self.labels.len()).map(mean).collect())
    }

    fn columns(&self, rows: &[Option<HeadOutput>]) -> Result<Vec<ArrayRef>> {
        let scores = || rows.iter().map(|row| row.as_ref().map(HeadOutput::values));
        if self.task == TaskKind::Regression {
            let values: Float32Array = scores().map(|row| row.and_then(|values| values.first().copied())).collect();
            return Ok(vec![Arc::new(values)]);
        }
        let best: Vec<Option<usize>> = scores().map(|row| row.map(best_label)).collect();
        let labels: StringArray = best.iter().map(|index| index.map(|index| self.labels[index].as_str())).collect();
        let best_scores: Float32Array = scores().zip(&best).map(|(row, index)| Some(row?[(*index)?])).collect();
        let mut columns: Vec<ArrayRef> = vec![Arc::new(labels), Arc::new(best_scores)];
        if self.task == TaskKind::MultiLabel {
            let over = |scores: &[f32]| {
                let mut order = best_first(scores);
                order.retain(|&index| scores[index] >= self.options.threshold);
                order
            };
            columns.push(self.list_column(scores(), over));
        }
        if let Some(top_k) = self.options.top_k {
            let top = |scores: &[f32]| {
                let mut order = best_first(scores);
                if let TopK::N(n) = top_k {
                    order.truncate(n);
                }
                order
            };
            columns.push(self.list_column(scores(), top));
        }
        Ok(columns)
    }
}

impl SequenceClassification {
    /// A List<Struct{label, score}> of the labels that `choose` picks of each row.
    fn list_column<'a>(
        &self,
        rows: impl Iterator<Item = Option<&'a [f32]>>,
        choose: impl Fn(&[f32]) -> Vec<usize>,
    ) -> ArrayRef {
        let entries = StructBuilder::new(
            score_fields(),
            vec![Box::new(StringBuilder::new()) as Box<_>, Box::new(Float32Builder::new())],
        );
        let mut list = ListBuilder::new(entries).with_field(score_item());
        for row in rows {
            if let Some(scores) = row {
                for index in choose(scores) {
                    let entry = list.values();
                    if let Some(labels) = entry.field_builder::<StringBuilder>(0) {
                        labels.append_value(&self.labels[index]);
                    }
                    if let Some(values) = entry.field_builder::<Float32Builder>(1) {
                        values.append_value(scores[index]);
                    }
                    entry.append(true);
                }
            }
            list.append(row.is_some());
        }
        Arc::new(list.finish())
    }
}

fn score_fields() -> Fields {
    Fields::from(vec![Field::new("label", DataType::Utf8, false), Field::new("score", DataType::Float32, false)])
}

fn score_item() -> Field {
    Field::new("item", DataType::Struct(score_fields()), false)
}

/// List<Struct{label Utf8, score Float32}>.
fn scores_type() -> DataType {
    DataType::List(Arc::new(score_item()))
}

/// Label indices by falling score; equal scores keep the order of the labels, as Python's sort does.
fn best_first(scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order
}

fn apply(function: FunctionToApply, logits: &[f32]) -> Vec<f32> {
    match function {
        FunctionToApply::None => logits.to_vec(),
        FunctionToApply::Sigmoid => logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
        FunctionToApply::Softmax => softmax(logits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Array, AsArray};
    use arrow::datatypes::Float32Type;

    fn head(task: TaskKind, pad_token_id: Option<u32>, options: ClassifyOptions) -> SequenceClassification {
        SequenceClassification {
            score: Tensor::zeros((3, 2), candle_core::DType::F32, &Device::Cpu).unwrap(),
            labels: ["low", "medium", "high"].map(str::to_owned).to_vec(),
            pad_token_id,
            task,
            function: FunctionToApply::Softmax,
            options,
        }
    }

    #[test]
    fn pools_the_rightmost_id_that_is_not_padding() {
        let pooled = |pad, ids: &[u32]| head(TaskKind::SingleLabel, pad, Default::default()).pooled_index(ids);
        assert_eq!(pooled(Some(9), &[1, 5, 6]), 2);
        assert_eq!(pooled(Some(2), &[1, 5, 2, 6, 2, 2]), 3, "pad == eos and a literal eos at the end");
        assert_eq!(pooled(None, &[1, 5, 2]), 2);
        assert_eq!(pooled(Some(2), &[2, 2]), 0);
    }

    #[test]
    fn functions_are_the_pipelines() {
        let softmax = apply(FunctionToApply::Softmax, &[1000.0, 1000.0, 999.0]);
        assert!(
            (softmax.iter().sum::<f32>() - 1.0).abs() < 1e-6 && softmax[0] == softmax[1] && softmax[1] > softmax[2]
        );
        let sigmoid = apply(FunctionToApply::Sigmoid, &[0.0, -1000.0, 1000.0]);
        assert_eq!(sigmoid, [0.5, 0.0, 1.0]);
        assert_eq!(apply(FunctionToApply::None, &[3.0, -1.0]), [3.0, -1.0]);
    }

    #[test]
    fn columns_hold_nulls_ties_and_lists() {
        let options = ClassifyOptions { top_k: Some(TopK::N(2)), threshold: 0.4, ..Default::default() };
        let head = head(TaskKind::MultiLabel, None, options);
        let rows = [Some(HeadOutput::Values(vec![0.2, 0.5, 0.5])), None, Some(HeadOutput::Values(vec![0.3, 0.1, 0.2]))];
        let columns = head.columns(&rows).unwrap();
        assert_eq!(columns.len(), head.fields().len());
        for (column, field) in columns.iter().zip(head.fields()) {
            assert_eq!(column.data_type(), field.data_type());
            assert_eq!((column.len(), column.is_null(1)), (3, true));
        }
        let labels: Vec<_> = columns[0].as_string::<i32>().iter().collect();
        assert_eq!(labels, [Some("medium"), None, Some("low")], "the first of equal scores");
        let over = columns[2].as_list::<i32>();
        assert_eq!(
            (over.value_length(0), over.value_length(2)),
            (2, 0),
            "no label over the threshold is an empty list"
        );
        let top = columns[3].as_list::<i32>().value(2);
        assert_eq!(top.as_struct().column(1).as_primitive::<Float32Type>().values(), &[0.3, 0.2]);
    }

    #[test]
    fn chunks_are_averaged() {
        let head = head(TaskKind::SingleLabel, None, Default::default());
        let chunks = || vec![HeadOutput::Values(vec![200.0, 0.0, 0.0]), HeadOutput::Values(vec![200.0, 200.0, 0.0])];
        assert_eq!(head.merge(chunks()), HeadOutput::Values(vec![0.75, 0.25, 0.0]), "as scores, not as logits");
        assert_eq!(head.merge(chunks().split_off(1)), HeadOutput::Values(vec![0.5, 0.5, 0.0]));
    }
}
