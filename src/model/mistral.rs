//! The whole model, top to bottom: embeddings, decoder layers, final norm.
//!
//! Jiang et al., "Mistral 7B" (arXiv:2310.06825); numerically transformers' `MistralModel`
//! (`models/mistral/modeling_mistral.py`, 5.23). Rows come without padding: N tokens of all sequences end to end.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};

use super::profile::{Phase, Profile};
use super::rotary::RotaryTable;
use super::{Checkpoint, KvCache, MistralConfig};
use crate::batch::PackedBatch;
use crate::error::{Error, Result};
use crate::kernels::cuda::{self, BlockPool};
use crate::kernels::{self, GateUp, GateUpScratch, Linear, RotaryAngles, VarlenSequences};

/// One part in so many of a CUDA device's memory is not planned with.
const KEPT_BACK: usize = 16;

/// A loaded MistralModel: token ids in, hidden states out.
#[derive(Debug)]
pub struct MistralModel {
    pub(super) config: MistralConfig,
    pub(super) device: Device,
    /// Of activations; f32 on the CPU.
    pub(super) dtype: DType,
    /// `[vocab_size, hidden]`; on the CPU in half precision where that holds every value.
    pub(super) embed_tokens: Tensor,
    pub(super) layers: Vec<DecoderLayer>,
    /// `[hidden]`, in f32 as all norms.
    pub(super) norm: Tensor,
    pub(super) rotary: RotaryTable,
    pub(super) profile: Profile,
    /// Where sequences on a CUDA device keep their keys and values, once there is such a place.
    pub(super) kv_blocks: Mutex<Option<Arc<BlockPool>>>,
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
    /// Reads the base model's weights for products in [`Checkpoint::compute_dtype`]; on the CPU, for f32, matrices stay in half
    /// precision where that holds every value.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when a tensor is missing, misshapen or not finite, [`crate::Error::Usage`] when the device
    /// does not compute in the dtype that was asked for.
    pub fn load(checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        let config = checkpoint.config.clone();
        let hidden = config.hidden_size;
        let embed_tokens = checkpoint.base_name("embed_tokens.weight");
        let embed_tokens = checkpoint.hidden_matrix(&embed_tokens, &[config.vocab_size, hidden], device)?;
        Ok(Self {
            dtype: checkpoint.hidden_dtype(device)?,
            embed_tokens: if device.is_cuda() { embed_tokens } else { kernels::narrowed(embed_tokens)? },
            layers: (0..config.num_hidden_layers)
                .map(|index| DecoderLayer::load(checkpoint, index, device))
                .collect::<Result<_>>()?,
            norm: checkpoint.base_tensor("norm.weight", &[hidden], device)?,
            rotary: RotaryTable::new(config.head_dim, config.rope_theta, device),
            profile: if device.is_cuda() { Profile::none() } else { Profile::default() },
            kv_blocks: Mutex::default(),
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

    /// The dtype of activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Memory for what a pass over `tokens` tokens computes, in bytes.
    pub fn activation_bytes(&self, tokens: usize) -> usize {
        let config = &self.config;
        let heads = config.heads();
        // The stream with its scratch, twice where the last layer computes few tokens only.
        let widths = 4 * config.hidden_size + heads.qkv_width() + heads.query_width() + 4 * config.intermediate_size;
        tokens.saturating_mul(widths * self.dtype.size_in_bytes())
    }

    /// Bytes of a CUDA device's memory that may be planned with: what the driver reports as free, less a part that fragments
    /// and libraries take. `None` on the CPU.
    ///
    /// # Errors
    /// When the driver does not tell.
    pub fn free_bytes(&self) -> Result<Option<usize>> {
        if !self.device.is_cuda() {
            return Ok(None);
        }
        let (free, total) = cuda::memory_bytes(&self.device)?;
        Ok(Some(free.saturating_sub(total / KEPT_BACK)))
    }

    /// Tokens of each of `batches` batches that a CUDA device has memory for at a time; any number on the CPU.
    ///
    /// # Errors
    /// As [`MistralModel::free_bytes`].
    pub fn batch_tokens_that_fit(&self, batches: usize) -> Result<usize> {
        Ok(self.free_bytes()?.map_or(usize::MAX, |free| (free / self.activation_bytes(batches)).max(1)))
    }

    /// Where this model's time has gone.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Hidden states of every token after the final norm, `[N, hidden]`, in the model's dtype.
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
        self.run(batch, Some(&kernels::indices(positions, &self.device)?))
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
        let last_tokens = kernels::indices(&last_tokens, &self.device)?;
        let hidden_states = match &self.device {
            Device::Cuda(_) => self.forward_blocks(batch, &past_lens, caches, &last_tokens)?,
            _ => self.layers_forward(batch, Some(&last_tokens), |index, pass| {
                let mut rings =
                    caches.iter_mut().map(|cache| cache.ring(index)).collect::<candle_core::Result<Vec<_>>>()?;
                let (heads, window) = (self.config.heads(), self.config.sliding_window);
                self.profile.time(Phase::Attention, || {
                    kernels::cached_attention(&pass.qkv, &batch.cu_seq_lens, &past_lens, &mut rings, heads, window)
                })
            })?,
        };
        for (b, cache) in caches.iter_mut().enumerate() {
            cache.advance(batch.range(b).len());
        }
        Ok(hidden_states)
    }

    /// The embeddings of `input_ids [N]` on the CPU, `[N, hidden]`.
    pub(super) fn embed(&self, input_ids: &Tensor) -> candle_core::Result<Tensor> {
        self.embed_tokens.index_select(input_ids, 0)?.to_dtype(DType::F32)
    }

    fn run(&self, batch: &PackedBatch, positions: Option<&Tensor>) -> Result<Tensor> {
        let (heads, window) = (self.config.heads(), self.config.sliding_window);
        let context = kernels::buffer((batch.num_tokens(), heads.query_width()), self.dtype, &self.device)?;
        let sequences = VarlenSequences::new(&batch.cu_seq_lens, window, &self.device)?;
        self.layers_forward(batch, positions, |_, pass| {
            // On the CPU the row blocks have done so.
            if self.device.is_cuda() {
                kernels::rotary_embedding(&pass.qkv, &pass.rotary, heads)?;
            }
            self.profile.time(Phase::Attention, || {
                kernels::varlen_attention(&context, &pass.qkv, &sequences, heads, window)?;
                Ok(context.clone())
            })
        })
    }

    /// All layers and the final norm; `attend` makes `[N, H·D]` of a layer's index and the pass, whose queries and keys it has to
    /// rotate first on a CUDA device.
    pub(super) fn layers_forward(
        &self,
        batch: &PackedBatch,
        positions: Option<&Tensor>,
        attend: impl FnMut(usize, &Pass) -> candle_core::Result<Tensor> + Send,
    ) -> Result<Tensor> {
        let run = || {
            let input_ids = kernels::indices(&batch.input_ids, &self.device)?;
            let pass = self.pass(batch.num_tokens(), self.rotary.angles(&batch.position_ids)?)?;
            let stream =
                self.profile.time(Phase::Embedding, || kernels::begin_stream(&self.embed_tokens, &input_ids))?;
            match &self.device {
                Device::Cuda(_) => self.run_layers(stream, &pass, positions, attend),
                _ => self.run_row_blocks(stream, &pass, positions, attend),
            }
        };
        Ok(match &self.device {
            Device::Cuda(_) => run()?,
            // On a thread of the pool: a caller from outside would hand over and wait at each of the many short steps.
            _ => rayon::scope(|_| run())?,
        })
    }

    /// What all layers share in passes over `tokens` tokens.
    pub(super) fn pass(&self, tokens: usize, rotary: RotaryAngles) -> candle_core::Result<Pass> {
        let (config, device) = (&self.config, &self.device);
        Ok(Pass {
            rotary,
            qkv: kernels::buffer((tokens, config.heads().qkv_width()), self.dtype, device)?,
            gate_up: match device {
                Device::Cuda(_) => Some(GateUpScratch::new(tokens, config.intermediate_size, self.dtype, device)?),
                _ => None,
            },
        })
    }

    /// All layers and the final norm over `stream [2, N, hidden]`, whose first half holds embeddings, on a CUDA device:
    /// `[N, hidden]`, or the rows at `positions`. On the CPU it is [`MistralModel::run_row_blocks`].
    pub(super) fn run_layers(
        &self,
        mut stream: Tensor,
        pass: &Pass,
        positions: Option<&Tensor>,
        mut attend: impl FnMut(usize, &Pass) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        let first_norm = self.layers.first().map_or(&self.norm, |first| &first.input_layernorm);
        kernels::rms_norm(&stream, first_norm, self.config.rms_norm_eps)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let next = self.layers.get(index + 1);
            let wanted = positions.filter(|_| next.is_none());
            let next_norm = next.map_or(&self.norm, |next| &next.input_layernorm);
            let eps = self.config.rms_norm_eps;
            stream = layer.forward(stream, pass, wanted, (next_norm, eps), |pass| attend(index, pass))?;
        }
        stream.get(1)
    }
}

/// What all layers of one pass over N tokens share: each fills the same buffers anew.
pub(super) struct Pass {
    /// cos and sin of each token.
    pub(super) rotary: RotaryAngles,
    /// `[N, (H + 2K)·D]`
    pub(super) qkv: Tensor,
    /// On a CUDA device.
    gate_up: Option<GateUpScratch>,
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

    /// `stream [2, N, hidden]`, hidden states and their norm, through the layer and `next_norm` on a CUDA device; or only the
    /// tokens `wanted` by what follows.
    fn forward(
        &self,
        mut stream: Tensor,
        pass: &Pass,
        wanted: Option<&Tensor>,
        (next_norm, eps): (&Tensor, f64),
        attend: impl FnOnce(&Pass) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        let Some(gate_up) = &pass.gate_up else { candle_core::bail!("a pass on the CPU goes by row blocks") };
        self.qkv_proj.forward_into(&stream.get(1)?, &pass.qkv)?;
        let mut context = attend(pass)?; // [N, H·D]

        // Attention was the last step that mixes tokens: from here on each is computed alone.
        if let Some(positions) = wanted {
            context = kernels::select_rows(&context, positions)?;
            stream = kernels::begin_stream(&stream.get(0)?, positions)?;
        }
        let block = stream.get(1)?;
        self.o_proj.forward_into(&context, &block)?;
        kernels::add_rms_norm(&stream, &self.post_attention_layernorm, eps)?;
        let gated = self.gate_up_proj.forward(&block, gate_up)?;
        self.down_proj.forward_into(&gated, &block)?;
        kernels::add_rms_norm(&stream, next_norm, eps)?;
        Ok(stream)
    }
}
