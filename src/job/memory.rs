//! `--memory-limit`: settings of a job that change its memory and, beyond the last digits, not its results, cut to fit.
//!
//! ```text
//! program and libraries · weights · keys and values of completions · one batch's activations · windows of rows under way
//! ```
//!
//! It is an estimate from the checkpoint and the settings, since nobody knows the rows before they are read. What one row needs alone
//! is not bounded: its text, its tokens up to `--max-length`, the activations of that many tokens. Nor is what writers of the input chose:
//! pages and dictionaries of Parquet, record batches of Arrow.

use std::sync::OnceLock;

use super::command::CommandSpec;
use super::devices::Devices;
use super::generation::{CPU_KV_CACHE_BYTES, GenerateOptions};
use super::spec::JobSpec;
use crate::error::{Error, Result};
use crate::model::Checkpoint;

/// What the program takes whatever it does: its code, the tokenizer, a part's encoders, a decoded batch.
const PROGRAM_BYTES: u64 = 96 << 20;
/// Windows that are under way at a time, and what their text is in other forms: tokens, batches, results, encoded columns.
const COPIES_OF_A_WINDOW: u64 = 16;
/// The least that is left for windows, activations and caches together.
const LEAST_WORKING_BYTES: u64 = 32 << 20;
/// A window of fewer bytes would pack poorly.
const LEAST_WINDOW_BYTES: u64 = 256 << 10;
/// Batches of fewer tokens would compute slowly.
const LEAST_BATCH_TOKENS: u64 = 128;

static ON_LIMIT: OnceLock<fn()> = OnceLock::new();

/// Has `give_back` called when a job has a `memory_limit`: what makes a program's allocator return freed memory at once.
pub fn on_memory_limit(give_back: fn()) {
    // The first one stays: a program has one allocator.
    let _ = ON_LIMIT.set(give_back);
}

/// What a checkpoint takes in memory, by its files and shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WeightBytes {
    /// All that is held while the job runs.
    pub held: u64,
    /// What comes on top while the largest matrix is converted and packed.
    pub loading: u64,
}

impl WeightBytes {
    /// Stored precision is kept in memory; a tied output layer is packed a second time for the commands that use it.
    pub fn of(checkpoint: &Checkpoint, command: &CommandSpec) -> Self {
        let config = &checkpoint.config;
        let stored: u64 = checkpoint.weights.files().map(|(_, bytes)| bytes).sum();
        let embedding = (config.vocab_size * config.hidden_size) as u64;
        let bytes_per_parameter = stored.div_ceil(checkpoint.weights.num_parameters().max(1)).min(4);
        let again = config.tie_word_embeddings && matches!(command, CommandSpec::Generate(_) | CommandSpec::Score(_));
        let widest = 2 * config.intermediate_size.max(config.heads().qkv_width()) * config.hidden_size;
        // In f32, and packed beside that.
        let loading = embedding.max(widest as u64) * (4 + bytes_per_parameter);
        Self { held: stored + if again { embedding * bytes_per_parameter } else { 0 }, loading }
    }
}

/// The job with batches, windows and caches that fit into `memory_limit`; as it is where there is none. Of what is computed on CUDA
/// devices, windows alone take memory of the machine.
///
/// # Errors
/// [`Error::Usage`] where program and weights alone leave no room.
pub(super) fn fitted(spec: &JobSpec, checkpoint: &Checkpoint, devices: &Devices) -> Result<JobSpec> {
    let mut spec = spec.clone();
    let Some(limit) = spec.memory_limit else { return Ok(spec) };
    if let Some(give_back) = ON_LIMIT.get() {
        give_back();
    }
    let mut weights = WeightBytes::of(checkpoint, &spec.command);
    if devices.are_cuda() {
        weights.held = 0; // each matrix goes to the device as it is loaded
    }
    let least = PROGRAM_BYTES + weights.held + LEAST_WORKING_BYTES.max(weights.loading);
    if limit < least {
        return Err(Error::Usage(format!(
            "--memory-limit {} is too little: {} of weights, {} to load the largest of them or to compute with, and {} for the \
             program need {}",
            mib(limit),
            mib(weights.held),
            mib(LEAST_WORKING_BYTES.max(weights.loading)),
            mib(PROGRAM_BYTES),
            mib(least)
        )));
    }
    let mut working = limit - PROGRAM_BYTES - weights.held;
    if !devices.are_cuda() {
        if let CommandSpec::Generate(options) = &mut spec.command {
            let cache = options.kv_cache_bytes.unwrap_or(CPU_KV_CACHE_BYTES).min(working / 2);
            options.kv_cache_bytes = Some(cache);
            working -= cache;
        }
        let bytes_per_token = checkpoint.config.activation_bytes(1).max(1) as u64;
        let batch_tokens = (working / 2 / bytes_per_token).max(LEAST_BATCH_TOKENS);
        let batch_tokens = usize::try_from(batch_tokens).unwrap_or(usize::MAX);
        spec.max_batch_tokens = Some(spec.batch_tokens(devices).min(batch_tokens));
    }
    let window_bytes = (working / 2 / COPIES_OF_A_WINDOW).max(LEAST_WINDOW_BYTES);
    spec.window_bytes = spec.window_bytes.min(usize::try_from(window_bytes).unwrap_or(usize::MAX));
    Ok(spec)
}

/// What the limit made of a job, for a person; `None` without a limit.
pub(super) fn describe(spec: &JobSpec) -> Option<String> {
    let limit = mib(spec.memory_limit?);
    let cache = match &spec.command {
        CommandSpec::Generate(GenerateOptions { kv_cache_bytes: Some(bytes), .. }) => {
            format!(", {} of keys and values", mib(*bytes))
        }
        _ => String::new(),
    };
    let batches = spec.max_batch_tokens.map_or(String::new(), |tokens| format!("batches of {tokens} tokens, "));
    let window = mib(spec.window_bytes as u64);
    Some(format!("memory limit {limit}: {batches}windows of {window}{cache}; a longer row comes on top"))
}

fn mib(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 10.0 { format!("{mib:.1} MiB") } else { format!("{mib:.0} MiB") }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use clap::Parser;

    use crate::job::DeviceChoice;
    use crate::job::settings::JobParser;

    fn job(command: &str, model: &str, limit: &str) -> JobSpec {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/checkpoints").join(model);
        let model = model.to_str().unwrap();
        let args = ["job", command, "-i", "x", "-o", "y", "--model", model, "--memory-limit", limit];
        JobParser::parse_from(args).settings.into_job().unwrap().spec
    }

    fn cpu() -> Devices {
        DeviceChoice::Cpu(1).open().unwrap()
    }

    fn fit(command: &str, model: &str, limit: &str) -> Result<JobSpec> {
        let spec = job(command, model, limit);
        fitted(&spec, &Checkpoint::open(&spec.model).unwrap(), &cpu())
    }

    #[test]
    fn a_limit_cuts_what_can_be_cut_and_no_more() {
        let ample = fit("classify", "cls-nopad", "64G").unwrap();
        let without = JobSpec { memory_limit: None, ..ample.clone() };
        let checkpoint = Checkpoint::open(&ample.model).unwrap();
        let unlimited = fitted(&without, &checkpoint, &cpu()).unwrap();
        assert_eq!(ample.batch_tokens(&cpu()), unlimited.batch_tokens(&cpu()));
        assert_eq!(ample.window_bytes, unlimited.window_bytes);
        let mut before = (usize::MAX, usize::MAX, u64::MAX);
        for limit in ["8G", "1G", "512M", "256M", "160M", "136M"] {
            let spec = fit("generate", "lm-window", limit).unwrap();
            let CommandSpec::Generate(options) = &spec.command else { panic!("another command") };
            let now = (spec.max_batch_tokens.unwrap(), spec.window_bytes, options.kv_cache_bytes.unwrap());
            assert!(now.0 <= before.0 && now.1 <= before.1 && now.2 <= before.2, "{limit}");
            let checkpoint = Checkpoint::open(&spec.model).unwrap();
            let total = PROGRAM_BYTES
                + WeightBytes::of(&checkpoint, &spec.command).held
                + now.2
                + checkpoint.config.activation_bytes(now.0) as u64
                + COPIES_OF_A_WINDOW * spec.window_bytes as u64;
            assert!(total <= spec.memory_limit.unwrap(), "{limit}: {total}");
            before = now;
        }
        assert!(before.1 < (2 << 20), "the last was tight");
    }

    #[test]
    fn weights_alone_beyond_the_limit_are_refused() {
        let error = fit("classify", "cls-nopad", "100M").unwrap_err();
        assert_eq!(error.exit_code(), crate::ExitCode::Usage);
        assert!(error.to_string().contains("--memory-limit 100 MiB is too little"), "{error}");
    }
}
