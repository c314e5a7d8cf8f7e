//! What a run says, and where.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};
use schemars::JsonSchema;

/// What a run says while it works and at its end; none of it changes a result.
#[derive(Debug, Clone, Default, Args, JsonSchema)]
pub struct MessageSettings {
    /// Write the summary to this file as JSON, also when the run fails
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Messages")]
    pub report: Option<PathBuf>,

    /// Append OpenLineage events to this file, a JSON object a line: which datasets and model made which output
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Messages")]
    pub openlineage: Option<PathBuf>,

    /// Write Prometheus metrics to this file, for node_exporter's textfile collector (a name ending in .prom)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Messages")]
    pub prometheus: Option<PathBuf>,

    /// How to show progress on standard error [default: auto]
    #[arg(long, value_enum, value_name = "HOW", help_heading = "Messages")]
    pub progress: Option<ProgressMode>,

    /// How messages on standard error are written [default: plain]
    #[arg(long, value_enum, value_name = "FORMAT", help_heading = "Messages")]
    pub log_format: Option<LogFormat>,

    /// Show errors only
    #[arg(short, long, conflicts_with = "verbose", help_heading = "Messages")]
    pub quiet: bool,

    /// Also say what was planned
    #[arg(short, long, help_heading = "Messages")]
    pub verbose: bool,
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum, JsonSchema)]
#[schemars(rename_all = "kebab-case")]
pub enum ProgressMode {
    /// A bar on a terminal, plain lines elsewhere
    Auto,
    /// A bar
    Bar,
    /// A line from time to time
    Plain,
    /// A JSON object a line
    Json,
    /// Nothing but the summary
    None,
}

/// How messages are written.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum, JsonSchema)]
#[schemars(rename_all = "kebab-case")]
pub enum LogFormat {
    /// The message, a line each
    Plain,
    /// A JSON object a line, with time and level; so is progress
    Json,
}

impl MessageSettings {
    /// These settings, and `others` where these say nothing.
    pub fn or(self, others: MessageSettings) -> MessageSettings {
        let says_how_much = self.quiet || self.verbose;
        MessageSettings {
            report: self.report.or(others.report),
            openlineage: self.openlineage.or(others.openlineage),
            prometheus: self.prometheus.or(others.prometheus),
            progress: self.progress.or(others.progress),
            log_format: self.log_format.or(others.log_format),
            quiet: if says_how_much { self.quiet } else { others.quiet },
            verbose: if says_how_much { self.verbose } else { others.verbose },
        }
    }
}
