use std::time::Instant;

use candle_core::{Device, Result, Tensor};

use super::*;

fn best_of(runs: usize, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::MAX;
    for _ in 0..runs {
        let start = Instant::now();
        f()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

#[test]
#[ignore = "prints timings"]
fn timing() -> Result<()> {
    let device = Device::Cpu;
    let heads = HeadLayout { num_heads: 12, num_kv_heads: 4, head_dim: 64 };
    for (m, n, k) in [(4096, 4096, 4096), (192, 64, 64), (192, 64, 640)] {
        let a = Tensor::randn(0f32, 1., (m, k), &device)?;
        let b = Tensor::randn(0f32, 1., (k, n), &device)?;
        let t = best_of(20, || a.matmul(&b).map(drop))?;
        println!("matmul {m}x{n}x{k}: {:.1} GFLOP/s", 2e-9 * (m * n * k) as f64 / t);
    }
    for (count, len, window) in
        [(400, 10, None), (128, 32, None), (32, 100, None), (32, 128, None), (4, 1024, None), (1, 8192, Some(1024))]
    {
        let tokens = count * len;
        let qkv = Tensor::randn(0f32, 1., (tokens, heads.qkv_width()), &device)?;
        let cu_seq_lens: Vec<u32> = (0..=count).map(|i| (i * len) as u32).collect();
        let pairs: usize = (0..len).map(|i| (i + 1).min(window.unwrap_or(usize::MAX))).sum::<usize>() * count;
        let flop = 4.0 * (pairs * heads.query_width()) as f64;
        let t = best_of(20, || varlen_attention(&qkv, &cu_seq_lens, heads, window).map(drop))?;
        println!(
            "attention {count} x {len}: {:.2} ms, {:.1} GFLOP/s, {:.2} us/token",
            t * 1e3,
            flop / t * 1e-9,
            t * 1e6 / tokens as f64
        );
    }
    let n = 4096;
    let gate_up = Tensor::randn(0f32, 1., (n, 4096), &device)?;
    let rate =
        |what: &str, bytes: usize, t: f64| println!("{what}: {:.2} ms, {:.1} GB/s", t * 1e3, bytes as f64 / t * 1e-9);
    let t = best_of(20, || gate_up.copy().map(drop))?;
    rate("copy", n * 4096 * 8, t);
    let t = best_of(20, || swiglu(&gate_up).map(drop))?;
    rate("swiglu", n * 4096 * 6, t);
    let t = best_of(20, || reference::swiglu(&gate_up).map(drop))?;
    rate("swiglu reference", n * 4096 * 6, t);
    let qkv = Tensor::randn(0f32, 1., (n, heads.qkv_width()), &device)?;
    let cos = Tensor::randn(0f32, 1., (n, 32), &device)?;
    let t = best_of(20, || rotary_embedding(&qkv, &cos, &cos, heads).map(drop))?;
    rate("rotary", n * heads.qkv_width() * 8, t);
    let x = Tensor::randn(0f32, 1., (n, 768), &device)?;
    let w = Tensor::randn(0f32, 1., 768, &device)?;
    let t = best_of(20, || rms_norm(&x, &w, 1e-5).map(drop))?;
    rate("rms_norm", n * 768 * 8, t);
    let t = best_of(20, || candle_nn::ops::rms_norm(&x, &w, 1e-5).map(drop))?;
    rate("rms_norm candle-nn", n * 768 * 8, t);
    let t = best_of(20, || add_rms_norm(&x, &x, &w, 1e-5).map(drop))?;
    rate("add_rms_norm", n * 768 * 16, t);
    let t = best_of(20, || rms_norm(&(&x + &x)?, &w, 1e-5).map(drop))?;
    rate("add, then rms_norm", n * 768 * 16, t);
    Ok(())
}
