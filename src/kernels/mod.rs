//! The arithmetic between the matrix products: attention, rotary embedding, norms and the gated activation.
//!
//! Every function takes the padding-free layout: the `N` tokens of all sequences stand one after another, and
//! `cu_seq_lens` (`[B + 1]`, cumulative, starting with 0) says where each sequence begins. Three sequences of 2, 5
//! and 1 tokens have `cu_seq_lens = [0, 2, 7, 8]`, and token 3 is the second token of the second sequence.
//!
//! Each function is one candle custom op, so that another device adds its own forward beside the CPU's. What a layer
//! computes goes into buffers that all layers share: most functions write to a tensor that they are given. The plain
//! computation that they all have to agree with is in [`mod@reference`].

mod cpu;
mod heads;
pub mod reference;

pub use cpu::{
    Arithmetic, KvRing, add_rms_norm, cached_attention, narrowed, pack_gate_up, pack_linear, packed_linear,
    packed_linear_into, packed_swiglu_into, rms_norm, rotary_embedding, varlen_attention,
};
pub use heads::HeadLayout;

#[cfg(test)]
mod tests;
