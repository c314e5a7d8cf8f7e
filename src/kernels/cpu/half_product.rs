//! Products in half precision, for those who ask for them: on a CPU with AVX512-FP16 twice the multiply-adds of f32.
//!
//! Weights and inputs are f16. An output's products with even inputs and those with odd inputs are summed apart: 64 in one chain of
//! f16 multiply-adds, each rounded once, two such chains added in f16, and these sums added in f32. So a row is the same
//! to the bit in any company, and on every CPU: where the instructions are missing, the same roundings are computed in f64.
//!
//! f16 reaches from 2^-24 to 65504. A row is scaled by a power of two so that its largest input is between 8 and 16; with
//! weights up to [`MAX_F16_WEIGHT`] no sum of 128 products then leaves that range, and what is too small for it is less
//! than 2^-27 of the largest input.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Once;

use half::f16;
use rayon::prelude::*;

use super::output::Place;
use super::panels::PANEL;
use super::simd::{Kernel, Level, Simd, dispatch_at};

/// The largest weight of a product in f16.
pub(super) const MAX_F16_WEIGHT: f32 = 16.0;
/// Products that are summed in one chain.
const CHAIN: usize = 64;
/// Chains that are added in f16.
const CHAINS: usize = 2;
/// The exponent that the largest input of a row is scaled to.
const ROW_EXPONENT: i32 = 3;
/// Rows of a register tile.
const TILE_ROWS: usize = 14;
/// Outputs of a register tile: two vectors, in which each has a sum of even inputs and one of odd ones.
const TILE_COLUMNS: usize = PANEL / 2;
/// Words of a row that lie together, each with two inputs.
const GROUP: usize = 4;
/// Inputs of a group: rows are filled up to whole ones with zeros.
pub(super) const GROUP_INPUTS: usize = 2 * GROUP;
/// Rows of a block that one thread rounds for itself: with 2,048 inputs each, 800 KiB of its core's second cache.
const BLOCK_ROWS: usize = 196;
/// So many blocks make it worth to share out blocks, and not the panels of a weight.
const BLOCKS_PER_THREAD: usize = 4;

/// What multiplies in f16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HalfUnit {
    /// f32 and f64 arithmetic that rounds as f16 arithmetic does.
    Emulated,
    #[cfg(target_arch = "x86_64")]
    Avx512Fp16,
}

impl HalfUnit {
    /// What this CPU has.
    pub(super) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512fp16") && Level::best() == Level::Avx512 {
            return Self::Avx512Fp16;
        }
        Self::Emulated
    }

    /// Everything that this CPU runs, for tests that compare them.
    #[cfg(test)]
    pub(super) fn available() -> Vec<Self> {
        let mut units = vec![Self::Emulated];
        if Self::best() != Self::Emulated {
            units.push(Self::best());
        }
        units
    }
}

/// Says once if products in f16 will be slow on this CPU.
pub(super) fn warn_if_emulated() {
    static TOLD: Once = Once::new();
    if HalfUnit::best() == HalfUnit::Emulated {
        TOLD.call_once(|| {
            tracing::warn!(
                "this CPU has no AVX512-FP16: products in f16 are emulated, and many times slower than in f32"
            );
        });
    }
}

/// Rows of inputs as f16, in tiles of like size: the last rows alone would wait for each other's sums.
pub(super) struct HalfRows<'a> {
    /// Words of a row.
    width: usize,
    /// Which rows of the product they are.
    rows: Range<usize>,
    /// Two inputs in a word, so that one broadcast of it meets a vector of weights of both. Tile after tile of R rows:
    /// `[width / GROUP, R, GROUP]`.
    pairs: &'a [u32],
    /// What brings a row's sums back to its own scale `[N]`; NaN where an input is not finite.
    scales: &'a [f32],
}

impl HalfRows<'_> {
    /// How many tiles there are.
    pub(super) fn tiles(&self) -> usize {
        self.rows.len().div_ceil(TILE_ROWS)
    }

    /// The rows of the product in some tiles.
    pub(super) fn rows(&self, tiles: Range<usize>) -> Range<usize> {
        self.rows.start + first_row(self.rows.len(), tiles.start)
            ..self.rows.start + first_row(self.rows.len(), tiles.end)
    }
}

/// The first row of a tile.
fn first_row(rows: usize, tile: usize) -> usize {
    rows * tile / rows.div_ceil(TILE_ROWS).max(1)
}

thread_local! {
    static HALF_ROWS: RefCell<(Vec<u32>, Vec<f32>)> = RefCell::default();
}

/// Rounds rows of `x [N, depth]` to f16, block by block, and hands them to `work`, which may run in parallel itself.
///
/// Many rows are shared out among the threads, each of which rounds a block of them into its core's cache and works on it there;
/// few rows are one block that all threads have rounded together.
pub(super) fn for_each_half_rows(level: Level, x: &[f32], depth: usize, work: impl Fn(&HalfRows) + Sync) {
    let (rows, threads) = (x.len() / depth, rayon::current_num_threads());
    let blocks = rows.div_ceil(BLOCK_ROWS).next_multiple_of(threads);
    if rows < BLOCKS_PER_THREAD * threads * BLOCK_ROWS {
        return with_half_rows(level, x, depth, 0..rows, 1, work);
    }
    // Blocks of like size, so that no thread waits for another's last one.
    (0..blocks).into_par_iter().for_each(|block| {
        let rows = rows * block / blocks..rows * (block + 1) / blocks;
        with_half_rows(level, x, depth, rows, usize::MAX, &work);
    });
}

/// Rounds some rows, so many tiles of them in a task of their own.
fn with_half_rows(
    level: Level,
    x: &[f32],
    depth: usize,
    rows: Range<usize>,
    tiles_at_once: usize,
    work: impl FnOnce(&HalfRows),
) {
    let x = &x[rows.start * depth..rows.end * depth];
    let width = depth.div_ceil(GROUP_INPUTS) * GROUP;
    // Taken, not borrowed: while it waits for others, a thread may begin another product.
    let (mut pairs, mut scales) = HALF_ROWS.take();
    if pairs.len() < rows.len() * width {
        pairs.resize(rows.len() * width, 0);
    }
    if scales.len() < rows.len() {
        scales.resize(rows.len(), 0.0);
    }
    let (rounded, row_scales) = (&mut pairs[..rows.len() * width], &mut scales[..rows.len()]);
    let tiles = rows.len().div_ceil(TILE_ROWS);
    let mut parts = Vec::with_capacity(tiles);
    let mut rest = (&mut rounded[..], &mut row_scales[..], x);
    for tile in 0..tiles {
        let len = first_row(rows.len(), tile + 1) - first_row(rows.len(), tile);
        let (pairs, scales, x);
        (pairs, rest.0) = std::mem::take(&mut rest.0).split_at_mut(len * width);
        (scales, rest.1) = std::mem::take(&mut rest.1).split_at_mut(len);
        (x, rest.2) = rest.2.split_at(len * depth);
        parts.push(RoundTile { x, depth, pairs, scales });
    }
    parts.into_par_iter().with_min_len(tiles_at_once).for_each(|tile| dispatch_at(level, tile));
    work(&HalfRows { width, rows, pairs: rounded, scales: row_scales });
    HALF_ROWS.set((pairs, scales));
}

/// The rounding of one tile.
struct RoundTile<'a> {
    /// `[R, depth]`
    x: &'a [f32],
    depth: usize,
    /// `[width / GROUP, R, GROUP]`
    pairs: &'a mut [u32],
    scales: &'a mut [f32],
}

impl Kernel for RoundTile<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        /// Inputs of a row that are rounded before they are spread over its words: a cache line.
        const STEP: usize = 32;
        let rows = self.scales.len();
        for (row, (x, scale)) in self.x.chunks_exact(self.depth).zip(self.scales).enumerate() {
            // Of positive numbers the larger one has the larger bits; NaN has the largest.
            let largest = x.iter().fold(0, |largest, x| (x.to_bits() & 0x7fff_ffff).max(largest));
            let exponent = (largest >> 23) as i32 - 127;
            let is_finite = exponent < 128;
            // Bounded, so that both powers are normal numbers; smaller rows are nothing to f16.
            let power = (ROW_EXPONENT - exponent).clamp(-120, 120);
            let power_of_two = |power: i32| f32::from_bits(((power + 127) as u32) << 23);
            *scale = if is_finite { power_of_two(-power) } else { f32::NAN };
            let factor = power_of_two(power);
            for (x, pairs) in x.chunks(STEP).zip(self.pairs.chunks_mut(STEP / 2 * rows)) {
                let mut rounded = [f16::ZERO; STEP];
                if x.len() == STEP {
                    for first in (0..STEP).step_by(S::LANES) {
                        // SAFETY: both have STEP values, a multiple of every vector's length.
                        unsafe {
                            let x = simd.mul(simd.load(x.as_ptr().add(first)), simd.splat(factor));
                            simd.store_f16(rounded.as_mut_ptr().add(first), x);
                        }
                    }
                } else {
                    for (rounded, x) in rounded.iter_mut().zip(x) {
                        *rounded = f16::from_f32(x * factor);
                    }
                }
                if !is_finite {
                    rounded = [f16::ZERO; STEP];
                }
                let (rounded, _) = rounded.as_chunks::<GROUP_INPUTS>();
                for (group, rounded) in pairs.chunks_exact_mut(GROUP * rows).zip(rounded) {
                    let (words, _) = group.as_chunks_mut::<GROUP>();
                    words[row] = std::array::from_fn(|word| pair_of(rounded[2 * word], rounded[2 * word + 1]));
                }
            }
        }
    }
}

/// Two values in one word, the first in its low half, which is memory's order.
fn pair_of(even: f16, odd: f16) -> u32 {
    u32::from(even.to_bits()) | u32::from(odd.to_bits()) << 16
}

/// Some rows times one panel, in f16.
pub(super) struct HalfTask<'a> {
    /// Of the rows of `tiles`.
    pub(super) place: Place,
    pub(super) x: &'a HalfRows<'a>,
    pub(super) tiles: Range<usize>,
    /// `[2, width, TILE_COLUMNS, 2]`: the weights of an even and of the odd input after it are neighbours.
    pub(super) panel: &'a [f16],
    pub(super) unit: HalfUnit,
    /// Scratch: the panel as f32.
    pub(super) widened: &'a mut Vec<f32>,
    /// Scratch: sums of a register tile `[_, PANEL]`.
    pub(super) sums: &'a mut Vec<f32>,
}

impl Kernel for HalfTask<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { place, x, tiles, panel, unit, widened, sums } = self;
        if sums.len() < TILE_ROWS * PANEL {
            sums.resize(TILE_ROWS * PANEL, 0.0);
        }
        if unit == HalfUnit::Emulated {
            widened.clear();
            widened.extend(panel.iter().map(|weight| weight.to_f32()));
        }
        for tile in tiles.clone() {
            let rows = x.rows(tile..tile + 1);
            let (row, tile_rows) = (rows.start, rows.len());
            let sums = &mut sums[..tile_rows * PANEL];
            let place_in_x = row - x.rows.start;
            let inputs = &x.pairs[place_in_x * x.width..][..tile_rows * x.width];
            place.prefetch_output(simd, row, tile_rows);
            for half in 0..2 {
                let part = half * x.width * PANEL..(half + 1) * x.width * PANEL;
                let scales = &x.scales[place_in_x..][..tile_rows];
                let sums = &mut sums[half * TILE_COLUMNS..];
                match unit {
                    HalfUnit::Emulated => emulated_product(inputs, &widened[part], scales, sums),
                    #[cfg(target_arch = "x86_64")]
                    HalfUnit::Avx512Fp16 => {
                        let ahead = x86::Ahead::part(panel, 2 * (tile - tiles.start) + half, 2 * tiles.len());
                        x86::product(inputs, &panel[part], ahead, scales, sums);
                    }
                }
            }
            place.finish(simd, row, sums);
        }
    }
}

/// The products of `x [width / GROUP, R, GROUP]` and `weights [width, TILE_COLUMNS, 2]` times `scales [R]`, to the first columns of
/// `sums [R, PANEL]`.
#[inline(always)]
fn emulated_product(x: &[u32], weights: &[f32], scales: &[f32], sums: &mut [f32]) {
    let rows = scales.len();
    for ((row, sums), scale) in sums.chunks_mut(PANEL).enumerate().zip(scales) {
        let mut pair_sums = [0f32; PANEL];
        for (x, weights) in x.chunks(CHAINS * CHAIN * rows).zip(weights.chunks(CHAINS * CHAIN * PANEL)) {
            let mut total = [0f32; PANEL];
            for (number, (x, weights)) in x.chunks(CHAIN * rows).zip(weights.chunks(CHAIN * PANEL)).enumerate() {
                let mut chain = [0f32; PANEL];
                for (k, weights) in weights.chunks_exact(PANEL).enumerate() {
                    let pair = x[(k / GROUP * rows + row) * GROUP + k % GROUP];
                    let x = [pair as u16, (pair >> 16) as u16].map(|half| f16::from_bits(half).to_f32());
                    let (chain, _) = chain.as_chunks_mut::<2>();
                    let (weights, _) = weights.as_chunks::<2>();
                    for (sums, weights) in chain.iter_mut().zip(weights) {
                        for ((sum, x), weight) in sums.iter_mut().zip(x).zip(weights) {
                            *sum = multiply_add_f16(x, *weight, *sum);
                        }
                    }
                }
                for (total, chain) in total.iter_mut().zip(chain) {
                    *total = if number == 0 { chain } else { multiply_add_f16(1.0, chain, *total) };
                }
            }
            for (sum, total) in pair_sums.iter_mut().zip(total) {
                *sum += total;
            }
        }
        for (sum, [even, odd]) in sums.iter_mut().zip(pair_sums.as_chunks::<2>().0) {
            *sum = (even + odd) * scale;
        }
    }
}

/// `a·b + c` of f16 values, rounded once to the nearest f16, ties to even; it must not be beyond f16's range.
///
/// The product is exact in f32. So is its sum with `c` in f64, unless the smaller one is so far below the larger that it
/// could not decide the rounding.
#[inline(always)]
fn multiply_add_f16(a: f32, b: f32, c: f32) -> f32 {
    const EXPONENT: u32 = 52;
    /// The exponent field of 2^-14, below which f16 values lie 2^-24 apart.
    const SMALLEST_NORMAL: u64 = 1023 - 14;
    let sum = f64::from(a * b) + f64::from(c);
    let exponent = ((sum.to_bits() >> EXPONENT) & 0x7ff).max(SMALLEST_NORMAL);
    // Numbers near 1.5·2^(e + 42) lie 2^(e - 10) apart, as f16 values near 2^e do.
    let rounder = f64::from_bits(((exponent + 42) << EXPONENT) | (1 << (EXPONENT - 1)));
    ((sum + rounder) - rounder) as f32
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::f16;

    use super::{CHAIN, CHAINS, GROUP, PANEL, TILE_COLUMNS, TILE_ROWS};

    /// What follows in memory, to ask for while a register tile is computed: so many bytes in each turn of its loop.
    #[derive(Clone, Copy)]
    pub(super) struct Ahead {
        from: *const u8,
        bytes: usize,
    }

    impl Ahead {
        #[cfg(test)]
        pub(super) const NOTHING: Self = Self { from: std::ptr::null(), bytes: 0 };

        /// Part number `part` of `parts` of the panel that follows `panel`, which as a rule is this thread's next one. Beyond the
        /// weight's end nothing is read: an address is all that this is.
        pub(super) fn part(panel: &[f16], part: usize, parts: usize) -> Self {
            let (bytes, turns) = (size_of_val(panel), panel.len() / (2 * PANEL));
            let from = panel.as_ptr_range().end.cast::<u8>().wrapping_add(bytes * part / parts);
            Self { from, bytes: bytes.div_ceil(parts * turns) }
        }
    }

    /// As [`super::emulated_product`], with weights in f16, for up to [`TILE_ROWS`] rows.
    pub(super) fn product(x: &[u32], weights: &[f16], ahead: Ahead, scales: &[f32], sums: &mut [f32]) {
        let (rows, width) = (scales.len(), weights.len() / PANEL);
        assert!(rows <= TILE_ROWS && x.len() == rows * width && width.is_multiple_of(GROUP));
        assert!(rows == 0 || sums.len() >= (rows - 1) * PANEL + TILE_COLUMNS);
        assert!(super::HalfUnit::best() == super::HalfUnit::Avx512Fp16, "this CPU has no AVX512-FP16");
        // SAFETY: the CPU has the instructions and the slices the sizes that the tile wants, by the assertions.
        unsafe {
            match rows {
                0 => {}
                1 => tile::<1>(x, weights, ahead, scales, sums),
                2 => tile::<2>(x, weights, ahead, scales, sums),
                3 => tile::<3>(x, weights, ahead, scales, sums),
                4 => tile::<4>(x, weights, ahead, scales, sums),
                5 => tile::<5>(x, weights, ahead, scales, sums),
                6 => tile::<6>(x, weights, ahead, scales, sums),
                7 => tile::<7>(x, weights, ahead, scales, sums),
                8 => tile::<8>(x, weights, ahead, scales, sums),
                9 => tile::<9>(x, weights, ahead, scales, sums),
                10 => tile::<10>(x, weights, ahead, scales, sums),
                11 => tile::<11>(x, weights, ahead, scales, sums),
                12 => tile::<12>(x, weights, ahead, scales, sums),
                13 => tile::<13>(x, weights, ahead, scales, sums),
                _ => tile::<TILE_ROWS>(x, weights, ahead, scales, sums),
            }
        }
    }

    /// Values of a vector.
    const VECTOR: usize = PANEL / 2;

    /// Vectors in cache lines of their own.
    #[repr(align(64))]
    struct Aligned<T>([T; TILE_ROWS * PANEL]);

    /// # Safety
    /// `x [width / GROUP, R, GROUP]`, `weights [width, TILE_COLUMNS, 2]` and `scales [R]` have these sizes, and `sums` R rows of
    /// TILE_COLUMNS, PANEL apart.
    #[target_feature(enable = "avx512fp16,avx512f,avx512vl,avx512bw,avx512dq")]
    unsafe fn tile<const R: usize>(x: &[u32], weights: &[f16], ahead: Ahead, scales: &[f32], sums: &mut [f32]) {
        let width = x.len() / R;
        let (x, weights, sums) = (x.as_ptr(), weights.as_ptr(), sums.as_mut_ptr());
        // Two halves of a vector each: sums over chains in f16, and of these in f32.
        let (mut totals, mut pair_sums) = (Aligned([f16::ZERO; _]), Aligned([0f32; _]));
        let (totals, pair_sums) = (in_memory(totals.0.as_mut_ptr()), in_memory(pair_sums.0.as_mut_ptr()));
        for first in (0..width).step_by(CHAINS * CHAIN) {
            let end = (first + CHAINS * CHAIN).min(width);
            for first_of_chain in (first..end).step_by(CHAIN) {
                let mut chains = [[_mm512_setzero_ph(); 2]; R];
                // SAFETY: k is below width, totals are for all rows, and the caller vouches for the sizes.
                unsafe {
                    for group in (first_of_chain..(first_of_chain + CHAIN).min(end)).step_by(GROUP) {
                        for k in group..group + GROUP {
                            _mm_prefetch::<_MM_HINT_T1>(ahead.from.wrapping_add(k * ahead.bytes).cast());
                            let weights = weights.add(k * PANEL);
                            let weights = [load(weights), load(weights.add(VECTOR))];
                            let x = in_memory(x.add(group * R + k - group).cast_mut());
                            for (row, chains) in chains.iter_mut().enumerate() {
                                let inputs = _mm512_castsi512_ph(_mm512_set1_epi32(x.add(row * GROUP).read() as i32));
                                for (chain, weight) in chains.iter_mut().zip(weights) {
                                    *chain = _mm512_fmadd_ph(inputs, weight, *chain);
                                }
                            }
                        }
                    }
                    for (index, &chain) in chains.as_flattened().iter().enumerate() {
                        let total = totals.add(index * VECTOR);
                        let is_first = first_of_chain == first;
                        let chain = if is_first { chain } else { _mm512_add_ph(chain, load(total)) };
                        _mm512_storeu_si512(total.cast(), _mm512_castph_si512(chain));
                    }
                }
            }
            let totals = in_memory(totals);
            for index in 0..R * 4 {
                // SAFETY: four vectors of f32 a row, half as many of f16.
                unsafe {
                    let total = _mm256_loadu_si256(totals.add(index * 16).cast());
                    let total = _mm512_cvtxph_ps(_mm256_castsi256_ph(total));
                    let sum = pair_sums.add(index * 16);
                    let total = if first == 0 { total } else { _mm512_add_ps(_mm512_loadu_ps(sum), total) };
                    _mm512_storeu_ps(sum, total);
                }
            }
        }
        // The sums of even and of odd inputs are neighbours.
        let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        for (row, &scale) in scales.iter().enumerate() {
            for half in 0..2 {
                // SAFETY: as above, and the caller vouches for the sums.
                unsafe {
                    let pairs = pair_sums.add((row * 2 + half) * VECTOR);
                    let pairs = [_mm512_loadu_ps(pairs), _mm512_loadu_ps(pairs.add(16))];
                    let (even, odd) = (
                        _mm512_permutex2var_ps(pairs[0], even, pairs[1]),
                        _mm512_permutex2var_ps(pairs[0], odd, pairs[1]),
                    );
                    let sum = _mm512_mul_ps(_mm512_add_ps(even, odd), _mm512_set1_ps(scale));
                    _mm512_storeu_ps(sums.add(row * PANEL + half * 16), sum);
                }
            }
        }
    }

    /// The same pointer, to values of which the compiler knows nothing: it would keep them in registers that the chains need, and
    /// widening them there takes three times the instructions that compete with products.
    #[inline(always)]
    fn in_memory<T>(mut values: *mut T) -> *mut T {
        // SAFETY: no instruction at all.
        unsafe { std::arch::asm!("/* {0} */", inout(reg) values, options(nostack, preserves_flags)) };
        values
    }

    /// # Safety
    /// There are 32 values.
    #[inline]
    #[target_feature(enable = "avx512fp16,avx512f")]
    unsafe fn load(values: *const f16) -> __m512h {
        // SAFETY: the caller vouches for the values.
        unsafe { _mm512_castsi512_ph(_mm512_loadu_si512(values.cast())) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn emulated_multiply_adds_round_as_f16_arithmetic(a: u16, b: u16, c: u16) {
            let [a, b, c] = [a, b, c].map(f16::from_bits);
            let exact = f64::from(a) * f64::from(b) + f64::from(c);
            prop_assume!([a, b, c].iter().all(|x| x.is_finite()) && exact.abs() < 65504.0);
            let ours = multiply_add_f16(a.to_f32(), b.to_f32(), c.to_f32());
            // `half` may round to f32 first: its result or a neighbour is the nearest, and of two such the even one.
            let near = f16::from_f64(exact).to_bits();
            let nearest = [near.wrapping_sub(1), near, near.wrapping_add(1)].map(f16::from_bits).into_iter();
            let nearest = nearest.filter(|x| x.is_finite()).min_by(|x, y| {
                let distance = |x: &f16| (f64::from(*x) - exact).abs();
                distance(x).total_cmp(&distance(y)).then((x.to_bits() & 1).cmp(&(y.to_bits() & 1)))
            });
            prop_assert_eq!(f64::from(ours), f64::from(nearest.unwrap()));
        }
    }

    #[test]
    fn every_unit_gives_the_same_sums() {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Inputs and weights of very different sizes, down to subnormal ones.
            let exponent = (state >> 60) as i32 - 11;
            f16::from_f32(((state >> 30) as u32 as f32 / (1u64 << 31) as f32 - 1.0) * 2f32.powi(exponent.min(4)))
        };
        for (rows, width) in [(1, 4), (2, 60), (5, 64), (13, 68), (14, 300)] {
            let x: Vec<u32> = (0..rows * width).map(|_| pair_of(next(), next())).collect();
            let weights: Vec<f16> = (0..width * PANEL).map(|_| next()).collect();
            let widened: Vec<f32> = weights.iter().map(|weight| weight.to_f32()).collect();
            let scales: Vec<f32> = (0..rows).map(|row| 2f32.powi(row as i32 - 5)).collect();
            let mut emulated = vec![0f32; rows * PANEL];
            emulated_product(&x, &widened, &scales, &mut emulated);
            #[cfg(target_arch = "x86_64")]
            if HalfUnit::available().contains(&HalfUnit::Avx512Fp16) {
                let mut native = vec![0f32; rows * PANEL];
                x86::product(&x, &weights, x86::Ahead::NOTHING, &scales, &mut native);
                assert_eq!(native, emulated, "{rows} rows of {width}");
            }
            // Against exact sums: each of the roundings is half a unit in the last place of a sum so far.
            for (row, sums) in emulated.chunks(PANEL).enumerate() {
                for (column, &sum) in sums[..TILE_COLUMNS].iter().enumerate() {
                    let products = (0..2 * width).map(|k| {
                        let word = x[(k / GROUP_INPUTS * rows + row) * GROUP + k / 2 % GROUP];
                        let weight = widened[k / 2 * PANEL + 2 * column + k % 2];
                        f64::from(f16::from_bits((word >> (16 * (k % 2))) as u16)) * f64::from(weight)
                    });
                    let (exact, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                    let sum = f64::from(sum / scales[row]);
                    assert!((sum - exact).abs() <= size * (CHAIN + CHAINS) as f64 / 2048.0 + 1e-6, "{sum} {exact}");
                }
            }
        }
    }
}
