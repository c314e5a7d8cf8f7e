//! Evaluation sweeps: what models' results are worth, over every combination of their settings.
//!
//! A [sweep file](SweepFile) becomes [cells](cells); each cell's predictions are the output of a job, kept under the job's
//! fingerprint, so that cells which ask for the same predictions share them and a killed sweep goes on. [Scoring](scoring)
//! tells what can be measured on them, [metrics] measure it, and [results] and [report] show it.

pub mod cells;
pub mod metrics;
mod prepare;
pub mod report;
pub mod results;
pub mod scoring;
pub mod spec;
pub mod sweep;

pub use spec::{SweepFile, TaskKind};
