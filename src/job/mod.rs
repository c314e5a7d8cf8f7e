//! A job: what to run over which data, planned, run, and reported.

mod command;
mod control;
mod generation;
mod pipeline;
mod plan;
mod prompts;
mod report;
mod row_params;
mod runner;
mod spec;
mod truth;

pub use command::{CommandSpec, ContinuationColumns, DEFAULT_STRIDE, ScoreOptions};
pub use control::{Counters, RunControl};
pub use generation::{DEFAULT_KV_CACHE_BYTES, GenerateOptions};
pub use report::{RunDetails, RunReport, UnitCounts};
pub use runner::run;
pub use spec::{DEFAULT_MAX_BATCH_TOKENS, JobSpec, PromptSpec};
