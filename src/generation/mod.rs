//! Completions: which token comes next, when a text ends, and who shares a step with whom.
//!
//! [`Scheduler`] keeps the sequences: it admits requests from a length-sorted queue as long as their caches fit, lets a
//! [`StepModel`] compute one token of every live sequence, gives each to the [`sampler`], and hands out completions as
//! [`stop`] ends them. The next request takes a finished one's place in the very next step.

mod causal_lm;
mod constraint;
mod params;
pub mod sampler;
mod scheduler;
pub mod stop;

pub use causal_lm::CausalLm;
pub use constraint::{Constraint, ConstraintState, Grammar, TokenMask};
pub use params::{BadSetting, DEFAULT_MAX_TOKENS, GenerationDefaults, SamplingParams};
pub use scheduler::{Completion, Generated, Request, Scheduler, SchedulerLimits, StepModel, StepStats};
pub use stop::{Decode, FinishReason};
