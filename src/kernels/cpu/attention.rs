//! Causal grouped-query attention over packed sequences, with an online softmax.
//!
//! One task computes the query heads of one key head for one tile of tokens. Its rows are (token, query head) pairs,
//! token by token, so that a block of keys is read once for the whole group. For every block of visible keys, and
//! every six rows: scores = Q·Kᵀ, their softmax relative to the largest score so far, output = output·correction + P·V.
//! Products work on register tiles of six rows; all that a task touches stays in the core's caches.
//!
//! A row's arithmetic is fixed by its own sequence: tiles and blocks are counted from the sequence's first token, so
//! neither the rest of the batch nor the number of threads can change a bit of it.

use std::cell::RefCell;
use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::output::SharedOutput;
use super::simd::{Kernel, Level, Simd, dispatch_at, exp};
use super::{contiguous, contiguous_mut};
use crate::kernels::HeadLayout;

/// Rows of a register tile.
pub(super) const TILE_ROWS: usize = 6;
/// Keys of a block: its keys and values of 64 columns are 32 KiB.
pub(super) const BLOCK: usize = 64;
/// Columns are computed in steps of the widest vector, on every CPU.
pub(super) const STEP: usize = 16;
/// Rows that a task should have: the packing of a key block is paid back over them.
const TASK_ROWS: usize = 256;
/// The largest score of a row that has seen no key: finite, so that the difference of two of them is no NaN.
pub(super) const NO_SCORE: f32 = f32::MIN / 2.0;

/// Causal grouped-query attention of `qkv [N, (H + 2K)·D]`, already rotated, to `context [N, H·D]`; scores are scaled by
/// `1/√D`.
///
/// `cu_seq_lens` is `[B + 1]`, cumulative, from 0 to `N`. Query `i` sees key `j` of its own sequence iff
/// `0 <= i - j < window`: a window of 1 is the token itself, `None` is all that came before.
pub fn varlen_attention(
    context: &Tensor,
    qkv: &Tensor,
    cu_seq_lens: &[u32],
    heads: HeadLayout,
    window: Option<usize>,
) -> Result<()> {
    let cu_seq_lens = cu_seq_lens.iter().map(|&offset| offset as usize).collect();
    context.inplace_op2(qkv, &VarlenAttention { cu_seq_lens, heads, window, level: Level::best() })
}

struct VarlenAttention {
    cu_seq_lens: Vec<usize>,
    heads: HeadLayout,
    window: Option<usize>,
    level: Level,
}

impl InplaceOp2 for VarlenAttention {
    fn name(&self) -> &'static str {
        "varlen-attention"
    }

    fn cpu_fwd(
        &self,
        context: &mut CpuStorage,
        context_layout: &Layout,
        qkv: &CpuStorage,
        layout: &Layout,
    ) -> Result<()> {
        let tokens = self.heads.check_qkv(layout.dims())?;
        if context_layout.dims() != [tokens, self.heads.query_width()] {
            let expected = [tokens, self.heads.query_width()];
            bail!("attention: expected a context of {expected:?}, got {:?}", context_layout.dims());
        }
        let offsets = &self.cu_seq_lens;
        if offsets.first() != Some(&0) || offsets.last() != Some(&tokens) || !offsets.is_sorted() {
            bail!("attention: cu_seq_lens have to rise from 0 to the {tokens} tokens, got {offsets:?}");
        }
        if self.window == Some(0) {
            bail!("attention: a window of 0 leaves a token nothing to see");
        }
        let qkv = contiguous(qkv, layout, "attention")?;
        let context = contiguous_mut(context, context_layout, "attention's context")?;
        let sequences: Vec<_> = offsets.windows(2).map(|bounds| bounds[0]..bounds[1]).collect();
        attend(self.level, qkv, &sequences, self.heads, self.window, SharedOutput::new(context));
        Ok(())
    }
}

/// Attention within each of `sequences`, disjoint ranges of the tokens of `qkv [N, (H + 2K)·D]`; fills their rows of
/// `output [N, H·D]`.
pub(super) fn attend(
    level: Level,
    qkv: &[f32],
    sequences: &[Range<usize>],
    heads: HeadLayout,
    window: Option<usize>,
    output: SharedOutput,
) {
    let (window, tile_tokens) = (window.unwrap_or(usize::MAX), tile_tokens(heads));
    // The (sequence, key head, first query token of the tile) of every task; the three name disjoint output.
    let mut tasks = Vec::new();
    for sequence in sequences {
        for first_query in (0..sequence.len()).step_by(tile_tokens) {
            tasks.extend((0..heads.num_kv_heads).map(|kv_head| (sequence, kv_head, first_query)));
        }
    }
    tasks.into_par_iter().for_each(|(sequence, kv_head, first_query)| {
        let begin = sequence.start;
        let queries = first_query..(first_query + tile_tokens).min(sequence.len());
        SCRATCH.with_borrow_mut(|scratch| {
            dispatch_at(level, Task { qkv, heads, window, begin, kv_head, queries, output, scratch });
        });
    });
}

/// Tokens of a query tile: enough rows to pay for packing the keys, in a number that leaves register tiles full.
fn tile_tokens(heads: HeadLayout) -> usize {
    (TASK_ROWS / heads.group_size() / TILE_ROWS * TILE_ROWS).clamp(TILE_ROWS, 96)
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// One thread's buffers, which grow to the largest task and stay.
#[derive(Default)]
struct Scratch {
    values: Vec<f32>,
}

/// A task's parts of the scratch. `D'` is `D` rounded up to whole steps; `R` is the rows, in whole register tiles.
struct Buffers<'a> {
    /// Scaled queries `[R, D]`.
    q: &'a mut [f32],
    /// One block's keys, transposed: `[D, BLOCK]`.
    keys: &'a mut [f32],
    /// One block's values `[BLOCK, D']`.
    values: &'a mut [f32],
    /// Scores, then weights, of one register tile `[TILE_ROWS, BLOCK]`.
    scores: &'a mut [f32],
    /// Unnormalised output `[R, D']`.
    output: &'a mut [f32],
    /// Each row's sum of weights, in as many parts as a step has columns: `[R, STEP]`.
    sums: &'a mut [f32],
    /// Each row's largest score `[R]`.
    largest: &'a mut [f32],
}

impl Scratch {
    fn buffers(&mut self, rows: usize, head_dim: usize, padded_dim: usize) -> Buffers<'_> {
        /// A cache line of f32: unaligned, every vector load would touch two.
        const LINE: usize = 16;
        let sizes = [
            rows * head_dim,
            head_dim * BLOCK,
            BLOCK * padded_dim,
            TILE_ROWS * BLOCK,
            rows * padded_dim,
            rows * STEP,
            rows,
        ];
        let total = sizes.iter().map(|size| size.next_multiple_of(LINE)).sum::<usize>() + LINE;
        if self.values.len() < total {
            self.values.resize(total, 0.0);
        }
        let aligned = self.values.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        let mut rest = &mut self.values[aligned..];
        let [q, keys, values, scores, output, sums, largest] = sizes.map(|size| {
            let (buffer, tail) = std::mem::take(&mut rest).split_at_mut(size.next_multiple_of(LINE));
            rest = tail;
            &mut buffer[..size]
        });
        Buffers { q, keys, values, scores, output, sums, largest }
    }
}

/// The query tokens `queries` (counted from `begin`, the sequence's first token) of one key head's group.
struct Task<'a> {
    qkv: &'a [f32],
    heads: HeadLayout,
    window: usize,
    begin: usize,
    kv_head: usize,
    queries: Range<usize>,
    output: SharedOutput,
    scratch: &'a mut Scratch,
}

impl Kernel for Task<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Task { heads, window, ref queries, .. } = self;
        let (group, head_dim) = (heads.group_size(), heads.head_dim);
        let padded_dim = head_dim.next_multiple_of(STEP);
        let rows = (queries.len() * group).next_multiple_of(TILE_ROWS);
        let width = heads.qkv_width();
        // From the first token of the sequence on.
        let qkv = &self.qkv[self.begin * width..];
        let first_k = heads.query_width() + self.kv_head * head_dim;
        let first_v = first_k + heads.kv_width();
        let first_q = self.kv_head * group * head_dim;

        let buffers = self.scratch.buffers(rows, head_dim, padded_dim);
        let Buffers { q, keys, values, scores, output, sums, largest } = buffers;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let group_width = group * head_dim;
        let (packed, rest) = q.split_at_mut(queries.len() * group_width);
        rest.fill(0.0);
        for (token, packed) in queries.clone().zip(packed.chunks_exact_mut(group_width)) {
            let query = &qkv[token * width + first_q..][..group_width];
            for (packed, query) in packed.iter_mut().zip(query) {
                *packed = query * scale;
            }
        }
        output.fill(0.0);
        sums.fill(0.0);
        largest.fill(NO_SCORE);

        let first_key = (queries.start + 1).saturating_sub(window);
        for block in (first_key..queries.end).step_by(BLOCK) {
            let block_len = BLOCK.min(queries.end - block);
            pack_keys(simd, &qkv[block * width + first_k..], width, block_len, head_dim, keys);
            for (key, value) in values.chunks_exact_mut(padded_dim).take(block_len).enumerate() {
                value[..head_dim].copy_from_slice(&qkv[(block + key) * width + first_v..][..head_dim]);
                value[head_dim..].fill(0.0);
            }
            // The keys of this block that a token sees, counted from the block's first.
            let visible = |token: usize| {
                let end = (token + 1).saturating_sub(block).min(block_len);
                (token + 1).saturating_sub(window).saturating_sub(block).min(end)..end
            };
            for row in (0..rows).step_by(TILE_ROWS) {
                // Rows that fill up the last register tile count as the last token's.
                let token = |row: usize| (queries.start + row / group).min(queries.end - 1);
                let keys_of_tile = visible(token(row)).start..visible(token(row + TILE_ROWS - 1)).end;
                if keys_of_tile.is_empty() {
                    continue;
                }
                // Whole steps, which a block is made of, so never beyond it.
                let begin = keys_of_tile.start / STEP * STEP;
                let columns = keys_of_tile.end.next_multiple_of(STEP) - begin;
                let tile_q = &q[row * head_dim..][..TILE_ROWS * head_dim];
                tile_product::<S, TILE_ROWS, false>(
                    simd,
                    Operand { values: tile_q, stride: head_dim },
                    Operand { values: &keys[begin..], stride: BLOCK },
                    head_dim,
                    columns,
                    &mut scores[..],
                    BLOCK,
                    &[0.0; TILE_ROWS],
                );
                let mut corrections = [0f32; TILE_ROWS];
                for (i, scores) in scores.chunks_exact_mut(BLOCK).enumerate() {
                    let visible = visible(token(row + i));
                    let scores = &mut scores[..columns];
                    // With no key in sight the range may lie before `begin`.
                    let (first, end) = (visible.start.max(begin) - begin, visible.end.max(begin) - begin);
                    scores[..first].fill(f32::NEG_INFINITY);
                    scores[end..].fill(f32::NEG_INFINITY);
                    corrections[i] =
                        softmax_row(simd, scores, &mut largest[row + i], &mut sums[(row + i) * STEP..][..STEP]);
                }
                let skipped = keys_of_tile.start - begin;
                tile_product::<S, TILE_ROWS, true>(
                    simd,
                    Operand { values: &scores[skipped..], stride: BLOCK },
                    Operand { values: &values[keys_of_tile.start * padded_dim..], stride: padded_dim },
                    keys_of_tile.len(),
                    padded_dim,
                    &mut output[row * padded_dim..][..TILE_ROWS * padded_dim],
                    padded_dim,
                    &corrections,
                );
            }
        }

        let row_stride = heads.query_width();
        for (row, output) in output.chunks_exact(padded_dim).take(queries.len() * group).enumerate() {
            let scale = 1.0 / sums[row * STEP..][..STEP].iter().sum::<f32>();
            let token = self.begin + queries.start + row / group;
            let start = token * row_stride + first_q + (row % group) * head_dim;
            // SAFETY: no other task writes this head of this token.
            let destination = unsafe { self.output.part(start, head_dim) };
            for (destination, value) in destination.iter_mut().zip(output) {
                *destination = value * scale;
            }
        }
    }
}

/// Writes `count` keys of `head_dim` values, `stride` apart, as the first columns of `packed [D, BLOCK]`.
///
/// The columns behind them keep what they held: the scores that come of it are overwritten.
#[inline(always)]
fn pack_keys<S: Simd>(simd: S, keys: &[f32], stride: usize, count: usize, head_dim: usize, packed: &mut [f32]) {
    let (whole_keys, whole_dims) = (count / 8 * 8, head_dim / 8 * 8);
    assert!(count <= BLOCK && packed.len() >= head_dim * BLOCK);
    assert!(count == 0 || keys.len() >= (count - 1) * stride + head_dim);
    for key in (0..whole_keys).step_by(8) {
        for d in (0..whole_dims).step_by(8) {
            // SAFETY: keys `key..key + 8` and dimensions `d..d + 8` are within both buffers, by the assertions.
            unsafe {
                let (src, dst) = (keys.as_ptr().add(key * stride + d), packed.as_mut_ptr().add(d * BLOCK + key));
                simd.transpose_8x8(src, stride, dst, BLOCK);
            }
        }
    }
    for key in 0..count {
        let first = if key < whole_keys { whole_dims } else { 0 };
        for d in first..head_dim {
            packed[d * BLOCK + key] = keys[key * stride + d];
        }
    }
}

/// Turns a row of scores into weights relative to the row's largest score so far, and adds them to the row's sums.
///
/// Returns the factor that brings what was summed before to the new largest score.
#[inline(always)]
pub(super) fn softmax_row<S: Simd>(simd: S, scores: &mut [f32], largest: &mut f32, sums: &mut [f32]) -> f32 {
    let (steps, _) = scores.as_chunks_mut::<STEP>();
    let mut lanes = [NO_SCORE; STEP];
    for step in steps.iter() {
        for (lane, &score) in lanes.iter_mut().zip(step) {
            *lane = if score > *lane { score } else { *lane };
        }
    }
    let mut new_largest = *largest;
    for lane in lanes {
        new_largest = if lane > new_largest { lane } else { new_largest };
    }
    let correction = exp(simd, *largest - new_largest);
    *largest = new_largest;
    let Some(sums) = sums.first_chunk_mut::<STEP>() else { return correction };
    let mut new_sums = sums.map(|sum| sum * correction);
    for step in steps {
        for (sum, score) in new_sums.iter_mut().zip(step) {
            *score = exp(simd, *score - new_largest);
            *sum += *score;
        }
    }
    *sums = new_sums;
    correction
}

/// A matrix by rows, `stride` values apart.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub(super) values: &'a [f32],
    pub(super) stride: usize,
}

/// `c = a·b`, or with `ADD` `c = factors·c + a·b`: `a [R, depth]`, `b [depth, columns]`, `c [R, columns]`.
///
/// A row is the same to the bit with any R.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "a matrix product has as many")]
pub(super) fn tile_product<S: Simd, const R: usize, const ADD: bool>(
    simd: S,
    a: Operand,
    b: Operand,
    depth: usize,
    columns: usize,
    c: &mut [f32],
    c_stride: usize,
    factors: &[f32; R],
) {
    assert!(columns.is_multiple_of(STEP) && depth > 0);
    assert!(a.values.len() >= (R - 1) * a.stride + depth);
    assert!(b.values.len() >= (depth - 1) * b.stride + columns);
    assert!(c.len() >= (R - 1) * c_stride + columns);
    let (a_stride, b_stride, a) = (a.stride, b.stride, a.values.as_ptr());
    let mut column = 0;
    while column < columns {
        // SAFETY: a panel of `vectors` vectors from `column` on ends within `columns`, which is a multiple of the
        // vectors' length; the assertions say that all rows of all three matrices reach that far.
        unsafe {
            let (b, c) = (b.values.as_ptr().add(column), c.as_mut_ptr().add(column));
            let vectors = ((columns - column) / S::LANES).min(S::TILE_VECTORS);
            match vectors {
                4 if S::TILE_VECTORS >= 4 => {
                    panel::<S, R, 4, ADD>(simd, depth, a, a_stride, b, b_stride, c, c_stride, factors)
                }
                3 if S::TILE_VECTORS >= 3 => {
                    panel::<S, R, 3, ADD>(simd, depth, a, a_stride, b, b_stride, c, c_stride, factors)
                }
                2 => panel::<S, R, 2, ADD>(simd, depth, a, a_stride, b, b_stride, c, c_stride, factors),
                _ => panel::<S, R, 1, ADD>(simd, depth, a, a_stride, b, b_stride, c, c_stride, factors),
            }
            column += vectors * S::LANES;
        }
    }
}

/// One register tile of [`tile_product`]: `V` vectors of columns.
///
/// # Safety
/// `R` rows of `depth` values of `a`, `depth` rows of `V` vectors of `b`, and `R` rows of `V` vectors of
/// `c` are there, at their strides.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "a matrix product has as many")]
unsafe fn panel<S: Simd, const R: usize, const V: usize, const ADD: bool>(
    simd: S,
    depth: usize,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
    factors: &[f32; R],
) {
    // SAFETY: the caller vouches for the three matrices.
    unsafe {
        let mut tile = [[simd.splat(0.0); V]; R];
        if ADD {
            for (i, row) in tile.iter_mut().enumerate() {
                let factor = simd.splat(factors[i]);
                for (j, value) in row.iter_mut().enumerate() {
                    *value = simd.mul(factor, simd.load(c.add(i * c_stride + j * S::LANES)));
                }
            }
        }
        let mut b_row = b;
        for k in 0..depth {
            let mut b_vectors = [simd.splat(0.0); V];
            for (j, vector) in b_vectors.iter_mut().enumerate() {
                *vector = simd.load(b_row.add(j * S::LANES));
            }
            for (i, row) in tile.iter_mut().enumerate() {
                let factor = simd.splat(*a.add(i * a_stride + k));
                for (value, vector) in row.iter_mut().zip(b_vectors) {
                    *value = simd.mul_add(factor, vector, *value);
                }
            }
            b_row = b_row.wrapping_add(b_stride);
        }
        for (i, row) in tile.iter().enumerate() {
            for (j, &value) in row.iter().enumerate() {
                simd.store(c.add(i * c_stride + j * S::LANES), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same random numbers in [-2, 2) at every call.
    fn random(len: usize) -> Vec<f32> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 22) as f32 - 2.0
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_same_output() -> Result<()> {
        for (num_heads, num_kv_heads, head_dim) in [(12, 4, 64), (4, 1, 128), (8, 2, 16), (2, 2, 8), (5, 1, 20)] {
            let heads = HeadLayout { num_heads, num_kv_heads, head_dim };
            for window in [None, Some(1), Some(33), Some(100)] {
                let qkv = random(250 * heads.qkv_width());
                let qkv = Tensor::from_vec(qkv, (250, heads.qkv_width()), &candle_core::Device::Cpu)?;
                let at = |level| -> Result<Vec<f32>> {
                    let attention = VarlenAttention { cu_seq_lens: vec![0, 9, 250], heads, window, level };
                    let context = Tensor::zeros((250, heads.query_width()), candle_core::DType::F32, qkv.device())?;
                    context.inplace_op2(&qkv, &attention)?;
                    context.flatten_all()?.to_vec1()
                };
                let expected = at(Level::Portable)?;
                for level in Level::available() {
                    for (x, y) in at(level)?.iter().zip(&expected) {
                        assert!((x - y).abs() < 5e-6, "{level:?}, {heads:?}, window {window:?}: {x} and {y}");
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_query_tile_fills_its_register_tiles() {
        for group in [1, 2, 3, 4, 6, 8, 32] {
            let tokens = tile_tokens(HeadLayout { num_heads: group, num_kv_heads: 1, head_dim: 64 });
            assert!((tokens * group).is_multiple_of(TILE_ROWS) && tokens * group >= 96, "{group}: {tokens}");
        }
    }
}
