//! The model: its configuration, its weights on disk, and its forward pass.

mod checkpoint;
mod compute_dtype;
mod config;
mod decode;
mod hub;
mod kv_cache;
mod mistral;
mod profile;
pub mod reference;
mod rotary;
mod row_blocks;
mod weights;

pub use checkpoint::{Checkpoint, CheckpointIdentity};
pub use compute_dtype::ComputeDtype;
pub use config::{Architecture, MistralConfig, ProblemType};
pub use decode::DecodeLanes;
pub use kv_cache::KvCache;
pub use mistral::MistralModel;
pub use profile::Profile;
pub use weights::Weights;
