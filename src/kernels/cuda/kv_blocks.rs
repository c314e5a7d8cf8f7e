//! Keys and values of sequences under way: one pool of blocks, of which a sequence holds as many as it will ever need.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Device, Result, Tensor, bail};
use cudarc::driver::result;

use super::ops::check_rotation;
use super::runtime::{Runtime, buffer, buffer_of, grid, launch, suffix, uninitialized, upload};
use crate::kernels::HeadLayout;

/// Positions of a block.
pub const BLOCK_TOKENS: usize = 256;
/// Keys of one split of a decoding row: fixed, so that a row is summed the same way in any company.
const SPLIT_TOKENS: usize = 128;
const THREADS: u32 = 128;

/// The memory of a device's key/value caches, in blocks of 256 tokens of every layer.
///
/// A sequence takes all blocks of its life when it begins: nothing grows, so nothing can get stuck half-way.
#[derive(Debug)]
pub struct BlockPool {
    heads: HeadLayout,
    dtype: DType,
    device: Device,
    /// Keys, and values, of each layer: `[blocks, K, 256, D]`.
    layers: Vec<(Tensor, Tensor)>,
    free: Mutex<Vec<u32>>,
}

/// One sequence's blocks; position p stands at slot `p mod capacity`, slot s in block `s / 256`.
#[derive(Debug)]
pub struct BlockTable {
    pool: Arc<BlockPool>,
    blocks: Vec<u32>,
    capacity: usize,
}

/// What a pass over new tokens needs to know of their sequences.
#[derive(Debug)]
pub struct CacheBatch {
    /// Each token's place in `block_tables`, `[N]`.
    token_sequences: Tensor,
    /// `[B, max_blocks]`
    block_tables: Tensor,
    /// Slots of each sequence, `[B]`; 0 where nothing is to be written or read.
    capacities: Tensor,
    /// Tokens of each sequence with this step's, `[B]`.
    sequence_ends: Tensor,
    max_blocks: usize,
    /// The decoding tokens among the N, `[M]`, which may be none.
    decoding_tokens: Tensor,
    num_decoding: usize,
    num_splits: usize,
    /// Sums of each split, `[M, H, splits, D]`, and their maxima and weights, `[M, H, splits, 2]`.
    partial: Tensor,
    partial_stats: Tensor,
}

impl BlockPool {
    /// A pool of as many blocks as fit in `bytes`.
    ///
    /// # Errors
    /// When not even one does, or the device has no memory for them.
    pub fn new(heads: HeadLayout, layers: usize, dtype: DType, bytes: usize, device: &Device) -> Result<Self> {
        let blocks = bytes / Self::block_bytes(heads, layers, dtype).max(1);
        if blocks == 0 || u32::try_from(blocks).is_err() {
            bail!("{bytes} bytes of key/value cache make {blocks} blocks");
        }
        let side = || uninitialized((blocks, heads.num_kv_heads, BLOCK_TOKENS, heads.head_dim), dtype, device);
        let layers = (0..layers).map(|_| Ok((side()?, side()?))).collect::<Result<_>>()?;
        let free = Mutex::new((0..blocks as u32).rev().collect());
        Ok(Self { heads, dtype, device: device.clone(), layers, free })
    }

    /// The memory of a block in all layers, in bytes.
    pub fn block_bytes(heads: HeadLayout, layers: usize, dtype: DType) -> usize {
        2 * layers * heads.kv_width() * BLOCK_TOKENS * dtype.size_in_bytes()
    }

    /// The memory of the pool, in bytes.
    pub fn bytes(&self) -> usize {
        let blocks = self.layers.first().map_or(0, |(keys, _)| keys.dims()[0]);
        blocks * Self::block_bytes(self.heads, self.layers.len(), self.dtype)
    }

    /// Blocks for `capacity` positions.
    ///
    /// # Errors
    /// When the pool has not as many left.
    pub fn table(self: &Arc<Self>, capacity: usize) -> Result<BlockTable> {
        let needed = capacity.div_ceil(BLOCK_TOKENS);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if needed > free.len() {
            bail!("key/value cache: {needed} blocks are needed, {} are left", free.len());
        }
        let from = free.len() - needed;
        Ok(BlockTable { pool: self.clone(), blocks: free.split_off(from), capacity })
    }
}

impl BlockTable {
    /// Positions that it holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Another table with the same content.
    ///
    /// # Errors
    /// As [`BlockPool::table`].
    pub fn fork(&self) -> Result<Self> {
        let copy = self.pool.table(self.capacity)?;
        let runtime = Runtime::of(&self.pool.device)?;
        runtime.stream.context().bind_to_thread().w()?;
        let bytes = self.pool.heads.kv_width() * BLOCK_TOKENS * self.pool.dtype.size_in_bytes();
        for tensor in self.pool.layers.iter().flat_map(|(keys, values)| [keys, values]) {
            let base = buffer(tensor)?.pointer;
            for (&from, &to) in self.blocks.iter().zip(&copy.blocks) {
                let at = |block: u32| base + u64::from(block) * bytes as u64;
                // SAFETY: both blocks are among the pool's, and only the copy's is written.
                unsafe { result::memcpy_dtod_async(at(to), at(from), bytes, runtime.stream.cu_stream()) }.w()?;
            }
        }
        Ok(copy)
    }
}

impl Drop for BlockTable {
    /// The next owner's work comes after this one's on the same stream.
    fn drop(&mut self) {
        self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).append(&mut self.blocks);
    }
}

impl CacheBatch {
    /// For the tokens of sequences `cu_seq_lens [B + 1]`, which have had `past_lens [B]` tokens before and keep them in
    /// `tables [B]`. The first `decoding` sequences go on with one token each; the others are fresh.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(cu_seq_lens: &[u32], past_lens: &[usize], tables: &[&BlockTable], decoding: usize) -> Result<Self> {
        let lens = cu_seq_lens.windows(2).map(|bounds| bounds[1] - bounds[0]);
        let ends = lens.clone().zip(past_lens).map(|(len, &past)| past as u32 + len).collect();
        let token_sequences: Vec<u32> =
            (0..).zip(lens).flat_map(|(b, len)| std::iter::repeat_n(b, len as usize)).collect();
        let longest =
            past_lens[..decoding].iter().zip(tables).map(|(&past, table)| (past + 1).min(table.capacity)).max();
        Self::with(tables, token_sequences, ends, decoding, longest.unwrap_or(0))
    }

    /// For steps of one token each of up to `lanes` sequences, which [`CacheBatch::set_lanes`] names; a ring has
    /// `max_capacity` slots at most.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn lanes(pool: &Arc<BlockPool>, lanes: usize, max_capacity: usize) -> Result<Self> {
        let max_blocks = max_capacity.div_ceil(BLOCK_TOKENS).max(1);
        let zeros = |len: usize| upload(&vec![0; len], &pool.device);
        let each = || upload(&(0..lanes as u32).collect::<Vec<_>>(), &pool.device);
        let num_splits = max_capacity.div_ceil(SPLIT_TOKENS).max(1);
        let HeadLayout { num_heads, head_dim, .. } = pool.heads;
        Ok(Self {
            token_sequences: each()?,
            block_tables: zeros(lanes * max_blocks)?.reshape((lanes, max_blocks))?,
            capacities: zeros(lanes)?,
            sequence_ends: zeros(lanes)?,
            max_blocks,
            decoding_tokens: each()?,
            num_decoding: lanes,
            num_splits,
            partial: uninitialized((lanes, num_heads, num_splits, head_dim), DType::F32, &pool.device)?,
            partial_stats: uninitialized((lanes, num_heads, num_splits, 2), DType::F32, &pool.device)?,
        })
    }

    fn with(
        tables: &[&BlockTable],
        token_sequences: Vec<u32>,
        ends: Vec<u32>,
        decoding: usize,
        longest: usize,
    ) -> Result<Self> {
        let Some(pool) = tables.first().map(|table| &table.pool) else { bail!("a pass without a sequence") };
        let max_blocks = tables.iter().map(|table| table.blocks.len()).max().unwrap_or(0).max(1);
        let capacities: Vec<u32> = tables.iter().map(|table| table.capacity as u32).collect();
        let num_splits = longest.div_ceil(SPLIT_TOKENS).max(1);
        let HeadLayout { num_heads, head_dim, .. } = pool.heads;
        let rows = decoding.max(1); // no memory is no buffer
        Ok(Self {
            token_sequences: upload(&token_sequences, &pool.device)?,
            block_tables: upload(&padded_tables(tables, max_blocks), &pool.device)?
                .reshape((tables.len(), max_blocks))?,
            capacities: upload(&capacities, &pool.device)?,
            sequence_ends: upload(&ends, &pool.device)?,
            max_blocks,
            decoding_tokens: upload(&(0..rows as u32).collect::<Vec<_>>(), &pool.device)?,
            num_decoding: decoding,
            num_splits,
            partial: uninitialized((rows, num_heads, num_splits, head_dim), DType::F32, &pool.device)?,
            partial_stats: uninitialized((rows, num_heads, num_splits, 2), DType::F32, &pool.device)?,
        })
    }

    /// Names the sequences of [`CacheBatch::lanes`] and how many tokens they have had; lanes beyond them are idle.
    ///
    /// # Errors
    /// When a table does not fit, or the copy fails.
    pub fn set_lanes(&self, tables: &[&BlockTable], past_lens: &[usize]) -> Result<()> {
        let lanes = self.capacities.dim(0)?;
        if tables.len() > lanes || tables.iter().any(|table| table.blocks.len() > self.max_blocks) {
            bail!("{} sequences for {lanes} lanes of {} blocks", tables.len(), self.max_blocks);
        }
        super::upload_to(&padded_tables(tables, self.max_blocks), &self.block_tables)?;
        let ends: Vec<u32> = past_lens.iter().map(|&past| past as u32 + 1).collect();
        super::upload_to(&ends, &self.sequence_ends)?;
        let mut capacities: Vec<u32> = tables.iter().map(|table| table.capacity as u32).collect();
        capacities.resize(lanes, 0);
        super::upload_to(&capacities, &self.capacities)
    }

    /// From the next step on `lane` writes and reads nothing.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn close_lane(&self, lane: usize) -> Result<()> {
        super::upload_to(&[0], &self.capacities.narrow(0, lane, 1)?)
    }

    /// The count that [`super::advance_positions`] advances.
    pub fn sequence_ends(&self) -> &Tensor {
        &self.sequence_ends
    }
}

fn padded_tables(tables: &[&BlockTable], max_blocks: usize) -> Vec<u32> {
    let mut padded = Vec::with_capacity(tables.len() * max_blocks);
    for (row, table) in (1..).zip(tables) {
        padded.extend_from_slice(&table.blocks);
        padded.resize(row * max_blocks, 0);
    }
    padded
}

/// As [`super::rotary_embedding`]; also writes the rotated keys, and the values, to `layer` of the sequences' caches.
pub fn rotary_cache_write(
    qkv: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    positions: &Tensor,
    pool: &BlockPool,
    layer: usize,
    batch: &CacheBatch,
) -> Result<()> {
    let heads = pool.heads;
    let tokens = check_rotation(qkv, cos, sin, positions, heads)?;
    let Some((keys, values)) = pool.layers.get(layer).filter(|_| batch.token_sequences.dims() == [tokens]) else {
        bail!("cache write: {tokens} tokens of {:?}, layer {layer}", batch.token_sequences.dims());
    };
    let runtime = Runtime::of(qkv.device())?;
    launch!(
        runtime,
        &format!("rotary_cache_write_{}", suffix(pool.dtype)?),
        grid(tokens, 1, 1, THREADS, 0),
        buffer_of(qkv, pool.dtype)?,
        buffer_of(positions, DType::U32)?,
        buffer_of(cos, DType::F32)?,
        buffer_of(sin, DType::F32)?,
        heads.num_heads as u32,
        heads.num_kv_heads as u32,
        heads.head_dim as u32,
        buffer_of(keys, pool.dtype)?,
        buffer_of(values, pool.dtype)?,
        buffer_of(&batch.token_sequences, DType::U32)?,
        buffer_of(&batch.block_tables, DType::U32)?,
        buffer_of(&batch.capacities, DType::U32)?,
        buffer_of(&batch.sequence_ends, DType::U32)?,
        batch.max_blocks as u32,
    )
}

/// Shared memory of `decode_attention`, which stages the keys and values of a split where a row of them fills whole vectors.
fn decode_shared_bytes(head_dim: usize, dtype: DType) -> u32 {
    match head_dim * dtype.size_in_bytes() {
        row_bytes @ (128 | 256) => (2 * SPLIT_TOKENS * row_bytes) as u32,
        _ => 0,
    }
}

/// Attention of the decoding tokens over what `layer` of their caches holds, themselves included, to their rows of `context`.
pub fn decode_attention(
    context: &Tensor,
    qkv: &Tensor,
    positions: &Tensor,
    pool: &BlockPool,
    layer: usize,
    batch: &CacheBatch,
) -> Result<()> {
    let heads = pool.heads;
    let tokens = heads.check_qkv(qkv.dims())?;
    let decoding = batch.num_decoding;
    let Some((keys, values)) = pool.layers.get(layer) else { bail!("decode: no layer {layer}") };
    if context.dims2()? != (tokens, heads.query_width()) || positions.dims() != [tokens] || decoding > tokens {
        bail!("decode: {tokens} tokens, {decoding} of them decoding, to {:?}", context.dims());
    }
    if decoding == 0 {
        return Ok(());
    }
    let runtime = Runtime::of(qkv.device())?;
    launch!(
        runtime,
        &format!("decode_attention_{}", suffix(pool.dtype)?),
        grid(batch.num_splits, heads.num_kv_heads, decoding, THREADS, decode_shared_bytes(heads.head_dim, pool.dtype)),
        buffer_of(qkv, pool.dtype)?,
        buffer_of(keys, pool.dtype)?,
        buffer_of(values, pool.dtype)?,
        buffer_of(&batch.partial, DType::F32)?,
        buffer_of(&batch.partial_stats, DType::F32)?,
        buffer_of(&batch.decoding_tokens, DType::U32)?,
        buffer_of(positions, DType::U32)?,
        buffer_of(&batch.token_sequences, DType::U32)?,
        buffer_of(&batch.block_tables, DType::U32)?,
        buffer_of(&batch.capacities, DType::U32)?,
        batch.max_blocks as u32,
        batch.num_splits as u32,
        heads.num_heads as u32,
        heads.num_kv_heads as u32,
        heads.head_dim as u32,
        1.0 / (heads.head_dim as f32).sqrt(),
    )?;
    launch!(
        runtime,
        &format!("decode_combine_{}", suffix(pool.dtype)?),
        grid(heads.num_heads, decoding, 1, THREADS, 0),
        buffer_of(&batch.partial, DType::F32)?,
        buffer_of(&batch.partial_stats, DType::F32)?,
        buffer_of(context, pool.dtype)?,
        buffer_of(&batch.decoding_tokens, DType::U32)?,
        buffer_of(positions, DType::U32)?,
        buffer_of(&batch.token_sequences, DType::U32)?,
        buffer_of(&batch.capacities, DType::U32)?,
        batch.num_splits as u32,
        heads.head_dim as u32,
    )
}
