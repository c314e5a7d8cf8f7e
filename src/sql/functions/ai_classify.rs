//! `ai_classify(text[, model])` → Struct{label, score, error}.
//!
//! `SELECT ai_classify(text).label FROM tickets`

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StructArray};
use arrow::datatypes::{DataType, Field, Fields};

use super::{CallOptions, ModelFunction, column, has_text};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::heads::{ClassifyOptions, SequenceClassification, TaskKind};
use crate::sql::models::SqlModel;
use crate::text::Overflow;

/// The best label of each text, with its score; why a row failed stands in `error`.
#[derive(Debug)]
pub struct AiClassify;

impl ModelFunction for AiClassify {
    fn name(&self) -> &'static str {
        "ai_classify"
    }

    fn return_type(&self, model: &SqlModel) -> Result<DataType> {
        check_labels(self.name(), model)?;
        Ok(DataType::Struct(fields()))
    }

    fn engine(&self, model: &SqlModel, _: &CallOptions) -> Result<Engine> {
        classifier(model, ClassifyOptions::default())
    }

    fn result(&self, columns: &RecordBatch) -> Result<ArrayRef> {
        let values = ["predicted_label", "predicted_score", "error"].map(|name| column(columns, name).cloned());
        let values = values.into_iter().collect::<Result<Vec<_>>>()?;
        Ok(Arc::new(StructArray::try_new(fields(), values, Some(has_text(columns)?))?))
    }
}

fn fields() -> Fields {
    Fields::from(vec![
        Field::new("label", DataType::Utf8, true),
        Field::new("score", DataType::Float32, true),
        Field::new("error", DataType::Utf8, true),
    ])
}

/// Refuses a checkpoint whose results are not labels.
pub(super) fn check_labels(function: &str, model: &SqlModel) -> Result<()> {
    match SequenceClassification::plan(model.checkpoint(), &ClassifyOptions::default())?.0 {
        TaskKind::SingleLabel | TaskKind::MultiLabel => Ok(()),
        TaskKind::Regression => {
            let message = format!("is a regression checkpoint, which has no labels for {function}; use ai_score");
            Err(Error::config(&model.checkpoint().dir, message))
        }
    }
}

/// An engine with the sequence classification head.
pub(super) fn classifier(model: &SqlModel, options: ClassifyOptions) -> Result<Engine> {
    let head = SequenceClassification::load(model.checkpoint(), options, &model.options().device)?;
    let tokenizer = model.limited_tokenizer(model.tokenizer().clone(), Overflow::TruncateRight)?;
    Ok(Engine::new(model.base()?, Box::new(head), tokenizer, model.options().max_batch_tokens))
}
