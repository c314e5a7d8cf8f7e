//! Root-mean-square norm of the residual stream, alone and joined with the sum before it.

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::simd::{Kernel, Simd, dispatch};
use super::{contiguous, contiguous_mut, rows_per_task};

/// Partial sums of a row: enough independent ones for the widest vectors, and the same number on every CPU, so that
/// the sum is the same on every CPU.
const PARTIAL_SUMS: usize = 64;

/// As [`crate::kernels::rms_norm`].
pub fn rms_norm(stream: &Tensor, weight: &Tensor, eps: f64) -> Result<()> {
    stream.inplace_op2(weight, &StreamNorm { eps: eps as f32, add: false })
}

/// As [`crate::kernels::add_rms_norm`].
pub fn add_rms_norm(stream: &Tensor, weight: &Tensor, eps: f64) -> Result<()> {
    stream.inplace_op2(weight, &StreamNorm { eps: eps as f32, add: true })
}

struct StreamNorm {
    eps: f32,
    add: bool,
}

impl InplaceOp2 for StreamNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        stream: &mut CpuStorage,
        layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<()> {
        match (layout.dims(), weight_layout.dims()) {
            (&[2, _, width], &[weights]) if width == weights && width > 0 => {}
            (stream, weight) => bail!("rms norm: expected [2, N, D] and [D], got {stream:?} and {weight:?}"),
        }
        let stream = contiguous_mut(stream, layout, "rms norm")?;
        let weight = contiguous(weight, weight_layout, "rms norm's weight")?;
        let (x, normed) = stream.split_at_mut(stream.len() / 2);
        norm_rows(x, normed, weight, self.eps, self.add);
        Ok(())
    }
}

/// Norms rows `x` to `normed [N, D]` both; with `add` after adding what `normed` holds to `x`.
pub(super) fn norm_rows(x: &mut [f32], normed: &mut [f32], weight: &[f32], eps: f32, add: bool) {
    let step = rows_per_task(weight.len()) * weight.len();
    x.par_chunks_mut(step)
        .zip(normed.par_chunks_mut(step))
        .for_each(|(x, normed)| dispatch(NormRows { x, normed, weight, eps, add }));
}

struct NormRows<'a> {
    x: &'a mut [f32],
    normed: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
    add: bool,
}

impl Kernel for NormRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let width = self.weight.len();
        for (x, normed) in self.x.chunks_exact_mut(width).zip(self.normed.chunks_exact_mut(width)) {
            if self.add {
                for (x, y) in x.iter_mut().zip(normed.iter()) {
                    *x += y;
                }
            }
            norm_row(x, self.weight, normed, self.eps);
        }
    }
}

#[inline(always)]
fn norm_row(x: &[f32], weight: &[f32], normed: &mut [f32], eps: f32) {
    let scale = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
    for ((normed, x), weight) in normed.iter_mut().zip(x).zip(weight) {
        *normed = x * scale * weight;
    }
}

#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut sums = [0f32; PARTIAL_SUMS];
    let (chunks, rest) = x.as_chunks::<PARTIAL_SUMS>();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x * x;
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum += x * x;
    }
    let mut half = PARTIAL_SUMS / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}
