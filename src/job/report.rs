//! What a run did: counts that add up over units, and the summary of the whole output.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::audit::AuditReport;
use super::control::Counters;
use super::job_file::JobFileIdentity;
use super::lineage::PlannedData;
use super::plan::JobPlan;
use super::spec::JobSpec;
use super::truth::Agreement;
use crate::batch::Padding;
use crate::data::part::{PartFooter, PartWriter};
use crate::engine::InferStats;
use crate::error::{Error, Result};

/// The key of a part's counts in its footer.
const COUNTS_KEY: &str = "counts";

/// Counts of one unit, stored in its part's footer so that a resumed run can report on the whole output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct UnitCounts {
    /// Rows in the part.
    pub rows: u64,
    pub null_rows: u64,
    pub failed_rows: u64,
    pub truncated_rows: u64,
    pub batches: u64,
    pub real_tokens: u64,
    pub padded_tokens: u64,
    pub agreement: Agreement,
}

impl UnitCounts {
    /// The counts of some rows of a unit.
    pub fn new(rows: u64, stats: &InferStats, agreement: Agreement) -> Self {
        Self {
            rows,
            null_rows: stats.null_rows,
            failed_rows: stats.failed_rows,
            truncated_rows: stats.truncated_rows,
            batches: stats.batches,
            real_tokens: stats.padding.real_tokens,
            padded_tokens: stats.padding.padded_tokens,
            agreement,
        }
    }

    /// Reads the counts that a committed part carries.
    ///
    /// # Errors
    /// [`Error::Internal`] when the footer has none.
    pub fn from_footer(footer: &PartFooter) -> Result<Self> {
        let missing = || Error::Internal(format!("the part of unit {} carries no counts", footer.unit));
        let text = footer.extra.get(COUNTS_KEY).ok_or_else(missing)?;
        serde_json::from_str(text).map_err(|_| missing())
    }

    /// Puts the counts into a part's footer.
    ///
    /// # Errors
    /// [`Error::Internal`] when they cannot be written as JSON.
    pub fn to_footer(&self, part: &mut PartWriter) -> Result<()> {
        let text = serde_json::to_string(self).map_err(|error| Error::Internal(error.to_string()))?;
        part.set_extra(COUNTS_KEY, &text);
        Ok(())
    }

    /// Tokens with and without padding.
    pub fn padding(&self) -> Padding {
        Padding { real_tokens: self.real_tokens, padded_tokens: self.padded_tokens }
    }
}

impl AddAssign for UnitCounts {
    fn add_assign(&mut self, other: Self) {
        self.rows += other.rows;
        self.null_rows += other.null_rows;
        self.failed_rows += other.failed_rows;
        self.truncated_rows += other.truncated_rows;
        self.batches += other.batches;
        self.real_tokens += other.real_tokens;
        self.padded_tokens += other.padded_tokens;
        self.agreement += other.agreement;
    }
}

/// The summary of a run, as `--report` writes it.
#[derive(Debug, Clone, Serialize)]
pub struct RunReport {
    /// `done`, `nothing_to_do`, or for a run that ended early `failed` or `stopped`.
    pub status: &'static str,
    pub exit_code: u8,
    /// Whether the same run again may go through without anybody doing anything.
    pub retryable: bool,
    /// The message of a run that ended early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Null where the command line or the job file was not understood; so are model and output.
    pub command: Option<&'static str>,
    pub version: &'static str,
    pub model: Option<String>,
    pub output: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_file: Option<JobFileIdentity>,
    /// UTC, as RFC 3339 has it; null where the run did not begin.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hashes: Option<Hashes>,
    /// What a run that ended early had done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<RunProgress>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<RunDetails>,
    /// The details of the earlier run that finished the output, where it keeps them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_earlier: Option<Value>,
    /// What lineage tells of the data, of a run that did what it was asked.
    #[serde(skip)]
    pub planned: Option<PlannedData>,
}

/// SHA-256 of what went into the results and of what came out, in hexadecimal.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Hashes {
    /// The plan's fingerprint: of all settings that determine results, the checkpoint's hashes among them.
    pub job: String,
    /// Of the input files' sizes and times (or etags), and of how they are cut into units.
    pub inputs: String,
    /// Of the checkpoint's `config.json`.
    pub config: String,
    /// Of every tensor's name, dtype, shape and first bytes.
    pub weights: String,
    pub tokenizer: String,
    /// Of the output file, or of its parts as `sha256sum part-*.parquet | sha256sum` gives it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
}

/// What a run that ended early had done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunProgress {
    /// Rows that this run was to read.
    pub rows_planned: u64,
    /// Rows that were computed; those of parts that were not committed are lost.
    pub rows_done: u64,
    pub rows_failed: u64,
    pub tokens: u64,
    /// Units that this run committed.
    pub units_committed: u64,
}

impl Hashes {
    /// What is known before the output is there.
    pub fn new(plan: &JobPlan) -> Self {
        let of = |key: &str| plan.footer.get(key).cloned().unwrap_or_default();
        Self {
            job: plan.file.fingerprint.clone(),
            inputs: plan.file.rows_digest(),
            config: of("config_sha256"),
            weights: of("weights_sha256"),
            tokenizer: of("tokenizer_sha256"),
            output: None,
        }
    }
}

impl RunReport {
    /// The report of a run that did what it was asked.
    pub fn new(spec: &JobSpec, status: &'static str, details: Option<RunDetails>) -> Self {
        Self {
            status,
            command: Some(spec.command.name()),
            model: Some(spec.model.clone()),
            output: Some(spec.output.display().to_string()),
            details,
            ..Self::empty()
        }
    }

    /// The report of a run that `error` ended.
    pub fn failed(spec: &JobSpec, error: &Error) -> Self {
        let Self { status, exit_code, retryable, error, .. } = Self::refused(error);
        Self { exit_code, retryable, error, ..Self::new(spec, status, None) }
    }

    /// The report of a command that was not understood.
    pub fn refused(error: &Error) -> Self {
        Self {
            status: match error {
                Error::Stopped { .. } | Error::Paused { .. } => "stopped",
                _ => "failed",
            },
            exit_code: error.exit_code() as u8,
            retryable: error.is_retryable(),
            error: Some(error.to_string()),
            ..Self::empty()
        }
    }

    fn empty() -> Self {
        Self {
            status: "done",
            exit_code: 0,
            retryable: false,
            error: None,
            command: None,
            version: env!("CARGO_PKG_VERSION"),
            model: None,
            output: None,
            job_file: None,
            started_at: None,
            hashes: None,
            progress: None,
            details: None,
            finished_earlier: None,
            planned: None,
        }
    }

    /// The same with what the run had done when it ended.
    pub fn with_progress(self, counters: &Counters) -> Self {
        let get = Counters::get;
        let progress = RunProgress {
            rows_planned: get(&counters.rows_total),
            rows_done: get(&counters.rows_done),
            rows_failed: get(&counters.rows_failed),
            tokens: get(&counters.real_tokens),
            units_committed: get(&counters.parts),
        };
        Self { progress: Some(progress), ..self }
    }
}

/// Where a run's wall time went, in seconds; the stages of the pipeline overlap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Timings {
    /// Reading what the inputs and the checkpoint are, and checking the job.
    pub plan_seconds: f64,
    /// Reading the weights.
    pub load_seconds: f64,
    /// From the first row read to the last part written.
    pub pipeline_seconds: f64,
    /// In model and head, within the pipeline.
    pub model_seconds: f64,
    pub audit_seconds: f64,
    /// From the start to the commit of the output.
    pub total_seconds: f64,
}

/// The numbers of a run that reached its end.
#[derive(Debug, Clone, Serialize)]
pub struct RunDetails {
    pub fingerprint: String,
    /// Rows of the input that passed `--where` and `--limit`.
    pub rows_in: u64,
    /// Rows of the output; equal to `rows_in`.
    pub rows_out: u64,
    pub rows_null: u64,
    pub rows_failed: u64,
    pub rows_truncated: u64,
    pub units: u64,
    /// Units that an earlier run had committed.
    pub units_resumed: u64,
    pub batches: u64,
    pub tokens: u64,
    pub padding_percent: f64,
    pub timings: Timings,
    /// Tokens of this run per second of its pipeline.
    pub tokens_per_second: f64,
    /// Share of the pipeline's time in which the model computed, in percent.
    pub model_busy_percent: f64,
    /// Where the pipeline's time went, in percent of it: tokenizing, which overlaps with the model, the parts of the model,
    /// and what the head and sampling took beside them.
    pub profile_percent: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truth: Option<Value>,
    /// The truth comparison in words.
    #[serde(skip)]
    pub truth_line: Option<String>,
}

impl RunDetails {
    /// The summary for a person, one fact a line.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!(
            "{} rows in, {} rows out: {} failed, {} truncated, {} null",
            self.rows_in, self.rows_out, self.rows_failed, self.rows_truncated, self.rows_null
        )];
        let resumed = match self.units_resumed {
            0 => String::new(),
            units => format!(" ({units} from an earlier run)"),
        };
        lines.push(format!(
            "{} units{resumed}, {} batches, {} tokens, {:.1}% padding",
            self.units, self.batches, self.tokens, self.padding_percent
        ));
        lines.push(format!(
            "{:.1} s, {:.0} tokens/s, model busy {:.0}% of the time",
            self.timings.total_seconds, self.tokens_per_second, self.model_busy_percent
        ));
        lines.extend(self.truth_line.clone());
        lines.extend(self.audit.as_ref().map(AuditReport::line));
        lines
    }
}
