//! What a sequence's tokens so far leave behind for those to come: rotated keys, and values, of every layer.

use super::MistralConfig;
use crate::kernels::KvRing;

/// The rolling key/value cache of one sequence.
///
/// With a sliding window of W it has W slots a layer, position p at slot p mod W, and never grows: after 5 tokens with
/// W = 4 the slots hold positions 4, 1, 2 and 3. Without a window, and for sequences shorter than it, it has a slot for
/// each position. Keys are stored after rotation with their absolute positions, so that nothing is recomputed.
#[derive(Debug, Clone)]
pub struct KvCache {
    /// One ring a layer.
    pub(super) layers: Vec<KvRing>,
    len: usize,
}

impl KvCache {
    /// An empty cache for a sequence that will have `max_len` tokens at most.
    pub fn new(config: &MistralConfig, max_len: usize) -> Self {
        let ring = || KvRing::new(config.heads(), capacity(config, max_len));
        Self { layers: (0..config.num_hidden_layers).map(|_| ring()).collect(), len: 0 }
    }

    /// The memory of [`KvCache::new`], in bytes.
    pub fn bytes(config: &MistralConfig, max_len: usize) -> usize {
        KvRing::bytes(config.heads(), capacity(config, max_len)) * config.num_hidden_layers
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
        self.layers.first().map_or(0, KvRing::capacity)
    }

    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

fn capacity(config: &MistralConfig, max_len: usize) -> usize {
    config.sliding_window.map_or(max_len, |window| window.min(max_len))
}
