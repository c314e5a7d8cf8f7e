//! Products in half precision, for those who ask for them: on a CPU with AVX512-FP16 twice the multiply-adds of f32.
//!
//! Weights and inputs are f16. Over 64 inputs at a time an output is one chain of f16 multiply-adds, each rounded once,
//! and these sums are added in f32. So a row is the same to the bit in any company, and on every CPU: where the
//! instructions are missing, the same roundings are computed in f64.
//!
//! f16 reaches from 2^-24 to 65504. A row is scaled by a power of two so that its largest input is between 16 and 32; with
//! weights up to [`MAX_F16_WEIGHT`] no sum of 64 products then leaves that range, and what is too small for it is less
//! than 2^-28 of the largest input.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Once;

use half::f16;
use rayon::prelude::*;

use super::linear::{Ahead, Place};
use super::panels::PANEL;
use super::rows_per_task;
use super::simd::{Kernel, Level, Simd, dispatch_at};

/// The largest weight of a product in f16.
pub(super) const MAX_F16_WEIGHT: f32 = 16.0;
/// Inputs whose products are summed in f16.
const CHAIN: usize = 64;
/// The exponent that the largest input of a row is scaled to.
const ROW_EXPONENT: i32 = 4;
/// Rows of a register tile.
const TILE_ROWS: usize = 14;
/// Rows of a block that one thread rounds for itself: with 2,048 inputs each, 800 KiB of its core's second cache.
const BLOCK_ROWS: usize = 98;
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

/// Rows of inputs as f16.
pub(super) struct HalfRows<'a> {
    depth: usize,
    /// Which rows of the product they are.
    rows: Range<usize>,
    /// Each input twice in one word, so that one broadcast of it fills a vector `[N, depth]`.
    pairs: &'a [u32],
    /// What brings a row's sums back to its own scale `[N]`; NaN where an input is not finite.
    scales: &'a [f32],
}

impl HalfRows<'_> {
    pub(super) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }
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
        return with_half_rows(level, x, depth, 0..rows, rows_per_task(depth), work);
    }
    // Blocks of like size, so that no thread waits for another's last one.
    (0..blocks).into_par_iter().for_each(|block| {
        let rows = rows * block / blocks..rows * (block + 1) / blocks;
        with_half_rows(level, x, depth, rows, usize::MAX, &work);
    });
}

/// Rounds some rows, `rows_at_once` in a task of their own.
fn with_half_rows(
    level: Level,
    x: &[f32],
    depth: usize,
    rows: Range<usize>,
    rows_at_once: usize,
    work: impl FnOnce(&HalfRows),
) {
    let x = &x[rows.start * depth..rows.end * depth];
    // Taken, not borrowed: while it waits for others, a thread may begin another product.
    let (mut pairs, mut scales) = HALF_ROWS.take();
    if pairs.len() < x.len() {
        pairs.resize(x.len(), 0);
    }
    if scales.len() < rows.len() {
        scales.resize(rows.len(), 0.0);
    }
    let (rounded, row_scales) = (&mut pairs[..x.len()], &mut scales[..rows.len()]);
    let round = |pairs: &mut [u32], scales: &mut [f32], x: &[f32]| {
        dispatch_at(level, RoundRows { x, depth, pairs, scales });
    };
    if rows_at_once < rows.len() {
        rounded
            .par_chunks_mut(rows_at_once * depth)
            .zip(row_scales.par_chunks_mut(rows_at_once))
            .zip(x.par_chunks(rows_at_once * depth))
            .for_each(|((pairs, scales), x)| round(pairs, scales, x));
    } else {
        round(rounded, row_scales, x);
    }
    work(&HalfRows { depth, rows, pairs: rounded, scales: row_scales });
    HALF_ROWS.set((pairs, scales));
}

struct RoundRows<'a> {
    x: &'a [f32],
    depth: usize,
    pairs: &'a mut [u32],
    scales: &'a mut [f32],
}

impl Kernel for RoundRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let rows = self.pairs.chunks_exact_mut(self.depth).zip(self.x.chunks_exact(self.depth));
        for ((pairs, x), scale) in rows.zip(self.scales) {
            // Of positive numbers the larger one has the larger bits; NaN has the largest.
            let largest = x.iter().fold(0, |largest, x| (x.to_bits() & 0x7fff_ffff).max(largest));
            let exponent = (largest >> 23) as i32 - 127;
            if exponent == 128 {
                pairs.fill(0);
                *scale = f32::NAN;
                continue;
            }
            // Bounded, so that both powers are normal numbers; smaller rows are nothing to f16.
            let power = (ROW_EXPONENT - exponent).clamp(-120, 120);
            let power_of_two = |power: i32| f32::from_bits(((power + 127) as u32) << 23);
            *scale = power_of_two(-power);
            let factor = power_of_two(power);
            for (pairs, x) in pairs.chunks_mut(S::LANES).zip(x.chunks(S::LANES)) {
                if x.len() == S::LANES {
                    // SAFETY: both have as many values.
                    unsafe {
                        simd.store_f16_pairs(pairs.as_mut_ptr(), simd.mul(simd.load(x.as_ptr()), simd.splat(factor)))
                    };
                } else {
                    for (pair, x) in pairs.iter_mut().zip(x) {
                        *pair = twice(f16::from_f32(x * factor));
                    }
                }
            }
        }
    }
}

/// A value in both halves of a word.
#[inline(always)]
pub(super) fn twice(value: f16) -> u32 {
    u32::from(value.to_bits()) * 0x1_0001
}

/// Some rows times one panel, in f16.
pub(super) struct HalfTask<'a> {
    pub(super) place: Place,
    pub(super) x: &'a HalfRows<'a>,
    /// `[depth, PANEL]`
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
        let Self { place, x, panel, unit, widened, sums } = self;
        if sums.len() < TILE_ROWS * PANEL {
            sums.resize(TILE_ROWS * PANEL, 0.0);
        }
        if unit == HalfUnit::Emulated {
            widened.clear();
            widened.extend(panel.iter().map(|weight| weight.to_f32()));
        }
        let tiles = place.rows.len().div_ceil(TILE_ROWS);
        let mut row = place.rows.start;
        for tile in 0..tiles {
            // Tiles of like size: the last rows alone would wait for each other's sums.
            let tile_rows = (place.rows.end - row).div_ceil(tiles - tile);
            let sums = &mut sums[..tile_rows * PANEL];
            sums.fill(0.0);
            let place_in_x = row - x.rows.start;
            let inputs = &x.pairs[place_in_x * x.depth..][..tile_rows * x.depth];
            place.prefetch_output(simd, row, tile_rows);
            // The panel that follows, in parts, while this one is computed with.
            let share = |tile: usize| size_of_val(panel) * tile / tiles;
            for offset in (share(tile)..share(tile + 1)).step_by(Ahead::LINE_BYTES) {
                simd.prefetch(panel.as_ptr_range().end.cast::<u8>().wrapping_add(offset));
            }
            match unit {
                HalfUnit::Emulated => emulated_product(inputs, x.depth, widened, sums),
                #[cfg(target_arch = "x86_64")]
                HalfUnit::Avx512Fp16 => x86::product(inputs, x.depth, panel, sums),
            }
            for (sums, scale) in sums.chunks_exact_mut(PANEL).zip(&x.scales[place_in_x..]) {
                for sum in sums {
                    *sum *= scale;
                }
            }
            place.finish(simd, row, sums);
            row += tile_rows;
        }
    }
}

/// `sums [R, PANEL]` plus the products of `x [R, depth]` and `weights [depth, PANEL]`.
#[inline(always)]
fn emulated_product(x: &[u32], depth: usize, weights: &[f32], sums: &mut [f32]) {
    for (x, sums) in x.chunks_exact(depth).zip(sums.chunks_exact_mut(PANEL)) {
        for (x, weights) in x.chunks(CHAIN).zip(weights.chunks(CHAIN * PANEL)) {
            let mut chain = [0f32; PANEL];
            for (&pair, weights) in x.iter().zip(weights.chunks_exact(PANEL)) {
                let x = f16::from_bits(pair as u16).to_f32();
                for (sum, weight) in chain.iter_mut().zip(weights) {
                    *sum = multiply_add_f16(x, *weight, *sum);
                }
            }
            for (sum, chain) in sums.iter_mut().zip(chain) {
                *sum += chain;
            }
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

    use super::{CHAIN, PANEL, TILE_ROWS};

    /// As [`super::emulated_product`], with weights in f16, for up to [`TILE_ROWS`] rows.
    pub(super) fn product(x: &[u32], depth: usize, weights: &[f16], sums: &mut [f32]) {
        let rows = sums.len() / PANEL;
        assert!(rows <= TILE_ROWS && x.len() == rows * depth && weights.len() == depth * PANEL);
        assert!(super::HalfUnit::best() == super::HalfUnit::Avx512Fp16, "this CPU has no AVX512-FP16");
        // SAFETY: the CPU has the instructions and the slices the sizes that the tile wants, by the assertions.
        unsafe {
            match rows {
                0 => {}
                1 => tile::<1>(x, depth, weights, sums),
                2 => tile::<2>(x, depth, weights, sums),
                3 => tile::<3>(x, depth, weights, sums),
                4 => tile::<4>(x, depth, weights, sums),
                5 => tile::<5>(x, depth, weights, sums),
                6 => tile::<6>(x, depth, weights, sums),
                7 => tile::<7>(x, depth, weights, sums),
                8 => tile::<8>(x, depth, weights, sums),
                9 => tile::<9>(x, depth, weights, sums),
                10 => tile::<10>(x, depth, weights, sums),
                11 => tile::<11>(x, depth, weights, sums),
                12 => tile::<12>(x, depth, weights, sums),
                13 => tile::<13>(x, depth, weights, sums),
                _ => tile::<TILE_ROWS>(x, depth, weights, sums),
            }
        }
    }

    /// # Safety
    /// `x [R, depth]`, `weights [depth, PANEL]` and `sums [R, PANEL]` have these sizes.
    #[target_feature(enable = "avx512fp16,avx512f,avx512vl,avx512bw,avx512dq")]
    unsafe fn tile<const R: usize>(x: &[u32], depth: usize, weights: &[f16], sums: &mut [f32]) {
        const VECTOR: usize = PANEL / 2;
        let (x, weights, sums) = (x.as_ptr(), weights.as_ptr(), sums.as_mut_ptr());
        for first in (0..depth).step_by(CHAIN) {
            let mut chains = [[_mm512_setzero_ph(); 2]; R];
            for k in first..(first + CHAIN).min(depth) {
                // SAFETY: k is below depth, and the caller vouches for the sizes.
                unsafe {
                    let weight = |half: usize| {
                        _mm512_castsi512_ph(_mm512_loadu_si512(weights.add(k * PANEL + half * VECTOR).cast()))
                    };
                    let weights = [weight(0), weight(1)];
                    for (row, chains) in chains.iter_mut().enumerate() {
                        let input = _mm512_castsi512_ph(_mm512_set1_epi32(x.add(row * depth + k).read() as i32));
                        for (chain, weight) in chains.iter_mut().zip(weights) {
                            *chain = _mm512_fmadd_ph(input, weight, *chain);
                        }
                    }
                }
            }
            for (row, chains) in chains.iter().enumerate() {
                for (half, &chain) in chains.iter().enumerate() {
                    let bits = _mm512_castph_si512(chain);
                    let quarters = [_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64::<1>(bits)];
                    for (quarter, bits) in quarters.into_iter().enumerate() {
                        let chain = _mm512_cvtxph_ps(_mm256_castsi256_ph(bits));
                        // SAFETY: four vectors a row, and the caller vouches for the sizes.
                        unsafe {
                            let sum = sums.add(row * PANEL + half * VECTOR + quarter * 16);
                            _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), chain));
                        }
                    }
                }
            }
        }
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
        for (rows, depth) in [(1, 1), (2, 63), (5, 64), (13, 65), (14, 300)] {
            let x: Vec<u32> = (0..rows * depth).map(|_| twice(next())).collect();
            let weights: Vec<f16> = (0..depth * PANEL).map(|_| next()).collect();
            let widened: Vec<f32> = weights.iter().map(|weight| weight.to_f32()).collect();
            let mut emulated = vec![0f32; rows * PANEL];
            emulated_product(&x, depth, &widened, &mut emulated);
            #[cfg(target_arch = "x86_64")]
            if HalfUnit::available().contains(&HalfUnit::Avx512Fp16) {
                let mut native = vec![0f32; rows * PANEL];
                x86::product(&x, depth, &weights, &mut native);
                assert_eq!(native, emulated, "{rows} rows of {depth}");
            }
            // Against exact sums: each of the roundings is half a unit in the last place of a sum so far.
            for (row, sums) in emulated.chunks(PANEL).enumerate() {
                for (column, &sum) in sums.iter().enumerate() {
                    let products = (0..depth).map(|k| {
                        f64::from(f16::from_bits(x[row * depth + k] as u16)) * f64::from(widened[k * PANEL + column])
                    });
                    let (exact, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                    assert!((f64::from(sum) - exact).abs() <= size * CHAIN as f64 / 2048.0 + 1e-6, "{sum} {exact}");
                }
            }
        }
    }
}
