//! What a model computes in.

use candle_core::DType;
use serde::Serialize;

use super::Weights;
use crate::error::{Error, Result};

/// The precision of activations and matrices. Sums, norms, softmax and logits are in f32 whatever it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// f32 on the CPU; on a CUDA device what most of the checkpoint is stored in.
    #[default]
    Auto,
    F32,
    F16,
    Bf16,
}

impl ComputeDtype {
    /// The dtype on a CUDA device or on the CPU, of a checkpoint with these weights.
    ///
    /// # Errors
    /// [`Error::Usage`] when the CPU is to compute in half precision.
    pub fn on(self, cuda: bool, weights: &Weights) -> Result<DType> {
        match self {
            Self::Auto | Self::F32 if !cuda => Ok(DType::F32),
            Self::F16 | Self::Bf16 if !cuda => Err(Error::Usage(
                "the CPU computes in f32; leave --dtype away, or compute in half precision with --device cuda:0".into(),
            )),
            Self::Auto => Ok(match weights.dtypes().first().map(|(name, _)| name.as_str()) {
                Some("BF16") => DType::BF16,
                Some("F16") => DType::F16,
                _ => DType::F32,
            }),
            Self::F32 => Ok(DType::F32),
            Self::F16 => Ok(DType::F16),
            Self::Bf16 => Ok(DType::BF16),
        }
    }
}
