//! The model: its configuration, its weights on disk, and its forward pass.

mod checkpoint;
mod config;
mod hub;
mod mistral;
pub mod reference;
mod rotary;
mod weights;

pub use checkpoint::{Checkpoint, CheckpointIdentity};
pub use config::{Architecture, MistralConfig, ProblemType};
pub use mistral::MistralModel;
pub use weights::Weights;
