//! `ai_classify_scores(text[, model])` → List<Struct{label, score}>, best first.
//!
//! `SELECT ai_classify_scores(text)[2].label FROM tickets` is the second best.

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::DataType;

use super::ai_classify::{check_labels, classifier};
use super::{CallOptions, ModelFunction, column};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::heads::{ClassifyOptions, SequenceClassification, TaskKind, TopK};
use crate::sql::models::SqlModel;

/// Every label of each text with its score.
#[derive(Debug)]
pub struct AiClassifyScores;

fn all_labels() -> ClassifyOptions {
    ClassifyOptions { top_k: Some(TopK::All), ..ClassifyOptions::default() }
}

impl ModelFunction for AiClassifyScores {
    fn name(&self) -> &'static str {
        "ai_classify_scores"
    }

    fn return_type(&self, model: &SqlModel) -> Result<DataType> {
        check_labels(self.name(), model)?;
        let fields = SequenceClassification::fields_of(TaskKind::SingleLabel, &all_labels());
        let scores = fields.into_iter().find(|field| field.name() == "predicted_scores");
        scores.map(|field| field.data_type().clone()).ok_or_else(|| Error::Internal("no predicted_scores".into()))
    }

    fn engine(&self, model: &SqlModel, _: &CallOptions) -> Result<Engine> {
        classifier(model, all_labels())
    }

    fn result(&self, columns: &RecordBatch) -> Result<ArrayRef> {
        column(columns, "predicted_scores").cloned()
    }
}
