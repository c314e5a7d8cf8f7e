//! `ai_generate(prompt[, model[, options]])` → Utf8, alias `ai_complete`.
//!
//! `SELECT ai_generate('Summarise: ' || text, 'mistral', {max_tokens: 60}) FROM articles`. A prompt may be a chat, a list
//! of {role, content}: it goes through the checkpoint's chat template.

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::DataType;

use super::{CallOptions, ModelFunction, column};
use crate::engine::{Engine, Generator};
use crate::error::{Error, Result};
use crate::generation::{GenerationDefaults, SamplingParams, SchedulerLimits};
use crate::heads::check_architecture;
use crate::model::Architecture;
use crate::sql::models::SqlModel;
use crate::text::Overflow;

/// Completions that are live at a time, as in the command.
const MAX_LIVE_ROWS: usize = 64;

/// A completion of each prompt.
#[derive(Debug)]
pub struct AiGenerate;

fn sampling_params(model: &SqlModel, options: &CallOptions) -> Result<SamplingParams> {
    let checkpoint = model.checkpoint();
    let defaults = GenerationDefaults::read(&checkpoint.dir, &checkpoint.config)?;
    let base = SamplingParams::default();
    let ignore_eos = options.flag("ignore_eos")?.unwrap_or(false);
    let count = |name| Ok::<_, Error>(options.count(name)?.map(|value| value as usize));
    let params = SamplingParams {
        max_tokens: count("max_tokens")?.unwrap_or(defaults.max_tokens),
        min_tokens: count("min_tokens")?.unwrap_or(base.min_tokens),
        temperature: options.number("temperature")?.unwrap_or(base.temperature),
        top_k: count("top_k")?,
        top_p: options.number("top_p")?.unwrap_or(base.top_p),
        min_p: options.number("min_p")?.unwrap_or(base.min_p),
        repetition_penalty: options.number("repetition_penalty")?.unwrap_or(base.repetition_penalty),
        frequency_penalty: options.number("frequency_penalty")?.unwrap_or(base.frequency_penalty),
        presence_penalty: options.number("presence_penalty")?.unwrap_or(base.presence_penalty),
        no_repeat_ngram_size: count("no_repeat_ngram_size")?.unwrap_or(base.no_repeat_ngram_size),
        stop_token_ids: if ignore_eos { Vec::new() } else { defaults.eos_token_ids },
        stop: options.texts("stop")?.unwrap_or_default(),
        logprobs: false,
        seed: options.count("seed")?.unwrap_or(base.seed),
    };
    params.check().map_err(|message| Error::Usage(format!("option {message}")))?;
    Ok(params)
}

impl ModelFunction for AiGenerate {
    fn name(&self) -> &'static str {
        "ai_generate"
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["ai_complete"]
    }

    fn option_names(&self) -> &'static [&'static str] {
        &[
            "max_tokens",
            "min_tokens",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "frequency_penalty",
            "presence_penalty",
            "no_repeat_ngram_size",
            "stop",
            "ignore_eos",
            "seed",
        ]
    }

    fn accepts_chats(&self) -> bool {
        true
    }

    fn generates(&self) -> bool {
        true
    }

    fn return_type(&self, model: &SqlModel) -> Result<DataType> {
        check_architecture(model.checkpoint(), "ai_generate", &[Architecture::CausalLm])?;
        Ok(DataType::Utf8)
    }

    fn check_options(&self, model: &SqlModel, options: &CallOptions) -> Result<()> {
        sampling_params(model, options).map(drop)
    }

    fn engine(&self, model: &SqlModel, options: &CallOptions) -> Result<Engine> {
        let limits = SchedulerLimits {
            kv_cache_bytes: model.options().kv_cache_bytes,
            max_rows: MAX_LIVE_ROWS,
            prefill_tokens: model.options().max_batch_tokens,
        };
        let tokenizer = model.limited_tokenizer(model.tokenizer().clone(), Overflow::TruncateLeft)?;
        let generator = Generator::new(model.causal()?, sampling_params(model, options)?, 1, limits);
        Ok(Engine::generating(generator, tokenizer))
    }

    fn result(&self, columns: &RecordBatch) -> Result<ArrayRef> {
        column(columns, "completion").cloned()
    }
}
