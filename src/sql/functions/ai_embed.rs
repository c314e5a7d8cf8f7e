//! `ai_embed(text[, model[, options]])` → FixedSizeList<Float32, hidden>.
//!
//! `SELECT ai_embed(text, 'e5', {pooling: 'last', normalize: true, append_eos: true}) FROM docs`

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::DataType;

use super::{CallOptions, ModelFunction, column};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::heads::{EmbedOptions, Embedding, Pooling};
use crate::sql::models::SqlModel;
use crate::text::Overflow;

/// The vector of each text.
#[derive(Debug)]
pub struct AiEmbed;

fn embed_options(options: &CallOptions) -> Result<EmbedOptions> {
    let pooling = match options.text("pooling")?.as_deref() {
        None | Some("last") => Pooling::Last,
        Some("mean") => Pooling::Mean,
        Some(other) => {
            return Err(Error::Usage(format!("option pooling is '{other}'; it has to be last or mean")));
        }
    };
    Ok(EmbedOptions {
        pooling,
        normalize: options.flag("normalize")?.unwrap_or(false),
        append_eos: options.flag("append_eos")?.unwrap_or(false),
    })
}

impl ModelFunction for AiEmbed {
    fn name(&self) -> &'static str {
        "ai_embed"
    }

    fn option_names(&self) -> &'static [&'static str] {
        &["pooling", "normalize", "append_eos"]
    }

    fn return_type(&self, model: &SqlModel) -> Result<DataType> {
        Embedding::check(model.checkpoint())?;
        let field = Embedding::fields_of(model.checkpoint().config.hidden_size).pop();
        field.map(|field| field.data_type().clone()).ok_or_else(|| Error::Internal("no embedding".into()))
    }

    fn check_options(&self, _: &SqlModel, options: &CallOptions) -> Result<()> {
        embed_options(options).map(drop)
    }

    fn engine(&self, model: &SqlModel, options: &CallOptions) -> Result<Engine> {
        let options = embed_options(options)?;
        let mut tokenizer = model.tokenizer().clone();
        if options.append_eos {
            tokenizer = tokenizer.with_appended_eos(model.checkpoint().config.eos_token_ids.first().copied())?;
        }
        let tokenizer = model.limited_tokenizer(tokenizer, Overflow::TruncateRight)?;
        let head = Embedding::new(model.checkpoint(), options)?;
        Ok(Engine::new(model.base()?, Box::new(head), tokenizer, model.options().max_batch_tokens))
    }

    fn result(&self, columns: &RecordBatch) -> Result<ArrayRef> {
        column(columns, "embedding").cloned()
    }
}
