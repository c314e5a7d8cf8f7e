//! Matrix products on the reference model's shapes, ours beside candle's: `cargo bench --bench products -- [THREADS]`.
//!
//! GFLOP/s and the share of the multiply-add peak that the machine reaches right then; for one row, as in decoding, GB/s of
//! weights and the share of its reading bandwidth. Engines take turns and the best of many turns counts, so that a
//! busy machine disturbs all alike.

use std::hint::black_box;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use mistral_batch::kernels::{Arithmetic, pack_linear, packed_linear_into};
use rayon::prelude::*;

/// Inputs and outputs of the query-key-value, gate-and-up, and down projections, and of the output layer.
const SHAPES: [(usize, usize); 4] = [(768, 1280), (768, 4096), (2048, 768), (768, 32_000)];
/// Copies of a weight that one row is multiplied with in turn, so that they come from memory as a model's layers do.
const COPIES: usize = 16;

fn main() -> Result<()> {
    let threads = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(0);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    pool.map_err(candle_core::Error::wrap)?;
    rayon::scope(|_| run())
}

fn run() -> Result<()> {
    let threads = rayon::current_num_threads();
    let peak = peak_gflops(multiply_adds);
    println!("{threads} threads; multiply-adds in registers: {peak:.0} GFLOP/s in f32");
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512bf16") {
            // SAFETY: the CPU has just said so.
            println!(
                "  {:.0} in bf16, summed in f32 (vdpbf16ps)",
                peak_gflops(|turns| unsafe { x86::bf16_pairs(turns) })
            );
        }
        if is_x86_feature_detected!("avx512fp16") {
            // SAFETY: as above.
            println!("  {:.0} in f16 (vfmadd231ph)", peak_gflops(|turns| unsafe { x86::f16(turns) }));
        }
    }
    println!(
        "{:>22}  {:>14} {:>14} {:>14} {:>14} {:>14}",
        "rows x inputs x outputs", "ours f32", "ours bf16", "ours f16", "in f16", "candle f32"
    );
    for (depth, outputs) in SHAPES {
        let weight = Tensor::rand(-1f32, 1f32, (outputs, depth), &Device::Cpu)?;
        // Stored in three precisions and multiplied in f32; then in f16.
        let stored = |dtype| pack_linear(&weight.to_dtype(dtype)?.to_dtype(DType::F32)?);
        let in_f32 = [DType::F32, DType::BF16, DType::F16].map(|dtype| stored(dtype).map(|w| (w, Arithmetic::F32)));
        let in_f16 = (pack_linear(&weight.to_dtype(DType::F16)?)?, Arithmetic::F16);
        let packed = in_f32.into_iter().chain([Ok(in_f16)]).collect::<Result<Vec<_>>>()?;
        for rows in [4096, 512, 128, 16] {
            let x = Tensor::rand(-1f32, 1f32, (rows, depth), &Device::Cpu)?;
            let output = Tensor::zeros((rows, outputs), DType::F32, &Device::Cpu)?;
            let transposed = weight.t()?;
            let flop = 2.0 * (rows * depth * outputs) as f64;
            let mut best = [f64::MAX; 5];
            for _ in 0..((6e10 / flop) as usize).clamp(3, 60) {
                for (best, (packed, arithmetic)) in best.iter_mut().zip(&packed) {
                    *best = best.min(seconds(|| packed_linear_into(&x, packed, &output, *arithmetic))?);
                }
                best[4] = best[4].min(seconds(|| x.matmul(&transposed).map(|_| ()))?);
            }
            let cells = best
                .map(|seconds| flop / seconds / 1e9)
                .map(|rate| format!("{rate:6.0} {:4.0} %", 100.0 * rate / peak));
            println!(
                "{:>22}  {:>14} {:>14} {:>14} {:>14} {:>14}",
                format!("{rows} x {depth} x {outputs}"),
                cells[0],
                cells[1],
                cells[2],
                cells[3],
                cells[4]
            );
        }
    }

    println!("one row, {COPIES} weights of 768 x 4096 in turn");
    let x = Tensor::rand(-1f32, 1f32, (1, 768), &Device::Cpu)?;
    let output = Tensor::zeros((1, 4096), DType::F32, &Device::Cpu)?;
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let weights: Vec<Tensor> = (0..COPIES)
            .map(|_| {
                pack_linear(
                    &Tensor::rand(-1f32, 1f32, (4096, 768), &Device::Cpu)?.to_dtype(dtype)?.to_dtype(DType::F32)?,
                )
            })
            .collect::<Result<_>>()?;
        let bytes = COPIES * 4096 * 768 * dtype.size_in_bytes();
        let stream = vec![1u64; bytes / 8];
        let (mut ours, mut reading) = (f64::MAX, f64::MAX);
        for _ in 0..30 {
            ours = ours.min(seconds(|| {
                weights.iter().try_for_each(|weight| packed_linear_into(&x, weight, &output, Arithmetic::F32))
            })?);
            reading = reading.min(seconds(|| {
                black_box(
                    stream.par_chunks(1 << 16).map(|part| part.iter().fold(0, |a, b| a ^ b)).reduce(|| 0, |a, b| a ^ b),
                );
                Ok(())
            })?);
        }
        let (ours, reading) = (bytes as f64 / ours / 1e9, bytes as f64 / reading / 1e9);
        println!(
            "  {dtype:?}: {ours:.1} GB/s of weights; reading as many bytes: {reading:.1} GB/s; share {:.0} %",
            100.0 * ours / reading
        );
    }
    Ok(())
}

fn seconds(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

/// The best rate of `work` on all threads at once; it runs so many turns and returns its floating-point operations.
fn peak_gflops(work: impl Fn(usize) -> f64 + Sync) -> f64 {
    const TURNS: usize = 400_000;
    let rate = |_| {
        let started = Instant::now();
        let flop: f64 = rayon::broadcast(|_| black_box(work(TURNS))).into_iter().sum();
        flop / started.elapsed().as_secs_f64() / 1e9
    };
    (0..10).map(rate).fold(0.0, f64::max)
}

/// Runs chains of multiply-adds, in the widest vectors of this CPU; returns how many floating-point operations they were.
fn multiply_adds(turns: usize) -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has just said so.
            return unsafe { x86::avx512(turns) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: as above.
            return unsafe { x86::avx2(turns) };
        }
    }
    let (mut chains, factor) = ([1f32; 32], black_box(0.999f32));
    for _ in 0..turns {
        chains = chains.map(|chain| chain * factor + 0.001);
    }
    black_box(chains);
    (turns * 32 * 2) as f64
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Chains that are under way at a time: more than a multiply-add's latency times the units that compute it.
    const CHAINS: usize = 12;

    #[target_feature(enable = "avx512f")]
    pub fn avx512(turns: usize) -> f64 {
        let mut chains = [_mm512_set1_ps(1.0); CHAINS];
        let addend = _mm512_set1_ps(0.001);
        let factor = black_box(_mm512_set1_ps(0.999));
        for _ in 0..turns {
            for chain in &mut chains {
                *chain = _mm512_fmadd_ps(*chain, factor, addend);
            }
        }
        black_box(chains);
        (turns * CHAINS * 16 * 2) as f64
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16_pairs(turns: usize) -> f64 {
        let mut chains = [_mm512_setzero_ps(); CHAINS];
        let factor = black_box(_mm512_cvtneps_pbh(_mm512_set1_ps(0.5)));
        let factor = _mm512_cvtne2ps_pbh(_mm512_cvtpbh_ps(factor), _mm512_cvtpbh_ps(factor));
        for _ in 0..turns {
            for chain in &mut chains {
                *chain = _mm512_dpbf16_ps(*chain, factor, factor);
            }
        }
        black_box(chains);
        (turns * CHAINS * 32 * 2) as f64
    }

    #[target_feature(enable = "avx512f,avx512fp16")]
    pub fn f16(turns: usize) -> f64 {
        let mut chains = [_mm512_setzero_ph(); CHAINS];
        let factor = black_box(_mm512_castsi512_ph(_mm512_set1_epi16(0x3800))); // 0.5
        for _ in 0..turns {
            for chain in &mut chains {
                *chain = _mm512_fmadd_ph(*chain, factor, factor);
            }
        }
        black_box(chains);
        (turns * CHAINS * 32 * 2) as f64
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn avx2(turns: usize) -> f64 {
        let mut chains = [_mm256_set1_ps(1.0); CHAINS];
        let addend = _mm256_set1_ps(0.001);
        let factor = black_box(_mm256_set1_ps(0.999));
        for _ in 0..turns {
            for chain in &mut chains {
                *chain = _mm256_fmadd_ps(*chain, factor, addend);
            }
        }
        black_box(chains);
        (turns * CHAINS * 8 * 2) as f64
    }
}
