//! Steps on a CUDA device: new tokens of cached sequences, prompts among them, or one token each of the same sequences over
//! and over.

use std::sync::Arc;

use candle_core::Tensor;

use super::mistral::Pass;
use super::{KvCache, MistralModel};
use crate::batch::PackedBatch;
use crate::error::{Error, Result};
use crate::kernels::cuda::{self, BlockPool, BlockTable, CacheBatch};
use crate::kernels::{self, VarlenSequences};

impl MistralModel {
    /// As [`MistralModel::forward_cached`] on a CUDA device: hidden states at `last_tokens [B]`.
    ///
    /// Sequences that go on come first, with one token each; prompts, which attend within themselves, follow.
    pub(super) fn forward_blocks(
        &self,
        batch: &PackedBatch,
        past_lens: &[usize],
        caches: &[&mut KvCache],
        last_tokens: &Tensor,
    ) -> Result<Tensor> {
        let decoding = past_lens.iter().take_while(|&&past| past > 0).count();
        let one_each = batch.cu_seq_lens[decoding] as usize == decoding;
        if !one_each || past_lens[decoding..].iter().any(|&past| past > 0) {
            return Err(Error::Internal(format!("sequences of {past_lens:?} tokens go on between prompts")));
        }
        let tables = caches.iter().map(|cache| cache.blocks()).collect::<Result<Vec<_>>>()?;
        let (pool, window) = (self.kv_blocks()?, self.config.sliding_window);
        let cache_batch = CacheBatch::new(&batch.cu_seq_lens, past_lens, &tables, decoding)?;
        let prompts = VarlenSequences::new(&batch.cu_seq_lens[decoding..], window, &self.device)?;
        let heads = self.config.heads();
        let context = kernels::buffer((batch.num_tokens(), heads.query_width()), self.dtype, &self.device)?;
        self.layers_forward(batch, Some(last_tokens), |layer, pass| {
            self.decode_layer(layer, pass, &context, &pool, &cache_batch)?;
            kernels::varlen_attention(&context, &pass.qkv, &prompts, heads, window)?;
            Ok(context.clone())
        })
    }

    /// Rotates a layer's queries and keys, adds its keys and values to the caches, and lets the decoding tokens attend.
    fn decode_layer(
        &self,
        layer: usize,
        pass: &Pass,
        context: &Tensor,
        pool: &BlockPool,
        batch: &CacheBatch,
    ) -> candle_core::Result<()> {
        let angles = &pass.rotary;
        let Some(positions) = &angles.positions else { candle_core::bail!("no positions on a CUDA device") };
        cuda::rotary_cache_write(&pass.qkv, &angles.cos, &angles.sin, positions, pool, layer, batch)?;
        cuda::decode_attention(context, &pass.qkv, positions, pool, layer, batch)
    }
}

/// Sequences on a CUDA device that go on one token a step, in buffers that stay where they are: a step can be recorded.
///
/// A sequence has a lane. Token ids and positions stand on the device: who chooses the next ids writes them to
/// [`DecodeLanes::ids`], and the next step reads them there.
pub struct DecodeLanes {
    pool: Arc<BlockPool>,
    batch: CacheBatch,
    /// `[lanes]`
    ids: Tensor,
    /// `[2, lanes, hidden]`
    stream: Tensor,
    /// `[lanes, H·D]`
    context: Tensor,
    pass: Pass,
    /// Tokens of a sequence at most.
    max_len: usize,
}

impl DecodeLanes {
    /// Buffers for up to `lanes` sequences, none of which will have more than `max_len` tokens.
    ///
    /// # Errors
    /// When the device has no memory for them, or no caches were reserved.
    pub fn new(model: &MistralModel, lanes: usize, max_len: usize) -> Result<Self> {
        let (config, device) = (&model.config, &model.device);
        let pool = model.kv_blocks()?;
        let capacity = config.sliding_window.map_or(max_len, |window| window.min(max_len));
        let none = vec![0; lanes];
        let angles = model.rotary.angles_at(cuda::upload(&none, device)?, max_len)?;
        Ok(Self {
            batch: CacheBatch::lanes(&pool, lanes, capacity)?,
            ids: cuda::upload(&none, device)?,
            stream: kernels::buffer((2, lanes, config.hidden_size), model.dtype, device)?,
            context: kernels::buffer((lanes, config.heads().query_width()), model.dtype, device)?,
            pass: model.pass(lanes, angles)?,
            max_len,
            pool,
        })
    }

    /// How many lanes there are.
    pub fn len(&self) -> usize {
        self.ids.elem_count()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives each of `caches` a lane, in order, that goes on with the token of `ids`; lanes beyond them are idle.
    ///
    /// # Errors
    /// When there are more than lanes, or a copy fails.
    pub fn set(&self, ids: &[u32], caches: &[&KvCache]) -> Result<()> {
        let tables = caches.iter().map(|cache| cache.blocks()).collect::<Result<Vec<&BlockTable>>>()?;
        let past_lens: Vec<usize> = caches.iter().map(|cache| cache.len()).collect();
        self.batch.set_lanes(&tables, &past_lens)?;
        cuda::upload_to(ids, &self.ids)?;
        let mut positions: Vec<u32> = past_lens.iter().map(|&past| past as u32).collect();
        positions.resize(self.len(), 0); // idle lanes stay at the beginning of the tables
        Ok(cuda::upload_to(&positions, self.positions()?)?)
    }

    /// From the next step on a lane is idle: its cache may go to another sequence.
    ///
    /// # Errors
    /// When a copy fails.
    pub fn close(&self, lane: usize) -> Result<()> {
        Ok(self.batch.close_lane(lane)?)
    }

    /// The token that each lane goes on with, `[lanes]`.
    pub fn ids(&self) -> &Tensor {
        &self.ids
    }

    /// Whether they serve sequences of up to `max_len` tokens of a model with this pool of caches.
    ///
    /// # Errors
    /// When the model has none.
    pub fn fit(&self, model: &MistralModel, max_len: usize) -> Result<bool> {
        Ok(max_len <= self.max_len && Arc::ptr_eq(&self.pool, &model.kv_blocks()?))
    }

    /// Computes the tokens at [`DecodeLanes::ids`] and moves on by one position: hidden states `[lanes, hidden]`, in a buffer
    /// that the next step overwrites.
    ///
    /// # Errors
    /// When a kernel cannot be launched.
    pub fn step(&self, model: &MistralModel) -> candle_core::Result<Tensor> {
        cuda::gather_rows_into(&model.embed_tokens, &self.ids, &self.stream.get(0)?)?;
        let hidden_states = model.run_layers(self.stream.clone(), &self.pass, None, |layer, pass| {
            model.decode_layer(layer, pass, &self.context, &self.pool, &self.batch)?;
            Ok(self.context.clone())
        })?;
        cuda::advance_positions(self.positions()?, self.batch.sequence_ends())?;
        Ok(hidden_states)
    }

    fn positions(&self) -> candle_core::Result<&Tensor> {
        match &self.pass.rotary.positions {
            Some(positions) => Ok(positions),
            None => candle_core::bail!("no positions on a CUDA device"),
        }
    }
}
