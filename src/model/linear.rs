//! A weight matrix and the product with it.

use candle_core::{Result, Tensor};

use crate::kernels;

/// How the matrices of a model are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightLayout {
    /// As stored: the products of large batches are fastest.
    Plain,
    /// In panels: products with few rows are fast, and a row's result is the same to the last bit in any company.
    Packed,
}

/// A matrix `[out, in]` without bias.
#[derive(Debug)]
pub(crate) enum Linear {
    /// `[out, in]`
    Plain(Tensor),
    /// As [`kernels::pack_linear`] packs it.
    Packed { panels: Tensor, outputs: usize },
}

impl Linear {
    /// Keeps `weight [out, in]` in `layout`.
    pub(crate) fn new(weight: Tensor, layout: WeightLayout) -> Result<Self> {
        Ok(match layout {
            WeightLayout::Plain => Self::Plain(weight),
            WeightLayout::Packed => Self::Packed { panels: kernels::pack_linear(&weight)?, outputs: weight.dim(0)? },
        })
    }

    /// `x [N, in]` times the transposed matrix: `[N, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain(weight) => x.matmul(&weight.t()?),
            Self::Packed { panels, outputs } => kernels::packed_linear(x, panels, *outputs),
        }
    }
}
