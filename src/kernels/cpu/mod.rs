//! The kernels on the CPU, in f32.

mod attention;
mod cached_attention;
mod gather;
mod half_product;
mod linear;
mod norm;
mod output;
mod panels;
mod rotary;
mod row_blocks;
mod simd;
mod tile;

pub use attention::varlen_attention;
pub use cached_attention::{KvRing, cached_attention};
pub use gather::begin_stream;
pub use linear::{Arithmetic, PackedMatrix, packed_linear, packed_linear_into, packed_swiglu_into};
pub use norm::{add_rms_norm, rms_norm};
pub use panels::{narrowed, pack_gate_up, pack_linear};
pub use rotary::rotary_embedding;
pub use row_blocks::{AfterAttention, BeforeAttention, BetweenAttentions, RowStep};

use candle_core::{CpuStorage, Layout, Result, bail};

/// Values that one parallel task of an elementwise kernel should touch: long enough to pay for its scheduling.
const VALUES_PER_TASK: usize = 16 * 1024;

/// Rows of `width` values that make one parallel task.
fn rows_per_task(width: usize) -> usize {
    (VALUES_PER_TASK / width.max(1)).max(1)
}

/// The f32 values of a contiguous tensor.
fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout, what: &str) -> Result<&'a [f32]> {
    let CpuStorage::F32(values) = storage else { bail!("{what}: the CPU kernels compute in f32") };
    match layout.contiguous_offsets() {
        Some((begin, end)) => Ok(&values[begin..end]),
        None => bail!("{what}: expected a contiguous tensor, got {layout:?}"),
    }
}

/// The f32 values of a contiguous tensor that is written in place.
fn contiguous_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout, what: &str) -> Result<&'a mut [f32]> {
    let CpuStorage::F32(values) = storage else { bail!("{what}: the CPU kernels compute in f32") };
    match layout.contiguous_offsets() {
        Some((begin, end)) => Ok(&mut values[begin..end]),
        None => bail!("{what}: expected a contiguous tensor to write to, got {layout:?}"),
    }
}
