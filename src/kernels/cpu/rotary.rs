//! Rotary position embedding on the fused query, key and value buffer.

use candle_core::{CpuStorage, InplaceOp3, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::simd::{Kernel, Simd, dispatch};
use super::{contiguous, contiguous_mut, rows_per_task};
use crate::kernels::HeadLayout;

/// Rotates the query and key heads of `qkv [N, (H + 2K)·D]` by `cos` and `sin [N, D/2]`, in place.
///
/// A head's first half `x1` and second half `x2` become `x1·cos - x2·sin` and `x2·cos + x1·sin` (the `rotate_half` of
/// Hugging Face, not interleaved pairs). Row `n` of `cos` and `sin` belongs to token `n`: its position is counted
/// from the beginning of its own sequence. Values stay as they are.
pub fn rotary_embedding(qkv: &Tensor, cos: &Tensor, sin: &Tensor, heads: HeadLayout) -> Result<()> {
    qkv.inplace_op3(cos, sin, &RotaryEmbedding { heads })
}

struct RotaryEmbedding {
    heads: HeadLayout,
}

impl InplaceOp3 for RotaryEmbedding {
    fn name(&self) -> &'static str {
        "rotary-embedding"
    }

    fn cpu_fwd(
        &self,
        qkv: &mut CpuStorage,
        qkv_layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> Result<()> {
        check(qkv_layout.dims(), cos_layout.dims(), sin_layout.dims(), self.heads)?;
        let qkv = contiguous_mut(qkv, qkv_layout, "rotary embedding")?;
        let cos = contiguous(cos, cos_layout, "rotary embedding's cos")?;
        let sin = contiguous(sin, sin_layout, "rotary embedding's sin")?;
        rotate_rows(qkv, cos, sin, self.heads);
        Ok(())
    }
}

/// Fails unless the shapes are those of [`rotary_embedding`].
pub(super) fn check(qkv: &[usize], cos: &[usize], sin: &[usize], heads: HeadLayout) -> Result<()> {
    let (tokens, half) = (heads.check_qkv(qkv)?, heads.head_dim / 2);
    if !heads.head_dim.is_multiple_of(2) {
        bail!("rotary embedding: a head of {} has no halves", heads.head_dim);
    }
    if cos != [tokens, half] || sin != [tokens, half] {
        bail!("rotary embedding: expected cos and sin of [{tokens}, {half}], got {cos:?} and {sin:?}");
    }
    Ok(())
}

/// As [`rotary_embedding`], of rows that are plain slices.
pub(super) fn rotate_rows(qkv: &mut [f32], cos: &[f32], sin: &[f32], heads: HeadLayout) {
    let (width, half) = (heads.qkv_width(), heads.head_dim / 2);
    let rows = rows_per_task(width);
    qkv.par_chunks_mut(rows * width)
        .zip(cos.par_chunks(rows * half).zip(sin.par_chunks(rows * half)))
        .for_each(|(qkv, (cos, sin))| dispatch(RotateRows { qkv, cos, sin, heads }));
}

struct RotateRows<'a> {
    qkv: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    heads: HeadLayout,
}

impl Kernel for RotateRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let (head_dim, half) = (self.heads.head_dim, self.heads.head_dim / 2);
        let (width, values) = (self.heads.qkv_width(), self.heads.query_width() + self.heads.kv_width());
        let tables = self.cos.chunks_exact(half).zip(self.sin.chunks_exact(half));
        for (qkv, (cos, sin)) in self.qkv.chunks_exact_mut(width).zip(tables) {
            for head in qkv[..values].chunks_exact_mut(head_dim) {
                let (x1, x2) = head.split_at_mut(half);
                for (((x1, x2), &cos), &sin) in x1.iter_mut().zip(x2).zip(cos).zip(sin) {
                    (*x1, *x2) = (*x1 * cos - *x2 * sin, *x2 * cos + *x1 * sin);
                }
            }
        }
    }
}
