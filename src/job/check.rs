//! What a job would do, told without loading a weight or writing anything.
//!
//! A sample of rows is tokenized and packed as the run would; the sample is the first packing window of units spread
//! evenly over the input, so the same job gives the same answer.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use serde::Serialize;

use super::command::CommandSpec;
use super::devices::Devices;
use super::generation::CPU_KV_CACHE_BYTES;
use super::plan::JobPlan;
use super::prompts::RowTexts;
use super::runner::PlannedJob;
use super::spec::JobSpec;
use crate::batch::{Packer, Padding, Sequence};
use crate::data::sink::Sink;
use crate::error::Result;
use crate::model::{Checkpoint, MistralConfig};
use crate::text::TextTokenizer;

/// Units that are sampled at most; each gives one packing window.
const SAMPLED_UNITS: usize = 4;
/// Rows of the plain batches that the packed ones are compared with.
const PLAIN_BATCH_ROWS: usize = 32;
/// Rows of the product that tells how fast this machine computes; fewer where the model is large.
const PROBE_ROWS: usize = 512;
/// Operations of that product at most, so that a check stays a matter of seconds.
const PROBE_FLOPS: usize = 16 << 30;
/// It is run at least so often, and for so long.
const PROBE_RUNS: u32 = 3;
const PROBE_TIME: Duration = Duration::from_millis(100);

/// What a job would do.
#[derive(Debug, Clone, Serialize)]
pub struct CheckReport {
    /// `checked`, or `nothing_to_do` for a job that is finished.
    pub status: &'static str,
    pub exit_code: u8,
    pub command: &'static str,
    pub version: &'static str,
    pub model: String,
    pub architecture: &'static str,
    pub output: String,
    /// `name: type` of every column of the output.
    pub output_schema: Vec<String>,
    pub fingerprint: String,
    pub files: u64,
    /// Rows that would be read, before `--where`.
    pub rows: u64,
    pub units: u64,
    pub unit_rows: u64,
    pub max_length: u64,
    pub sample: SampleReport,
    pub memory: MemoryEstimate,
    pub time: TimeEstimate,
}

/// What the sampled rows are like.
#[derive(Debug, Clone, Default, Serialize)]
pub struct SampleReport {
    /// Rows that were looked at, before `--where`.
    pub rows_read: u64,
    /// Rows of them that passed `--where`.
    pub rows: u64,
    pub rows_null: u64,
    pub rows_failed: u64,
    /// Why the first of the failed rows would fail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_error: Option<String>,
    pub rows_truncated: u64,
    pub tokens: u64,
    pub tokens_p50: u64,
    pub tokens_p90: u64,
    pub tokens_p99: u64,
    pub tokens_max: u64,
    /// Rows by length: up to so many tokens, and over the bucket before.
    pub histogram: Vec<Bucket>,
    pub batches: u64,
    /// Padding of the length-sorted batches, which is not computed.
    pub padding_percent: f64,
    /// Padding of batches of 32 rows in input order, left-padded.
    pub plain_padding_percent: f64,
    #[serde(skip)]
    attention_flops: f64,
}

/// Rows of similar length.
#[derive(Debug, Clone, Serialize)]
pub struct Bucket {
    pub up_to_tokens: u64,
    pub rows: u64,
}

/// Bytes that the run needs at its widest moment, input windows not among them.
#[derive(Debug, Clone, Serialize)]
pub struct MemoryEstimate {
    pub weights_bytes: u64,
    pub activations_bytes: u64,
    pub kv_cache_bytes: u64,
    /// What `--memory-limit` made of the settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<String>,
}

/// How long the model would compute.
#[derive(Debug, Clone, Serialize)]
pub struct TimeEstimate {
    /// Tokens of the whole input, from the sample.
    pub tokens: u64,
    /// A lower bound, from the arithmetic alone; null for `generate`, whose completions' lengths are not known.
    pub seconds_at_least: Option<f64>,
    /// What the bound is made of.
    pub basis: String,
}

/// Checks `spec` and tells what it would do.
///
/// # Errors
/// What the run would refuse before it loads the model.
pub fn check(spec: &JobSpec) -> Result<CheckReport> {
    let PlannedJob { spec, checkpoint, tokenizer, plan, target, max_length, devices } = PlannedJob::new(spec)?;
    let spec = &spec;
    let finished = Sink::look(&target, &plan.output_schema, &plan.file, spec.on_existing)?.is_some();
    let batch_tokens = spec.batch_tokens(&devices);
    let sample = sample(batch_tokens, &plan, &checkpoint.config, &tokenizer)?;
    let share = if sample.rows_read == 0 { 0.0 } else { plan.file.rows as f64 / sample.rows_read as f64 };
    Ok(CheckReport {
        status: if finished { "nothing_to_do" } else { "checked" },
        exit_code: 0,
        command: spec.command.name(),
        version: env!("CARGO_PKG_VERSION"),
        model: spec.model.clone(),
        architecture: checkpoint.config.architecture.class_name(),
        output: spec.output.display().to_string(),
        output_schema: plan
            .output_schema
            .fields()
            .iter()
            .map(|field| format!("{}: {}", field.name(), field.data_type()))
            .collect(),
        fingerprint: plan.file.fingerprint.clone(),
        files: plan.dataset.files.len() as u64,
        rows: plan.file.rows,
        units: plan.units.len() as u64,
        unit_rows: plan.file.unit_rows,
        max_length: max_length as u64,
        memory: memory(spec, &checkpoint, &devices, sample.tokens_max)?,
        time: time(spec, &checkpoint, &devices, &sample, share)?,
        sample,
    })
}

fn sample(
    batch_tokens: usize,
    plan: &JobPlan,
    config: &MistralConfig,
    tokenizer: &TextTokenizer,
) -> Result<SampleReport> {
    let count = plan.units.len().min(SAMPLED_UNITS);
    let mut report = SampleReport::default();
    let mut lengths = Vec::new();
    let (mut packed, mut plain) = (Padding::default(), Padding::default());
    for index in 0..count {
        let unit = plan.units[index * plan.units.len() / count].clone();
        let Some(window) = plan.windows(vec![unit])?.next() else { continue };
        let mut batch = window?.batch;
        report.rows_read += batch.num_rows() as u64;
        if let Some(filter) = &plan.filter {
            batch = filter.apply(&batch)?.0;
        }
        report.rows += batch.num_rows() as u64;
        let tokenized = match plan.prompts.rows(&batch)? {
            RowTexts::Prompts(prompts) => tokenizer.tokenize(&prompts),
            RowTexts::Continuations { contexts, continuations } => {
                tokenizer.tokenize_continuations(&contexts, &continuations)
            }
        };
        let mut sequences = Vec::new();
        for row in tokenized {
            match row {
                None => report.rows_null += 1,
                Some(Err(error)) => {
                    report.rows_failed += 1;
                    report.first_error.get_or_insert(error);
                }
                Some(Ok(row)) => {
                    report.rows_truncated += u64::from(row.truncated);
                    lengths.push(row.num_tokens() as u64);
                    let first = sequences.len();
                    sequences.extend((first..).zip(row.chunks).map(|(row, input_ids)| Sequence { row, input_ids }));
                }
            }
        }
        report.attention_flops += sequences.iter().map(|s| attention_flops(config, s.input_ids.len())).sum::<f64>();
        for rows in sequences.chunks(PLAIN_BATCH_ROWS) {
            let longest = rows.iter().map(|s| s.input_ids.len()).max().unwrap_or(0);
            let real = rows.iter().map(|s| s.input_ids.len() as u64).sum();
            plain += Padding { real_tokens: real, padded_tokens: (longest * rows.len()) as u64 };
        }
        for batch in Packer::new(batch_tokens, 0).pack(sequences) {
            report.batches += 1;
            packed += Padding { real_tokens: batch.real_tokens() as u64, padded_tokens: batch.padded_tokens() as u64 };
        }
    }
    lengths.sort_unstable();
    let percentile = |percent: usize| match lengths.len() {
        0 => 0,
        count => lengths[(count * percent).div_ceil(100).clamp(1, count) - 1],
    };
    (report.tokens_p50, report.tokens_p90, report.tokens_p99) = (percentile(50), percentile(90), percentile(99));
    report.tokens_max = percentile(100);
    report.tokens = lengths.iter().sum();
    report.histogram = histogram(&lengths);
    report.padding_percent = packed.waste_percent();
    report.plain_padding_percent = plain.waste_percent();
    Ok(report)
}

/// Rows by length, in buckets of doubling width; `lengths` are sorted.
fn histogram(lengths: &[u64]) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = Vec::new();
    for length in lengths {
        let up_to_tokens = length.next_power_of_two();
        match buckets.last_mut() {
            Some(bucket) if bucket.up_to_tokens == up_to_tokens => bucket.rows += 1,
            _ => buckets.push(Bucket { up_to_tokens, rows: 1 }),
        }
    }
    buckets
}

/// Scores and weighted values of one sequence: two products of each query with the keys in its window.
fn attention_flops(config: &MistralConfig, tokens: usize) -> f64 {
    let window = config.sliding_window.unwrap_or(usize::MAX).min(tokens);
    let pairs = window as f64 * (window as f64 + 1.0) / 2.0 + (tokens - window) as f64 * window as f64;
    4.0 * (config.num_hidden_layers * config.num_attention_heads * config.head_dim) as f64 * pairs
}

fn memory(spec: &JobSpec, checkpoint: &Checkpoint, devices: &Devices, longest: u64) -> Result<MemoryEstimate> {
    let tokens = spec.batch_tokens(devices).max(longest as usize);
    let value_bytes = checkpoint.hidden_dtype(devices.first())?.size_in_bytes() as u64;
    let kv_cache_bytes = match &spec.command {
        CommandSpec::Generate(options) => options.kv_cache_bytes.unwrap_or(CPU_KV_CACHE_BYTES),
        _ => 0,
    };
    Ok(MemoryEstimate {
        weights_bytes: value_bytes * checkpoint.weights.num_parameters(),
        activations_bytes: checkpoint.config.activation_bytes(tokens) as u64 * value_bytes / 4,
        kv_cache_bytes,
        limit: super::memory::describe(spec),
    })
}

fn time(
    spec: &JobSpec,
    checkpoint: &Checkpoint,
    devices: &Devices,
    sample: &SampleReport,
    share: f64,
) -> Result<TimeEstimate> {
    let tokens = (sample.tokens as f64 * share) as u64;
    if devices.are_cuda() {
        let basis = "not estimated: the rate of a GPU is not measured here".to_owned();
        return Ok(TimeEstimate { tokens, seconds_at_least: None, basis });
    }
    if matches!(spec.command, CommandSpec::Generate(_)) {
        let basis = "not estimated: the lengths of completions are not known".to_owned();
        return Ok(TimeEstimate { tokens, seconds_at_least: None, basis });
    }
    let config = &checkpoint.config;
    // The embedding is looked up, not multiplied; every other weight is, once a token.
    let embedding = (config.vocab_size * config.hidden_size) as u64;
    let weights = checkpoint.weights.num_parameters().saturating_sub(embedding) as f64;
    let flops = share * (2.0 * weights * sample.tokens as f64 + sample.attention_flops);
    let (m, k, n) = probe(config);
    let rate = measured_flops_per_second(m, k, n)?;
    let basis = format!(
        "{flops:.2e} floating-point operations at {:.0} GFLOP/s, the rate of a {m}x{k} by {k}x{n} product in f32 measured \
         just now, at its best; what is not a matrix product, loading and reading come on top",
        rate / 1e9
    );
    Ok(TimeEstimate { tokens, seconds_at_least: Some(flops / rate), basis })
}

/// Rows, depth and columns of a product like the model's widest.
fn probe(config: &MistralConfig) -> (usize, usize, usize) {
    let (k, n) = (config.hidden_size, config.intermediate_size);
    ((PROBE_FLOPS / (2 * k * n).max(1)).clamp(32, PROBE_ROWS), k, n)
}

fn measured_flops_per_second(m: usize, k: usize, n: usize) -> Result<f64> {
    let a = Tensor::ones((m, k), DType::F32, &Device::Cpu)?;
    let b = Tensor::ones((k, n), DType::F32, &Device::Cpu)?;
    // The fastest counts: a bound from below must not depend on what else the machine does just now.
    let started = Instant::now();
    let (mut runs, mut fastest) = (0, Duration::MAX);
    while runs < PROBE_RUNS || started.elapsed() < PROBE_TIME {
        let run = Instant::now();
        black_box(a.matmul(&b)?);
        fastest = fastest.min(run.elapsed());
        runs += 1;
    }
    Ok(2.0 * (m * n * k) as f64 / fastest.as_secs_f64().max(1e-9))
}

impl CheckReport {
    /// The report for a person.
    pub fn lines(&self) -> Vec<String> {
        let sample = &self.sample;
        let mib = |bytes: u64| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20));
        let mut lines = vec![
            format!("{}: {} with {}", self.command, self.model, self.architecture),
            format!(
                "{} rows in {} file(s), {} unit(s) of up to {} rows, to {}",
                self.rows, self.files, self.units, self.unit_rows, self.output
            ),
            format!("columns: {}", self.output_schema.join(", ")),
            format!(
                "sample of {} rows: {} taken, {} null, {} would fail, {} truncated at {} tokens",
                sample.rows_read,
                sample.rows,
                sample.rows_null,
                sample.rows_failed,
                sample.rows_truncated,
                self.max_length
            ),
        ];
        lines.extend(sample.first_error.as_ref().map(|error| format!("first failure: {error}")));
        lines.push(format!(
            "tokens a row: median {}, 90% {}, 99% {}, most {}",
            sample.tokens_p50, sample.tokens_p90, sample.tokens_p99, sample.tokens_max
        ));
        let most = sample.histogram.iter().map(|bucket| bucket.rows).max().unwrap_or(1);
        for bucket in &sample.histogram {
            let bar = "#".repeat((bucket.rows * 40).div_ceil(most) as usize);
            lines.push(format!("  up to {:>6} {:>6} rows {bar}", bucket.up_to_tokens, bucket.rows));
        }
        lines.push(format!(
            "{} batches in the sample, {:.1}% padding, which is not computed; {:.1}% in left-padded batches of {PLAIN_BATCH_ROWS} rows as they come",
            sample.batches, sample.padding_percent, sample.plain_padding_percent
        ));
        let memory = &self.memory;
        let cache = match memory.kv_cache_bytes {
            0 => String::new(),
            bytes => format!(", up to {} of keys and values", mib(bytes)),
        };
        lines.push(format!(
            "memory: {} of weights, about {} of activations{cache}",
            mib(memory.weights_bytes),
            mib(memory.activations_bytes)
        ));
        lines.extend(memory.limit.clone());
        let seconds = self.time.seconds_at_least;
        let seconds = seconds.map_or(String::new(), |seconds| format!("at least {} s, ", two_digits(seconds)));
        lines.push(format!("time: about {} tokens, {seconds}{}", self.time.tokens, self.time.basis));
        lines.push(match self.status {
            "nothing_to_do" => "the output is finished already: a run would do nothing".to_owned(),
            _ => "nothing was written".to_owned(),
        });
        lines
    }
}

/// A number of seconds with as much precision as an estimate has.
fn two_digits(seconds: f64) -> String {
    if seconds >= 10.0 { format!("{seconds:.0}") } else { format!("{seconds:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_double_and_lose_no_row() {
        let buckets = histogram(&[1, 2, 3, 4, 5, 8, 9]);
        let pairs: Vec<_> = buckets.iter().map(|bucket| (bucket.up_to_tokens, bucket.rows)).collect();
        assert_eq!(pairs, [(1, 1), (2, 1), (4, 2), (8, 2), (16, 1)]);
    }
}
