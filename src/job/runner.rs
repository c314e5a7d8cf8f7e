//! Runs a job from its specification to its committed output.

use std::sync::Arc;
use std::time::Instant;

use arrow::datatypes::SchemaRef;
use candle_core::Device;
use chrono::{SecondsFormat, Utc};
use serde_json::{Map, Value};
use tokio::task::{JoinHandle, spawn_blocking};

use super::control::{Counters, RunControl};
use super::lineage::PlannedData;
use super::models::ModelCache;
use super::pipeline::{self, PipelineTotals};
use super::plan::JobPlan;
use super::report::{Hashes, RunDetails, RunReport, Timings, UnitCounts};
use super::spec::JobSpec;
use crate::data::output::OutputTarget;
use crate::data::plan_file::SuccessFile;
use crate::data::sink::{Opened, Sink};
use crate::error::{Error, Result};
use crate::model::Checkpoint;
use crate::text::TextTokenizer;

/// Runs `spec` to its end, watched and stopped through `control`.
///
/// # Errors
/// Whatever stopped the job; what was committed until then stays, and the same job resumes from there.
pub async fn run(spec: JobSpec, control: Arc<RunControl>) -> Result<RunReport> {
    run_sharing(spec, control, Arc::new(ModelCache::default())).await
}

/// As [`run`], with the model of another job over the same checkpoint where `models` holds it.
///
/// # Errors
/// As [`run`].
pub async fn run_sharing(spec: JobSpec, control: Arc<RunControl>, models: Arc<ModelCache>) -> Result<RunReport> {
    let started = Instant::now();
    let spec = Arc::new(spec);
    let started_at = Some(Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true));
    let (job, finished) = {
        let spec = spec.clone();
        join(spawn_blocking(move || {
            let job = PlannedJob::new(&spec)?;
            let finished = Sink::look(&job.target, &job.plan.output_schema, &job.plan.file, spec.on_existing)?;
            Ok((job, finished))
        }))
        .await?
    };
    let PlannedJob { checkpoint, tokenizer, plan, target, .. } = job;
    let hashes = Some(Hashes::new(&plan));
    let planned = Some(PlannedData::new(&plan));
    let nothing_to_do = |finished: SuccessFile| RunReport {
        started_at: started_at.clone(),
        hashes: hashes.clone(),
        planned: planned.clone(),
        finished_earlier: Some(finished.summary).filter(|summary| !summary.is_null()),
        ..RunReport::new(&spec, "nothing_to_do", None)
    };
    if let Some(finished) = finished {
        return Ok(nothing_to_do(finished));
    }
    let plan_seconds = started.elapsed().as_secs_f64();
    for line in plan.describe(&checkpoint, &spec) {
        control.notice(line);
    }
    control.check()?;
    // Loaded before the output is touched, so that a checkpoint with bad weights leaves no trace there.
    let engine = {
        let spec = spec.clone();
        join(spawn_blocking(move || spec.command.engine(&spec, &checkpoint, tokenizer, &models, &Device::Cpu))).await?
    };
    let load_seconds = started.elapsed().as_secs_f64() - plan_seconds;
    control.check()?;
    let opened = {
        let (spec, plan) = (spec.clone(), plan.clone());
        join(spawn_blocking(move || {
            Sink::open(&target, plan.output_schema.clone(), plan.file.clone(), spec.on_existing)
        }))
        .await?
    };
    let sink = match opened {
        Opened::Work(sink) => sink,
        Opened::NothingToDo(finished) => return Ok(nothing_to_do(finished)),
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

    let pending_is_empty = pending.is_empty();
    let (sink, this_run) = if pending_is_empty {
        (*sink, PipelineTotals::default())
    } else {
        pipeline::run(&spec, &plan, engine, *sink, pending, total.failed_rows, &control).await?
    };
    total += this_run.counts;
    if pending_is_empty && spec.audit.is_some() {
        tracing::warn!("this run computed no rows, so that it audits none");
    }
    if plan.filter.is_none() && total.rows != plan.file.rows {
        return Err(Error::Internal(format!("{} rows were written, {} were planned", total.rows, plan.file.rows)));
    }

    let mut details = details(&plan, &total, this_run, units_resumed);
    details.timings = Timings { plan_seconds, load_seconds, ..details.timings };
    if let (Some(truth), Some(column)) = (plan.truth, &spec.truth_column) {
        let (line, value) = truth.describe(column, &total.agreement);
        (details.truth_line, details.truth) = (Some(line), Some(value));
    }
    // All but the commit, which the mark of success is a part of.
    details.timings.total_seconds = started.elapsed().as_secs_f64();
    let summary = serde_json::to_value(&details).map_err(|error| Error::Internal(error.to_string()))?;
    join(spawn_blocking(move || sink.complete(summary))).await?;
    details.timings.total_seconds = started.elapsed().as_secs_f64();
    Ok(RunReport { started_at, hashes, planned, ..RunReport::new(&spec, "done", Some(details)) })
}

/// What a job is, known without a weight being read or its output being looked at.
#[derive(Debug, Clone)]
pub struct JobIdentity {
    /// The plan's fingerprint: what determines results.
    pub fingerprint: String,
    /// Hex SHA-256 of the inputs and of how they are cut into units.
    pub rows_digest: String,
    /// Rows that are read, before any filter.
    pub rows: u64,
    /// Columns of the output.
    pub output_schema: SchemaRef,
}

/// Checks `spec` against its data and its checkpoint, and tells what job it is.
///
/// # Errors
/// Everything about a job that can be told to be wrong without computing, but for its output.
pub fn identify(spec: &JobSpec) -> Result<JobIdentity> {
    let plan = PlannedJob::new(spec)?.plan;
    Ok(JobIdentity {
        fingerprint: plan.file.fingerprint.clone(),
        rows_digest: plan.file.rows_digest(),
        rows: plan.file.rows,
        output_schema: plan.output_schema.clone(),
    })
}

/// A job that was checked and planned, before a weight is read or the output is touched.
pub(super) struct PlannedJob {
    pub checkpoint: Checkpoint,
    pub tokenizer: TextTokenizer,
    pub plan: Arc<JobPlan>,
    pub target: OutputTarget,
    /// Tokens of a text at most.
    pub max_length: usize,
}

impl PlannedJob {
    /// Everything about the job that can be told to be wrong so cheaply is; the output is not looked at.
    ///
    /// # Errors
    /// As [`JobPlan::new`], and when the checkpoint cannot be opened.
    pub fn new(spec: &JobSpec) -> Result<Self> {
        let checkpoint = Checkpoint::open(&spec.model)?;
        let tokenizer = TextTokenizer::open(&checkpoint.dir, checkpoint.config.vocab_size)?;
        let max_length = max_length(spec, &checkpoint, &tokenizer)?;
        let tokenizer = spec.command.tokenizer(spec, &checkpoint, tokenizer, max_length)?;
        let plan = Arc::new(JobPlan::new(spec, &checkpoint, &tokenizer, max_length)?);
        Ok(Self { checkpoint, tokenizer, plan, target: OutputTarget::new(&spec.output), max_length })
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

fn details(plan: &JobPlan, total: &UnitCounts, this_run: PipelineTotals, units_resumed: u64) -> RunDetails {
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
        timings: Timings {
            pipeline_seconds: seconds,
            model_seconds: this_run.busy.as_secs_f64(),
            audit_seconds: this_run.audit_elapsed.as_secs_f64(),
            ..Timings::default()
        },
        tokens_per_second: share(this_run.counts.real_tokens as f64),
        model_busy_percent: 100.0 * share(this_run.busy.as_secs_f64()),
        profile_percent: profile_percent(&this_run),
        audit: this_run.audit,
        truth: None,
        truth_line: None,
    }
}

/// Waits for blocking work; a panic in it becomes an error of this run.
pub(super) async fn join<T>(work: JoinHandle<Result<T>>) -> Result<T> {
    work.await.unwrap_or_else(|error| Err(Error::Internal(format!("a worker thread failed: {error}"))))
}
