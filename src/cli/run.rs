//! `mistral-batch run` and `mistral-batch check`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::job;
use crate::data::sink::OnExisting;
use crate::error::Result;
use crate::job::{Job, JobFile, MessageSettings, Variables};

/// Run a job file: the settings of one command, as TOML.
///
/// A key is a flag of the command in snake_case; paths are relative to the file. An unfinished output of the same job is
/// resumed, a finished one is left as it is. Flags given here win over the file's.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mistral-batch run jobs/classify.toml
  mistral-batch run nightly.toml --set date=2026-07-01 --report nightly.json

A job file:
  command = \"classify\"
  model = \"../models/ticket-classifier\"
  input = [\"../data/tickets-${date}.parquet\"]
  output = \"../out/tickets-${date}\"
  max_batch_tokens = \"16k\"

${name} and ${name:-default} stand in texts; their values come from --set, and else from the environment.")]
pub struct RunArgs {
    #[command(flatten)]
    file: JobFileArgs,

    /// Go on with an unfinished output of the same job, and refuse an output of another
    #[arg(long, conflicts_with = "overwrite", help_heading = "Running")]
    resume: bool,

    /// Redo an output that an earlier run of this program wrote; other files are never deleted
    #[arg(long, help_heading = "Running")]
    overwrite: bool,

    /// Compute N rows of a sample once more at the end, each alone, and tell how far that is from their results
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Running")]
    audit: Option<u64>,

    /// Check everything and say what would be done; load no weights, write nothing
    #[arg(long, help_heading = "Running")]
    dry_run: bool,

    #[command(flatten)]
    messages: MessageSettings,
}

/// A job file and its variables.
#[derive(Debug, Args)]
pub struct JobFileArgs {
    /// The job file
    #[arg(value_name = "JOB.toml", value_hint = ValueHint::FilePath)]
    job: PathBuf,

    /// Value of a ${variable} in the file; repeatable
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    set: Vec<(String, String)>,
}

/// What a job file is read for.
#[derive(Clone, Copy, PartialEq)]
enum Purpose {
    Run,
    /// As `run`, which tells what it would do where the file wants its report; metrics are of runs.
    DryRun,
    /// The file's own outlets are its run's.
    Check,
}

impl JobFileArgs {
    /// Reads the job; that it is refused is told where `messages` says, else where the file does.
    fn read(self, mut messages: MessageSettings, purpose: Purpose) -> Result<Job> {
        let variables = Variables::new(BTreeMap::from_iter(self.set));
        let name = self.job.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let refused = |messages: MessageSettings, error| {
            let prometheus = messages.prometheus.clone().filter(|_| purpose == Purpose::Run);
            job::refused(&MessageSettings { prometheus, ..messages }, &name, error)
        };
        let file = JobFile::read(&self.job).map_err(|error| refused(messages.clone(), error))?;
        file.job(&variables).map_err(|error| {
            if purpose != Purpose::Check {
                messages = messages.clone().or(file.messages(&variables));
            }
            refused(messages.clone(), error)
        })
    }
}

impl RunArgs {
    pub fn run(self) -> Result<()> {
        let purpose = if self.dry_run { Purpose::DryRun } else { Purpose::Run };
        let mut job = self.file.read(self.messages.clone(), purpose)?;
        if self.resume {
            job.spec.on_existing = OnExisting::Resume;
        } else if self.overwrite {
            job.spec.on_existing = OnExisting::Overwrite;
        }
        job.spec.audit = self.audit.or(job.spec.audit);
        job.dry_run |= self.dry_run;
        job.messages = self.messages.or(job.messages);
        job::run(job)
    }
}

/// Check a job file: its settings, data and checkpoint, and what it would do.
///
/// Tokenizes a sample of rows and tells lengths, batches, padding, memory and time; loads no weights and writes nothing
/// but --report. Exits as the run would that is refused.
#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    file: JobFileArgs,

    #[command(flatten)]
    messages: MessageSettings,
}

impl CheckArgs {
    pub fn run(self) -> Result<()> {
        // The file's own report is of its run.
        let mut job = self.file.read(self.messages.clone(), Purpose::Check)?;
        job.dry_run = true;
        job.messages = MessageSettings { report: self.messages.report.clone(), ..self.messages.or(job.messages) };
        job::run(job)
    }
}

pub(super) fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}
