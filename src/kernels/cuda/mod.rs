//! The kernels on NVIDIA devices: `kernels.cu` with what it includes, and the products of cuBLAS.
//!
//! Activations have one dtype T, bf16, f16 or f32; sums, softmax and norms are in f32 whatever it is, as are norm weights,
//! logits and what heads read.

#[cfg(feature = "flash-attn")]
mod flash_attn;
mod graph;
mod kv_blocks;
mod ops;
mod runtime;

pub use graph::Graph;
pub use kv_blocks::{BLOCK_TOKENS, BlockPool, BlockTable, CacheBatch, decode_attention, rotary_cache_write};
pub use ops::{
    AttentionTiles, add_rms_norm, advance_positions, argmax_logprob, gather_rows, gather_rows_into, mean_pool,
    rms_norm, rotary_embedding, silu_mul, target_logprobs, to_f32, varlen_attention,
};
pub use runtime::{Download, memory_bytes, name, open, uninitialized, upload, upload_to};

use candle_core::{Result, Tensor};

/// Whether this build has these kernels.
pub const IS_BUILT: bool = true;

/// `x [N, in]` times the transposed `weight [out, in]`, to `output [N, out]`, which may be f32 whatever the others are.
pub fn product_into(x: &Tensor, weight: &Tensor, output: &Tensor) -> Result<()> {
    runtime::Runtime::of(x.device())?.product(x, weight, output)
}
