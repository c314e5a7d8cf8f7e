//! Rows become length-sorted, left-padded batches under a token budget.
//!
//! Everything here is plain vectors: packing is tested without a model or a device.

mod left_padded;
mod packer;
mod sequence;

pub use left_padded::{LeftPaddedBatch, PackedBatch};
pub use packer::{Packer, Padding};
pub use sequence::Sequence;
