//! A job: what to run over which data, planned, run, and reported.

mod command;
mod control;
mod generation;
mod models;
mod pipeline;
mod plan;
mod prompts;
mod report;
mod runner;
mod spec;
pub mod truth;

pub use command::{CommandSpec, ContinuationColumns, DEFAULT_STRIDE, ScoreOptions};
pub use control::{Counters, RunControl};
pub use generation::{DEFAULT_KV_CACHE_BYTES, GenerateOptions};
pub use models::ModelCache;
pub use report::{RunDetails, RunReport, UnitCounts};
pub use runner::{JobIdentity, identify, run, run_sharing};
pub use spec::{DEFAULT_MAX_BATCH_TOKENS, JobSpec, PromptSpec};
