//! The whole model, top to bottom: embeddings, decoder layers, final norm.
//!
//! Jiang et al., "Mistral 7B" (arXiv:2310.06825); numerically transformers' `MistralModel`
//! (`models/mistral/modeling_mistral.py`, 5.23). Rows come without padding: N tokens of all sequences end to end.

use candle_core::{Device, Tensor};

use super::linear::{Linear, WeightLayout};
use super::rotary::RotaryTable;
use super::{Checkpoint, KvCache, MistralConfig};
use crate::batch::PackedBatch;
use crate::error::{Error, Result};
use crate::kernels;

/// A loaded MistralModel: token ids in, hidden states out.
#[derive(Debug)]
pub struct MistralModel {
    pub(super) config: MistralConfig,
    pub(super) device: Device,
    /// `[vocab_size, hidden]`
    pub(super) embed_tokens: Tensor,
    pub(super) layers: Vec<DecoderLayer>,
    /// `[hidden]`
    pub(super) norm: Tensor,
    pub(super) rotary: RotaryTable,
}

/// One of the model's equal layers. Matrices are `[out, in]`; H query heads, K key/value heads of width D.
#[derive(Debug)]
pub(super) struct DecoderLayer {
    /// `[hidden]`
    pub(super) input_layernorm: Tensor,
    /// Query, key and value projections stacked: `[(H + 2K)·D, hidden]`.
    pub(super) qkv_proj: Linear,
    /// `[hidden, H·D]`
    pub(super) o_proj: Linear,
    /// `[hidden]`
    pub(super) post_attention_layernorm: Tensor,
    /// Gate and up projections stacked: `[2·intermediate, hidden]`.
    pub(super) gate_up_proj: Linear,
    /// `[hidden, intermediate]`
    pub(super) down_proj: Linear,
}

impl MistralModel {
    /// Reads the base model's weights, converted to f32.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when a tensor is missing, misshapen or not finite.
    pub fn load(checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        Self::load_with_layout(checkpoint, device, WeightLayout::Plain)
    }

    /// As [`MistralModel::load`], with the matrices kept in `layout`; generation wants [`WeightLayout::Packed`].
    ///
    /// # Errors
    /// As [`MistralModel::load`].
    pub fn load_with_layout(checkpoint: &Checkpoint, device: &Device, layout: WeightLayout) -> Result<Self> {
        let config = checkpoint.config.clone();
        let hidden = config.hidden_size;
        Ok(Self {
            embed_tokens: checkpoint.base_tensor("embed_tokens.weight", &[config.vocab_size, hidden], device)?,
            layers: (0..config.num_hidden_layers)
                .map(|index| DecoderLayer::load(checkpoint, index, device, layout))
                .collect::<Result<_>>()?,
            norm: checkpoint.base_tensor("norm.weight", &[hidden], device)?,
            rotary: RotaryTable::new(config.head_dim, config.rope_theta, device),
            device: device.clone(),
            config,
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &MistralConfig {
        &self.config
    }

    /// The device that the weights are on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The embedding matrix, `[vocab_size, hidden]`: the output layer, too, where a checkpoint ties the two.
    pub fn embed_tokens(&self) -> &Tensor {
        &self.embed_tokens
    }

    /// Hidden states of every token after the final norm, `[N, hidden]`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward(&self, batch: &PackedBatch) -> Result<Tensor> {
        self.run(batch, None)
    }

    /// Hidden states after the final norm of the tokens at `positions` (indices into the N tokens), `[positions, hidden]`.
    ///
    /// The last layer then computes only what these tokens need, which a head that pools one token a row saves.
    ///
    /// # Errors
    /// When a tensor operation fails or a position is not among the N tokens.
    pub fn forward_at(&self, batch: &PackedBatch, positions: &[u32]) -> Result<Tensor> {
        self.run(batch, Some(&Tensor::from_slice(positions, positions.len(), &self.device)?))
    }

    /// Hidden states after the final norm of the last token of each sequence, `[B, hidden]`.
    ///
    /// The batch holds new tokens only: a whole prompt where the sequence's cache is empty, later one token a step, in any
    /// mixture. `position_ids` go on where `caches` `[B]` end: a first step of `5 6 7` at positions `0 1 2` may be
    /// followed by `8` at position `3`. The new keys and values are added to the caches, which are of no use after an
    /// error.
    ///
    /// # Errors
    /// When the batch does not go on where a cache ends, a cache is too small, or a tensor operation fails.
    pub fn forward_cached(&self, batch: &PackedBatch, caches: &mut [&mut KvCache]) -> Result<Tensor> {
        let past_lens: Vec<usize> = caches.iter().map(|cache| cache.len()).collect();
        if batch.num_sequences() != caches.len() {
            return Err(Error::Internal(format!("{} sequences, {} caches", batch.num_sequences(), caches.len())));
        }
        for (b, &past) in past_lens.iter().enumerate() {
            let positions = &batch.position_ids[batch.range(b)];
            if positions.is_empty() || positions.iter().zip(past..).any(|(&position, next)| position as usize != next) {
                return Err(Error::Internal(format!("sequence {b} of {past} tokens goes on with {positions:?}")));
            }
        }
        let last_tokens: Vec<u32> = batch.cu_seq_lens[1..].iter().map(|end| end - 1).collect();
        let last_tokens = Tensor::from_vec(last_tokens, caches.len(), &self.device)?;
        let hidden_states = self.layers_forward(batch, Some(&last_tokens), |index, qkv| {
            let mut rings: Vec<_> = caches.iter_mut().map(|cache| &mut cache.layers[index]).collect();
            let (heads, window) = (self.config.heads(), self.config.sliding_window);
            kernels::cached_attention(qkv, &batch.cu_seq_lens, &past_lens, &mut rings, heads, window)
        })?;
        for (b, cache) in caches.iter_mut().enumerate() {
            cache.advance(batch.range(b).len());
        }
        Ok(hidden_states)
    }

    fn run(&self, batch: &PackedBatch, positions: Option<&Tensor>) -> Result<Tensor> {
        self.layers_forward(batch, positions, |_, qkv| {
            kernels::varlen_attention(qkv, &batch.cu_seq_lens, self.config.heads(), self.config.sliding_window)
        })
    }

    /// All layers and the final norm; `attend` turns a layer's index and rotated `[N, (H + 2K)·D]` into `[N, H·D]`.
    fn layers_forward(
        &self,
        batch: &PackedBatch,
        positions: Option<&Tensor>,
        mut attend: impl FnMut(usize, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        let input_ids = Tensor::from_slice(&batch.input_ids, batch.num_tokens(), &self.device)?;
        let rotary = self.rotary.gather(&batch.position_ids)?;

        let mut hidden_states = self.embed_tokens.index_select(&input_ids, 0)?; // [N, hidden]
        for (index, layer) in self.layers.iter().enumerate() {
            let wanted = positions.filter(|_| index + 1 == self.layers.len());
            hidden_states = layer.forward(&hidden_states, &rotary, wanted, &self.config, |qkv| attend(index, qkv))?;
        }
        Ok(kernels::rms_norm(&hidden_states, &self.norm, self.config.rms_norm_eps)?)
    }
}

impl DecoderLayer {
    fn load(checkpoint: &Checkpoint, index: usize, device: &Device, layout: WeightLayout) -> Result<Self> {
        let config = &checkpoint.config;
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let query = config.num_attention_heads * config.head_dim;
        let key_value = config.num_key_value_heads * config.head_dim;
        let name = |part: &str| format!("layers.{index}.{part}.weight");
        let tensor = |part: &str, shape: &[usize]| checkpoint.base_tensor(&name(part), shape, device);
        let matrix = |part: &str, shape: &[usize]| -> Result<Linear> { Ok(Linear::new(tensor(part, shape)?, layout)?) };
        let stacked = |parts: &[(&str, usize)]| -> Result<Linear> {
            let parts: Vec<_> = parts.iter().map(|(part, rows)| (checkpoint.base_name(&name(part)), *rows)).collect();
            Ok(Linear::new(checkpoint.weights.stacked(&parts, hidden, device)?, layout)?)
        };
        Ok(Self {
            input_layernorm: tensor("input_layernorm", &[hidden])?,
            qkv_proj: stacked(&[
                ("self_attn.q_proj", query),
                ("self_attn.k_proj", key_value),
                ("self_attn.v_proj", key_value),
            ])?,
            o_proj: matrix("self_attn.o_proj", &[hidden, query])?,
            post_attention_layernorm: tensor("post_attention_layernorm", &[hidden])?,
            gate_up_proj: stacked(&[("mlp.gate_proj", intermediate), ("mlp.up_proj", intermediate)])?,
            down_proj: matrix("mlp.down_proj", &[hidden, intermediate])?,
        })
    }

    /// `[N, hidden]` → `[N, hidden]`, or only the tokens `wanted` by what follows.
    fn forward(
        &self,
        hidden_states: &Tensor,
        (cos, sin): &(Tensor, Tensor),
        wanted: Option<&Tensor>,
        config: &MistralConfig,
        attend: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        let normed = kernels::rms_norm(hidden_states, &self.input_layernorm, config.rms_norm_eps)?;
        let qkv = self.qkv_proj.forward(&normed)?; // [N, (H + 2K)·D]
        let qkv = kernels::rotary_embedding(&qkv, cos, sin, config.heads())?;
        let context = attend(&qkv)?; // [N, H·D]

        // Attention was the last step that mixes tokens: from here on each is computed alone.
        let (context, residual) = match wanted {
            Some(positions) => (context.index_select(positions, 0)?, hidden_states.index_select(positions, 0)?),
            None => (context, hidden_states.clone()),
        };
        let attended = self.o_proj.forward(&context)?;
        let (hidden_states, normed) =
            kernels::add_rms_norm(&attended, &residual, &self.post_attention_layernorm, config.rms_norm_eps)?;

        let gate_up = self.gate_up_proj.forward(&normed)?; // [N, 2·intermediate]
        let activated = kernels::swiglu(&gate_up)?; // [N, intermediate]
        hidden_states + self.down_proj.forward(&activated)?
    }
}
