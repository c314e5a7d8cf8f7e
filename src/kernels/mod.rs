//! The arithmetic between the matrix products: attention, rotary embedding, norms and the gated activation.
//!
//! Every function takes the padding-free layout: the `N` tokens of all sequences stand one after another, and
//! `cu_seq_lens` (`[B + 1]`, cumulative, starting with 0) says where each sequence begins. Three sequences of 2, 5
//! and 1 tokens have `cu_seq_lens = [0, 2, 7, 8]`, and token 3 is the second token of the second sequence.
//!
//! What a layer computes goes into buffers that all layers share: most functions write to a tensor that they are given.
//! Each runs on the device that its tensors are on. The plain computation that all devices have to agree with is in
//! [`mod@reference`].

mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
pub mod cuda;
mod heads;
mod linear;
mod ops;
pub mod reference;

pub use cpu::{
    AfterAttention, Arithmetic, BeforeAttention, BetweenAttentions, KvRing, PackedMatrix, RowStep, cached_attention,
    narrowed, pack_gate_up, pack_linear, packed_linear, packed_linear_into, packed_swiglu_into,
};
pub use heads::HeadLayout;
pub(crate) use linear::{GateUp, GateUpScratch, Linear};
pub use ops::{
    RotaryAngles, VarlenSequences, add_rms_norm, begin_stream, buffer, host_rows, indices, mean_rows, project,
    rms_norm, rotary_embedding, select_rows, varlen_attention,
};

#[cfg(test)]
mod tests;
