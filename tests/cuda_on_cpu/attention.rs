//! Attention, over fresh sequences and over the cache.

use candle_core::{DType, Device, Tensor};
use mistral_batch::kernels::{HeadLayout, reference};

use super::{Arg, Buffer, DTYPES, distance, flat, in_any_order, launch, named, random, rounding};

const TILE_QUERIES: usize = 64;
const BLOCK_SLOTS: usize = 256;
const SPLIT_SLOTS: usize = 128;

const fn layout(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> HeadLayout {
    HeadLayout { num_heads, num_kv_heads, head_dim }
}

/// The goldens' heads (8, 2 and 8 or 16), groups from 1 to 8, widths that are and are not whole vectors.
const LAYOUTS: [HeadLayout; 9] = [
    layout(8, 2, 8),
    layout(8, 2, 16),
    layout(2, 2, 64),
    layout(4, 1, 128),
    layout(5, 1, 20),
    layout(6, 1, 2),
    layout(7, 1, 32),
    layout(8, 1, 64),
    layout(3, 1, 256),
];

/// The heads that tensor cores take.
const FLASH_LAYOUTS: [HeadLayout; 2] = [layout(2, 1, 64), layout(2, 2, 128)];

/// The least-rounded oracle: padded, masked, in f64; `qkv [N, (H + 2K)·D]` to `[N, H·D]`.
fn oracle(qkv: &Tensor, seq_lens: &[usize], heads: HeadLayout, window: Option<usize>) -> Vec<f32> {
    let mut start = 0;
    let rows = seq_lens.iter().map(|&seq_len| {
        let row = qkv.narrow(0, start, seq_len).unwrap().reshape((1, seq_len, (), heads.head_dim)).unwrap();
        start += seq_len;
        let row = row.transpose(1, 2).unwrap();
        let part = |first, heads| row.narrow(1, first, heads).unwrap();
        let (q, k) = (part(0, heads.num_heads), part(heads.num_heads, heads.num_kv_heads));
        let v = part(heads.num_heads + heads.num_kv_heads, heads.num_kv_heads);
        let mask = reference::left_padded_causal_mask(&[seq_len], 0, seq_len, window, &Device::Cpu).unwrap();
        let output = reference::padded_attention(&q, &k, &v, &mask.to_dtype(DType::F64).unwrap()).unwrap();
        flat(&output.transpose(1, 2).unwrap().contiguous().unwrap())
    });
    rows.flatten().collect()
}

fn cumulative(seq_lens: &[usize]) -> Vec<usize> {
    let mut offsets = vec![0];
    offsets.extend(seq_lens.iter().scan(0, |end, seq_len| {
        *end += seq_len;
        Some(*end)
    }));
    offsets
}

/// Every sequence in tiles of 64 queries, the last tile first.
fn tiles(seq_lens: &[usize]) -> Vec<u32> {
    let offsets = cumulative(seq_lens);
    let tiles = offsets.windows(2).flat_map(|bounds| {
        (bounds[0]..bounds[1]).step_by(TILE_QUERIES).rev().flat_map(|first| [bounds[0], bounds[1], first, 0])
    });
    tiles.map(|value| value as u32).collect()
}

/// A kernel over fresh sequences; `[N, H·D]`.
fn varlen(
    kernel: &str,
    qkv: &Buffer,
    seq_lens: &[usize],
    heads: HeadLayout,
    window: Option<usize>,
    seed: u64,
) -> Vec<f32> {
    let tokens: usize = seq_lens.iter().sum();
    let context = Buffer::new(tokens * heads.query_width(), qkv.dtype);
    let tiles = Buffer::u32(&tiles(seq_lens));
    let shared_bytes = match kernel {
        "varlen_attention" => 4 * (80 * heads.head_dim + 32),
        _ => 5 * TILE_QUERIES * heads.head_dim * 2,
    };
    let mut args = vec![qkv.into(), (&context).into(), (&tiles).into()];
    args.extend(
        [heads.num_heads, heads.num_kv_heads, heads.head_dim, window.unwrap_or(u32::MAX as usize)].map(Arg::U32),
    );
    args.push(Arg::F32(1.0 / (heads.head_dim as f64).sqrt()));
    let grid = (tiles.bytes / 16, heads.num_heads, 1);
    launch(&named(kernel, qkv.dtype), grid, 128, shared_bytes, &args, seed);
    context.to_f32()
}

fn check_varlen(kernel: &str, dtype: DType, seq_lens: &[usize], heads: HeadLayout, window: Option<usize>) {
    let tokens: usize = seq_lens.iter().sum();
    let qkv = Buffer::floats(&random(tokens * heads.qkv_width(), 2.0, tokens as u64), dtype);
    let found = in_any_order(|seed| varlen(kernel, &qkv, seq_lens, heads, window, seed));
    let distance = distance(&found, &oracle(&qkv.tensor((tokens, heads.qkv_width())), seq_lens, heads, window));
    // On tensor cores the weights are rounded as well: each off by half a unit, of values up to 2.
    let tolerance = rounding(dtype) * if kernel == "varlen_attention" { 1.0 } else { 2.0 };
    assert!(distance < tolerance, "{kernel} {dtype:?} {seq_lens:?} {heads:?} window {window:?}: {distance:e}");
}

/// Windows around a length and around the tiles' edges.
fn windows(seq_len: usize) -> Vec<Option<usize>> {
    let mut windows = vec![None, Some(1), Some(2), Some(seq_len.max(2) - 1), Some(seq_len), Some(seq_len + 1)];
    if seq_len > 64 {
        windows.extend([Some(63), Some(64), Some(65)]);
    }
    windows
}

#[test]
fn plain_attention_equals_the_oracle() {
    for (i, heads) in LAYOUTS.into_iter().enumerate() {
        for seq_len in [1, 2, 16, 17] {
            for window in windows(seq_len) {
                check_varlen("varlen_attention", DTYPES[(i + seq_len) % 3], &[seq_len], heads, window);
            }
        }
        for window in [None, Some(33), Some(69)] {
            check_varlen("varlen_attention", DTYPES[i % 3], &[70], heads, window);
        }
    }
    for dtype in DTYPES {
        for window in [None, Some(16), Some(129)] {
            check_varlen("varlen_attention", dtype, &[130, 1, 65], layout(2, 1, 16), window);
        }
    }
}

#[test]
fn flash_attention_equals_the_oracle() {
    for (i, heads) in FLASH_LAYOUTS.into_iter().enumerate() {
        let kernel = format!("flash_attention_d{}", heads.head_dim);
        for seq_len in [1, 2, 7, 16, 63, 64, 65, 129] {
            for (j, window) in windows(seq_len).into_iter().enumerate() {
                let dtype = [DType::BF16, DType::F16][(i + j + seq_len) % 2];
                check_varlen(&kernel, dtype, &[seq_len], heads, window);
            }
        }
    }
    for dtype in [DType::BF16, DType::F16] {
        for window in [None, Some(1), Some(64), Some(100), Some(192)] {
            check_varlen("flash_attention_d64", dtype, &[200, 1, 64], layout(4, 1, 64), window);
            check_varlen("flash_attention_d128", dtype, &[1, 193], layout(3, 1, 128), window);
        }
    }
}

#[test]
fn a_sequence_attends_the_same_alone_and_in_a_batch() {
    let seq_lens = [100, 1, 37, 130];
    let cases = [
        ("varlen_attention", DType::F32, layout(8, 2, 16)),
        ("flash_attention_d64", DType::BF16, layout(4, 2, 64)),
        ("flash_attention_d128", DType::F16, layout(2, 1, 128)),
    ];
    for (kernel, dtype, heads) in cases {
        let values = random(268 * heads.qkv_width(), 2.0, 3);
        let together = varlen(kernel, &Buffer::floats(&values, dtype), &seq_lens, heads, Some(50), 1);
        let offsets = cumulative(&seq_lens);
        for b in 0..seq_lens.len() {
            let own = &values[offsets[b] * heads.qkv_width()..offsets[b + 1] * heads.qkv_width()];
            let alone = varlen(kernel, &Buffer::floats(own, dtype), &seq_lens[b..=b], heads, Some(50), 2);
            let row = &together[offsets[b] * heads.query_width()..offsets[b + 1] * heads.query_width()];
            assert_eq!(alone, row, "{kernel}: sequence {b}");
        }
    }
}

#[test]
fn sequences_that_are_not_listed_stay_and_not_a_number_stays_in_its_sequence() {
    for (kernel, dtype, heads) in
        [("varlen_attention", DType::F32, layout(2, 1, 16)), ("flash_attention_d64", DType::BF16, layout(2, 1, 64))]
    {
        let width = heads.qkv_width();
        let mut values = random(200 * width, 2.0, 5);
        values[70 * width..100 * width].fill(f32::NAN);
        let qkv = Buffer::floats(&values, dtype);
        let found = varlen(kernel, &qkv, &[70, 30, 100], heads, None, 1);
        let is_nan =
            |token: usize| found[token * heads.query_width()..][..heads.query_width()].iter().all(|x| x.is_nan());
        let is_finite =
            |token: usize| found[token * heads.query_width()..][..heads.query_width()].iter().all(|x| x.is_finite());
        assert!((0..70).chain(100..200).all(is_finite), "{kernel}");
        assert!((70..100).all(is_nan), "{kernel}");
    }
}

/// Large scores: beyond 1,000, where one weight is all.
#[test]
fn large_scores_do_not_overflow() {
    for (kernel, dtype, heads) in
        [("varlen_attention", DType::F32, layout(2, 1, 64)), ("flash_attention_d64", DType::F16, layout(2, 1, 64))]
    {
        let qkv = Buffer::floats(&random(150 * heads.qkv_width(), 60.0, 2), dtype);
        let found: Vec<f32> = varlen(kernel, &qkv, &[150], heads, None, 1).iter().map(|x| x / 60.0).collect();
        let expected: Vec<f32> =
            oracle(&qkv.tensor((150, heads.qkv_width())), &[150], heads, None).iter().map(|x| x / 60.0).collect();
        let distance = distance(&found, &expected);
        assert!(distance < if dtype == DType::F32 { 5e-4 } else { 2e-3 }, "{kernel}: {distance:e}");
    }
}

/// A layer's pool and what says where each sequence's ring is in it.
struct Cache {
    heads: HeadLayout,
    keys: Buffer,
    values: Buffer,
    max_blocks: usize,
    block_tables: Buffer,
    capacities: Buffer,
}

impl Cache {
    /// Blocks are dealt out to the rings in an order of their own.
    fn new(heads: HeadLayout, dtype: DType, capacities: &[usize]) -> Self {
        let blocks_of = |capacity: &usize| capacity.div_ceil(BLOCK_SLOTS);
        let max_blocks = capacities.iter().map(blocks_of).max().unwrap().max(1);
        let mut free: Vec<u32> = (0..capacities.iter().map(blocks_of).sum::<usize>() as u32 + 1).collect();
        free.reverse();
        let swapped = free.len() / 2;
        free.swap(0, swapped);
        let mut tables = vec![u32::MAX; capacities.len() * max_blocks];
        for (sequence, capacity) in capacities.iter().enumerate() {
            for block in 0..blocks_of(capacity) {
                tables[sequence * max_blocks + block] = free.pop().unwrap();
            }
        }
        let values = (tables.iter().filter(|&&block| block != u32::MAX).count() + 1) * BLOCK_SLOTS * heads.kv_width();
        Self {
            heads,
            keys: Buffer::new(values, dtype),
            values: Buffer::new(values, dtype),
            max_blocks,
            block_tables: Buffer::u32(&tables),
            capacities: Buffer::u32(&capacities.iter().map(|&c| c as u32).collect::<Vec<_>>()),
        }
    }

    /// Adds tokens `qkv` of the `sequences` at `positions`, rotated by nothing.
    fn write(&self, qkv: &Buffer, positions: &[u32], sequences: &[u32], ends: &[u32]) {
        let (heads, dtype) = (self.heads, self.keys.dtype);
        let table = (positions.iter().max().unwrap() + 1) as usize * heads.head_dim / 2;
        let (cos, sin) = (Buffer::floats(&vec![1.0; table], DType::F32), Buffer::floats(&vec![0.0; table], DType::F32));
        let [positions, sequences, ends] = [positions, sequences, ends].map(Buffer::u32);
        let mut args = vec![qkv.into(), (&positions).into(), (&cos).into(), (&sin).into()];
        args.extend([heads.num_heads, heads.num_kv_heads, heads.head_dim].map(Arg::U32));
        args.extend(
            [&self.keys, &self.values, &sequences, &self.block_tables, &self.capacities, &ends].map(Arg::Buffer),
        );
        args.push(Arg::U32(self.max_blocks));
        launch(&named("rotary_cache_write", dtype), (positions.bytes / 4, 1, 1), 128, 0, &args, 7);
    }

    /// The context of the `tokens` of `qkv [N, …]`, other rows being NaN: `[N, H·D]`.
    fn attend(
        &self,
        qkv: &Buffer,
        tokens: &[u32],
        positions: &[u32],
        sequences: &[u32],
        splits: usize,
        seed: u64,
    ) -> Vec<f32> {
        let (heads, dtype) = (self.heads, self.keys.dtype);
        let [tokens, positions, sequences] = [tokens, positions, sequences].map(Buffer::u32);
        let (entries, rows) = (tokens.bytes / 4, positions.bytes / 4);
        let partial = Buffer::new(entries * heads.query_width() * splits, DType::F32);
        let stats = Buffer::new(entries * heads.num_heads * splits * 2, DType::F32);
        let context = Buffer::new(rows * heads.query_width(), dtype);
        let mut args = vec![qkv.into()];
        let buffers = [
            &self.keys,
            &self.values,
            &partial,
            &stats,
            &tokens,
            &positions,
            &sequences,
            &self.block_tables,
            &self.capacities,
        ];
        args.extend(buffers.map(Arg::Buffer));
        args.extend([self.max_blocks, splits, heads.num_heads, heads.num_kv_heads, heads.head_dim].map(Arg::U32));
        args.push(Arg::F32(1.0 / (heads.head_dim as f64).sqrt()));
        let row_bytes = heads.head_dim * dtype.size_in_bytes();
        let shared_bytes = if [128, 256].contains(&row_bytes) { 2 * SPLIT_SLOTS * row_bytes } else { 0 };
        // Blocks may take several splits each.
        let grid = (if seed.is_multiple_of(2) { splits } else { splits.div_ceil(2) }, heads.num_kv_heads, entries);
        launch(&named("decode_attention", dtype), grid, 128, shared_bytes, &args, seed);
        let mut args: Vec<Arg> =
            [&partial, &stats, &context, &tokens, &positions, &sequences, &self.capacities].map(Arg::Buffer).into();
        args.extend([splits, heads.head_dim].map(Arg::U32));
        launch(&named("decode_combine", dtype), (heads.num_heads, entries, 1), 128, 0, &args, seed);
        context.to_f32()
    }
}

/// Sequences of `past` tokens and one new one, whose rings have `capacities`: the last row of the oracle for each.
fn check_decode(dtype: DType, heads: HeadLayout, window: Option<usize>, lens: &[usize], spare_splits: usize) {
    let capacity = |len: usize| window.map_or(len, |window| window.min(len));
    let capacities: Vec<_> = lens.iter().map(|&len| capacity(len)).collect();
    let cache = Cache::new(heads, dtype, &capacities);
    let width = heads.qkv_width();
    let tokens: Vec<_> = lens.iter().map(|&len| random(len * width, 2.0, len as u64)).collect();
    // The prompts in one step, but for the last half of the second: in a step of its own.
    let mut steps = vec![Vec::new(), Vec::new()];
    for (sequence, &len) in lens.iter().enumerate() {
        for position in 0..len - 1 {
            steps[usize::from(sequence == 1 && position >= len / 2)].push((sequence, position));
        }
    }
    for step in steps.into_iter().filter(|step| !step.is_empty()) {
        let qkv: Vec<f32> = step
            .iter()
            .flat_map(|&(sequence, position)| tokens[sequence][position * width..][..width].to_vec())
            .collect();
        let mut ends = vec![0; lens.len()];
        step.iter().for_each(|&(sequence, position)| ends[sequence] = position as u32 + 1);
        let (sequences, positions): (Vec<_>, Vec<_>) = step.iter().map(|&(s, p)| (s as u32, p as u32)).unzip();
        cache.write(&Buffer::floats(&qkv, dtype), &positions, &sequences, &ends);
    }
    // The new tokens, the last sequence's first, behind a row that is not asked for.
    let order: Vec<usize> = (0..lens.len()).rev().collect();
    let mut qkv = vec![f32::NAN; width];
    order.iter().for_each(|&s| qkv.extend_from_slice(&tokens[s][(lens[s] - 1) * width..]));
    let qkv = Buffer::floats(&qkv, dtype);
    let with_first = |first: u32, of: &dyn Fn(usize) -> usize| -> Vec<u32> {
        std::iter::once(first).chain(order.iter().map(|&s| of(s) as u32)).collect()
    };
    let (positions, sequences) = (with_first(0, &|s| lens[s] - 1), with_first(0, &|s| s));
    let ends: Vec<u32> = lens.iter().map(|&len| len as u32).collect();
    let new = Buffer::floats(&qkv.to_f32()[width..], dtype);
    cache.write(&new, &positions[1..], &sequences[1..], &ends);
    let splits = capacities.iter().max().unwrap().div_ceil(SPLIT_SLOTS) + spare_splits;
    let entries: Vec<u32> = (1..=lens.len() as u32).collect();
    let found = in_any_order(|seed| cache.attend(&qkv, &entries, &positions, &sequences, splits, seed));
    assert!(found[..heads.query_width()].iter().all(|x| x.is_nan()), "a row that is not asked for is not written");
    for (row, &sequence) in order.iter().enumerate() {
        let len = lens[sequence];
        let all = Buffer::floats(&tokens[sequence], dtype).tensor((len, width));
        let expected = oracle(&all, &[len], heads, window);
        let found = &found[(row + 1) * heads.query_width()..][..heads.query_width()];
        let distance = distance(found, &expected[(len - 1) * heads.query_width()..]);
        assert!(distance < rounding(dtype), "{dtype:?} {heads:?} {window:?} {len} tokens: {distance:e}");
    }
}

#[test]
fn decode_attention_equals_the_oracle_around_the_window() {
    for (i, heads) in LAYOUTS.into_iter().enumerate() {
        let dtype = |j: usize| DTYPES[(i + j) % 3];
        for (j, window) in [1, 2, 16, 127, 128, 129].into_iter().enumerate() {
            let lens = [window, window + 1, (window - 1).max(1), 2 * window + 3, 1];
            check_decode(dtype(j), heads, Some(window), &lens, j % 2);
        }
        check_decode(dtype(i), heads, None, &[1, 70, 129], 2);
    }
    for dtype in DTYPES {
        check_decode(dtype, layout(4, 1, 64), Some(300), &[700, 257, 300, 299, 301], 0);
        check_decode(dtype, layout(2, 1, 128), None, &[513, 256], 1);
    }
}

#[test]
fn a_cached_sequence_is_the_same_alone_and_in_a_batch_and_a_row_without_slots_is_zero() {
    let heads = layout(4, 2, 64);
    let width = heads.qkv_width();
    for dtype in DTYPES {
        let new = random(3 * width, 2.0, 1);
        let qkv = Buffer::floats(&new, dtype);
        let prompt = Buffer::floats(&random(200 * width, 2.0, 2), dtype);
        let cache = Cache::new(heads, dtype, &[150, 0, 7]);
        let positions: Vec<u32> = (0..200).collect();
        cache.write(&prompt, &positions, &[0; 200], &[200, 0, 0]);
        cache.write(&qkv, &[200, 0, 0], &[0, 1, 2], &[201, 1, 1]);
        let together = cache.attend(&qkv, &[0, 1, 2], &[200, 0, 0], &[0, 1, 2], 2, 1);
        let alone = cache.attend(&qkv, &[0], &[200, 0, 0], &[0, 1, 2], 5, 2);
        let row = heads.query_width();
        assert_eq!(together[..row], alone[..row], "whatever the company and the number of splits");
        assert!(together[row..2 * row].iter().all(|&x| x == 0.0));
        let value =
            |head: usize| new[2 * width + heads.query_width() + heads.kv_width() + head / 2 * 64..][..64].to_vec();
        let own: Vec<f32> = (0..4).flat_map(value).collect();
        assert_eq!(together[2 * row..], Buffer::floats(&own, dtype).to_f32(), "one key: its own value");
    }
}
