//! What a run did: counts that add up over units, and the summary of the whole output.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

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
    /// The message of a run that ended early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    pub command: &'static str,
    pub version: &'static str,
    pub model: String,
    pub output: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<RunDetails>,
}

impl RunReport {
    /// The report of a run that did what it was asked.
    pub fn new(spec: &JobSpec, status: &'static str, details: Option<RunDetails>) -> Self {
        Self {
            status,
            exit_code: 0,
            error: None,
            command: spec.command.name(),
            version: env!("CARGO_PKG_VERSION"),
            model: spec.model.clone(),
            output: spec.output.display().to_string(),
            details,
        }
    }

    /// The report of a run that `error` ended.
    pub fn failed(spec: &JobSpec, error: &Error) -> Self {
        let status = if matches!(error, Error::Stopped { .. }) { "stopped" } else { "failed" };
        let exit_code = error.exit_code() as u8;
        Self { exit_code, error: Some(error.to_string()), ..Self::new(spec, status, None) }
    }
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
    /// Wall time of this run in seconds, from its start to the commit of the output.
    pub seconds: f64,
    /// Wall time from the first row read to the last part written.
    pub pipeline_seconds: f64,
    /// Tokens of this run per second of its pipeline.
    pub tokens_per_second: f64,
    /// Share of the pipeline's time in which the model computed, in percent.
    pub model_busy_percent: f64,
    /// Where the pipeline's time went, in percent of it: tokenizing, which overlaps with the model, the parts of the model,
    /// and what the head and sampling took beside them.
    pub profile_percent: Map<String, Value>,
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
            self.seconds, self.tokens_per_second, self.model_busy_percent
        ));
        lines.extend(self.truth_line.clone());
        lines
    }
}
