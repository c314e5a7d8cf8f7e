//! What a sequence's tokens so far leave behind for those to come: rotated keys, and values, of every layer.

use std::sync::{Arc, PoisonError};

use candle_core::bail;

use super::{MistralConfig, MistralModel};
use crate::error::{Error, Result};
use crate::kernels::KvRing;
use crate::kernels::cuda::{BLOCK_TOKENS, BlockPool, BlockTable};

/// The rolling key/value cache of one sequence.
///
/// With a sliding window of W it has W slots a layer, position p at slot p mod W, and never grows: after 5 tokens with
/// W = 4 the slots hold positions 4, 1, 2 and 3. Without a window, and for sequences shorter than it, it has a slot for
/// each position. Keys are stored after rotation with their absolute positions, so that nothing is recomputed.
pub struct KvCache {
    slots: Slots,
    len: usize,
}

enum Slots {
    /// On the CPU: one ring a layer.
    Rings(Vec<KvRing>),
    /// On a CUDA device: blocks of the model's pool.
    Blocks(BlockTable),
}

impl KvCache {
    /// An empty cache on the CPU for a sequence that will have `max_len` tokens at most.
    pub fn new(config: &MistralConfig, max_len: usize) -> Self {
        let ring = || KvRing::new(config.heads(), capacity(config, max_len));
        Self { slots: Slots::Rings((0..config.num_hidden_layers).map(|_| ring()).collect()), len: 0 }
    }

    /// The memory of [`KvCache::new`], in bytes.
    pub fn bytes(config: &MistralConfig, max_len: usize) -> usize {
        KvRing::bytes(config.heads(), capacity(config, max_len)) * config.num_hidden_layers
    }

    /// A second cache with the same content.
    ///
    /// # Errors
    /// When the device has no room for it.
    pub fn fork(&self) -> Result<Self> {
        let slots = match &self.slots {
            Slots::Rings(rings) => Slots::Rings(rings.clone()),
            Slots::Blocks(table) => Slots::Blocks(table.fork()?),
        };
        Ok(Self { slots, len: self.len })
    }

    /// Tokens that the sequence has had so far: the position of the next one.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the sequence has not begun.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Slots of each layer.
    pub fn capacity(&self) -> usize {
        match &self.slots {
            Slots::Rings(rings) => rings.first().map_or(0, KvRing::capacity),
            Slots::Blocks(table) => table.capacity(),
        }
    }

    /// Notes that so many tokens were added.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }

    /// The ring of a layer, on the CPU.
    pub(super) fn ring(&mut self, layer: usize) -> candle_core::Result<&mut KvRing> {
        match &mut self.slots {
            Slots::Rings(rings) if layer < rings.len() => Ok(&mut rings[layer]),
            _ => bail!("the cache has no ring of layer {layer} on the CPU"),
        }
    }

    /// The blocks, on a CUDA device.
    pub(super) fn blocks(&self) -> Result<&BlockTable> {
        match &self.slots {
            Slots::Blocks(table) => Ok(table),
            Slots::Rings(_) => Err(Error::Internal("a cache on the CPU was given to a CUDA device".into())),
        }
    }
}

impl MistralModel {
    /// An empty cache on the model's device for a sequence that will have `max_len` tokens at most.
    ///
    /// # Errors
    /// When a CUDA device has no room for it: see [`MistralModel::reserve_caches`].
    pub fn new_cache(&self, max_len: usize) -> Result<KvCache> {
        if !self.device.is_cuda() {
            return Ok(KvCache::new(&self.config, max_len));
        }
        let table = self.kv_blocks()?.table(capacity(&self.config, max_len))?;
        Ok(KvCache { slots: Slots::Blocks(table), len: 0 })
    }

    /// The memory of [`MistralModel::new_cache`], in bytes.
    pub fn cache_bytes(&self, max_len: usize) -> usize {
        if !self.device.is_cuda() {
            return KvCache::bytes(&self.config, max_len);
        }
        let blocks = capacity(&self.config, max_len).div_ceil(BLOCK_TOKENS);
        blocks * BlockPool::block_bytes(self.config.heads(), self.config.num_hidden_layers, self.dtype)
    }

    /// What [`MistralModel::reserve_caches`] has taken.
    pub fn reserved_cache_bytes(&self) -> Option<usize> {
        let held = self.kv_blocks.lock().unwrap_or_else(PoisonError::into_inner);
        held.as_ref().map(|pool| pool.bytes())
    }

    /// Takes up to `bytes` of a CUDA device's memory for caches; on the CPU memory is taken as sequences begin. Returns what
    /// caches may take together.
    ///
    /// # Errors
    /// When the device has no such memory.
    pub fn reserve_caches(&self, bytes: usize) -> Result<usize> {
        if !self.device.is_cuda() {
            return Ok(bytes);
        }
        let mut held = self.kv_blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = held.as_ref().filter(|pool| pool.bytes() <= bytes) {
            return Ok(pool.bytes());
        }
        *held = None; // before the new one takes its place
        let (heads, layers) = (self.config.heads(), self.config.num_hidden_layers);
        let pool = BlockPool::new(heads, layers, self.dtype, bytes, &self.device)?;
        Ok(held.insert(pool.into()).bytes())
    }

    pub(super) fn kv_blocks(&self) -> Result<Arc<BlockPool>> {
        let held = self.kv_blocks.lock().unwrap_or_else(PoisonError::into_inner);
        held.clone().ok_or_else(|| Error::Internal("no device memory was reserved for caches".into()))
    }
}

fn capacity(config: &MistralConfig, max_len: usize) -> usize {
    config.sliding_window.map_or(max_len, |window| window.min(max_len))
}
