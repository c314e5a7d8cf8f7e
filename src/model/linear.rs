//! Weight matrices, packed for the products with them.

use candle_core::{D, DType, Result, Tensor};

use crate::kernels;

/// A matrix `[out, in]` without bias, in panels: a row's result is the same to the last bit in any company.
#[derive(Debug)]
pub(crate) struct Linear {
    /// As [`kernels::pack_linear`] packs it.
    panels: Tensor,
    outputs: usize,
}

impl Linear {
    /// Packs `weight [out, in]`, in half precision where that holds every value.
    pub(crate) fn new(weight: &Tensor) -> Result<Self> {
        Ok(Self { panels: kernels::pack_linear(weight)?, outputs: weight.dim(0)? })
    }

    /// Outputs of a row.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// `x [N, in]` times the transposed matrix: `[N, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::packed_linear(x, &self.panels, self.outputs)
    }

    /// As [`Linear::forward`], to `output [N, out]`.
    pub(crate) fn forward_into(&self, x: &Tensor, output: &Tensor) -> Result<()> {
        kernels::packed_linear_into(x, &self.panels, output)
    }
}

/// The gate and up projections of a feed-forward block, side by side.
#[derive(Debug)]
pub(crate) struct GateUp {
    /// As [`kernels::pack_gate_up`] packs them.
    panels: Tensor,
    intermediate: usize,
}

impl GateUp {
    /// Packs `weight [2·intermediate, in]`, gate first, in half precision where that holds every value.
    pub(crate) fn new(weight: &Tensor) -> Result<Self> {
        Ok(Self { panels: kernels::pack_gate_up(weight)?, intermediate: weight.dim(0)? / 2 })
    }

    /// `silu(gate) · up` of `x [N, in]`, to `gated [N, intermediate]`.
    pub(crate) fn forward_into(&self, x: &Tensor, gated: &Tensor) -> Result<()> {
        kernels::packed_swiglu_into(x, &self.panels, gated)
    }

    /// The two products of `x [N, in]` without the activation, gate first: `[N, 2·intermediate]`.
    pub(crate) fn products(&self, x: &Tensor) -> Result<Tensor> {
        let (panels, _, width) = self.panels.dims3()?;
        let both = kernels::packed_linear(x, &self.panels, panels * width)?;
        let both = both.reshape((x.dim(0)?, panels, 2, width / 2))?;
        let half = |half: usize| both.narrow(2, half, 1)?.flatten_from(1)?.narrow(1, 0, self.intermediate);
        Tensor::cat(&[half(0)?, half(1)?], D::Minus1)?.to_dtype(DType::F32)
    }
}
