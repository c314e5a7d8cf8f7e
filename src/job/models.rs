//! Loaded models that jobs which follow each other share.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, DeviceLocation};

use crate::error::Result;
use crate::generation::CausalLm;
use crate::model::{Checkpoint, CheckpointIdentity, MistralModel};

/// The models of the checkpoint that was used last; another checkpoint, or dtype, takes its place, so that memory holds one.
#[derive(Default)]
pub struct ModelCache {
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    checkpoint: Option<(CheckpointIdentity, DType)>,
    /// For heads that read whole sequences.
    base: Replicas<MistralModel>,
    /// With the output layer.
    causal_lm: Replicas<CausalLm>,
    loads: u64,
}

/// A model for each replica, by its device and its number.
type Replicas<M> = Vec<((DeviceLocation, usize), Arc<M>)>;

impl ModelCache {
    /// The base model of a checkpoint on `device`, loaded where it is not held; `replica` tells models on one device apart.
    ///
    /// # Errors
    /// As [`MistralModel::load`].
    pub fn base(&self, checkpoint: &Checkpoint, device: &Device, replica: usize) -> Result<Arc<MistralModel>> {
        let load = || MistralModel::load(checkpoint, device);
        self.get(checkpoint, device, replica, |held| &mut held.base, load)
    }

    /// The causal language model of a checkpoint, as [`ModelCache::base`].
    ///
    /// # Errors
    /// As [`CausalLm::load`].
    pub fn causal_lm(&self, checkpoint: &Checkpoint, device: &Device, replica: usize) -> Result<Arc<CausalLm>> {
        let load = || CausalLm::load(checkpoint, device);
        self.get(checkpoint, device, replica, |held| &mut held.causal_lm, load)
    }

    /// How often weights were read.
    pub fn loads(&self) -> u64 {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).loads
    }

    fn get<M>(
        &self,
        checkpoint: &Checkpoint,
        device: &Device,
        replica: usize,
        kind: impl Fn(&mut Held) -> &mut Replicas<M>,
        load: impl FnOnce() -> Result<M>,
    ) -> Result<Arc<M>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = (checkpoint.identity(), checkpoint.compute_dtype(device)?);
        if held.checkpoint.as_ref() != Some(&identity) {
            // The old ones go before the new one comes.
            *held = Held { checkpoint: Some(identity), loads: held.loads, ..Held::default() };
        }
        let place = (device.location(), replica);
        if let Some((_, model)) = kind(&mut held).iter().find(|(at, _)| *at == place) {
            return Ok(model.clone());
        }
        let model = Arc::new(load()?);
        held.loads += 1;
        kind(&mut held).push((place, model.clone()));
        Ok(model)
    }
}
