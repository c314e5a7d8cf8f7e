//! The gated activation of the feed-forward block.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::simd::{Kernel, Simd, dispatch, exp};
use super::{contiguous, rows_per_task};

/// `silu(gate) · up` of `gate_up [N, 2·I]`, the gate in the first `I` columns, to `[N, I]`.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    gate_up.apply_op1_no_bwd(&SwiGlu)
}

struct SwiGlu;

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, gate_up: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let &[tokens, both] = layout.dims() else { bail!("swiglu: expected [N, 2·I], got {:?}", layout.dims()) };
        if !both.is_multiple_of(2) || both == 0 {
            bail!("swiglu: {both} columns are not a gate and as many values");
        }
        let width = both / 2;
        let gate_up = contiguous(gate_up, layout, "swiglu")?;
        let mut gated = vec![0f32; tokens * width];
        let rows = rows_per_task(both);
        gated
            .par_chunks_mut(rows * width)
            .zip(gate_up.par_chunks(rows * both))
            .for_each(|(gated, gate_up)| dispatch(GateRows { gate_up, gated, width }));
        Ok((CpuStorage::F32(gated), Shape::from((tokens, width))))
    }
}

struct GateRows<'a> {
    gate_up: &'a [f32],
    gated: &'a mut [f32],
    width: usize,
}

impl Kernel for GateRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (row, gated) in self.gate_up.chunks_exact(2 * self.width).zip(self.gated.chunks_exact_mut(self.width)) {
            let (gate, up) = row.split_at(self.width);
            for ((gated, &gate), &up) in gated.iter_mut().zip(gate).zip(up) {
                *gated = gate / (1.0 + exp(simd, -gate)) * up;
            }
        }
    }
}
