//! The oracle: the same arithmetic in the plainest tensor operations, padded and masked.
//!
//! Nothing here is fast, and no run uses it but static batching, the comparison. Tests compare every kernel, and the whole model, with it.

use candle_core::{D, Device, Result, Tensor};
use candle_nn::ops::{sigmoid, softmax_last_dim};

use super::HeadLayout;

/// Attention over left-padded rows: `q [B, H, N, D]`, `k` and `v [B, K, T, D]`, additive `mask [B, 1, N, T]`,
/// to `[B, H, N, D]`; scores are scaled by `1/√D`.
pub fn padded_attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let (_, num_heads, _, head_dim) = q.dims4()?;
    let group_size = num_heads / k.dim(1)?;
    let k = repeat_heads(k, group_size)?;
    let v = repeat_heads(v, group_size)?;
    let scores = (q.contiguous()?.matmul(&k.t()?)? / (head_dim as f64).sqrt())?;
    softmax_last_dim(&scores.broadcast_add(mask)?)?.matmul(&v)
}

/// Key or value heads `x [B, K, T, D]` to `[B, K·group_size, T, D]`: each for all query heads of its group, which follow each other.
fn repeat_heads(x: &Tensor, group_size: usize) -> Result<Tensor> {
    let (batch, heads, tokens, head_dim) = x.dims4()?;
    let repeated = x.unsqueeze(2)?.expand((batch, heads, group_size, tokens, head_dim))?;
    repeated.reshape((batch, heads * group_size, tokens, head_dim))
}

/// The additive mask `[B, 1, T − past, T]` of left-padded rows, queries from column `past` on: 0 where query `i` sees key
/// `j`, −∞ elsewhere.
///
/// Row `b` is real in columns `T - seq_lens[b]..T`. There query `i` sees key `j` iff `0 <= i - j < window`, so a window
/// of 1 is the token itself. A padded query sees itself only, so that its softmax is defined; its output means nothing.
/// With `seq_lens = [2]`, `t = 3` and no window the rows of the mask are `[0 -∞ -∞]`, `[-∞ 0 -∞]`, `[-∞ 0 0]`.
pub fn left_padded_causal_mask(
    seq_lens: &[usize],
    past: usize,
    t: usize,
    window: Option<usize>,
    device: &Device,
) -> Result<Tensor> {
    let new = t - past;
    let mut mask = vec![f32::NEG_INFINITY; seq_lens.len() * new * t];
    for (b, &seq_len) in seq_lens.iter().enumerate() {
        let first_real = t - seq_len;
        for i in past..t {
            for j in 0..=i {
                let visible = j >= first_real && window.is_none_or(|window| i - j < window);
                if visible || i == j {
                    mask[(b * new + i - past) * t + j] = 0.0;
                }
            }
        }
    }
    Tensor::from_vec(mask, (seq_lens.len(), 1, new, t), device)
}

/// Root-mean-square norm of `x [N, D]` with `weight [D]`, to `[N, D]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean_square + eps)?.sqrt()?)?.broadcast_mul(weight)
}

/// Rotates the query and key heads of `qkv [N, (H + 2K)·D]` by `cos` and `sin [N, D/2]`, to `[N, (H + 2K)·D]`.
pub fn rotary_embedding(qkv: &Tensor, cos: &Tensor, sin: &Tensor, heads: HeadLayout) -> Result<Tensor> {
    let (tokens, _) = qkv.dims2()?;
    let half = heads.head_dim / 2;
    let rotated = heads.num_heads + heads.num_kv_heads;
    let values = qkv.narrow(1, rotated * heads.head_dim, heads.kv_width())?;
    let x = qkv.narrow(1, 0, rotated * heads.head_dim)?.reshape((tokens, rotated, heads.head_dim))?;
    let (x1, x2) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    let first = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
    let second = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
    let x = Tensor::cat(&[first, second], 2)?.reshape((tokens, rotated * heads.head_dim))?;
    Tensor::cat(&[x, values], 1)
}

/// `silu(gate) · up` of `gate_up [N, 2·I]`, gate first, to `[N, I]`.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let width = gate_up.dim(1)? / 2;
    let (gate, up) = (gate_up.narrow(1, 0, width)?, gate_up.narrow(1, width, width)?);
    (&gate * sigmoid(&gate)?)? * up
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mask_of_the_documented_example() -> Result<()> {
        const N: f32 = f32::NEG_INFINITY;
        let mask = left_padded_causal_mask(&[2], 0, 3, None, &Device::Cpu)?.squeeze(0)?.squeeze(0)?;
        assert_eq!(mask.to_vec2::<f32>()?, [[0., N, N], [N, 0., N], [N, 0., 0.]]);
        Ok(())
    }

    #[test]
    fn a_window_counts_the_token_itself() -> Result<()> {
        for window in 1..=5 {
            let mask = left_padded_causal_mask(&[5], 0, 5, Some(window), &Device::Cpu)?;
            let last = mask.squeeze(0)?.squeeze(0)?.get(4)?.to_vec1::<f32>()?;
            assert_eq!(last.iter().filter(|&&m| m == 0.0).count(), window);
        }
        Ok(())
    }
}
