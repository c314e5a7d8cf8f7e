//! The kernels' callers: shapes are checked here, the arithmetic is in the `.cu` files.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::runtime::{Runtime, buffer, buffer_of, grid, launch, suffix, uninitialized, upload};
use crate::kernels::HeadLayout;

/// Threads of a block of the kernels that take a row each, and of those that run over values.
const ROW_THREADS: u32 = 128;
const VALUE_THREADS: u32 = 256;
const LOGIT_THREADS: u32 = 512;
/// Values that a block of an elementwise kernel takes.
const VALUES_PER_BLOCK: usize = 2048;
/// Queries of a tile of attention.
const TILE_QUERIES: usize = 64;
/// Keys of a step of the attention without tensor cores.
const PLAIN_TILE_KEYS: usize = 16;
/// The window of a kernel that has none.
const NO_WINDOW: u32 = u32::MAX;

/// Rows `rows [N]` (u32) of `source [V, width]`, to `output [N, width]`.
pub fn gather_rows_into(source: &Tensor, rows: &Tensor, output: &Tensor) -> Result<()> {
    let ((_, width), count) = (source.dims2()?, rows.dim(0)?);
    if output.dims2()? != (count, width) {
        bail!("gather rows: {count} rows of {width} do not fit {:?}", output.dims());
    }
    if count == 0 {
        return Ok(());
    }
    let dtype = source.dtype();
    let runtime = Runtime::of(source.device())?;
    launch!(
        runtime,
        &format!("gather_rows_{}", suffix(dtype)?),
        grid(count, 1, 1, ROW_THREADS, 0),
        buffer(source)?.pointer,
        buffer_of(rows, DType::U32)?,
        buffer_of(output, dtype)?,
        width as u32,
    )
}

/// As [`gather_rows_into`], to a new tensor.
pub fn gather_rows(source: &Tensor, rows: &Tensor) -> Result<Tensor> {
    let output = uninitialized((rows.dim(0)?, source.dim(1)?), source.dtype(), source.device())?;
    gather_rows_into(source, rows, &output)?;
    Ok(output)
}

/// The same values in f32.
pub fn to_f32(x: &Tensor) -> Result<Tensor> {
    if x.dtype() == DType::F32 {
        return Ok(x.clone());
    }
    let output = uninitialized(x.shape(), DType::F32, x.device())?;
    let source = buffer(x)?;
    if source.len > 0 {
        let runtime = Runtime::of(x.device())?;
        launch!(
            runtime,
            &format!("to_f32_{}", suffix(source.dtype)?),
            grid(source.len.div_ceil(VALUES_PER_BLOCK), 1, 1, VALUE_THREADS, 0),
            source.pointer,
            buffer_of(&output, DType::F32)?,
            source.len as u64,
        )?;
    }
    Ok(output)
}

/// As [`crate::kernels::rms_norm`].
pub fn rms_norm(stream: &Tensor, weight: &Tensor, eps: f64) -> Result<()> {
    norm("rms_norm", stream, weight, eps)
}

/// As [`crate::kernels::add_rms_norm`].
pub fn add_rms_norm(stream: &Tensor, weight: &Tensor, eps: f64) -> Result<()> {
    norm("add_rms_norm", stream, weight, eps)
}

fn norm(kernel: &str, stream: &Tensor, weight: &Tensor, eps: f64) -> Result<()> {
    let (tokens, width) = match (stream.dims(), weight.dims()) {
        (&[2, tokens, width], &[weights]) if width == weights && width > 0 => (tokens, width),
        (stream, weight) => bail!("rms norm: expected [2, N, D] and [D], got {stream:?} and {weight:?}"),
    };
    if tokens == 0 {
        return Ok(());
    }
    let runtime = Runtime::of(stream.device())?;
    let x = buffer(stream)?;
    launch!(
        runtime,
        &format!("{kernel}_{}", suffix(x.dtype)?),
        grid(tokens, 1, 1, VALUE_THREADS, 0),
        x.pointer,
        x.pointer + (tokens * width * x.dtype.size_in_bytes()) as u64,
        buffer_of(weight, DType::F32)?,
        eps as f32,
        width as u32,
    )
}

/// Rotates query and key heads of `qkv [N, (H + 2K)·D]` in place; `cos` and `sin [P, D/2]` are tables by position, and
/// `positions [N]` has each token's.
pub fn rotary_embedding(qkv: &Tensor, cos: &Tensor, sin: &Tensor, positions: &Tensor, heads: HeadLayout) -> Result<()> {
    let tokens = check_rotation(qkv, cos, sin, positions, heads)?;
    if tokens == 0 {
        return Ok(());
    }
    let runtime = Runtime::of(qkv.device())?;
    let qkv = buffer(qkv)?;
    launch!(
        runtime,
        &format!("rotary_{}", suffix(qkv.dtype)?),
        grid(tokens, 1, 1, ROW_THREADS, 0),
        qkv.pointer,
        buffer_of(positions, DType::U32)?,
        buffer_of(cos, DType::F32)?,
        buffer_of(sin, DType::F32)?,
        heads.num_heads as u32,
        heads.num_kv_heads as u32,
        heads.head_dim as u32,
    )
}

/// Checks the operands of a rotation, and returns `N`.
pub(super) fn check_rotation(
    qkv: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    positions: &Tensor,
    heads: HeadLayout,
) -> Result<usize> {
    let tokens = heads.check_qkv(qkv.dims())?;
    let half = heads.head_dim / 2;
    let tables = cos.dim(1)? == half && cos.dims() == sin.dims();
    if !heads.head_dim.is_multiple_of(2) || !tables || positions.dims() != [tokens] {
        let shapes = (cos.dims(), sin.dims(), positions.dims());
        bail!("rotary embedding: {tokens} tokens with heads of {}, but {shapes:?}", heads.head_dim);
    }
    Ok(tokens)
}

/// `silu(gate) · up` of `gate_up [N, 2·I]`, gate first, to `gated [N, I]`.
pub fn silu_mul(gate_up: &Tensor, gated: &Tensor) -> Result<()> {
    let (tokens, width) = gated.dims2()?;
    if gate_up.dims2()? != (tokens, 2 * width) {
        bail!("silu·mul: {:?} does not give {:?}", gate_up.dims(), gated.dims());
    }
    if tokens == 0 {
        return Ok(());
    }
    let runtime = Runtime::of(gated.device())?;
    let source = buffer(gate_up)?;
    launch!(
        runtime,
        &format!("silu_mul_{}", suffix(source.dtype)?),
        grid(tokens, width.div_ceil(VALUES_PER_BLOCK), 1, VALUE_THREADS, 0),
        source.pointer,
        buffer_of(gated, source.dtype)?,
        width as u32,
    )
}

/// The work list of attention within fresh sequences: a tile is 64 consecutive queries of one of them.
#[derive(Debug)]
pub struct AttentionTiles {
    /// `[tiles, 4]`: a tile's sequence from its first token to one past its last, and the tile's first query.
    tiles: Tensor,
    count: usize,
    tokens: usize,
    #[cfg(feature = "flash-attn")]
    sequences: super::flash_attn::Sequences,
}

impl AttentionTiles {
    /// Tiles for the sequences that the neighbours in `cu_seq_lens [B + 1]` bound, those with most keys first: with a long
    /// tile last, the whole device would wait for it.
    pub fn new(cu_seq_lens: &[u32], window: Option<usize>, device: &Device) -> Result<Self> {
        if !cu_seq_lens.is_sorted() {
            bail!("attention: cu_seq_lens have to rise, got {cu_seq_lens:?}");
        }
        let mut tiles: Vec<[u32; 4]> = Vec::new();
        for bounds in cu_seq_lens.windows(2) {
            tiles.extend((bounds[0]..bounds[1]).step_by(TILE_QUERIES).map(|first| [bounds[0], bounds[1], first, 0]));
        }
        let reach = window.unwrap_or(usize::MAX);
        let keys = |[begin, end, first, _]: &[u32; 4]| {
            let last = (*end).min(first + TILE_QUERIES as u32) as usize;
            (last - *begin as usize).min(reach.saturating_add(TILE_QUERIES))
        };
        tiles.sort_by_key(|tile| std::cmp::Reverse(keys(tile)));
        let count = tiles.len();
        let tiles = upload(tiles.as_flattened(), device)?;
        Ok(Self {
            tiles,
            count,
            tokens: cu_seq_lens.last().map_or(0, |&end| end as usize),
            #[cfg(feature = "flash-attn")]
            sequences: super::flash_attn::Sequences::new(cu_seq_lens, device)?,
        })
    }

    /// Whether there is no work.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// As [`crate::kernels::varlen_attention`] of the sequences that `tiles` lists; other tokens of `context` stay as they are.
pub fn varlen_attention(
    context: &Tensor,
    qkv: &Tensor,
    tiles: &AttentionTiles,
    heads: HeadLayout,
    window: Option<usize>,
) -> Result<()> {
    let tokens = heads.check_qkv(qkv.dims())?;
    if context.dims2()? != (tokens, heads.query_width()) || tiles.tokens > tokens {
        bail!("attention: {tokens} tokens, tiles of {}, to {:?}", tiles.tokens, context.dims());
    }
    if window == Some(0) {
        bail!("attention: a window of 0 sees nothing");
    }
    if tiles.is_empty() {
        return Ok(());
    }
    #[cfg(feature = "flash-attn")]
    if super::flash_attn::takes(qkv.dtype(), heads) {
        return super::flash_attn::attend(context, qkv, &tiles.sequences, heads, window);
    }
    let runtime = Runtime::of(qkv.device())?;
    let source = buffer(qkv)?;
    let name = suffix(source.dtype)?;
    let (name, shared_bytes) = match heads.head_dim {
        64 if source.dtype != DType::F32 => (format!("flash_attention_d64_{name}"), 40 << 10),
        128 if source.dtype != DType::F32 => (format!("flash_attention_d128_{name}"), 80 << 10),
        head_dim => (format!("varlen_attention_{name}"), plain_shared_bytes(head_dim)),
    };
    launch!(
        runtime,
        &name,
        grid(tiles.count, heads.num_heads, 1, ROW_THREADS, shared_bytes),
        source.pointer,
        buffer_of(context, source.dtype)?,
        buffer_of(&tiles.tiles, DType::U32)?,
        heads.num_heads as u32,
        heads.num_kv_heads as u32,
        heads.head_dim as u32,
        window.map_or(NO_WINDOW, |window| window.min(NO_WINDOW as usize - 1) as u32),
        1.0 / (heads.head_dim as f32).sqrt(),
    )
}

/// Shared memory of `varlen_attention`: tiles of 64 queries and 16 keys, and sums.
fn plain_shared_bytes(head_dim: usize) -> u32 {
    (size_of::<f32>() * ((TILE_QUERIES + PLAIN_TILE_KEYS) * head_dim + 32)) as u32
}

/// The first of each row's largest logits `[B, V]` (f32), to `tokens [B]` (u32), and its log-probability, to `logprobs [B]`
/// (f32); a row with a logit that is not finite gives `u32::MAX`.
pub fn argmax_logprob(logits: &Tensor, tokens: &Tensor, logprobs: &Tensor) -> Result<()> {
    let (rows, vocab_size) = logits.dims2()?;
    if tokens.dims() != [rows] || logprobs.dims() != [rows] {
        bail!("argmax: {:?} to {:?} and {:?}", logits.dims(), tokens.dims(), logprobs.dims());
    }
    if rows == 0 {
        return Ok(());
    }
    let runtime = Runtime::of(logits.device())?;
    launch!(
        runtime,
        "argmax_logprob",
        grid(rows, 1, 1, LOGIT_THREADS, 0),
        buffer_of(logits, DType::F32)?,
        buffer_of(tokens, DType::U32)?,
        buffer_of(logprobs, DType::F32)?,
        vocab_size as u32,
    )
}

/// The log-probability of `targets [B]` in the softmax of each row of `logits [B, V]` (f32), `[B]` (f32).
pub fn target_logprobs(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (rows, vocab_size) = logits.dims2()?;
    let logprobs = uninitialized(rows, DType::F32, logits.device())?;
    if targets.dims() != [rows] {
        bail!("log-probabilities: {:?} and {:?}", logits.dims(), targets.dims());
    }
    if rows > 0 {
        let runtime = Runtime::of(logits.device())?;
        launch!(
            runtime,
            "target_logprobs",
            grid(rows, 1, 1, LOGIT_THREADS, 0),
            buffer_of(logits, DType::F32)?,
            buffer_of(targets, DType::U32)?,
            buffer_of(&logprobs, DType::F32)?,
            vocab_size as u32,
        )?;
    }
    Ok(logprobs)
}

/// Adds one to each of `positions [B]` and `sequence_ends [B]`.
pub fn advance_positions(positions: &Tensor, sequence_ends: &Tensor) -> Result<()> {
    let rows = positions.dim(0)?;
    if sequence_ends.dims() != [rows] {
        bail!("advance: {:?} and {:?}", positions.dims(), sequence_ends.dims());
    }
    let runtime = Runtime::of(positions.device())?;
    launch!(
        runtime,
        "advance_positions",
        grid(rows.div_ceil(VALUE_THREADS as usize), 1, 1, VALUE_THREADS, 0),
        buffer_of(positions, DType::U32)?,
        buffer_of(sequence_ends, DType::U32)?,
        rows as u32,
    )
}

/// The mean of each sequence's rows of `x [N, width]`, in f32: `[B, width]`; sequences as in `cu_seq_lens [B + 1]`.
pub fn mean_pool(x: &Tensor, cu_seq_lens: &[u32]) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let rows = cu_seq_lens.len().saturating_sub(1);
    if !cu_seq_lens.is_sorted() || cu_seq_lens.last().is_none_or(|&end| end as usize != tokens) {
        bail!("mean: cu_seq_lens have to rise to the {tokens} tokens, got {cu_seq_lens:?}");
    }
    let output = uninitialized((rows, width), DType::F32, x.device())?;
    let offsets = upload(cu_seq_lens, x.device())?;
    if rows > 0 {
        let runtime = Runtime::of(x.device())?;
        let source = buffer(x)?;
        launch!(
            runtime,
            &format!("mean_pool_{}", suffix(source.dtype)?),
            grid(rows, width.div_ceil(VALUE_THREADS as usize), 1, VALUE_THREADS, 0),
            source.pointer,
            buffer_of(&offsets, DType::U32)?,
            buffer_of(&output, DType::F32)?,
            width as u32,
        )?;
    }
    Ok(output)
}
