//! Attention of new tokens over a rolling cache of keys and values.
//!
//! A fresh sequence of several tokens attends within itself, as [`super::varlen_attention`]; its last keys and values
//! then fill the cache. A token that continues a sequence is written to its slot first and attends to all slots: after
//! that write the ring holds exactly the positions that it sees. Order among slots does not matter to attention.

use std::ops::Range;

use candle_core::{Device, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use super::attention::{BLOCK, NO_SCORE, Operand, STEP, TILE_ROWS, attend, softmax_row, tile_product};
use super::contiguous;
use super::output::SharedOutput;
use super::simd::{Kernel, Level, Simd, dispatch_at};
use crate::kernels::HeadLayout;

/// One layer's rotated keys, and values, of one sequence: position p at slot p mod `capacity`.
///
/// With 4 slots and 6 tokens so far the slots hold positions 4, 5, 2 and 3. Slots lie in blocks of 64, block by block
/// and head by head, keys transposed: what the products read is contiguous. Memory is zeroed when allocated, so that the
/// system hands out pages only as slots fill.
#[derive(Debug, Clone)]
pub struct KvRing {
    heads: HeadLayout,
    capacity: usize,
    /// `[K, blocks, D, BLOCK]`
    keys: Vec<f32>,
    /// `[K, blocks, BLOCK, D']`, D' being D in whole vectors.
    values: Vec<f32>,
}

impl KvRing {
    /// An empty ring of `capacity` slots.
    pub fn new(heads: HeadLayout, capacity: usize) -> Self {
        let slots = slots(capacity) * heads.num_kv_heads;
        let (keys, values) = (vec![0.0; slots * heads.head_dim], vec![0.0; slots * padded_dim(heads)]);
        Self { heads, capacity, keys, values }
    }

    /// The memory of a ring of `capacity` slots, in bytes.
    pub fn bytes(heads: HeadLayout, capacity: usize) -> usize {
        slots(capacity) * heads.num_kv_heads * (heads.head_dim + padded_dim(heads)) * size_of::<f32>()
    }

    /// How many positions the ring holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}

/// Slots in whole blocks.
fn slots(capacity: usize) -> usize {
    capacity.next_multiple_of(BLOCK)
}

fn padded_dim(heads: HeadLayout) -> usize {
    heads.head_dim.next_multiple_of(STEP)
}

/// Causal grouped-query attention of new tokens `qkv [N, (H + 2K)·D]`, already rotated, over themselves and what their
/// sequences' `rings [B]` hold, to `[N, H·D]`; the new keys and values are added to the rings.
///
/// `cu_seq_lens [B + 1]` says which new tokens belong to which sequence, `past_lens [B]` how many tokens each has had
/// before. Query `i` sees key `j` iff `0 <= i - j < window`. A ring has `window` slots, or fewer where they hold the
/// whole sequence: a sequence of 5 cached and 3 new tokens needs 8, or `window` if that is less.
pub fn cached_attention(
    qkv: &Tensor,
    cu_seq_lens: &[u32],
    past_lens: &[usize],
    rings: &mut [&mut KvRing],
    heads: HeadLayout,
    window: Option<usize>,
) -> Result<Tensor> {
    let tokens = heads.check_qkv(qkv.dims())?;
    let sequences: Vec<_> = cu_seq_lens.windows(2).map(|bounds| bounds[0] as usize..bounds[1] as usize).collect();
    if cu_seq_lens.first() != Some(&0) || !cu_seq_lens.is_sorted() || sequences.last().map_or(0, |s| s.end) != tokens {
        bail!("cached attention: cu_seq_lens have to rise from 0 to the {tokens} tokens, got {cu_seq_lens:?}");
    }
    if sequences.len() != past_lens.len() || sequences.len() != rings.len() {
        bail!("cached attention: {} sequences, {} lengths, {} rings", sequences.len(), past_lens.len(), rings.len());
    }
    for ((sequence, &past), ring) in sequences.iter().zip(past_lens).zip(rings.iter()) {
        let held = window.map_or(past + sequence.len(), |window| window.min(past + sequence.len()));
        if ring.heads != heads || ring.capacity < held || window.is_some_and(|window| ring.capacity > window) {
            bail!(
                "cached attention: a ring of {} slots for {past} + {} tokens and a window of {window:?}",
                ring.capacity,
                sequence.len()
            );
        }
    }
    let (storage, layout) = qkv.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("cached attention: the tokens are not on the CPU") };
    let qkv = contiguous(storage, layout, "cached attention")?;
    let level = Level::best();

    let mut output = vec![0f32; tokens * heads.query_width()];
    let shared = SharedOutput::new(&mut output);
    let is_fresh = |sequence: &Range<usize>, past: usize| past == 0 && sequence.len() > 1;
    let fresh: Vec<_> =
        sequences.iter().zip(past_lens).filter(|(s, past)| is_fresh(s, **past)).map(|(s, _)| s.clone()).collect();
    attend(level, qkv, &fresh, heads, window, shared);

    let key_values = (BLOCK * heads.head_dim, BLOCK * padded_dim(heads));
    // Sequences are shared out first, and their heads only where there are too few of them.
    let min_heads = if rings.len() >= 4 * rayon::current_num_threads() { heads.num_kv_heads } else { 1 };
    rings.par_iter_mut().zip(sequences.par_iter().zip(past_lens)).for_each(|(ring, (sequence, &past))| {
        let (capacity, blocks) = (ring.capacity, ring.capacity.div_ceil(BLOCK).max(1));
        let keys = ring.keys.par_chunks_mut(blocks * key_values.0);
        let values = ring.values.par_chunks_mut(blocks * key_values.1);
        keys.zip(values).with_min_len(min_heads).enumerate().for_each(|(kv_head, (keys, values))| {
            let tokens = sequence.clone();
            let fresh = is_fresh(sequence, past);
            let task = Task { qkv, heads, kv_head, tokens, past, fresh, capacity, keys, values, output: shared };
            dispatch_at(level, task);
        });
    });
    Tensor::from_vec(output, (tokens, heads.query_width()), &Device::Cpu)
}

/// The new tokens of one sequence and one key head.
struct Task<'a> {
    qkv: &'a [f32],
    heads: HeadLayout,
    kv_head: usize,
    tokens: Range<usize>,
    past: usize,
    /// The tokens have attended already and are only to be written.
    fresh: bool,
    capacity: usize,
    /// The head's `[blocks, D, BLOCK]`.
    keys: &'a mut [f32],
    /// The head's `[blocks, BLOCK, D']`.
    values: &'a mut [f32],
    output: SharedOutput,
}

impl Kernel for Task<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        // Of a fresh sequence that is longer than the ring only the last positions stay.
        let first = if self.fresh {
            self.tokens.end.saturating_sub(self.capacity).max(self.tokens.start)
        } else {
            self.tokens.start
        };
        for token in first..self.tokens.end {
            let position = self.past + token - self.tokens.start;
            self.write(token, position % self.capacity);
            if !self.fresh {
                self.attend(simd, token, (position + 1).min(self.capacity));
            }
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    fn write(&mut self, token: usize, slot: usize) {
        let (head_dim, padded_dim) = (self.heads.head_dim, padded_dim(self.heads));
        let row = &self.qkv[token * self.heads.qkv_width()..][..self.heads.qkv_width()];
        let key = &row[self.heads.query_width() + self.kv_head * head_dim..][..head_dim];
        let value = &row[self.heads.query_width() + self.heads.kv_width() + self.kv_head * head_dim..][..head_dim];
        let block = &mut self.keys[slot / BLOCK * head_dim * BLOCK..][..head_dim * BLOCK];
        for (line, key) in block.chunks_exact_mut(BLOCK).zip(key) {
            line[slot % BLOCK] = *key;
        }
        self.values[slot * padded_dim..][..head_dim].copy_from_slice(value);
    }

    /// The token's query heads of this key head over the first `count` slots.
    #[inline(always)]
    fn attend<S: Simd>(&self, simd: S, token: usize, count: usize) {
        let group = self.heads.group_size();
        for first_head in (0..group).step_by(TILE_ROWS) {
            match group - first_head {
                1 => self.attend_heads::<S, 1>(simd, token, first_head, count),
                2 => self.attend_heads::<S, 2>(simd, token, first_head, count),
                3 => self.attend_heads::<S, 3>(simd, token, first_head, count),
                4 => self.attend_heads::<S, 4>(simd, token, first_head, count),
                5 => self.attend_heads::<S, 5>(simd, token, first_head, count),
                _ => self.attend_heads::<S, TILE_ROWS>(simd, token, first_head, count),
            }
        }
    }

    /// R of the group's query heads, from `first_head` on: a register tile.
    #[inline(always)]
    fn attend_heads<S: Simd, const R: usize>(&self, simd: S, token: usize, first_head: usize, count: usize) {
        let (group, head_dim, padded_dim) = (self.heads.group_size(), self.heads.head_dim, padded_dim(self.heads));
        let first_head = self.kv_head * group + first_head;
        let query = &self.qkv[token * self.heads.qkv_width() + first_head * head_dim..][..R * head_dim];
        let scale = 1.0 / (head_dim as f32).sqrt();
        let q: Vec<f32> = query.iter().map(|query| query * scale).collect();
        let mut sums_of_values = vec![0f32; R * padded_dim];
        let mut scores = [[0f32; BLOCK]; R];
        let mut sums = [[0f32; STEP]; R];
        let mut largest = [NO_SCORE; R];
        for block in 0..count.div_ceil(BLOCK) {
            let block_len = BLOCK.min(count - block * BLOCK);
            let columns = block_len.next_multiple_of(STEP);
            let keys = &self.keys[block * head_dim * BLOCK..][..head_dim * BLOCK];
            tile_product::<S, R, false>(
                simd,
                Operand { values: &q, stride: head_dim },
                Operand { values: keys, stride: BLOCK },
                head_dim,
                columns,
                scores.as_flattened_mut(),
                BLOCK,
                &[0.0; R],
            );
            let mut corrections = [0f32; R];
            for (i, scores) in scores.iter_mut().enumerate() {
                scores[block_len..columns].fill(f32::NEG_INFINITY);
                corrections[i] = softmax_row(simd, &mut scores[..columns], &mut largest[i], &mut sums[i]);
            }
            tile_product::<S, R, true>(
                simd,
                Operand { values: scores.as_flattened(), stride: BLOCK },
                Operand { values: &self.values[block * BLOCK * padded_dim..], stride: padded_dim },
                block_len,
                padded_dim,
                &mut sums_of_values,
                padded_dim,
                &corrections,
            );
        }
        // SAFETY: no other task writes these heads of this token.
        let output =
            unsafe { self.output.part(token * self.heads.query_width() + first_head * head_dim, R * head_dim) };
        for ((output, values), sums) in
            output.chunks_exact_mut(head_dim).zip(sums_of_values.chunks_exact(padded_dim)).zip(sums)
        {
            let scale = 1.0 / sums.iter().sum::<f32>();
            for (output, value) in output.iter_mut().zip(values) {
                *output = value * scale;
            }
        }
    }
}
