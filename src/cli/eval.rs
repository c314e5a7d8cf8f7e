//! `mistral-batch eval`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueHint};
use serde::Serialize;

use super::job::{block_on, report_failure, use_threads, write_report};
use super::log;
use super::progress::Display;
use super::run::variable;
use crate::error::{Error, Result};
use crate::eval::sweep::{SweepPlan, SweepSummary};
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

    /// Check everything and list the cells; load no weights, write nothing
    #[arg(long, help_heading = "Running")]
    dry_run: bool,

    #[command(flatten)]
    messages: MessageSettings,
}

impl EvalArgs {
    pub fn run(self) -> Result<()> {
        log::start(&self.messages);
        let started = Instant::now();
        let result = self.evaluate();
        let report = SweepReport {
            status: match &result {
                Ok(_) if self.dry_run => "checked",
                Ok(_) => "done",
                Err(Error::Stopped { .. }) => "stopped",
                Err(_) => "failed",
            },
            exit_code: result.as_ref().map_or_else(|error| error.exit_code() as u8, |_| 0),
            // A sweep goes on with its own output.
            retryable: result.as_ref().is_err_and(Error::is_retryable),
            error: result.as_ref().err().map(ToString::to_string),
            sweep: &self.sweep,
            version: env!("CARGO_PKG_VERSION"),
            seconds: started.elapsed().as_secs_f64(),
            summary: result.as_ref().ok().and_then(Option::as_ref),
        };
        match (&self.messages.report, &result) {
            (Some(path), Ok(_)) => write_report(path, &report)?,
            _ => report_failure(&self.messages, &report),
        }
        result.map(|_| ())
    }

    /// What the sweep did; nothing where it is only looked at.
    fn evaluate(&self) -> Result<Option<SweepSummary>> {
        let plan = SweepPlan::new(&self.sweep, &Variables::new(self.set.iter().cloned().collect()))?;
        plan.devices.iter().try_for_each(|device| device.open().map(drop))?;
        if self.dry_run {
            return super::print(&(plan.describe().join("\n") + "\n")).map(|()| None);
        }
        use_threads(plan.threads)?;
        let control = Arc::new(RunControl::default());
        let mut display = Display::start(&self.messages, control.clone())?;
        let summary = block_on(control.clone(), plan.run(control, self.overwrite));
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
        }
        tracing::info!(
            "written to {}: report.html, runs.parquet, comparisons.parquet, predictions/",
            plan.output.display()
        );
        Ok(Some(summary))
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
    sweep: &'a Path,
    version: &'static str,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    summary: Option<&'a SweepSummary>,
}
