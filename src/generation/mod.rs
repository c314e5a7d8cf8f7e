//! Completions: which token comes next, when a text ends, and who shares a step with whom.
//!
//! [`Scheduler`] keeps the sequences: it admits requests from a length-sorted queue as long as their caches fit, lets a
//! [`StepModel`] compute one token of every live sequence, gives each to the [`sampler`], and hands out completions as
//! [`stop`] ends them. The next request takes a finished one's place in the very next step.

use serde::Serialize;

mod causal_lm;
mod constraint;
mod greedy_lanes;
mod live;
mod params;
pub mod sampler;
mod scheduler;
mod static_batch;
pub mod stop;

pub use causal_lm::CausalLm;
pub use constraint::{Constraint, ConstraintState, Grammar, TokenMask};
pub use live::{Completion, Generated, Request};
pub use params::{BadSetting, DEFAULT_MAX_TOKENS, GenerationDefaults, SamplingParams};
pub use scheduler::{GreedyRun, Scheduler, SchedulerLimits, StepModel, StepStats};
pub use static_batch::StaticBatches;
pub use stop::{Decode, FinishReason};

/// Who shares the steps of a completion.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Batching {
    /// Whoever is live: [`Scheduler`].
    #[default]
    InFlight,
    /// A rectangle of rows from its first step to its last: [`StaticBatches`].
    Static,
}
