//! A checkpoint folder: its configuration, its weights, and what identifies both.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{ComputeDtype, MistralConfig, Weights, hub};
use crate::error::{Error, Result};

/// A Mistral checkpoint on disk, opened but not loaded.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder.
    pub dir: PathBuf,
    /// What the user called it: a path or a hub id.
    pub name: String,
    pub config: MistralConfig,
    pub weights: Weights,
    /// What is to be computed in.
    dtype: ComputeDtype,
    /// "model." for checkpoints with a head, "" for a bare `MistralModel`.
    prefix: &'static str,
    config_sha256: String,
}

/// What tells one checkpoint from another, whatever its path and file times.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckpointIdentity {
    /// SHA-256 of `config.json`.
    pub config_sha256: String,
    /// SHA-256 over every tensor's name, dtype, shape and first bytes.
    pub weights_sha256: String,
}

impl Checkpoint {
    /// Opens the checkpoint that `--model` names: a folder, or a hub id in the local cache.
    ///
    /// # Errors
    /// [`Error::Config`] when it is not there or is not a usable Mistral checkpoint.
    pub fn open(model: &str) -> Result<Self> {
        let dir = hub::resolve(model)?;
        let config_path = dir.join("config.json");
        let config = MistralConfig::read(&config_path)?;
        let config_sha256 = file_sha256(&config_path)?;
        let weights = Weights::open(&dir)?;
        let prefix = if weights.contains("model.embed_tokens.weight") { "model." } else { "" };
        Ok(Self { dir, name: model.to_owned(), config, weights, dtype: ComputeDtype::Auto, prefix, config_sha256 })
    }

    /// The same, to be computed in `dtype`.
    pub fn with_dtype(self, dtype: ComputeDtype) -> Self {
        Self { dtype, ..self }
    }

    /// What a model of this checkpoint computes in on `device`: see [`ComputeDtype`].
    ///
    /// # Errors
    /// [`Error::Usage`] when the device does not compute in the dtype that was asked for.
    pub fn compute_dtype(&self, device: &Device) -> Result<DType> {
        self.dtype.on(device.is_cuda(), &self.weights)
    }

    /// The tensor `name` of the base model as f32, checked against `shape`.
    ///
    /// # Errors
    /// As [`Weights::tensor`].
    pub fn base_tensor(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        self.weights.tensor(&self.base_name(name), shape, device)
    }

    /// The dtype of hidden states on `device`: f32 on the CPU, that of products on a CUDA device.
    ///
    /// # Errors
    /// As [`Checkpoint::compute_dtype`].
    pub(crate) fn hidden_dtype(&self, device: &Device) -> Result<DType> {
        let products = self.compute_dtype(device)?;
        Ok(if device.is_cuda() { products } else { DType::F32 })
    }

    /// The matrix `name` in the dtype of hidden states.
    ///
    /// # Errors
    /// As [`Weights::tensor_as`].
    pub(crate) fn hidden_matrix(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        self.weights.tensor_as(name, shape, self.hidden_dtype(device)?, device)
    }

    /// As [`Checkpoint::base_tensor`], in the dtype that products with it are computed in.
    ///
    /// # Errors
    /// As [`Weights::tensor_as`].
    pub(crate) fn base_matrix(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        self.matrix(&self.base_name(name), shape, device)
    }

    /// The matrix `name` in the dtype that products with it are computed in.
    ///
    /// # Errors
    /// As [`Weights::tensor_as`].
    pub(crate) fn matrix(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        self.weights.tensor_as(name, shape, self.compute_dtype(device)?, device)
    }

    /// The full name of a tensor of the base model.
    pub fn base_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// What identifies the checkpoint in a plan and in every part's footer.
    pub fn identity(&self) -> CheckpointIdentity {
        CheckpointIdentity { config_sha256: self.config_sha256.clone(), weights_sha256: self.weights.identity_sha256() }
    }

    /// Reads the output layer of a causal language model, `[vocab_size, hidden]`: the token embeddings where the two are tied.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when the tensor is missing, misshapen or not finite.
    pub(crate) fn lm_head(&self, device: &Device) -> Result<Tensor> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        if self.config.tie_word_embeddings {
            self.base_matrix("embed_tokens.weight", &shape, device)
        } else {
            self.matrix("lm_head.weight", &shape, device)
        }
    }
}

/// SHA-256 of a small file, in hexadecimal.
///
/// # Errors
/// [`Error::Config`] when it cannot be read.
pub fn file_sha256(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|error| Error::config(path, format!("cannot read it: {error}")))?;
    Ok(format!("{:x}", Sha256::digest(&bytes)))
}
