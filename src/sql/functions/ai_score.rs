//! `ai_score(text[, model])` → Float32, the value of a regression checkpoint.
//!
//! `SELECT avg(ai_score(review)) FROM reviews`

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::DataType;

use super::ai_classify::classifier;
use super::{CallOptions, ModelFunction, column};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::heads::{ClassifyOptions, SequenceClassification, TaskKind};
use crate::sql::models::SqlModel;

/// The value of each text.
#[derive(Debug)]
pub struct AiScore;

impl ModelFunction for AiScore {
    fn name(&self) -> &'static str {
        "ai_score"
    }

    fn return_type(&self, model: &SqlModel) -> Result<DataType> {
        match SequenceClassification::plan(model.checkpoint(), &ClassifyOptions::default())?.0 {
            TaskKind::Regression => Ok(DataType::Float32),
            TaskKind::SingleLabel | TaskKind::MultiLabel => Err(Error::config(
                &model.checkpoint().dir,
                "has labels, but ai_score needs a regression checkpoint; use ai_classify",
            )),
        }
    }

    fn engine(&self, model: &SqlModel, _: &CallOptions) -> Result<Engine> {
        classifier(model, ClassifyOptions::default())
    }

    fn result(&self, columns: &RecordBatch) -> Result<ArrayRef> {
        column(columns, "predicted_value").cloned()
    }
}
