//! Evaluation: what a model's results are worth.

pub mod metrics;
