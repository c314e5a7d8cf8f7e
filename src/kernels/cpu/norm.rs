//! Root-mean-square norm, alone and joined with the residual sum before it.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::simd::{Kernel, Simd, dispatch};
use super::{contiguous, rows_per_task};

/// Partial sums of a row: enough independent ones for the widest vectors, and the same number on every CPU, so that
/// the sum is the same on every CPU.
const PARTIAL_SUMS: usize = 64;

/// `x / sqrt(mean(x²) + eps) · weight` of each row: `x [N, D]` and `weight [D]` to `[N, D]`, with sums in f32.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    x.apply_op2_no_bwd(weight, &RmsNorm { eps })
}

/// `sum = x + residual` and `rms_norm(sum)` in one pass: `x` and `residual [N, D]`, `weight [D]` to two `[N, D]`.
pub fn add_rms_norm(x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let both = x.apply_op3_no_bwd(residual, weight, &AddRmsNorm { eps })?;
    Ok((both.get(0)?, both.get(1)?))
}

struct RmsNorm {
    eps: f64,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let width = row_width(x_layout, weight_layout)?;
        let x = contiguous(x, x_layout, "rms norm")?;
        let weight = contiguous(weight, weight_layout, "rms norm's weight")?;
        let mut normed = vec![0f32; x.len()];
        let step = rows_per_task(width) * width;
        normed
            .par_chunks_mut(step)
            .zip(x.par_chunks(step))
            .for_each(|(normed, x)| dispatch(NormRows { x, weight, normed, eps: self.eps as f32 }));
        Ok((CpuStorage::F32(normed), x_layout.shape().clone()))
    }
}

struct AddRmsNorm {
    eps: f64,
}

impl CustomOp3 for AddRmsNorm {
    fn name(&self) -> &'static str {
        "add-rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let width = row_width(x_layout, weight_layout)?;
        if residual_layout.shape() != x_layout.shape() {
            bail!("add rms norm: {:?} and {:?} differ", x_layout.shape(), residual_layout.shape());
        }
        let x = contiguous(x, x_layout, "add rms norm")?;
        let residual = contiguous(residual, residual_layout, "add rms norm's residual")?;
        let weight = contiguous(weight, weight_layout, "add rms norm's weight")?;
        let mut both = vec![0f32; 2 * x.len()];
        let (sum, normed) = both.split_at_mut(x.len());
        let step = rows_per_task(width) * width;
        sum.par_chunks_mut(step)
            .zip(normed.par_chunks_mut(step))
            .zip(x.par_chunks(step).zip(residual.par_chunks(step)))
            .for_each(|((sum, normed), (x, residual))| {
                dispatch(AddNormRows { x, residual, weight, sum, normed, eps: self.eps as f32 });
            });
        Ok((CpuStorage::F32(both), Shape::from((2, x_layout.dims()[0], width))))
    }
}

/// Fails unless `x` is `[N, D]` and the weight `[D]` with `D > 0`; returns `D`.
fn row_width(x: &Layout, weight: &Layout) -> Result<usize> {
    match (x.dims(), weight.dims()) {
        (&[_, width], &[weights]) if width == weights && width > 0 => Ok(width),
        (x, weight) => bail!("rms norm: expected [N, D] and [D], got {x:?} and {weight:?}"),
    }
}

struct NormRows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    normed: &'a mut [f32],
    eps: f32,
}

impl Kernel for NormRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let width = self.weight.len();
        for (x, normed) in self.x.chunks_exact(width).zip(self.normed.chunks_exact_mut(width)) {
            norm_row(x, self.weight, normed, self.eps);
        }
    }
}

struct AddNormRows<'a> {
    x: &'a [f32],
    residual: &'a [f32],
    weight: &'a [f32],
    sum: &'a mut [f32],
    normed: &'a mut [f32],
    eps: f32,
}

impl Kernel for AddNormRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let width = self.weight.len();
        let inputs = self.x.chunks_exact(width).zip(self.residual.chunks_exact(width));
        let outputs = self.sum.chunks_exact_mut(width).zip(self.normed.chunks_exact_mut(width));
        for ((x, residual), (sum, normed)) in inputs.zip(outputs) {
            for ((sum, x), residual) in sum.iter_mut().zip(x).zip(residual) {
                *sum = x + residual;
            }
            norm_row(sum, self.weight, normed, self.eps);
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
