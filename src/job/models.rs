//! Loaded models that jobs which follow each other share.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device};

use crate::error::Result;
use crate::generation::CausalLm;
use crate::model::{Checkpoint, CheckpointIdentity, MistralModel};

/// The models of the checkpoint and precision that were used last; others take their place, so that memory holds one.
#[derive(Debug, Default)]
pub struct ModelCache {
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    checkpoint: Option<(CheckpointIdentity, DType)>,
    /// For heads that read whole sequences.
    base: Option<Arc<MistralModel>>,
    /// For generation, whose weights are laid out for single rows.
    causal_lm: Option<Arc<CausalLm>>,
    loads: u64,
}

impl ModelCache {
    /// The base model of a checkpoint, loaded where it is not held.
    ///
    /// # Errors
    /// As [`MistralModel::load`].
    pub fn base(&self, checkpoint: &Checkpoint, device: &Device) -> Result<Arc<MistralModel>> {
        self.with(checkpoint, |held| match &held.base {
            Some(model) => Ok(model.clone()),
            None => {
                let model = Arc::new(MistralModel::load(checkpoint, device)?);
                held.loads += 1;
                Ok(held.base.insert(model).clone())
            }
        })
    }

    /// The causal language model of a checkpoint, loaded where it is not held.
    ///
    /// # Errors
    /// As [`CausalLm::load`].
    pub fn causal_lm(&self, checkpoint: &Checkpoint, device: &Device) -> Result<Arc<CausalLm>> {
        self.with(checkpoint, |held| match &held.causal_lm {
            Some(model) => Ok(model.clone()),
            None => {
                let model = Arc::new(CausalLm::load(checkpoint, device)?);
                held.loads += 1;
                Ok(held.causal_lm.insert(model).clone())
            }
        })
    }

    /// How often weights were read.
    pub fn loads(&self) -> u64 {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).loads
    }

    fn with<T>(&self, checkpoint: &Checkpoint, load: impl FnOnce(&mut Held) -> Result<T>) -> Result<T> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = (checkpoint.identity(), checkpoint.compute_dtype(&Device::Cpu)?);
        if held.checkpoint.as_ref() != Some(&identity) {
            // The old one goes before the new one comes.
            *held = Held { checkpoint: Some(identity), loads: held.loads, ..Held::default() };
        }
        load(&mut held)
    }
}
