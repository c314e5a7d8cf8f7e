//! The oracle: the same model over padded rectangles with a mask, in the plainest operations.
//!
//! Nothing runs this but tests. It shares weights with [`MistralModel`] and nothing else: no packing, no fused
//! kernel, no tile.

use candle_core::{Result, Tensor};

use super::MistralModel;
use crate::batch::LeftPaddedBatch;
use crate::kernels::reference as plain;

/// Hidden states after the final norm, `[B, T, hidden]`; what stands at padding is not meaningful.
///
/// # Errors
/// When a tensor operation fails.
pub fn padded_forward(model: &MistralModel, batch: &LeftPaddedBatch) -> Result<Tensor> {
    let config = model.config();
    let (b, t) = (batch.num_rows(), batch.width());
    let (h, k, d) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
    let input_ids = Tensor::from_slice(batch.input_ids(), b * t, model.device())?;
    // Positions count from each row's first real token; padding stands at 0.
    let position_ids: Vec<u32> = batch
        .seq_lens()
        .iter()
        .flat_map(|&len| (0..t).map(move |column| (column + len).saturating_sub(t) as u32))
        .collect();
    let (cos, sin) = model.rotary.gather(&position_ids)?;
    let mask = plain::left_padded_causal_mask(batch.seq_lens(), t, config.sliding_window, model.device())?;

    let mut hidden_states = model.embed_tokens.index_select(&input_ids, 0)?; // [B·T, hidden]
    for layer in &model.layers {
        let normed = plain::rms_norm(&hidden_states, &layer.input_layernorm, config.rms_norm_eps)?;
        let qkv = plain::rotary_embedding(&layer.qkv_proj.forward(&normed)?, &cos, &sin, config.heads())?;
        let part = |first: usize, heads: usize| {
            qkv.narrow(1, first * d, heads * d)?.reshape((b, t, heads, d))?.transpose(1, 2)?.contiguous()
        };
        let context = plain::padded_attention(&part(0, h)?, &part(h, k)?, &part(h + k, k)?, &mask)?; // [B, H, T, D]
        let context = context.transpose(1, 2)?.reshape((b * t, h * d))?;
        let residual = (hidden_states + layer.o_proj.forward(&context)?)?;

        let normed = plain::rms_norm(&residual, &layer.post_attention_layernorm, config.rms_norm_eps)?;
        let activated = plain::swiglu(&layer.gate_up_proj.forward(&normed)?)?;
        hidden_states = (residual + layer.down_proj.forward(&activated)?)?;
    }
    plain::rms_norm(&hidden_states, &model.norm, config.rms_norm_eps)?.reshape((b, t, config.hidden_size))
}
