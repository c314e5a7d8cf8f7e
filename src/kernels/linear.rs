//! Weight matrices, as their device multiplies with them.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{Arithmetic, PackedMatrix, buffer, cuda, pack_gate_up, pack_linear, packed_linear, packed_linear_into};

/// A matrix `[out, in]` without bias. On the CPU a row's result is the same to the last bit in any company.
#[derive(Debug)]
pub(crate) struct Linear {
    /// On the CPU as [`pack_linear`] packs it; `[out, in]` on a CUDA device.
    panels: Tensor,
    outputs: usize,
    arithmetic: Arithmetic,
}

impl Linear {
    /// Keeps `weight [out, in]` as its device needs it; on the CPU an f16 one for products in f16, an f32 one for
    /// products in f32, in half precision where that holds every value.
    pub(crate) fn new(weight: &Tensor) -> Result<Self> {
        let panels = if weight.device().is_cuda() { weight.clone() } else { pack_linear(weight)? };
        Ok(Self { panels, outputs: weight.dim(0)?, arithmetic: arithmetic(weight) })
    }

    /// Outputs of a row.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// `x [N, in]` times the transposed matrix, in f32: `[N, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match x.device() {
            Device::Cuda(_) => {
                let output = buffer((x.dim(0)?, self.outputs), DType::F32, x.device())?;
                cuda::product_into(x, &self.panels, &output)?;
                Ok(output)
            }
            _ => packed_linear(x, &self.panels, self.outputs, self.arithmetic),
        }
    }

    /// As [`Linear::forward`], to `output [N, out]`, in its dtype.
    pub(crate) fn forward_into(&self, x: &Tensor, output: &Tensor) -> Result<()> {
        match x.device() {
            Device::Cuda(_) => cuda::product_into(x, &self.panels, output),
            _ => packed_linear_into(x, &self.panels, output, self.arithmetic),
        }
    }

    /// As the CPU's row blocks multiply with it.
    pub(crate) fn packed(&self) -> PackedMatrix<'_> {
        PackedMatrix { panels: &self.panels, outputs: self.outputs, is_gate_up: false, arithmetic: self.arithmetic }
    }

    /// As [`Linear::forward`], on the host.
    pub(crate) fn forward_to_host(&self, x: &Tensor) -> Result<Vec<f32>> {
        let output = self.forward(x)?;
        match output.device() {
            Device::Cuda(_) => cuda::Download::begin(&output)?.f32(),
            _ => output.flatten_all()?.to_vec1(),
        }
    }
}

/// What a product with `weight` is computed in on the CPU.
fn arithmetic(weight: &Tensor) -> Arithmetic {
    if weight.dtype() == DType::F16 { Arithmetic::F16 } else { Arithmetic::F32 }
}

/// The gate and up projections of a feed-forward block, side by side.
#[derive(Debug)]
pub(crate) struct GateUp {
    /// On the CPU as [`pack_gate_up`] packs them; `[2·intermediate, in]` on a CUDA device.
    panels: Tensor,
    intermediate: usize,
    arithmetic: Arithmetic,
}

/// Where the products of [`GateUp`] on a CUDA device, and what passes the gate, stand until they are read; the CPU's row blocks
/// keep both in their cores' caches.
#[derive(Debug)]
pub(crate) struct GateUpScratch {
    /// `[N, 2·intermediate]`
    products: Tensor,
    /// `[N, intermediate]`
    gated: Tensor,
}

impl GateUpScratch {
    /// Memory for `tokens` rows.
    pub(crate) fn new(tokens: usize, intermediate: usize, dtype: DType, device: &Device) -> Result<Self> {
        Ok(Self {
            products: buffer((tokens, 2 * intermediate), dtype, device)?,
            gated: buffer((tokens, intermediate), dtype, device)?,
        })
    }
}

impl GateUp {
    /// Keeps `weight [2·intermediate, in]`, gate first, as its device needs it.
    pub(crate) fn new(weight: &Tensor) -> Result<Self> {
        let panels = if weight.device().is_cuda() { weight.clone() } else { pack_gate_up(weight)? };
        Ok(Self { panels, intermediate: weight.dim(0)? / 2, arithmetic: arithmetic(weight) })
    }

    /// As the CPU's row blocks multiply with it.
    pub(crate) fn packed(&self) -> PackedMatrix<'_> {
        PackedMatrix { panels: &self.panels, outputs: self.intermediate, is_gate_up: true, arithmetic: self.arithmetic }
    }

    /// `silu(gate) · up` of `x [N, in]` on a CUDA device, in a part of `scratch`, which has at least N rows: `[N, intermediate]`.
    pub(crate) fn forward(&self, x: &Tensor, scratch: &GateUpScratch) -> Result<Tensor> {
        let products = scratch.products.narrow(0, 0, x.dim(0)?)?;
        let gated = scratch.gated.narrow(0, 0, x.dim(0)?)?;
        cuda::product_into(x, &self.panels, &products)?;
        cuda::silu_mul(&products, &gated)?;
        Ok(gated)
    }

    /// The two products of `x [N, in]` without the activation, gate first: `[N, 2·intermediate]`.
    pub(crate) fn products(&self, x: &Tensor) -> Result<Tensor> {
        let (panels, _, width) = self.panels.dims3()?;
        let both = packed_linear(x, &self.panels, panels * width, self.arithmetic)?;
        let both = both.reshape((x.dim(0)?, panels, 2, width / 2))?;
        let half = |half: usize| both.narrow(2, half, 1)?.flatten_from(1)?.narrow(1, 0, self.intermediate);
        Tensor::cat(&[half(0)?, half(1)?], D::Minus1)?.to_dtype(DType::F32)
    }
}
