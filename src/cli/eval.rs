//! `mistral-batch eval`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueHint};

use super::job::{check_device, stop_on_signals, use_threads};
use super::progress::Display;
use super::run::variable;
use crate::error::{Error, Result};
use crate::eval::sweep::SweepPlan;
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

    /// Show errors only
    #[arg(short, long, help_heading = "Messages")]
    quiet: bool,
}

impl EvalArgs {
    pub fn run(self) -> Result<()> {
        let plan = SweepPlan::new(&self.sweep, &Variables::new(BTreeMap::from_iter(self.set)))?;
        plan.devices.iter().try_for_each(|device| check_device(device))?;
        if self.dry_run {
            return super::print(&(plan.describe().join("\n") + "\n"));
        }
        use_threads(plan.threads)?;
        let control = Arc::new(RunControl::default());
        let messages = MessageSettings { quiet: self.quiet, ..MessageSettings::default() };
        let mut display = Display::start(&messages, control.clone());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|error| Error::Internal(format!("cannot start the runtime: {error}")))?;
        let summary = runtime.block_on(async {
            tokio::spawn(stop_on_signals(control.clone()));
            plan.run(control, self.overwrite).await
        });
        display.close();
        let summary = summary?;
        if !self.quiet {
            eprintln!(
                "{} runs of {} different predictions ({} from an earlier run), weights loaded {} times",
                summary.runs, summary.predictions, summary.predictions_reused, summary.model_loads
            );
            eprintln!(
                "written to {}: report.html, runs.parquet, comparisons.parquet, predictions/",
                plan.output.display()
            );
        }
        Ok(())
    }
}
