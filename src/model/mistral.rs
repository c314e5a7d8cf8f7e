//! The whole model, top to bottom: embeddings, decoder layers, final norm.
//!
//! Jiang et al., "Mistral 7B" (arXiv:2310.06825); numerically transformers' `MistralModel`
//! (`models/mistral/modeling_mistral.py`, 5.23). Rows come without padding: N tokens of all sequences end to end.

use candle_core::{DType, Device, Tensor};

use super::linear::{GateUp, Linear};
use super::profile::{Phase, Profile};
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
    /// `[vocab_size, hidden]`, in half precision where that holds every value.
    embed_tokens: Tensor,
    pub(super) layers: Vec<DecoderLayer>,
    /// `[hidden]`
    pub(super) norm: Tensor,
    pub(super) rotary: RotaryTable,
    profile: Profile,
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
    pub(super) gate_up_proj: GateUp,
    /// `[hidden, intermediate]`
    pub(super) down_proj: Linear,
}

impl MistralModel {
    /// Reads the base model's weights for products in [`Checkpoint::compute_dtype`]; for f32, matrices stay in half precision
    /// where that holds every value.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when a tensor is missing, misshapen or not finite, [`crate::Error::Usage`] when the device
    /// does not compute in the dtype that was asked for.
    pub fn load(checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        let config = checkpoint.config.clone();
        let hidden = config.hidden_size;
        Ok(Self {
            embed_tokens: kernels::narrowed(checkpoint.base_tensor(
                "embed_tokens.weight",
                &[config.vocab_size, hidden],
                device,
            )?)?,
            layers: (0..config.num_hidden_layers)
                .map(|index| DecoderLayer::load(checkpoint, index, device))
                .collect::<Result<_>>()?,
            norm: checkpoint.base_tensor("norm.weight", &[hidden], device)?,
            rotary: RotaryTable::new(config.head_dim, config.rope_theta, device),
            profile: Profile::default(),
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

    /// Where this model's time has gone.
    pub fn profile(&self) -> &Profile {
        &self.profile
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

    /// The embeddings of `input_ids [N]`, `[N, hidden]`.
    pub(super) fn embed(&self, input_ids: &Tensor) -> candle_core::Result<Tensor> {
        self.embed_tokens.index_select(input_ids, 0)?.to_dtype(DType::F32)
    }

    fn run(&self, batch: &PackedBatch, positions: Option<&Tensor>) -> Result<Tensor> {
        let (heads, window) = (self.config.heads(), self.config.sliding_window);
        let context = Tensor::zeros((batch.num_tokens(), heads.query_width()), DType::F32, &self.device)?;
        self.layers_forward(batch, positions, |_, qkv| {
            kernels::varlen_attention(&context, qkv, &batch.cu_seq_lens, heads, window)?;
            Ok(context.clone())
        })
    }

    /// All layers and the final norm; `attend` turns a layer's index and rotated `[N, (H + 2K)·D]` into `[N, H·D]`.
    fn layers_forward(
        &self,
        batch: &PackedBatch,
        positions: Option<&Tensor>,
        attend: impl FnMut(usize, &Tensor) -> candle_core::Result<Tensor> + Send,
    ) -> Result<Tensor> {
        // On a thread of the pool: a caller from outside would hand over and wait at each of the many short steps.
        Ok(rayon::scope(|_| self.run_layers(batch, positions, attend))?)
    }

    fn run_layers(
        &self,
        batch: &PackedBatch,
        positions: Option<&Tensor>,
        mut attend: impl FnMut(usize, &Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        let (config, device, tokens) = (&self.config, &self.device, batch.num_tokens());
        let pass = Pass {
            config,
            profile: &self.profile,
            rotary: self.rotary.gather(&batch.position_ids)?,
            qkv: Tensor::zeros((tokens, config.heads().qkv_width()), DType::F32, device)?,
            gated: Tensor::zeros((tokens, config.intermediate_size), DType::F32, device)?,
        };
        let mut stream = self.profile.time(Phase::Embedding, || {
            let input_ids = Tensor::from_slice(&batch.input_ids, tokens, device)?;
            let hidden_states = self.embed(&input_ids)?;
            Tensor::stack(&[&hidden_states, &hidden_states], 0) // [2, N, hidden]
        })?;
        if let Some(first) = self.layers.first() {
            pass.norm(|eps| kernels::rms_norm(&stream, &first.input_layernorm, eps))?;
        } else {
            pass.norm(|eps| kernels::rms_norm(&stream, &self.norm, eps))?;
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let next = self.layers.get(index + 1);
            let wanted = positions.filter(|_| next.is_none());
            let next_norm = next.map_or(&self.norm, |next| &next.input_layernorm);
            stream = layer.forward(stream, &pass, wanted, next_norm, |qkv| attend(index, qkv))?;
        }
        stream.get(1)
    }
}

/// What all layers of one pass over N tokens share: each fills the same buffers anew.
struct Pass<'a> {
    config: &'a MistralConfig,
    profile: &'a Profile,
    /// cos and sin of each token, `[N, D/2]` both.
    rotary: (Tensor, Tensor),
    /// `[N, (H + 2K)·D]`
    qkv: Tensor,
    /// `[N, intermediate]`
    gated: Tensor,
}

impl Pass<'_> {
    fn norm(&self, norm: impl FnOnce(f64) -> candle_core::Result<()>) -> candle_core::Result<()> {
        self.profile.time(Phase::Norm, || norm(self.config.rms_norm_eps))
    }
}

impl DecoderLayer {
    fn load(checkpoint: &Checkpoint, index: usize, device: &Device) -> Result<Self> {
        let config = &checkpoint.config;
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let query = config.num_attention_heads * config.head_dim;
        let key_value = config.num_key_value_heads * config.head_dim;
        let name = |part: &str| format!("layers.{index}.{part}.weight");
        let dtype = checkpoint.compute_dtype(device)?;
        let tensor = |part: &str, shape: &[usize]| checkpoint.base_tensor(&name(part), shape, device);
        let matrix = |part: &str, shape: &[usize]| -> Result<Linear> {
            Ok(Linear::new(&checkpoint.base_matrix(&name(part), shape, device)?)?)
        };
        let stacked = |parts: &[(&str, usize)]| {
            let parts: Vec<_> = parts.iter().map(|(part, rows)| (checkpoint.base_name(&name(part)), *rows)).collect();
            checkpoint.weights.stacked(&parts, hidden, dtype, device)
        };
        Ok(Self {
            input_layernorm: tensor("input_layernorm", &[hidden])?,
            qkv_proj: Linear::new(&stacked(&[
                ("self_attn.q_proj", query),
                ("self_attn.k_proj", key_value),
                ("self_attn.v_proj", key_value),
            ])?)?,
            o_proj: matrix("self_attn.o_proj", &[hidden, query])?,
            post_attention_layernorm: tensor("post_attention_layernorm", &[hidden])?,
            gate_up_proj: GateUp::new(&stacked(&[("mlp.gate_proj", intermediate), ("mlp.up_proj", intermediate)])?)?,
            down_proj: matrix("mlp.down_proj", &[hidden, intermediate])?,
        })
    }

    /// `stream [2, N, hidden]`, hidden states and their norm, through the layer and `next_norm`; or only the tokens `wanted`
    /// by what follows.
    fn forward(
        &self,
        mut stream: Tensor,
        pass: &Pass,
        wanted: Option<&Tensor>,
        next_norm: &Tensor,
        attend: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        let Pass { config, profile, rotary: (cos, sin), qkv, .. } = pass;
        profile.time(Phase::QkvProjection, || self.qkv_proj.forward_into(&stream.get(1)?, qkv))?;
        profile.time(Phase::Rotary, || kernels::rotary_embedding(qkv, cos, sin, config.heads()))?;
        let mut context = profile.time(Phase::Attention, || attend(qkv))?; // [N, H·D]

        // Attention was the last step that mixes tokens: from here on each is computed alone.
        let mut gated = pass.gated.clone();
        if let Some(positions) = wanted {
            context = context.index_select(positions, 0)?;
            let hidden_states = stream.get(0)?.index_select(positions, 0)?;
            stream = Tensor::stack(&[&hidden_states, &hidden_states], 0)?;
            gated = Tensor::zeros((positions.dim(0)?, config.intermediate_size), DType::F32, stream.device())?;
        }
        let block = stream.get(1)?;
        profile.time(Phase::OutputProjection, || self.o_proj.forward_into(&context, &block))?;
        pass.norm(|eps| kernels::add_rms_norm(&stream, &self.post_attention_layernorm, eps))?;
        profile.time(Phase::GateUpProjection, || self.gate_up_proj.forward_into(&block, &gated))?;
        profile.time(Phase::DownProjection, || self.down_proj.forward_into(&gated, &block))?;
        pass.norm(|eps| kernels::add_rms_norm(&stream, next_norm, eps))?;
        Ok(stream)
    }
}
