//! The oracle: the same model over padded rectangles with a mask, in the plainest operations.
//!
//! Tests run it, and static batching, which is there to be compared with. It shares weights, and the products with them, with [`MistralModel`] and nothing else: no packing, no fused
//! kernel, no tile.

use candle_core::{Result, Tensor};

use super::{MistralConfig, MistralModel};
use crate::batch::LeftPaddedBatch;
use crate::kernels::reference as plain;

/// Keys and values of a left-padded batch's columns so far, `[B, K, T, D]` both, of every layer.
#[derive(Debug, Default)]
pub struct PaddedCache {
    layers: Vec<(Tensor, Tensor)>,
}

impl PaddedCache {
    /// The memory of a cache of `rows` by `width` columns, in bytes.
    pub fn bytes(config: &MistralConfig, rows: usize, width: usize) -> usize {
        let column = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * size_of::<f32>();
        rows.saturating_mul(width).saturating_mul(column)
    }

    /// Adds the columns of `k` and `v` to layer `index`; all columns of the layer.
    fn extend(&mut self, index: usize, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        match self.layers.get_mut(index) {
            Some(layer) => *layer = (Tensor::cat(&[&layer.0, &k], 2)?, Tensor::cat(&[&layer.1, &v], 2)?),
            None => self.layers.push((k, v)),
        }
        Ok(self.layers[index].clone())
    }
}

/// Hidden states after the final norm, `[B, T, hidden]`; what stands at padding is not meaningful.
///
/// # Errors
/// When a tensor operation fails.
pub fn padded_forward(model: &MistralModel, batch: &LeftPaddedBatch) -> Result<Tensor> {
    padded_step(model, batch, batch.seq_lens(), &mut PaddedCache::default())
}

/// As [`padded_forward`] of the last columns of a rectangle, `[B, N, hidden]`, whose others are in `cache`.
///
/// `batch` holds the N new columns; rows have `seq_lens` `[B]` real tokens with them.
///
/// # Errors
/// When a tensor operation fails.
pub fn padded_step(
    model: &MistralModel,
    batch: &LeftPaddedBatch,
    seq_lens: &[usize],
    cache: &mut PaddedCache,
) -> Result<Tensor> {
    let config = model.config();
    let (b, n) = (batch.num_rows(), batch.width());
    let past = cache.layers.first().map_or(Ok(0), |(k, _)| k.dim(2))?;
    let t = past + n;
    let (h, k, d) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
    let input_ids = Tensor::from_slice(batch.input_ids(), b * n, model.device())?;
    // Positions count from each row's first real token; padding stands at 0.
    let position_ids: Vec<u32> =
        seq_lens.iter().flat_map(|&len| (past..t).map(move |column| (column + len).saturating_sub(t) as u32)).collect();
    let (cos, sin) = model.rotary.gather(&position_ids)?;
    let mask = plain::left_padded_causal_mask(seq_lens, past, t, config.sliding_window, model.device())?;

    let mut hidden_states = model.embed(&input_ids)?; // [B·N, hidden]
    for (index, layer) in model.layers.iter().enumerate() {
        let normed = plain::rms_norm(&hidden_states, &layer.input_layernorm, config.rms_norm_eps)?;
        let qkv = plain::rotary_embedding(&layer.qkv_proj.forward(&normed)?, &cos, &sin, config.heads())?;
        let part = |first: usize, heads: usize| {
            qkv.narrow(1, first * d, heads * d)?.reshape((b, n, heads, d))?.transpose(1, 2)?.contiguous()
        };
        let (keys, values) = cache.extend(index, part(h, k)?, part(h + k, k)?)?;
        let context = plain::padded_attention(&part(0, h)?, &keys, &values, &mask)?; // [B, H, N, D]
        let context = context.transpose(1, 2)?.reshape((b * n, h * d))?;
        let residual = (hidden_states + layer.o_proj.forward(&context)?)?;

        let normed = plain::rms_norm(&residual, &layer.post_attention_layernorm, config.rms_norm_eps)?;
        let activated = plain::swiglu(&layer.gate_up_proj.products(&normed)?)?;
        hidden_states = (residual + layer.down_proj.forward(&activated)?)?;
    }
    plain::rms_norm(&hidden_states, &model.norm, config.rms_norm_eps)?.reshape((b, n, config.hidden_size))
}
