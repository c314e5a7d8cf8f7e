//! MistralForCausalLM, a step at a time.

use candle_core::Device;

use super::{Decode, StepModel};
use crate::batch::{LeftPaddedBatch, PackedBatch};
use crate::error::Result;
use crate::model::reference::{self, PaddedCache};
use crate::model::{Checkpoint, KvCache, Linear, MistralModel};
use crate::text::TextTokenizer;

/// The base model and its language-model head.
#[derive(Debug)]
pub struct CausalLm {
    model: MistralModel,
    /// `[vocab_size, hidden]`
    lm_head: Linear,
}

impl CausalLm {
    /// Reads the weights; with tied embeddings the head is the token embeddings.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when a tensor is missing, misshapen or not finite.
    pub fn load(checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        Ok(Self { lm_head: Linear::new(&checkpoint.lm_head(device)?)?, model: MistralModel::load(checkpoint, device)? })
    }

    /// The logits of each row's next token, `[B, vocab]`, the plain way: as [`reference::padded_step`].
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn padded_step(
        &self,
        batch: &LeftPaddedBatch,
        seq_lens: &[usize],
        cache: &mut PaddedCache,
    ) -> Result<Vec<f32>> {
        let hidden_states = reference::padded_step(&self.model, batch, seq_lens, cache)?; // [B, N, hidden]
        let last = hidden_states.narrow(1, batch.width() - 1, 1)?.squeeze(1)?.contiguous()?;
        Ok(self.lm_head.forward(&last)?.flatten_all()?.to_vec1()?)
    }

    /// The base model.
    pub fn model(&self) -> &MistralModel {
        &self.model
    }
}

impl StepModel for CausalLm {
    type Cache = KvCache;

    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    fn cache_bytes(&self, max_len: usize) -> usize {
        KvCache::bytes(self.model.config(), max_len)
    }

    fn new_cache(&self, max_len: usize) -> KvCache {
        KvCache::new(self.model.config(), max_len)
    }

    fn step(&self, batch: &PackedBatch, caches: &mut [&mut KvCache]) -> Result<Vec<f32>> {
        let hidden_states = self.model.forward_cached(batch, caches)?; // [B, hidden]
        Ok(self.lm_head.forward(&hidden_states)?.flatten_all()?.to_vec1()?)
    }
}

impl Decode for TextTokenizer {
    fn decode(&self, token_ids: &[u32]) -> Result<String, String> {
        self.decode(token_ids)
    }
}
