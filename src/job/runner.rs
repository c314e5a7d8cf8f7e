//! Runs a job from its specification to its committed output.

use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;
use tokio::task::{JoinHandle, spawn_blocking};

use super::control::{Counters, RunControl};
use serde_json::{Map, Value};

use super::pipeline::{self, PipelineTotals};
use super::plan::JobPlan;
use super::report::{RunDetails, RunReport, UnitCounts};
use super::spec::JobSpec;
use crate::data::output::OutputTarget;
use crate::data::sink::{Opened, Sink};
use crate::error::{Error, Result};
use crate::model::Checkpoint;
use crate::text::TextTokenizer;

/// Runs `spec` to its end, watched and stopped through `control`.
///
/// # Errors
/// Whatever stopped the job; what was committed until then stays, and the same job resumes from there.
pub async fn run(spec: JobSpec, control: Arc<RunControl>) -> Result<RunReport> {
    let started = Instant::now();
    let spec = Arc::new(spec);
    let checked = {
        let spec = spec.clone();
        join(spawn_blocking(move || CheckedJob::new(&spec))).await?
    };
    let Some(CheckedJob { checkpoint, tokenizer, plan, target }) = checked else {
        return Ok(RunReport::new(&spec, "nothing_to_do", None));
    };
    for line in plan.describe(&checkpoint, &spec) {
        control.notice(line);
    }
    control.check()?;
    // Loaded before the output is touched, so that a checkpoint with bad weights leaves no trace there.
    let engine = {
        let spec = spec.clone();
        join(spawn_blocking(move || spec.command.engine(&spec, &checkpoint, tokenizer, &Device::Cpu))).await?
    };
    control.check()?;
    let opened = {
        let (spec, plan) = (spec.clone(), plan.clone());
        join(spawn_blocking(move || {
            Sink::open(&target, plan.output_schema.clone(), plan.file.clone(), spec.on_existing)
        }))
        .await?
    };
    let Opened::Work(sink) = opened else {
        return Ok(RunReport::new(&spec, "nothing_to_do", None));
    };
    if let Some(note) = sink.changed_note() {
        control.notice(format!("resuming with other settings that do not change the job: {note}"));
    }

    let mut total = UnitCounts::default();
    let mut pending = Vec::new();
    for unit in &plan.units {
        match sink.finished_units().get(&unit.index) {
            Some(footer) => total += UnitCounts::from_footer(footer)?,
            None => pending.push(unit.clone()),
        }
    }
    let units_resumed = (plan.units.len() - pending.len()) as u64;
    Counters::add(&control.counters.rows_resumed, total.rows);
    Counters::add(&control.counters.rows_total, pending.iter().map(|unit| unit.rows.end - unit.rows.start).sum());

    let (sink, this_run) = if pending.is_empty() {
        (*sink, PipelineTotals::default())
    } else {
        pipeline::run(&spec, &plan, engine, *sink, pending, total.failed_rows, &control).await?
    };
    total += this_run.counts;
    if plan.filter.is_none() && total.rows != plan.file.rows {
        return Err(Error::Internal(format!("{} rows were written, {} were planned", total.rows, plan.file.rows)));
    }

    let mut details = details(&plan, &total, &this_run, units_resumed);
    if let (Some(truth), Some(column)) = (plan.truth, &spec.truth_column) {
        let (line, value) = truth.describe(column, &total.agreement);
        (details.truth_line, details.truth) = (Some(line), Some(value));
    }
    let summary = serde_json::to_value(&details).map_err(|error| Error::Internal(error.to_string()))?;
    join(spawn_blocking(move || sink.complete(summary))).await?;
    details.seconds = started.elapsed().as_secs_f64();
    Ok(RunReport::new(&spec, "done", Some(details)))
}

/// A job that was checked and planned, before a weight is read or the output is touched.
struct CheckedJob {
    checkpoint: Checkpoint,
    tokenizer: TextTokenizer,
    plan: Arc<JobPlan>,
    target: OutputTarget,
}

impl CheckedJob {
    /// Everything that can be told to be wrong so cheaply is; `None` when the output is finished already.
    fn new(spec: &JobSpec) -> Result<Option<Self>> {
        let checkpoint = Checkpoint::open(&spec.model)?;
        let tokenizer = TextTokenizer::open(&checkpoint.dir, checkpoint.config.vocab_size)?;
        let max_length = max_length(spec, &checkpoint, &tokenizer)?;
        let tokenizer = spec.command.tokenizer(spec, &checkpoint, tokenizer, max_length)?;
        let plan = JobPlan::new(spec, &checkpoint, &tokenizer, max_length)?;
        let target = OutputTarget::new(&spec.output);
        if Sink::look(&target, &plan.output_schema, &plan.file, spec.on_existing)?.is_some() {
            return Ok(None);
        }
        Ok(Some(Self { checkpoint, tokenizer, plan: Arc::new(plan), target }))
    }
}

/// The limit of a text in tokens: what was asked for, else the smaller of the tokenizer's and the model's.
fn max_length(spec: &JobSpec, checkpoint: &Checkpoint, tokenizer: &TextTokenizer) -> Result<usize> {
    let positions = checkpoint.config.max_position_embeddings;
    match spec.max_length {
        Some(wanted) if wanted > positions => Err(Error::Usage(format!(
            "--max-length {wanted} is more than the {positions} positions that the checkpoint was made for"
        ))),
        Some(wanted) => Ok(wanted),
        None => Ok(tokenizer.model_max_length().unwrap_or(usize::MAX).min(positions)),
    }
}

/// The profile of a run as shares of its pipeline's time, which need not add up to 100: tokenizing overlaps with the model.
fn profile_percent(this_run: &PipelineTotals) -> Map<String, Value> {
    let elapsed = this_run.elapsed.as_secs_f64();
    let in_model: f64 = this_run.profile.iter().filter(|(name, _)| *name != "tokenizing").map(|(_, spent)| spent).sum();
    let rest = ("head_and_sampling", (this_run.busy.as_secs_f64() - in_model).max(0.0));
    let percent = |seconds: f64| if elapsed > 0.0 { (1e4 * seconds / elapsed).round() / 100.0 } else { 0.0 };
    let named = this_run.profile.iter().copied().chain([rest]);
    named.map(|(name, seconds)| (name.to_owned(), percent(seconds).into())).collect()
}

fn details(plan: &JobPlan, total: &UnitCounts, this_run: &PipelineTotals, units_resumed: u64) -> RunDetails {
    let seconds = this_run.elapsed.as_secs_f64();
    let share = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
    RunDetails {
        fingerprint: plan.file.fingerprint.clone(),
        rows_in: total.rows,
        rows_out: total.rows,
        rows_null: total.null_rows,
        rows_failed: total.failed_rows,
        rows_truncated: total.truncated_rows,
        units: plan.units.len() as u64,
        units_resumed,
        batches: total.batches,
        tokens: total.real_tokens,
        padding_percent: total.padding().waste_percent(),
        seconds,
        pipeline_seconds: seconds,
        tokens_per_second: share(this_run.counts.real_tokens as f64),
        model_busy_percent: 100.0 * share(this_run.busy.as_secs_f64()),
        profile_percent: profile_percent(this_run),
        truth: None,
        truth_line: None,
    }
}

/// Waits for blocking work; a panic in it becomes an error of this run.
pub(super) async fn join<T>(work: JoinHandle<Result<T>>) -> Result<T> {
    work.await.unwrap_or_else(|error| Err(Error::Internal(format!("a worker thread failed: {error}"))))
}
