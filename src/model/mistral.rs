//! The whole model, top to bottom: embeddings, decoder layers, final norm.
//!
//! Jiang et al., "Mistral 7B" (arXiv:2310.06825); numerically transformers' `MistralModel`
//! (`models/mistral/modeling_mistral.py`, 5.23). Rows come without padding: N tokens of all sequences end to end.

use candle_core::{Device, Tensor};

use super::rotary::RotaryTable;
use super::{Checkpoint, MistralConfig};
use crate::batch::PackedBatch;
use crate::error::Result;
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
    pub(super) qkv_proj: Tensor,
    /// `[hidden, H·D]`
    pub(super) o_proj: Tensor,
    /// `[hidden]`
    pub(super) post_attention_layernorm: Tensor,
    /// Gate and up projections stacked: `[2·intermediate, hidden]`.
    pub(super) gate_up_proj: Tensor,
    /// `[hidden, intermediate]`
    pub(super) down_proj: Tensor,
}

impl MistralModel {
    /// Reads the base model's weights, converted to f32.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when a tensor is missing, misshapen or not finite.
    pub fn load(checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        let config = checkpoint.config.clone();
        let hidden = config.hidden_size;
        Ok(Self {
            embed_tokens: checkpoint.base_tensor("embed_tokens.weight", &[config.vocab_size, hidden], device)?,
            layers: (0..config.num_hidden_layers)
                .map(|index| DecoderLayer::load(checkpoint, index, device))
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

    fn run(&self, batch: &PackedBatch, positions: Option<&Tensor>) -> Result<Tensor> {
        let input_ids = Tensor::from_slice(&batch.input_ids, batch.num_tokens(), &self.device)?;
        let rotary = self.rotary.gather(&batch.position_ids)?;

        let mut hidden_states = self.embed_tokens.index_select(&input_ids, 0)?; // [N, hidden]
        for (index, layer) in self.layers.iter().enumerate() {
            let wanted = positions.filter(|_| index + 1 == self.layers.len());
            hidden_states = layer.forward(&hidden_states, batch, &rotary, wanted, &self.config)?;
        }
        Ok(kernels::rms_norm(&hidden_states, &self.norm, self.config.rms_norm_eps)?)
    }
}

impl DecoderLayer {
    fn load(checkpoint: &Checkpoint, index: usize, device: &Device) -> Result<Self> {
        let config = &checkpoint.config;
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let query = config.num_attention_heads * config.head_dim;
        let key_value = config.num_key_value_heads * config.head_dim;
        let name = |part: &str| format!("layers.{index}.{part}.weight");
        let tensor = |part: &str, shape: &[usize]| checkpoint.base_tensor(&name(part), shape, device);
        let stacked = |parts: &[(&str, usize)]| {
            let parts: Vec<_> = parts.iter().map(|(part, rows)| (checkpoint.base_name(&name(part)), *rows)).collect();
            checkpoint.weights.stacked(&parts, hidden, device)
        };
        Ok(Self {
            input_layernorm: tensor("input_layernorm", &[hidden])?,
            qkv_proj: stacked(&[
                ("self_attn.q_proj", query),
                ("self_attn.k_proj", key_value),
                ("self_attn.v_proj", key_value),
            ])?,
            o_proj: tensor("self_attn.o_proj", &[hidden, query])?,
            post_attention_layernorm: tensor("post_attention_layernorm", &[hidden])?,
            gate_up_proj: stacked(&[("mlp.gate_proj", intermediate), ("mlp.up_proj", intermediate)])?,
            down_proj: tensor("mlp.down_proj", &[hidden, intermediate])?,
        })
    }

    /// `[N, hidden]` → `[N, hidden]`, or only the tokens `wanted` by what follows.
    fn forward(
        &self,
        hidden_states: &Tensor,
        batch: &PackedBatch,
        (cos, sin): &(Tensor, Tensor),
        wanted: Option<&Tensor>,
        config: &MistralConfig,
    ) -> candle_core::Result<Tensor> {
        let heads = config.heads();

        let normed = kernels::rms_norm(hidden_states, &self.input_layernorm, config.rms_norm_eps)?;
        let qkv = linear(&normed, &self.qkv_proj)?; // [N, (H + 2K)·D]
        let qkv = kernels::rotary_embedding(&qkv, cos, sin, heads)?;
        let context = kernels::varlen_attention(&qkv, &batch.cu_seq_lens, heads, config.sliding_window)?; // [N, H·D]

        // Attention was the last step that mixes tokens: from here on each is computed alone.
        let (context, residual) = match wanted {
            Some(positions) => (context.index_select(positions, 0)?, hidden_states.index_select(positions, 0)?),
            None => (context, hidden_states.clone()),
        };
        let attended = linear(&context, &self.o_proj)?;
        let (hidden_states, normed) =
            kernels::add_rms_norm(&attended, &residual, &self.post_attention_layernorm, config.rms_norm_eps)?;

        let gate_up = linear(&normed, &self.gate_up_proj)?; // [N, 2·intermediate]
        let activated = kernels::swiglu(&gate_up)?; // [N, intermediate]
        hidden_states + linear(&activated, &self.down_proj)?
    }
}

/// x `[N, in]` times the transposed weight `[out, in]`: `[N, out]`.
pub(crate) fn linear(x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    x.matmul(&weight.t()?)
}
