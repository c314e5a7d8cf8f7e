//! Attention over fresh sequences by candle-flash-attn (Dao, "FlashAttention-2", arXiv:2307.08691), in builds with the feature
//! `flash-attn`, for what it takes; our own kernel does the rest, and all of it in other builds.

use candle_core::{DType, Device, Result, Tensor};

use super::runtime::upload;
use crate::kernels::HeadLayout;

/// Head widths that its kernels have.
const MAX_HEAD_DIM: usize = 512;

/// Consecutive sequences, as its kernels want to know them.
#[derive(Debug)]
pub(super) struct Sequences {
    /// `[B + 1]`
    cu_seq_lens: Tensor,
    begin: usize,
    end: usize,
    longest: usize,
}

impl Sequences {
    /// Sequence b is tokens `cu_seq_lens[b]..cu_seq_lens[b + 1]`.
    pub(super) fn new(cu_seq_lens: &[u32], device: &Device) -> Result<Self> {
        let bound = |offset: Option<&u32>| offset.map_or(0, |&offset| offset as usize);
        Ok(Self {
            begin: bound(cu_seq_lens.first()),
            end: bound(cu_seq_lens.last()),
            longest: cu_seq_lens.windows(2).map(|bounds| bounds[1] - bounds[0]).max().unwrap_or(0) as usize,
            cu_seq_lens: upload(cu_seq_lens, device)?,
        })
    }
}

/// Whether its kernels compute in this dtype with heads of this width.
pub(super) fn takes(dtype: DType, heads: HeadLayout) -> bool {
    matches!(dtype, DType::BF16 | DType::F16) && heads.head_dim.is_multiple_of(8) && heads.head_dim <= MAX_HEAD_DIM
}

/// As [`super::varlen_attention`], for what it [`takes`].
pub(super) fn attend(
    context: &Tensor,
    qkv: &Tensor,
    sequences: &Sequences,
    heads: HeadLayout,
    window: Option<usize>,
) -> Result<()> {
    let HeadLayout { num_heads, num_kv_heads, head_dim } = heads;
    let by_head = qkv.reshape((qkv.dim(0)?, num_heads + 2 * num_kv_heads, head_dim))?;
    let attended = candle_flash_attn::flash_attn_varlen_windowed(
        &by_head.narrow(1, 0, num_heads)?,
        &by_head.narrow(1, num_heads, num_kv_heads)?,
        &by_head.narrow(1, num_heads + num_kv_heads, num_kv_heads)?,
        &sequences.cu_seq_lens,
        &sequences.cu_seq_lens,
        sequences.longest,
        sequences.longest,
        1.0 / (head_dim as f32).sqrt(),
        // Keys before the query's own; where all are seen the causal kernels are the faster ones.
        window.map(|window| window - 1).filter(|&before| before < sequences.longest),
        Some(0),
    )?; // [N, H, D], of which only the sequences' tokens are written
    let (begin, count) = (sequences.begin, sequences.end - sequences.begin);
    let attended = attended.narrow(0, begin, count)?.reshape((count, num_heads * head_dim))?;
    context.slice_set(&attended, 0, begin)
}
