//! The settings of a job as flags and job files give them; one file a command.
//!
//! Each setting is defined once, as a field whose doc comment is its help. [`clap`] parses flags into these types, a
//! [job file](super::job_file) is read through the same parser, and its schema is made of the same types: none can have a
//! setting that the others lack, or check it otherwise.

mod classify;
mod common;
mod embed;
mod generate;
mod messages;
mod score;
mod tag;
mod values;

use std::path::Path;

use clap::{CommandFactory, Parser, Subcommand};

use super::job_file::JobFileIdentity;
use super::spec::JobSpec;
use crate::error::Result;

pub use classify::ClassifySettings;
pub use embed::EmbedSettings;
pub use generate::GenerateSettings;
pub use messages::{LogFormat, MessageSettings, ProgressMode};
pub use score::ScoreSettings;
pub use tag::TagSettings;
pub use values::count;

/// A command with a model and its settings.
#[derive(Debug, Clone, Subcommand)]
pub enum JobSettings {
    Classify(Box<ClassifySettings>),
    Embed(Box<EmbedSettings>),
    Score(Box<ScoreSettings>),
    Generate(Box<GenerateSettings>),
    #[command(visible_alias = "token-classify")]
    Tag(Box<TagSettings>),
}

/// A job, and how this process runs it; the latter changes no result.
#[derive(Debug, Clone)]
pub struct Job {
    pub spec: JobSpec,
    /// `auto`, `cpu`, or what no build of this program has.
    pub device: String,
    /// Threads to compute with; all cores when `None`.
    pub threads: Option<u64>,
    /// Check, and compute nothing.
    pub dry_run: bool,
    /// Where the settings come from, if from a file.
    pub file: Option<JobFileIdentity>,
    pub messages: MessageSettings,
}

impl Job {
    /// What its runs have in common: the job file's name, or the command's and its output's.
    pub fn name(&self) -> String {
        let stem = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        match &self.file {
            Some(file) => stem(&file.path),
            None => format!("{}.{}", self.spec.command.name(), stem(&self.spec.output)),
        }
    }
}

impl JobSettings {
    /// What the run is to say, and where.
    pub fn messages(&self) -> &MessageSettings {
        match self {
            Self::Classify(settings) => settings.messages(),
            Self::Embed(settings) => settings.messages(),
            Self::Score(settings) => settings.messages(),
            Self::Generate(settings) => settings.messages(),
            Self::Tag(settings) => settings.messages(),
        }
    }

    /// The job that these settings ask for.
    ///
    /// # Errors
    /// [`Error::Usage`](crate::Error::Usage) when a pattern or a schema of completions is none.
    pub fn into_job(self) -> Result<Job> {
        match self {
            Self::Classify(settings) => Ok(settings.into_job()),
            Self::Embed(settings) => Ok(settings.into_job()),
            Self::Score(settings) => Ok(settings.into_job()),
            Self::Generate(settings) => settings.into_job(),
            Self::Tag(settings) => Ok(settings.into_job()),
        }
    }
}

/// The commands with a model alone, for settings that come from a file.
#[derive(Parser)]
#[command(name = "job", disable_help_subcommand = true)]
pub(super) struct JobParser {
    #[command(subcommand)]
    pub settings: JobSettings,
}

/// The parser of [`JobSettings`], which reads no environment: what a file says is the whole job.
pub(super) fn job_command() -> clap::Command {
    let mut command = JobParser::command();
    command.build();
    command
}
