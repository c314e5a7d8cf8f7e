//! `ai_generate(prompt[, model[, options]])` → Utf8, alias `ai_complete`.
//!
//! `SELECT ai_generate('Summarise: ' || text, 'mistral', {max_tokens: 60}) FROM articles`. A prompt may be a chat, a list
//! of {role, content}: it goes through the checkpoint's chat template.

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::DataType;

use super::{CallOptions, ModelFunction, column};
use crate::engine::{Engine, Generator};
use crate::error::{Error, Result};
use crate::generation::{Constraint, GenerationDefaults, Grammar, SamplingParams, SchedulerLimits};
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
        constraint: None,
    };
    params.check().map_err(|message| Error::Usage(format!("option {message}")))?;
    Ok(params)
}

/// What the completions have to be, by the one option that says so.
fn grammar(options: &CallOptions) -> Result<Option<Grammar>> {
    let mut grammars = [
        options.texts("choices")?.map(Grammar::Choices),
        options.text("json_schema")?.map(Grammar::JsonSchema),
        options.text("regex")?.map(Grammar::Regex),
    ]
    .into_iter()
    .flatten();
    let grammar = grammars.next();
    if grammars.next().is_some() {
        return Err(Error::Usage("options choices, json_schema and regex exclude each other".to_owned()));
    }
    if let Some(grammar) = &grammar {
        grammar.check().map_err(|message| wrong_grammar(grammar, &message))?;
    }
    Ok(grammar)
}

fn wrong_grammar(grammar: &Grammar, message: &str) -> Error {
    let option = grammar.flag().trim_start_matches("--").replace('-', "_");
    Error::Usage(format!("option {option}: {message}"))
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
            "choices",
            "json_schema",
            "regex",
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
        sampling_params(model, options)?;
        grammar(options).map(drop)
    }

    fn engine(&self, model: &SqlModel, options: &CallOptions) -> Result<Engine> {
        let tokenizer = model.limited_tokenizer(model.tokenizer().clone(), Overflow::TruncateLeft)?;
        let mut params = sampling_params(model, options)?;
        if let Some(grammar) = grammar(options)? {
            let constraint = Constraint::compile(grammar.clone(), &tokenizer.token_bytes()?);
            params.constraint = Some(constraint.map_err(|message| wrong_grammar(&grammar, &message))?);
        }
        let (max_rows, prefill_tokens) = (MAX_LIVE_ROWS, model.options().max_batch_tokens);
        let causal = model.causal()?;
        let kv_cache_bytes = causal.reserve_caches(model.options().kv_cache_bytes, prefill_tokens, max_rows)?;
        let limits = SchedulerLimits { kv_cache_bytes, max_rows, prefill_tokens };
        let generator = Generator::new(causal, params, 1, limits);
        Ok(Engine::generating(generator, tokenizer))
    }

    fn result(&self, columns: &RecordBatch) -> Result<ArrayRef> {
        column(columns, "completion").cloned()
    }
}
