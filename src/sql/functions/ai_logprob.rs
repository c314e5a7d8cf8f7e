//! `ai_logprob(text[, model])` → Float64, the text's log-likelihood.
//!
//! `SELECT text FROM essays ORDER BY ai_logprob(text) / length(text) LIMIT 10`

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::DataType;

use super::{CallOptions, ModelFunction, column};
use crate::engine::Engine;
use crate::error::Result;
use crate::heads::Score;
use crate::sql::models::SqlModel;
use crate::text::Overflow;

/// The sum of the log-probabilities of each text's tokens.
#[derive(Debug)]
pub struct AiLogprob;

impl ModelFunction for AiLogprob {
    fn name(&self) -> &'static str {
        "ai_logprob"
    }

    fn return_type(&self, model: &SqlModel) -> Result<DataType> {
        Score::check(model.checkpoint())?;
        Ok(DataType::Float64)
    }

    fn engine(&self, model: &SqlModel, _: &CallOptions) -> Result<Engine> {
        let head = Score::load(model.checkpoint(), None, &model.options().device)?;
        let tokenizer = model.limited_tokenizer(model.tokenizer().clone(), Overflow::TruncateRight)?;
        Ok(Engine::new(model.base()?, Box::new(head), tokenizer, model.options().max_batch_tokens))
    }

    fn result(&self, columns: &RecordBatch) -> Result<ArrayRef> {
        column(columns, "logprob").cloned()
    }
}
