//! The model: its configuration, its weights on disk, and its forward pass.

mod checkpoint;
mod compute_dtype;
mod config;
mod hub;
mod kv_cache;
mod linear;
mod mistral;
mod profile;
pub mod reference;
mod rotary;
mod weights;

pub use checkpoint::{Checkpoint, CheckpointIdentity};
pub use compute_dtype::ComputeDtype;
pub use config::{Architecture, MistralConfig, ProblemType};
pub use kv_cache::KvCache;
pub(crate) use linear::Linear;
pub use mistral::MistralModel;
pub use profile::Profile;
pub use weights::Weights;
