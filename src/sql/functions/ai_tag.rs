//! `ai_tag(text[, model[, options]])` → List<Struct{entity, score, start, end, word}>.
//!
//! `SELECT unnest(ai_tag(text)) FROM letters`

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::DataType;

use super::{CallOptions, ModelFunction, column};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::heads::{Aggregation, TagOptions, TokenClassification};
use crate::sql::models::SqlModel;
use crate::text::Overflow;

/// The entities of each text, tokens of one label joined.
#[derive(Debug)]
pub struct AiTag;

fn tag_options(options: &CallOptions) -> Result<TagOptions> {
    let aggregation = match options.text("aggregation")?.as_deref() {
        None | Some("simple") => Aggregation::Simple,
        Some("none") => Aggregation::None,
        Some("first") => Aggregation::First,
        Some("average") => Aggregation::Average,
        Some("max") => Aggregation::Max,
        Some(other) => {
            return Err(Error::Usage(format!(
                "option aggregation is '{other}'; it has to be none, simple, first, average or max"
            )));
        }
    };
    let ignore_labels = options.texts("ignore_labels")?.unwrap_or_else(|| vec!["O".into()]);
    Ok(TagOptions { aggregation, ignore_labels })
}

impl ModelFunction for AiTag {
    fn name(&self) -> &'static str {
        "ai_tag"
    }

    fn option_names(&self) -> &'static [&'static str] {
        &["aggregation", "ignore_labels"]
    }

    fn return_type(&self, model: &SqlModel) -> Result<DataType> {
        TokenClassification::check(model.checkpoint())?;
        let field = TokenClassification::fields_of().pop();
        field.map(|field| field.data_type().clone()).ok_or_else(|| Error::Internal("no entities".into()))
    }

    fn check_options(&self, _: &SqlModel, options: &CallOptions) -> Result<()> {
        tag_options(options).map(drop)
    }

    fn engine(&self, model: &SqlModel, options: &CallOptions) -> Result<Engine> {
        let tokenizer = model.limited_tokenizer(model.tokenizer().clone().with_spans(), Overflow::Chunk)?;
        let head = TokenClassification::load(
            model.checkpoint(),
            tag_options(options)?,
            tokenizer.clone(),
            &model.options().device,
        )?;
        Ok(Engine::new(model.base()?, Box::new(head), tokenizer, model.options().max_batch_tokens))
    }

    fn result(&self, columns: &RecordBatch) -> Result<ArrayRef> {
        column(columns, "entities").cloned()
    }
}
