//! Every kernel against the oracle, over random data.

use candle_core::{DType, Device, Result, Tensor};
use proptest::prelude::*;

use super::*;

/// Uniform values in [-1, 1) that depend on the seed only.
fn random(shape: (usize, usize), seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<f32> = (0..shape.0 * shape.1)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

// The kernels write in place; these give new tensors.

fn varlen_attention(qkv: &Tensor, cu_seq_lens: &[u32], heads: HeadLayout, window: Option<usize>) -> Result<Tensor> {
    let context = Tensor::zeros((qkv.dim(0)?, heads.query_width()), DType::F32, &Device::Cpu)?;
    cpu::varlen_attention(&context, qkv, cu_seq_lens, heads, window)?;
    Ok(context)
}

fn rotary_embedding(qkv: &Tensor, cos: &Tensor, sin: &Tensor, heads: HeadLayout) -> Result<Tensor> {
    let rotated = qkv.copy()?;
    cpu::rotary_embedding(&rotated, cos, sin, heads)?;
    Ok(rotated)
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let stream = Tensor::stack(&[x, x], 0)?;
    super::rms_norm(&stream, weight, eps)?;
    assert_eq!(flat(&stream.get(0)?)?, flat(x)?);
    stream.get(1)
}

fn add_rms_norm(x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let stream = Tensor::stack(&[residual, x], 0)?;
    super::add_rms_norm(&stream, weight, eps)?;
    Ok((stream.get(0)?, stream.get(1)?))
}

/// The activation alone: behind a product with the identity, which changes no finite value.
fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let both = gate_up.dim(1)?;
    let packed = pack_gate_up(&Tensor::eye(both, DType::F32, &Device::Cpu)?)?;
    let gated = Tensor::zeros((gate_up.dim(0)?, both / 2), DType::F32, &Device::Cpu)?;
    packed_swiglu_into(gate_up, &packed, &gated, Arithmetic::F32)?;
    Ok(gated)
}

fn flat(x: &Tensor) -> Result<Vec<f32>> {
    x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// The largest difference between `x` and `y`, relative to the larger of 1 and the value.
fn distance(x: &Tensor, y: &Tensor) -> Result<f32> {
    assert_eq!(x.shape(), y.shape());
    let pairs = flat(x)?.into_iter().zip(flat(y)?);
    Ok(pairs.map(|(x, y)| (x - y).abs() / y.abs().max(1.0)).fold(0.0, |a, b| if a >= b { a } else { b }))
}

fn cumulative(seq_lens: &[usize]) -> Vec<u32> {
    let mut offsets = vec![0];
    for &seq_len in seq_lens {
        offsets.push(offsets[offsets.len() - 1] + seq_len as u32);
    }
    offsets
}

/// [`varlen_attention`]'s contract by way of [`reference::padded_attention`] in f64: pads, attends, drops the padding.
fn reference_attention(qkv: &Tensor, seq_lens: &[usize], heads: HeadLayout, window: Option<usize>) -> Result<Tensor> {
    let qkv = qkv.to_dtype(DType::F64)?;
    let t = seq_lens.iter().copied().max().unwrap_or(0);
    let mut rows = Vec::new();
    let offsets = cumulative(seq_lens);
    for (b, &seq_len) in seq_lens.iter().enumerate() {
        let real = qkv.narrow(0, offsets[b] as usize, seq_len)?;
        rows.push(real.pad_with_zeros(0, t - seq_len, 0)?);
    }
    let padded = Tensor::stack(&rows, 0)?.reshape((seq_lens.len(), t, (), heads.head_dim))?.transpose(1, 2)?;
    let q = padded.narrow(1, 0, heads.num_heads)?;
    let k = padded.narrow(1, heads.num_heads, heads.num_kv_heads)?;
    let v = padded.narrow(1, heads.num_heads + heads.num_kv_heads, heads.num_kv_heads)?;
    let mask = reference::left_padded_causal_mask(seq_lens, 0, t, window, qkv.device())?.to_dtype(DType::F64)?;
    let output = reference::padded_attention(&q, &k, &v, &mask)?.transpose(1, 2)?.flatten_from(2)?;
    let real: Result<Vec<_>> =
        seq_lens.iter().enumerate().map(|(b, &seq_len)| output.get(b)?.narrow(0, t - seq_len, seq_len)).collect();
    Tensor::cat(&real?, 0)
}

fn check_attention(seq_lens: &[usize], heads: HeadLayout, window: Option<usize>, seed: u64) -> Result<()> {
    let tokens = seq_lens.iter().sum();
    let qkv = (random((tokens, heads.qkv_width()), seed)? * 2.0)?;
    let output = varlen_attention(&qkv, &cumulative(seq_lens), heads, window)?;
    let expected = reference_attention(&qkv, seq_lens, heads, window)?;
    let distance = distance(&output, &expected)?;
    assert!(distance < 5e-6, "{seq_lens:?} {heads:?} window {window:?}: {distance:e}");
    Ok(())
}

const LAYOUTS: [HeadLayout; 7] = [
    HeadLayout { num_heads: 12, num_kv_heads: 4, head_dim: 64 },
    HeadLayout { num_heads: 8, num_kv_heads: 2, head_dim: 16 },
    HeadLayout { num_heads: 4, num_kv_heads: 1, head_dim: 128 },
    HeadLayout { num_heads: 2, num_kv_heads: 2, head_dim: 8 },
    HeadLayout { num_heads: 2, num_kv_heads: 2, head_dim: 64 },
    HeadLayout { num_heads: 5, num_kv_heads: 1, head_dim: 20 },
    HeadLayout { num_heads: 1, num_kv_heads: 1, head_dim: 1 },
];

#[test]
fn attention_equals_the_oracle_around_the_window() -> Result<()> {
    for (i, heads) in LAYOUTS.into_iter().enumerate() {
        for seq_len in [1, 2, 3, 7, 16, 63, 64, 65, 100] {
            for window in [None, Some(1), Some(2), Some(seq_len.max(2) - 1), Some(seq_len), Some(seq_len + 1)] {
                check_attention(&[seq_len], heads, window, i as u64)?;
            }
        }
    }
    Ok(())
}

#[test]
fn attention_equals_the_oracle_over_many_tiles_and_blocks() -> Result<()> {
    for heads in LAYOUTS {
        for window in [None, Some(1), Some(63), Some(64), Some(65), Some(130), Some(299), Some(usize::MAX)] {
            check_attention(&[300, 1, 257], heads, window, 5)?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn attention_equals_the_oracle(
        seq_lens in prop::collection::vec(1usize..200, 1..6),
        layout in 0..LAYOUTS.len(),
        window in prop::option::of(1usize..220),
        seed in any::<u64>(),
    ) {
        check_attention(&seq_lens, LAYOUTS[layout], window, seed).unwrap();
    }
}

#[test]
fn a_sequence_is_the_same_alone_and_in_a_batch() -> Result<()> {
    let seq_lens = [100, 1, 0, 37, 300, 64];
    let offsets = cumulative(&seq_lens);
    for heads in LAYOUTS {
        for window in [None, Some(50)] {
            let qkv = random((502, heads.qkv_width()), 3)?;
            let together = varlen_attention(&qkv, &offsets, heads, window)?;
            for (b, &seq_len) in seq_lens.iter().enumerate() {
                let own = qkv.narrow(0, offsets[b] as usize, seq_len)?;
                let alone = varlen_attention(&own, &[0, seq_len as u32], heads, window)?;
                let row = together.narrow(0, offsets[b] as usize, seq_len)?;
                assert_eq!(flat(&alone)?, flat(&row)?, "sequence {b} of {heads:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let heads = LAYOUTS[0];
    let qkv = random((700, heads.qkv_width()), 11)?;
    let angles = random((700, 32), 12)?;
    let weight = random((1, heads.qkv_width()), 13)?.squeeze(0)?;
    let all = || -> Result<Vec<f32>> {
        let mut values = flat(&varlen_attention(&qkv, &[0, 400, 700], heads, Some(90))?)?;
        values.extend(flat(&rotary_embedding(&qkv, &angles, &angles, heads)?)?);
        values.extend(flat(&rms_norm(&qkv, &weight, 1e-5)?)?);
        values.extend(flat(&swiglu(&qkv)?)?);
        Ok(values)
    };
    let with_threads = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(all);
    assert_eq!(with_threads(1)?, with_threads(3)?);
    Ok(())
}

#[test]
fn large_scores_do_not_overflow() -> Result<()> {
    let heads = LAYOUTS[0];
    let qkv = (random((150, heads.qkv_width()), 2)? * 30.0)?;
    let output = varlen_attention(&qkv, &[0, 150], heads, None)?;
    let expected = reference_attention(&qkv, &[150], heads, None)?;
    // Scores beyond 1,000 are known to 1e-4 in f32, and so are the weights of values up to 30.
    let distance = distance(&(output / 30.0)?, &(expected / 30.0)?)?;
    assert!(distance < 5e-4, "{distance:e}");
    Ok(())
}

#[test]
fn not_a_number_stays_in_its_sequence() -> Result<()> {
    let heads = LAYOUTS[1];
    let qkv = random((100, heads.qkv_width()), 8)?;
    let poison = (Tensor::zeros((1, heads.qkv_width()), DType::F32, &Device::Cpu)? / 0.0)?;
    let qkv = Tensor::cat(&[qkv.narrow(0, 0, 60)?, poison, qkv.narrow(0, 61, 39)?], 0)?;
    let output = varlen_attention(&qkv, &[0, 30, 61, 100], heads, Some(10))?.to_vec2::<f32>()?;
    for (token, row) in output.iter().enumerate() {
        // Tokens just before it may share its register tile, where a weight of 0 times NaN is NaN.
        let may_be_nan = (50..=60).contains(&token);
        assert!(token != 60 || row.iter().all(|value| value.is_nan()));
        assert!(may_be_nan || row.iter().all(|value| value.is_finite()), "token {token}");
    }
    Ok(())
}

#[test]
fn an_empty_batch_has_an_empty_output() -> Result<()> {
    let heads = LAYOUTS[1];
    let qkv = Tensor::zeros((0, heads.qkv_width()), DType::F32, &Device::Cpu)?;
    assert_eq!(varlen_attention(&qkv, &[0], heads, None)?.dims(), [0, heads.query_width()]);
    Ok(())
}

#[test]
fn attention_refuses_what_it_cannot_read() -> Result<()> {
    let heads = LAYOUTS[1];
    let qkv = random((10, heads.qkv_width()), 1)?;
    for offsets in [&[][..], &[0], &[0, 9], &[1, 10], &[0, 6, 4, 10], &[0, 11]] {
        assert!(varlen_attention(&qkv, offsets, heads, None).is_err(), "{offsets:?}");
    }
    assert!(varlen_attention(&qkv, &[0, 10], heads, Some(0)).is_err());
    assert!(varlen_attention(&qkv.narrow(1, 0, 8)?, &[0, 10], heads, None).is_err());
    assert!(varlen_attention(&qkv.to_dtype(DType::F64)?, &[0, 10], heads, None).is_err());
    let transposed = random((heads.qkv_width(), 10), 1)?.t()?;
    assert!(varlen_attention(&transposed, &[0, 10], heads, None).is_err());
    Ok(())
}

#[test]
fn rotary_embedding_equals_the_oracle() -> Result<()> {
    for heads in LAYOUTS.into_iter().filter(|heads| heads.head_dim % 2 == 0) {
        for tokens in [1, 5, 333] {
            let qkv = random((tokens, heads.qkv_width()), 21)?;
            let (cos, sin) = (random((tokens, heads.head_dim / 2), 22)?, random((tokens, heads.head_dim / 2), 23)?);
            let output = rotary_embedding(&qkv, &cos, &sin, heads)?;
            assert!(distance(&output, &reference::rotary_embedding(&qkv, &cos, &sin, heads)?)? < 1e-6, "{heads:?}");
        }
    }
    let heads = LAYOUTS[0];
    let (qkv, cos) = (random((4, heads.qkv_width()), 1)?, random((4, 31), 1)?);
    assert!(rotary_embedding(&qkv, &cos, &cos, heads).is_err());
    Ok(())
}

#[test]
fn rms_norm_equals_the_oracle() -> Result<()> {
    for (tokens, width) in [(1, 1), (3, 7), (65, 64), (33, 100), (200, 768), (2, 4096)] {
        let (x, residual) = (random((tokens, width), 31)?, random((tokens, width), 32)?);
        let weight = random((1, width), 33)?.squeeze(0)?;
        for eps in [1e-5, 1e-6, 0.5] {
            let normed = rms_norm(&x, &weight, eps)?;
            assert!(distance(&normed, &reference::rms_norm(&x, &weight, eps)?)? < 2e-6, "{tokens} x {width}");
            let (sum, normed) = add_rms_norm(&x, &residual, &weight, eps)?;
            let expected = (&x + &residual)?;
            assert_eq!(flat(&sum)?, flat(&expected)?);
            assert_eq!(flat(&normed)?, flat(&rms_norm(&expected, &weight, eps)?)?);
        }
    }
    let x = random((4, 8), 1)?;
    assert!(rms_norm(&x, &random((1, 9), 1)?.squeeze(0)?, 1e-5).is_err());
    Ok(())
}

#[test]
fn swiglu_equals_the_oracle() -> Result<()> {
    for (tokens, width) in [(1, 1), (3, 7), (65, 64), (33, 100), (40, 2048)] {
        let gate_up = (random((tokens, 2 * width), 41)? * 20.0)?;
        assert!(distance(&swiglu(&gate_up)?, &reference::swiglu(&gate_up)?)? < 1e-6, "{tokens} x {width}");
    }
    let ends = Tensor::new(&[[-1000f32, -88., 0., 88., 1000., 1., 1., 1., 1., 1.]], &Device::Cpu)?;
    let expected = Tensor::new(&[[0f32, 0., 0., 88., 1000.]], &Device::Cpu)?;
    assert!(distance(&swiglu(&ends)?, &expected)? < 1e-6);
    assert!(swiglu(&random((4, 7), 1)?).is_err());
    Ok(())
}

/// Feeds a sequence of `len` tokens to a ring in steps of `steps` tokens, over and over.
fn in_steps(qkv: &Tensor, steps: &[usize], heads: HeadLayout, window: Option<usize>) -> Result<Tensor> {
    let len = qkv.dim(0)?;
    let mut ring = KvRing::new(heads, window.map_or(len, |window| window.min(len)));
    let (mut past, mut outputs) = (0, Vec::new());
    for step in steps.iter().cycle() {
        let new = (*step).min(len - past);
        let tokens = qkv.narrow(0, past, new)?;
        outputs.push(cached_attention(&tokens, &[0, new as u32], &[past], &mut [&mut ring], heads, window)?);
        past += new;
        if past == len {
            break;
        }
    }
    Tensor::cat(&outputs, 0)
}

#[test]
fn cached_attention_equals_the_oracle_around_the_window() -> Result<()> {
    for (i, heads) in LAYOUTS.into_iter().enumerate() {
        for window in [1, 2, 16, 63, 64, 65, 100] {
            for len in [window - 1, window, window + 1, 2 * window, 3 * window + 5] {
                if len == 0 {
                    continue;
                }
                let qkv = (random((len, heads.qkv_width()), i as u64)? * 2.0)?;
                for window in [None, Some(window)] {
                    let expected = reference_attention(&qkv, &[len], heads, window)?;
                    for steps in [&[1][..], &[len / 2 + 1, 1], &[3, 1, 4]] {
                        let distance = distance(&in_steps(&qkv, steps, heads, window)?, &expected)?;
                        assert!(distance < 5e-6, "{len} {heads:?} window {window:?} steps {steps:?}: {distance:e}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_cached_sequence_is_the_same_alone_and_in_a_batch() -> Result<()> {
    let heads = LAYOUTS[0];
    let (past, new) = ([70, 0, 5, 0], [1u32, 30, 2, 1]);
    let qkv = random((34, heads.qkv_width()), 7)?;
    let ring_of = |past: usize| -> Result<KvRing> {
        let mut ring = KvRing::new(heads, 40);
        let tokens = random((past.max(1), heads.qkv_width()), past as u64)?.narrow(0, 0, past)?;
        cached_attention(&tokens, &[0, past as u32], &[0], &mut [&mut ring], heads, Some(40))?;
        Ok(ring)
    };
    let mut rings = past.iter().map(|&past| ring_of(past)).collect::<Result<Vec<_>>>()?;
    let offsets = cumulative(&new.map(|n| n as usize));
    let mut together: Vec<_> = rings.iter_mut().collect();
    let together = cached_attention(&qkv, &offsets, &past, &mut together, heads, Some(40))?;
    for b in 0..4 {
        let own = qkv.narrow(0, offsets[b] as usize, new[b] as usize)?;
        let alone = cached_attention(&own, &[0, new[b]], &past[b..=b], &mut [&mut ring_of(past[b])?], heads, Some(40))?;
        assert_eq!(flat(&alone)?, flat(&together.narrow(0, offsets[b] as usize, new[b] as usize)?)?, "sequence {b}");
    }
    Ok(())
}

#[test]
fn a_ring_of_the_wrong_size_is_refused() -> Result<()> {
    let heads = LAYOUTS[1];
    let qkv = random((4, heads.qkv_width()), 1)?;
    for (capacity, past, window) in [(3, 0, None), (7, 4, None), (9, 6, Some(8)), (4, 6, Some(8))] {
        let mut ring = KvRing::new(heads, capacity);
        let output = cached_attention(&qkv, &[0, 4], &[past], &mut [&mut ring], heads, window);
        assert!(output.is_err(), "{capacity} slots, {past} past, window {window:?}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_gated_product_equals_the_oracle(n in 0usize..220, depth in 1usize..1200, width in 1usize..100, seed in any::<u64>()) {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let x = random((n, depth), seed).unwrap();
            let weight = random((2 * width, depth), seed ^ 1).unwrap().to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
            let packed = pack_gate_up(&weight).unwrap();
            prop_assert_eq!(packed.dtype(), dtype);
            let gated = random((n, width), 3).unwrap();
            packed_swiglu_into(&x, &packed, &gated, Arithmetic::F32).unwrap();
            let weight = weight.to_dtype(DType::F64).unwrap();
            let products = x.to_dtype(DType::F64).unwrap().matmul(&weight.t().unwrap()).unwrap();
            let expected = reference::swiglu(&products).unwrap();
            // Sums are known to their length's root in roundings, and so is either factor of the result.
            let largest = flat(&products.abs().unwrap()).unwrap().into_iter().fold(1.0, f32::max);
            let tolerance = 8e-6 * (depth as f32).sqrt() * largest;
            let differences = flat(&(gated.to_dtype(DType::F64).unwrap() - expected).unwrap().abs().unwrap()).unwrap();
            prop_assert!(differences.iter().all(|&difference| difference < tolerance), "{} {} {}", n, depth, width);
        }
    }
}
