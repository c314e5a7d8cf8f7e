//! What a model computes in.

use candle_core::DType;
use serde::Serialize;

use super::Weights;
use crate::error::{Error, Result};

/// The precision of matrix products, and on a CUDA device of the activations between them. Sums over all inputs, softmax,
/// norms and logits are in f32 whatever it is; on the CPU so are activations and attention.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// f32 on the CPU; on a CUDA device what most of the checkpoint is stored in.
    #[default]
    Auto,
    F32,
    /// Weights and the inputs of products are rounded to f16: on the CPU see [`crate::kernels::Arithmetic::F16`].
    F16,
    /// On a CUDA device only.
    Bf16,
}

impl ComputeDtype {
    /// The dtype on a CUDA device or on the CPU, of a checkpoint with these weights.
    ///
    /// # Errors
    /// [`Error::Usage`] for bf16 on the CPU.
    pub fn on(self, is_cuda: bool, weights: &Weights) -> Result<DType> {
        match self {
            Self::Auto if is_cuda => Ok(match weights.dtypes().first().map(|(name, _)| name.as_str()) {
                Some("BF16") => DType::BF16,
                Some("F16") => DType::F16,
                _ => DType::F32,
            }),
            Self::Auto | Self::F32 => Ok(DType::F32),
            Self::F16 => Ok(DType::F16),
            Self::Bf16 if is_cuda => Ok(DType::BF16),
            Self::Bf16 => Err(Error::Usage(
                "the CPU computes in f32, or with --dtype f16 in f16, whatever the checkpoint is stored in; bf16 needs \
                 --device cuda:0"
                    .into(),
            )),
        }
    }
}
