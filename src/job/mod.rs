//! A job: what to run over which data, planned, run, and reported.

mod audit;
mod check;
mod command;
mod control;
mod devices;
mod generation;
pub mod job_file;
pub mod lineage;
mod memory;
mod models;
mod pipeline;
mod plan;
pub mod prometheus;
mod prompts;
mod report;
mod row_params;
mod runner;
pub mod schema;
pub mod settings;
mod spec;
pub mod truth;
mod variables;

pub use audit::AuditReport;
pub use check::{CheckReport, check};
pub use command::{CommandSpec, ContinuationColumns, DEFAULT_STRIDE, ScoreOptions};
pub use control::{Counters, RunControl};
pub use devices::{CPU_BATCH_TOKENS, CUDA_BATCH_TOKENS, DeviceChoice, Devices};
pub use generation::{CPU_KV_CACHE_BYTES, GenerateOptions};
pub use job_file::{JobFile, JobFileIdentity};
pub use memory::on_memory_limit;
pub use models::ModelCache;
pub use report::{Hashes, RunDetails, RunReport, Timings, UnitCounts};
pub use runner::{JobIdentity, identify, run, run_sharing};
pub use settings::{Job, JobSettings, LogFormat, MessageSettings, ProgressMode, count};
pub use spec::{DEFAULT_WINDOW_BYTES, JobSpec, PromptSpec};
pub use variables::Variables;

#[cfg(test)]
mod store_tests;
