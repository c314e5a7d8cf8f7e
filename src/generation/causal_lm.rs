//! MistralForCausalLM, a step at a time.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::Device;

use super::greedy_lanes::{GreedyLanes, LaneRun};
use super::sampler::Sampled;
use super::{Decode, GreedyRun, StepModel};
use crate::batch::{LeftPaddedBatch, PackedBatch};
use crate::error::Result;
use crate::kernels::Linear;
use crate::model::reference::{self, PaddedCache};
use crate::model::{Checkpoint, KvCache, MistralModel};
use crate::text::TextTokenizer;

/// The base model and its language-model head.
pub struct CausalLm {
    pub(super) model: MistralModel,
    /// `[vocab_size, hidden]`
    pub(super) lm_head: Linear,
    /// On a CUDA device: buffers and recorded steps of runs that have ended, by number of lanes.
    pub(super) idle_lanes: Mutex<HashMap<usize, GreedyLanes>>,
}

impl CausalLm {
    /// Reads the weights; with tied embeddings the head is the token embeddings.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when a tensor is missing, misshapen or not finite.
    pub fn load(checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        Ok(Self {
            lm_head: Linear::new(&checkpoint.lm_head(device)?)?,
            model: MistralModel::load(checkpoint, device)?,
            idle_lanes: Mutex::default(),
        })
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
        Ok(self.lm_head.forward_to_host(&last)?)
    }

    /// Takes memory of a CUDA device for the caches of sequences: `wanted` bytes, or what is left beside the buffers of steps
    /// with `prefill_tokens` new tokens and `max_rows` sequences. Returns what caches may take together; on the CPU `wanted`.
    ///
    /// # Errors
    /// When nothing is left.
    pub fn reserve_caches(&self, wanted: usize, prefill_tokens: usize, max_rows: usize) -> Result<usize> {
        if let Some(held) = self.model.reserved_cache_bytes().filter(|held| *held <= wanted) {
            return Ok(held);
        }
        let logits = 2 * max_rows * self.model.config().vocab_size * size_of::<f32>();
        let steps = self.model.activation_bytes(prefill_tokens + max_rows) + logits;
        match self.model.free_bytes()? {
            Some(free) => self.model.reserve_caches(wanted.min(free.saturating_sub(steps))),
            None => self.model.reserve_caches(wanted),
        }
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
        self.model.cache_bytes(max_len)
    }

    fn new_cache(&self, max_len: usize) -> Result<KvCache> {
        self.model.new_cache(max_len)
    }

    fn fork_cache(&self, cache: &KvCache) -> Result<KvCache> {
        cache.fork()
    }

    fn step(&self, batch: &PackedBatch, caches: &mut [&mut KvCache]) -> Result<Vec<f32>> {
        let hidden_states = self.model.forward_cached(batch, caches)?; // [B, hidden]
        Ok(self.lm_head.forward_to_host(&hidden_states)?)
    }

    fn step_greedy(&self, batch: &PackedBatch, caches: &mut [&mut KvCache]) -> Result<Option<Vec<Sampled>>> {
        if !self.model.device().is_cuda() {
            return Ok(None);
        }
        let hidden_states = self.model.forward_cached(batch, caches)?; // [B, hidden]
        GreedyLanes::likeliest(&self.lm_head.forward(&hidden_states)?).map(Some)
    }

    /// On a CUDA device, with as many lanes as the next power of two.
    fn greedy_run<'a>(
        &'a self,
        ids: &[u32],
        caches: &[&KvCache],
        max_len: usize,
    ) -> Result<Option<Box<dyn GreedyRun<KvCache> + 'a>>> {
        if !self.model.device().is_cuda() {
            return Ok(None);
        }
        let lanes = ids.len().next_power_of_two();
        let idle = self.idle_lanes.lock().unwrap_or_else(PoisonError::into_inner).remove(&lanes);
        let lanes = match idle {
            Some(idle) if idle.fit(self, max_len)? => idle,
            _ => GreedyLanes::new(self, lanes, max_len)?,
        };
        Ok(Some(Box::new(LaneRun::begin(self, lanes, ids, caches)?)))
    }

    /// A prompt interrupts the recorded steps: on a CUDA device several begin together.
    fn refill_share(&self) -> Option<usize> {
        self.model.device().is_cuda().then_some(8)
    }
}

impl Decode for TextTokenizer {
    fn decode(&self, token_ids: &[u32]) -> Result<String, String> {
        self.decode(token_ids)
    }
}
