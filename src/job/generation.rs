//! What `generate` is asked for, and what the checkpoint adds to it.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};

use super::devices::Devices;
use super::models::ModelCache;
use super::row_params::RowParams;
use super::spec::JobSpec;
use crate::data::dataset::Dataset;
use crate::engine::Generator;
use crate::error::{Error, Result};
use crate::generation::{Batching, Constraint, GenerationDefaults, Grammar, SamplingParams, SchedulerLimits};
use crate::model::Checkpoint;
use crate::text::TextTokenizer;

/// Memory for key/value caches on the CPU when nothing is said, in bytes.
pub const CPU_KV_CACHE_BYTES: u64 = 2 << 30;
/// Completions that are live at a time: as many rows as one reading of the weights serves well on a CPU.
const MAX_LIVE_ROWS: usize = 64;
/// The same on a CUDA device, beyond which keys and values take longer to read than weights.
const MAX_CUDA_LIVE_ROWS: usize = 256;

/// Settings of `generate`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GenerateOptions {
    /// Everything but what ends a completion, which may come from the checkpoint.
    pub params: SamplingParams,
    /// Tokens of a completion at most; `generation_config.json`'s, else 256, when `None`.
    pub max_tokens: Option<usize>,
    /// Instead of the checkpoint's end tokens.
    pub stop_token_ids: Option<Vec<u32>>,
    /// No end token ends a completion.
    pub ignore_eos: bool,
    /// Completions of each row.
    pub samples: u32,
    /// A struct column whose fields override `params`, `max_tokens`, `stop_token_ids` and `ignore_eos` row by row.
    pub params_column: Option<String>,
    /// Who shares the steps of a completion.
    pub batching: Batching,
    /// What completions have to be.
    pub grammar: Option<Grammar>,
    /// Memory for key/value caches, in bytes, of each device; what suits it when `None`. It changes no result.
    #[serde(skip)]
    pub kv_cache_bytes: Option<u64>,
}

impl GenerateOptions {
    /// The settings of every row's completion, with what the checkpoint says where the user does not.
    ///
    /// # Errors
    /// [`Error::Config`] for an unreadable `generation_config.json`, [`Error::Usage`] for settings that mean nothing.
    pub fn resolve(&self, checkpoint: &Checkpoint) -> Result<SamplingParams> {
        let defaults = GenerationDefaults::read(&checkpoint.dir, &checkpoint.config)?;
        let mut params = self.params.clone();
        params.max_tokens = self.max_tokens.unwrap_or(defaults.max_tokens);
        params.stop_token_ids = match &self.stop_token_ids {
            Some(ids) => ids.clone(),
            None if self.ignore_eos => Vec::new(),
            None => defaults.eos_token_ids,
        };
        params.check().map_err(|bad| Error::Usage(bad.of_flag()))?;
        if self.samples > 1 && params.temperature == 0.0 && self.params_column.is_none() {
            return Err(Error::Usage(format!(
                "--n {} without a --temperature would give the same greedy completion each time",
                self.samples
            )));
        }
        Ok(params)
    }

    /// As [`GenerateOptions::resolve`], with the grammar compiled for the checkpoint's tokens.
    ///
    /// # Errors
    /// As [`GenerateOptions::resolve`]; [`Error::Usage`] for a grammar that is wrong, [`Error::Config`] for a tokenizer
    /// whose tokens have no bytes of their own.
    pub fn constrained(&self, checkpoint: &Checkpoint, tokenizer: &TextTokenizer) -> Result<SamplingParams> {
        let mut params = self.resolve(checkpoint)?;
        if let Some(grammar) = &self.grammar {
            let constraint = Constraint::compile(grammar.clone(), &tokenizer.token_bytes()?);
            let constraint = constraint.map_err(|error| Error::Usage(format!("{}: {error}", grammar.flag())))?;
            params.constraint = Some(constraint);
            params.check().map_err(|bad| Error::Usage(bad.of_flag()))?;
        }
        Ok(params)
    }

    /// What determines the results, for the plan's settings.
    ///
    /// # Errors
    /// As [`GenerateOptions::resolve`].
    pub fn settings(&self, checkpoint: &Checkpoint) -> Result<Value> {
        let params =
            serde_json::to_value(self.resolve(checkpoint)?).map_err(|error| Error::Internal(error.to_string()))?;
        Ok(json!({
            "params": params,
            "n": self.samples,
            "params_column": self.params_column,
            "batching": self.batching,
            "grammar": self.grammar,
        }))
    }

    /// The settings that rows bring themselves; the grammar is checked either way.
    ///
    /// # Errors
    /// As [`GenerateOptions::constrained`] and [`RowParams::new`].
    pub fn row_params(
        &self,
        checkpoint: &Checkpoint,
        tokenizer: &TextTokenizer,
        dataset: &Dataset,
    ) -> Result<Option<RowParams>> {
        let params = Arc::new(self.constrained(checkpoint, tokenizer)?);
        let Some(column) = &self.params_column else { return Ok(None) };
        let eos_token_ids = GenerationDefaults::read(&checkpoint.dir, &checkpoint.config)?.eos_token_ids;
        RowParams::new(dataset, column, params, eos_token_ids).map(Some)
    }

    /// Loads the model on each of `devices` where `models` does not hold it.
    ///
    /// # Errors
    /// As [`GenerateOptions::constrained`], and when weights are unusable or a device has no memory for them.
    pub fn generator(
        &self,
        checkpoint: &Checkpoint,
        spec: &JobSpec,
        tokenizer: &TextTokenizer,
        models: &ModelCache,
        devices: &Devices,
    ) -> Result<Generator> {
        let params = self.constrained(checkpoint, tokenizer)?;
        if self.batching == Batching::Static && (devices.are_cuda() || devices.iter().count() > 1) {
            return Err(Error::Usage(
                "--batching static, the comparison, computes on the CPU; leave it away, or use --device cpu".into(),
            ));
        }
        let mut generator: Option<Generator> = None;
        for (replica, device) in devices.iter().enumerate() {
            let model = models.causal_lm(checkpoint, device, replica)?;
            let prefill_tokens = spec.batch_tokens(devices);
            let max_rows = if device.is_cuda() { MAX_CUDA_LIVE_ROWS } else { MAX_LIVE_ROWS };
            let asked = self.kv_cache_bytes.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
            let wanted = match asked {
                Some(bytes) => bytes,
                None if device.is_cuda() => usize::MAX,
                None => CPU_KV_CACHE_BYTES as usize,
            };
            let kv_cache_bytes = model.reserve_caches(wanted, prefill_tokens, max_rows)?;
            let limits = SchedulerLimits { kv_cache_bytes, max_rows, prefill_tokens };
            generator = Some(match generator {
                None => Generator::new(model, params.clone(), self.samples, limits).with_batching(self.batching),
                Some(generator) => generator.with_replica(model, limits),
            });
        }
        generator.ok_or_else(|| Error::Internal("there is no device to generate on".into()))
    }
}
