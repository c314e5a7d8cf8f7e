//! One program for every x86-64: kernels are written once over [`Simd`] and compiled for each instruction set.
//!
//! The binary is built for the oldest CPU; [`dispatch`] picks the widest version that the CPU at hand runs. Plain
//! loops inside a [`Kernel`] are vectorised by the compiler for that version, so only products need explicit vectors.

use half::{bf16, f16};

/// Bytes of a cache line.
pub(super) const LINE_BYTES: usize = 64;

/// An instruction set, as a token that exists only where the CPU has it.
///
/// All methods are `inline(always)`, as every function of a kernel has to be: what is not inlined into the
/// function that enables the instruction set is compiled without it.
pub(super) trait Simd: Copy {
    /// A vector of `LANES` f32 values.
    type Vector: Copy;
    const LANES: usize;
    /// Vectors in one row of a register tile: with six rows, accumulators and operands fill the registers.
    const TILE_VECTORS: usize;

    fn splat(self, value: f32) -> Self::Vector;
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a·b + c`, rounded once where the CPU can.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// As [`Simd::mul_add`], of single values, for loops that the compiler vectorises.
    fn mul_add_f32(self, a: f32, b: f32, c: f32) -> f32;

    /// Asks for the cache line of an address, which need not be one of anything, in the core's second cache.
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint that never faults, and does nothing on a CPU that does not know it.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address.cast())
        };
        #[cfg(not(target_arch = "x86_64"))]
        let _ = address;
    }

    /// As [`Simd::prefetch`], of a line that will be written, in the core's first cache.
    #[inline(always)]
    fn prefetch_for_write(self, address: *const u8) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as for `prefetch`.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_ET0 }>(address.cast())
        };
        #[cfg(not(target_arch = "x86_64"))]
        let _ = address;
    }

    /// # Safety
    /// `LANES` values from `src` on can be read.
    unsafe fn load(self, src: *const f32) -> Self::Vector;
    /// Widens bf16 values, which changes none of them.
    ///
    /// # Safety
    /// `LANES` values from `src` on can be read.
    unsafe fn load_bf16(self, src: *const bf16) -> Self::Vector;
    /// Widens f16 values, which changes none of them.
    ///
    /// # Safety
    /// `LANES` values from `src` on can be read.
    unsafe fn load_f16(self, src: *const f16) -> Self::Vector;
    /// # Safety
    /// `LANES` values from `dst` on can be written.
    unsafe fn store(self, dst: *mut f32, value: Self::Vector);
    /// Rounds to f16, to nearest with ties to even.
    ///
    /// # Safety
    /// `LANES` values from `dst` on can be written.
    unsafe fn store_f16(self, dst: *mut f16, value: Self::Vector);
    /// `dst[c][r] = src[r][c]` for 8 rows and 8 columns.
    ///
    /// # Safety
    /// Eight rows of 8 values, `src_stride` apart, can be read from `src` on, and likewise written to `dst`.
    unsafe fn transpose_8x8(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize);
}

/// A computation that can be compiled for any instruction set; `run` has to be `inline(always)`.
pub(super) trait Kernel {
    fn run<S: Simd>(self, simd: S);
}

/// The instruction sets that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// Every level that this CPU runs, for tests that compare them.
    #[cfg(test)]
    pub(super) fn available() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let all = [Self::Portable, Self::Avx2, Self::Avx512];
        #[cfg(not(target_arch = "x86_64"))]
        let all = [Self::Portable];
        all.into_iter().filter(|&level| level <= Self::best()).collect()
    }

    /// The widest level that this CPU runs.
    pub(super) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                {
                    return Self::Avx512;
                }
                return Self::Avx2;
            }
        }
        Self::Portable
    }
}

/// Runs `kernel` in the widest version that this CPU runs.
#[inline]
pub(super) fn dispatch(kernel: impl Kernel) {
    dispatch_at(Level::best(), kernel);
}

/// Runs `kernel` in the version for `level`, which this CPU has to run.
#[inline]
pub(super) fn dispatch_at(level: Level, kernel: impl Kernel) {
    assert!(level <= Level::best(), "this CPU does not run {level:?}");
    match level {
        Level::Portable => kernel.run(Portable),
        // SAFETY: the assertion above: the CPU said that it has the features of this level.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::run_avx2(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::run_avx512(kernel) },
    }
}

/// `e^x` with a relative error under 1e-6 for x in −87.3 to 88.3; 0 below, and no more than `e^88.37` above.
///
/// A polynomial in plain arithmetic, so that a loop over it is vectorised. NaN stays NaN.
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: f32) -> f32 {
    /// ln 2^-126: smaller results would not be normal numbers, which are slow and mean nothing here.
    const LOWEST: f32 = -87.336_54;
    /// A little less than ln 2^127.5, from where on the exponent below would overflow.
    const HIGHEST: f32 = 88.37;
    /// Adding 1.5·2^23 rounds to an integer and leaves that integer in the low bits of the sum.
    const ROUNDER: f32 = 12_582_912.0;
    /// ln 2 as a short number, whose small multiples are exact, and the rest.
    const LN_2: (f32, f32) = (355.0 / 512.0, -2.121_944_4e-4);

    let clamped = if x < LOWEST { LOWEST } else { x };
    let clamped = if clamped > HIGHEST { HIGHEST } else { clamped };
    // e^x = 2^n · e^r with an integer n and |r| <= ln(2) / 2.
    let rounded = simd.mul_add_f32(clamped, std::f32::consts::LOG2_E, ROUNDER);
    let n = rounded - ROUNDER;
    let r = simd.mul_add_f32(n, -LN_2.0, clamped);
    let r = simd.mul_add_f32(n, -LN_2.1, r);
    // The minimax polynomial of Cephes' expf.
    let p = simd.mul_add_f32(1.987_569_1e-4, r, 1.398_2e-3);
    let p = simd.mul_add_f32(p, r, 8.333_452e-3);
    let p = simd.mul_add_f32(p, r, 4.166_579_6e-2);
    let p = simd.mul_add_f32(p, r, 1.666_666_5e-1);
    let p = simd.mul_add_f32(p, r, 0.5);
    let p = simd.mul_add_f32(p, r * r, r) + 1.0;
    let two_to_n = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    if x < LOWEST { 0.0 } else { p * two_to_n }
}

/// Any CPU: four lanes that the compiler keeps in the vectors of the baseline.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Simd for Portable {
    type Vector = [f32; 4];
    const LANES: usize = 4;
    const TILE_VECTORS: usize = 2;

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; 4] {
        [value; 4]
    }

    #[inline(always)]
    fn mul(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        [a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]]
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        [a[0] * b[0] + c[0], a[1] * b[1] + c[1], a[2] * b[2] + c[2], a[3] * b[3] + c[3]]
    }

    #[inline(always)]
    fn mul_add_f32(self, a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }

    #[inline(always)]
    unsafe fn load(self, src: *const f32) -> [f32; 4] {
        // SAFETY: the caller vouches for four values; f32 needs no more alignment than it has.
        unsafe { src.cast::<[f32; 4]>().read() }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, src: *const bf16) -> [f32; 4] {
        // SAFETY: as for `load`.
        unsafe { src.cast::<[bf16; 4]>().read_unaligned() }.map(bf16::to_f32)
    }

    #[inline(always)]
    unsafe fn load_f16(self, src: *const f16) -> [f32; 4] {
        // SAFETY: as for `load`.
        unsafe { src.cast::<[f16; 4]>().read_unaligned() }.map(f16::to_f32)
    }

    #[inline(always)]
    unsafe fn store(self, dst: *mut f32, value: [f32; 4]) {
        // SAFETY: as for `load`.
        unsafe { dst.cast::<[f32; 4]>().write(value) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, dst: *mut f16, value: [f32; 4]) {
        // SAFETY: as for `load`.
        unsafe { dst.cast::<[f16; 4]>().write(value.map(f16::from_f32)) }
    }

    #[inline(always)]
    unsafe fn transpose_8x8(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        for r in 0..8 {
            for c in 0..8 {
                // SAFETY: the caller vouches for 8 rows of 8 values on both sides.
                unsafe { *dst.add(c * dst_stride + r) = *src.add(r * src_stride + c) };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::{Kernel, Simd};

    // Calling the intrinsics is sound in both implementations below because their tokens are made only in the two
    // `run_` functions, which enable the instruction sets; the pointers are as the trait's methods demand.

    #[derive(Clone, Copy)]
    pub(super) struct Avx2(());

    #[derive(Clone, Copy)]
    pub(super) struct Avx512(());

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn run_avx2(kernel: impl Kernel) {
        kernel.run(Avx2(()));
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq")]
    pub(super) fn run_avx512(kernel: impl Kernel) {
        kernel.run(Avx512(()));
    }

    impl Simd for Avx2 {
        type Vector = __m256;
        const LANES: usize = 8;
        const TILE_VECTORS: usize = 2;

        #[inline(always)]
        fn splat(self, value: f32) -> __m256 {
            // SAFETY: the token proves AVX2, FMA and F16C, here and below.
            unsafe { _mm256_set1_ps(value) }
        }

        #[inline(always)]
        fn mul(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: as for `splat`.
            unsafe { _mm256_mul_ps(a, b) }
        }

        #[inline(always)]
        fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: as for `splat`.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        fn mul_add_f32(self, a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }

        #[inline(always)]
        unsafe fn load(self, src: *const f32) -> __m256 {
            // SAFETY: as for `splat`; the caller vouches for 8 values.
            unsafe { _mm256_loadu_ps(src) }
        }

        #[inline(always)]
        unsafe fn load_bf16(self, src: *const bf16) -> __m256 {
            // SAFETY: as for `splat`; the caller vouches for 8 values. A bf16 is the upper half of its f32.
            unsafe {
                let halves = _mm_loadu_si128(src.cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
            }
        }

        #[inline(always)]
        unsafe fn load_f16(self, src: *const f16) -> __m256 {
            // SAFETY: as for `splat`, which proves F16C, too; the caller vouches for 8 values.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(src.cast())) }
        }

        #[inline(always)]
        unsafe fn store(self, dst: *mut f32, value: __m256) {
            // SAFETY: as for `splat`; the caller vouches for 8 values.
            unsafe { _mm256_storeu_ps(dst, value) }
        }

        #[inline(always)]
        unsafe fn store_f16(self, dst: *mut f16, value: __m256) {
            // SAFETY: as for `splat`, which proves F16C, too; the caller vouches for 8 values.
            unsafe { _mm_storeu_si128(dst.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)) }
        }

        #[inline(always)]
        unsafe fn transpose_8x8(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
            // SAFETY: as for `splat`; the caller vouches for 8 rows of 8 values on both sides.
            unsafe { transpose_8x8(src, src_stride, dst, dst_stride) }
        }
    }

    impl Simd for Avx512 {
        type Vector = __m512;
        const LANES: usize = 16;
        const TILE_VECTORS: usize = 4;

        #[inline(always)]
        fn splat(self, value: f32) -> __m512 {
            // SAFETY: the token proves AVX-512 (F, VL, BW, DQ), AVX2 and FMA, here and below.
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: as for `splat`.
            unsafe { _mm512_mul_ps(a, b) }
        }

        #[inline(always)]
        fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: as for `splat`.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        fn mul_add_f32(self, a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }

        #[inline(always)]
        unsafe fn load(self, src: *const f32) -> __m512 {
            // SAFETY: as for `splat`; the caller vouches for 16 values.
            unsafe { _mm512_loadu_ps(src) }
        }

        #[inline(always)]
        unsafe fn load_bf16(self, src: *const bf16) -> __m512 {
            // SAFETY: as for `splat`; the caller vouches for 16 values. A bf16 is the upper half of its f32.
            unsafe {
                let halves = _mm256_loadu_si256(src.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
            }
        }

        #[inline(always)]
        unsafe fn load_f16(self, src: *const f16) -> __m512 {
            // SAFETY: as for `splat`; the caller vouches for 16 values.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(src.cast())) }
        }

        #[inline(always)]
        unsafe fn store(self, dst: *mut f32, value: __m512) {
            // SAFETY: as for `splat`; the caller vouches for 16 values.
            unsafe { _mm512_storeu_ps(dst, value) }
        }

        #[inline(always)]
        unsafe fn store_f16(self, dst: *mut f16, value: __m512) {
            // SAFETY: as for `splat`; the caller vouches for 16 values.
            unsafe { _mm256_storeu_si256(dst.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)) }
        }

        #[inline(always)]
        unsafe fn transpose_8x8(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
            // SAFETY: as for `splat`; the caller vouches for 8 rows of 8 values on both sides.
            unsafe { transpose_8x8(src, src_stride, dst, dst_stride) }
        }
    }

    /// # Safety
    /// As [`Simd::transpose_8x8`], on a CPU with AVX.
    #[inline(always)]
    unsafe fn transpose_8x8(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: the caller vouches for the CPU and the memory.
        unsafe {
            // Rows r and r + 4 share a vector, so that the transposition stays within halves.
            let pair = |r: usize, c: usize| {
                let low = _mm256_castps128_ps256(_mm_loadu_ps(src.add(r * src_stride + c)));
                _mm256_insertf128_ps::<1>(low, _mm_loadu_ps(src.add((r + 4) * src_stride + c)))
            };
            for c in [0, 4] {
                let (r0, r1, r2, r3) = (pair(0, c), pair(1, c), pair(2, c), pair(3, c));
                let (t0, t1) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
                let (t2, t3) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
                let columns = [
                    _mm256_shuffle_ps::<0b01_00_01_00>(t0, t2),
                    _mm256_shuffle_ps::<0b11_10_11_10>(t0, t2),
                    _mm256_shuffle_ps::<0b01_00_01_00>(t1, t3),
                    _mm256_shuffle_ps::<0b11_10_11_10>(t1, t3),
                ];
                for (i, column) in columns.into_iter().enumerate() {
                    _mm256_storeu_ps(dst.add((c + i) * dst_stride), column);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct ExpOf<'a> {
        x: &'a [f32],
        y: &'a mut [f32],
    }

    impl Kernel for ExpOf<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for (y, &x) in self.y.iter_mut().zip(self.x) {
                *y = exp(simd, x);
            }
        }
    }

    fn exp_at(level: Level, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        dispatch_at(level, ExpOf { x, y: &mut y });
        y
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        let x: Vec<f32> = (-873_000..=883_000).map(|i| i as f32 * 1e-4).collect();
        for level in Level::available() {
            let worst = x.iter().zip(exp_at(level, &x)).map(|(&x, y)| {
                let exact = f64::from(x).exp();
                (f64::from(y) - exact).abs() / exact
            });
            let worst = worst.fold(0.0, f64::max);
            assert!(worst < 2.5e-7, "{level:?}: {worst:e}");
        }
    }

    #[test]
    fn exp_at_and_beyond_its_ends() {
        for level in Level::available() {
            let y = exp_at(level, &[0.0, -0.0, f32::NEG_INFINITY, f32::MIN, -87.4, f32::INFINITY, f32::MAX, f32::NAN]);
            assert_eq!(y[..5], [1.0, 1.0, 0.0, 0.0, 0.0], "{level:?}");
            assert!(y[5].is_finite() && y[5] > 2e38 && y[6] == y[5], "{level:?}: {y:?}");
            assert!(y[7].is_nan(), "{level:?}");
        }
    }
}
