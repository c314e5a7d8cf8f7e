//! What a model computes in.

use candle_core::DType;
use serde::Serialize;

use crate::error::{Error, Result};

/// The precision of matrix products. Sums over all inputs, attention, norms, softmax and logits are in f32 whatever it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// f32, whatever the checkpoint is stored in.
    #[default]
    Auto,
    F32,
    /// Weights and the inputs of products are rounded to f16: see [`crate::kernels::Arithmetic::F16`].
    F16,
    Bf16,
}

impl ComputeDtype {
    /// The dtype on the CPU.
    ///
    /// # Errors
    /// [`Error::Usage`] for bf16.
    pub fn on_cpu(self) -> Result<DType> {
        match self {
            Self::Auto | Self::F32 => Ok(DType::F32),
            Self::F16 => Ok(DType::F16),
            Self::Bf16 => Err(Error::Usage(
                "the CPU computes in f32, or with --dtype f16 in f16, whatever the checkpoint is stored in".into(),
            )),
        }
    }
}
