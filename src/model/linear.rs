//! Weight matrices, packed for the products with them.

use candle_core::{D, DType, Result, Tensor};

use crate::kernels::{self, Arithmetic};

/// A matrix `[out, in]` without bias, in panels: a row's result is the same to the last bit in any company.
#[derive(Debug)]
pub(crate) struct Linear {
    /// As [`kernels::pack_linear`] packs it.
    panels: Tensor,
    outputs: usize,
    arithmetic: Arithmetic,
}

impl Linear {
    /// Packs `weight [out, in]`: an f16 weight for products in f16, an f32 one for products in f32, where it is kept in half
    /// precision if that holds every value.
    pub(crate) fn new(weight: &Tensor) -> Result<Self> {
        Ok(Self { panels: kernels::pack_linear(weight)?, outputs: weight.dim(0)?, arithmetic: arithmetic(weight) })
    }

    /// Outputs of a row.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// `x [N, in]` times the transposed matrix: `[N, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::packed_linear(x, &self.panels, self.outputs, self.arithmetic)
    }

    /// As [`Linear::forward`], to `output [N, out]`.
    pub(crate) fn forward_into(&self, x: &Tensor, output: &Tensor) -> Result<()> {
        kernels::packed_linear_into(x, &self.panels, output, self.arithmetic)
    }
}

/// What a product with `weight` is computed in.
fn arithmetic(weight: &Tensor) -> Arithmetic {
    if weight.dtype() == DType::F16 { Arithmetic::F16 } else { Arithmetic::F32 }
}

/// The gate and up projections of a feed-forward block, side by side.
#[derive(Debug)]
pub(crate) struct GateUp {
    /// As [`kernels::pack_gate_up`] packs them.
    panels: Tensor,
    intermediate: usize,
    arithmetic: Arithmetic,
}

impl GateUp {
    /// Packs `weight [2·intermediate, in]`, gate first, as [`Linear::new`].
    pub(crate) fn new(weight: &Tensor) -> Result<Self> {
        let panels = kernels::pack_gate_up(weight)?;
        Ok(Self { panels, intermediate: weight.dim(0)? / 2, arithmetic: arithmetic(weight) })
    }

    /// `silu(gate) · up` of `x [N, in]`, to `gated [N, intermediate]`.
    pub(crate) fn forward_into(&self, x: &Tensor, gated: &Tensor) -> Result<()> {
        kernels::packed_swiglu_into(x, &self.panels, gated, self.arithmetic)
    }

    /// The two products of `x [N, in]` without the activation, gate first: `[N, 2·intermediate]`.
    pub(crate) fn products(&self, x: &Tensor) -> Result<Tensor> {
        let (panels, _, width) = self.panels.dims3()?;
        let both = kernels::packed_linear(x, &self.panels, panels * width, self.arithmetic)?;
        let both = both.reshape((x.dim(0)?, panels, 2, width / 2))?;
        let half = |half: usize| both.narrow(2, half, 1)?.flatten_from(1)?.narrow(1, 0, self.intermediate);
        Tensor::cat(&[half(0)?, half(1)?], D::Minus1)?.to_dtype(DType::F32)
    }
}
