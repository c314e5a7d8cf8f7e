//! Rotary position embedding on the fused query, key and value buffer.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::simd::{Kernel, Simd, dispatch};
use super::{contiguous, rows_per_task};
use crate::kernels::HeadLayout;

/// Rotates the query and key heads of `qkv [N, (H + 2K)·D]` by `cos` and `sin [N, D/2]`, to `[N, (H + 2K)·D]`.
///
/// A head's first half `x1` and second half `x2` become `x1·cos - x2·sin` and `x2·cos + x1·sin` (the `rotate_half` of
/// Hugging Face, not interleaved pairs). Row `n` of `cos` and `sin` belongs to token `n`: its position is counted
/// from the beginning of its own sequence. Values are copied as they are.
pub fn rotary_embedding(qkv: &Tensor, cos: &Tensor, sin: &Tensor, heads: HeadLayout) -> Result<Tensor> {
    qkv.apply_op3_no_bwd(cos, sin, &RotaryEmbedding { heads })
}

struct RotaryEmbedding {
    heads: HeadLayout,
}

impl CustomOp3 for RotaryEmbedding {
    fn name(&self) -> &'static str {
        "rotary-embedding"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let tokens = self.heads.check_qkv(qkv_layout.dims())?;
        let (width, half) = (self.heads.qkv_width(), self.heads.head_dim / 2);
        if !self.heads.head_dim.is_multiple_of(2) {
            bail!("rotary embedding: a head of {} has no halves", self.heads.head_dim);
        }
        if cos_layout.dims() != [tokens, half] || sin_layout.dims() != [tokens, half] {
            let (cos, sin) = (cos_layout.dims(), sin_layout.dims());
            bail!("rotary embedding: expected cos and sin of [{tokens}, {half}], got {cos:?} and {sin:?}");
        }
        let qkv = contiguous(qkv, qkv_layout, "rotary embedding")?;
        let cos = contiguous(cos, cos_layout, "rotary embedding's cos")?;
        let sin = contiguous(sin, sin_layout, "rotary embedding's sin")?;
        let mut rotated = vec![0f32; qkv.len()];
        let rows = rows_per_task(width);
        rotated
            .par_chunks_mut(rows * width)
            .zip(qkv.par_chunks(rows * width))
            .zip(cos.par_chunks(rows * half).zip(sin.par_chunks(rows * half)))
            .for_each(|((rotated, qkv), (cos, sin))| {
                dispatch(RotateRows { qkv, cos, sin, rotated, heads: self.heads });
            });
        Ok((CpuStorage::F32(rotated), qkv_layout.shape().clone()))
    }
}

struct RotateRows<'a> {
    qkv: &'a [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    rotated: &'a mut [f32],
    heads: HeadLayout,
}

impl Kernel for RotateRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let (head_dim, half) = (self.heads.head_dim, self.heads.head_dim / 2);
        let (width, values) = (self.heads.qkv_width(), self.heads.query_width() + self.heads.kv_width());
        let inputs = self.qkv.chunks_exact(width).zip(self.cos.chunks_exact(half).zip(self.sin.chunks_exact(half)));
        for ((qkv, (cos, sin)), rotated) in inputs.zip(self.rotated.chunks_exact_mut(width)) {
            let heads = qkv[..values].chunks_exact(head_dim).zip(rotated[..values].chunks_exact_mut(head_dim));
            for (x, y) in heads {
                let ((x1, x2), (y1, y2)) = (x.split_at(half), y.split_at_mut(half));
                for i in 0..half {
                    y1[i] = x1[i] * cos[i] - x2[i] * sin[i];
                    y2[i] = x2[i] * cos[i] + x1[i] * sin[i];
                }
            }
            rotated[values..].copy_from_slice(&qkv[values..]);
        }
    }
}
