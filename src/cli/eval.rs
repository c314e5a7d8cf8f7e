//! `mistral-batch eval`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueHint};
use serde::Serialize;

use super::job::{block_on, check_device, use_threads};
use super::log;
use super::outlets::{self, Outlets, write_report};
use super::progress::Display;
use super::run::variable;
use crate::error::{Error, Result};
use crate::eval::sweep::{RunSummary, SweepPlan, SweepSummary};
use crate::job::lineage::{LineageEnvironment, LineageRun};
use crate::job::prometheus::{MetricLabels, MetricsText, RunEnd};
use crate::job::{MessageSettings, RunControl, Variables};

/// Evaluate checkpoints over every combination of their settings: an evaluation sweep, as TOML.
///
/// Writes predictions, runs.parquet (one row for each cell, task and metric), comparisons.parquet and report.html to the
/// sweep's output. Cells that ask for the same predictions share them; a sweep that was stopped goes on where it was.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mistral-batch eval jobs/sweeps/tickets.toml --dry-run
  mistral-batch eval jobs/sweeps/tickets.toml

A sweep file:
  output = \"../out/tickets\"
  [settings]
  model = \"../models/ticket-classifier\"
  [matrix]
  prompt_template = [\"{text}\", \"Ticket: {text}\"]
  threshold = [0.0, 0.9]
  [[task]]
  name = \"topics\"
  kind = \"classification\"
  input = [\"../data/tickets.parquet\"]
  truth_column = \"topic\"")]
pub struct EvalArgs {
    /// The sweep file
    #[arg(value_name = "SWEEP.toml", value_hint = ValueHint::FilePath)]
    sweep: PathBuf,

    /// Value of a ${variable} in the file; repeatable
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    set: Vec<(String, String)>,

    /// Make all predictions again
    #[arg(long, help_heading = "Running")]
    overwrite: bool,

    /// Compute N rows of each new prediction once more, each alone, and tell how far that is from their results
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Running")]
    audit: Option<u64>,

    /// Check everything and list the cells; load no weights, write nothing but --report
    #[arg(long, help_heading = "Running")]
    dry_run: bool,

    #[command(flatten)]
    messages: MessageSettings,
}

impl EvalArgs {
    pub fn run(self) -> Result<()> {
        log::start(&self.messages);
        let started = Instant::now();
        let name = self.sweep.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let labels = MetricLabels { job_name: name.clone(), command: "eval".to_owned() };
        let plan = match self.plan() {
            Ok(plan) => plan,
            Err(error) => {
                let report = self.report(started, Err(&error));
                // Metrics are of runs, and a look at the file is none.
                let prometheus = self.messages.prometheus.clone().filter(|_| !self.dry_run);
                let messages = MessageSettings { prometheus, ..self.messages.clone() };
                outlets::refused(&messages, &labels, report.end(), &report);
                return Err(error);
            }
        };
        if self.dry_run {
            super::print(&(plan.describe().join("\n") + "\n"))?;
            let report = self.report(started, Ok(None));
            return self.messages.report.as_ref().map_or(Ok(()), |path| write_report(path, &report));
        }
        let lineage =
            || LineageRun::new(&name, &plan.inputs(), &plan.models(), &plan.output, LineageEnvironment::of_process());
        let outlets = Arc::new(Outlets::new(&self.messages, labels, lineage));
        // A sweep goes on with its own output.
        let result = outlets.begin().and_then(|()| self.evaluate(&plan, &outlets)).map_err(Error::resumed_by_a_rerun);
        let report = self.report(started, result.as_ref().map(Some));
        let told = outlets.end_with(report.end(), &report, |text| {
            if let Some(summary) = report.summary {
                add_results(text, summary);
            }
        });
        result.map(|_| ()).and(told)
    }

    /// The sweep, checked.
    fn plan(&self) -> Result<SweepPlan> {
        let mut plan = SweepPlan::new(&self.sweep, &Variables::new(self.set.iter().cloned().collect()))?;
        plan.devices.iter().try_for_each(|device| check_device(device))?;
        if let Some(rows) = self.audit {
            plan.audit(rows);
        }
        Ok(plan)
    }

    /// Runs the sweep and says what it did.
    fn evaluate(&self, plan: &SweepPlan, outlets: &Arc<Outlets>) -> Result<SweepSummary> {
        use_threads(plan.threads)?;
        let control = Arc::new(RunControl::default());
        let mut display = Display::start(&self.messages, control.clone())?;
        let watch = outlets.watch(control.clone());
        let summary = block_on(control.clone(), plan.run(control, self.overwrite));
        drop(watch);
        display.close();
        let summary = summary?;
        tracing::info!(
            "{} runs of {} different predictions ({} from an earlier run), weights loaded {} times",
            summary.runs,
            summary.predictions,
            summary.predictions_reused,
            summary.model_loads
        );
        for (name, audit) in &summary.audits {
            tracing::info!("predictions/{name}: {}", audit.line());
            if audit.rows_flipped > 0 {
                tracing::warn!("predictions/{name}: {}", audit.warning());
            }
        }
        if self.audit.is_some() && summary.predictions_reused > 0 {
            tracing::warn!(
                "{} predictions are from an earlier run, so that this one audits none of their rows; --overwrite makes them again",
                summary.predictions_reused
            );
        }
        tracing::info!(
            "written to {}: report.html, runs.parquet, comparisons.parquet, predictions/",
            plan.output.display()
        );
        Ok(summary)
    }

    fn report<'a>(&'a self, started: Instant, result: Result<Option<&'a SweepSummary>, &'a Error>) -> SweepReport<'a> {
        SweepReport {
            status: match result {
                Ok(_) if self.dry_run => "checked",
                Ok(_) => "done",
                Err(Error::Paused { .. }) => "stopped",
                Err(_) => "failed",
            },
            exit_code: result.map_or_else(|error| error.exit_code() as u8, |_| 0),
            retryable: result.is_err_and(Error::is_retryable),
            error: result.err().map(ToString::to_string),
            command: "eval",
            sweep: &self.sweep,
            version: env!("CARGO_PKG_VERSION"),
            seconds: started.elapsed().as_secs_f64(),
            summary: result.ok().flatten(),
        }
    }
}

/// The summary of a sweep, as `--report` writes it.
#[derive(Serialize)]
struct SweepReport<'a> {
    status: &'static str,
    exit_code: u8,
    retryable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    command: &'static str,
    sweep: &'a Path,
    version: &'static str,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    summary: Option<&'a SweepSummary>,
}

impl SweepReport<'_> {
    fn end(&self) -> RunEnd {
        RunEnd { exit_code: self.exit_code, retryable: self.retryable }
    }
}

/// What a sweep measured, as metrics.
fn add_results(text: &mut MetricsText, summary: &SweepSummary) {
    let count = |number: usize| number as f64;
    text.gauge("mistral_batch_eval_runs", "Tasks in cells that were measured.", count(summary.runs));
    let help = "Different predictions among them.";
    text.gauge("mistral_batch_eval_predictions", help, count(summary.predictions));
    let cells: Vec<String> = summary.results.iter().map(|result| result.cell.to_string()).collect();
    let labelled = |value: fn(&RunSummary) -> Option<f64>| -> Vec<(Vec<(&str, &str)>, f64)> {
        let samples = summary.results.iter().zip(&cells).filter_map(|(result, cell)| {
            let labels = vec![("task", result.task.as_str()), ("cell", cell.as_str()), ("measure", result.measure)];
            Some((labels, value(result)?))
        });
        samples.collect()
    };
    let help = "The first measure of a task in a cell of the sweep.";
    text.gauges("mistral_batch_eval_value", help, &labelled(|result| Some(result.value)));
    let help = "Lower end of the value's bootstrap interval.";
    text.gauges("mistral_batch_eval_value_low", help, &labelled(|result| Some(result.interval?.0)));
    let help = "Upper end of the value's bootstrap interval.";
    text.gauges("mistral_batch_eval_value_high", help, &labelled(|result| Some(result.interval?.1)));
}
