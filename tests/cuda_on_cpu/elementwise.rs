//! Everything but attention.

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use mistral_batch::kernels::{HeadLayout, reference};

use super::{Arg, Buffer, DTYPES, distance, flat, in_any_order, launch, named, random, rounding};

#[test]
fn rows_are_gathered_and_no_token_is_zero() {
    for dtype in DTYPES {
        for width in [1, 4, 20, 64, 4096] {
            let source = Buffer::floats(&random(7 * width, 3.0, 1), dtype);
            let ids = [6, 0, u32::MAX, 3, 3];
            let (rows, out) = (Buffer::u32(&ids), Buffer::new(5 * width, dtype));
            let args = [(&source).into(), (&rows).into(), (&out).into(), Arg::U32(width)];
            launch(&named("gather_rows", dtype), (5, 1, 1), 128, 0, &args, 3);
            let source = source.to_f32();
            let expected: Vec<f32> = ids
                .iter()
                .flat_map(|&id| {
                    if id == u32::MAX { vec![0.0; width] } else { source[id as usize * width..][..width].to_vec() }
                })
                .collect();
            assert_eq!(out.to_f32(), expected, "{dtype:?} {width}");
        }
    }
}

#[test]
fn casts_round_to_nearest_even() {
    let mut values = random(5000, 300.0, 2);
    values.extend(random(500, 1e-6, 3)); // subnormal in f16
    values.extend([
        0.0,
        -0.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        65504.0,
        65519.0,
        65520.0,
        1e38,
        3.4e38,
        6.1e-5,
        5.96e-8,
        2.98e-8,
    ]);
    values.extend([1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0]);
    let x = Buffer::floats(&values, DType::F32);
    let grid = (values.len().div_ceil(2048), 1, 1);
    for dtype in [DType::BF16, DType::F16] {
        let narrow = Buffer::new(values.len(), dtype);
        launch(&named("from_f32", dtype), grid, 256, 0, &[(&x).into(), (&narrow).into(), Arg::U64(values.len())], 1);
        let wide = Buffer::new(values.len(), DType::F32);
        launch(&named("to_f32", dtype), grid, 256, 0, &[(&narrow).into(), (&wide).into(), Arg::U64(values.len())], 2);
        let round = |x: f32| if dtype == DType::BF16 { bf16::from_f32(x).to_f32() } else { f16::from_f32(x).to_f32() };
        let expected: Vec<f32> = values.iter().copied().map(round).collect();
        assert_eq!(wide.to_f32(), expected, "{dtype:?}");
        let nan = Buffer::floats(&[f32::NAN], DType::F32);
        launch(&named("from_f32", dtype), (1, 1, 1), 256, 0, &[(&nan).into(), (&narrow).into(), Arg::U64(1)], 1);
        assert!(narrow.to_f32()[0].is_nan());
    }
}

#[test]
fn means_are_those_of_each_sequence() {
    for dtype in DTYPES {
        let width = 300;
        let x = Buffer::floats(&random(9 * width, 2.0, 4), dtype);
        let (offsets, out) = (Buffer::u32(&[0, 1, 6, 9]), Buffer::new(3 * width, DType::F32));
        let args = [(&x).into(), (&offsets).into(), (&out).into(), Arg::U32(width)];
        launch(&named("mean_pool", dtype), (3, width.div_ceil(256), 1), 256, 0, &args, 1);
        let rows = x.tensor((9, width));
        let mean = |begin, len| flat(&rows.narrow(0, begin, len).unwrap().mean(0).unwrap());
        assert!(distance(&out.to_f32(), &[mean(0, 1), mean(1, 5), mean(6, 3)].concat()) < 1e-6);
    }
}

#[test]
fn norms_equal_the_oracle() {
    for dtype in DTYPES {
        for (rows, width) in [(1, 1), (3, 7), (2, 64), (3, 100), (2, 4096), (1, 9000), (1, 9001), (1, 20_000)] {
            let weight = Buffer::floats(&random(width, 1.0, 5), DType::F32);
            let (x, y) = (random(rows * width, 2.0, 6), random(rows * width, 2.0, 7));
            for eps in [1e-5, 0.5] {
                let given = Buffer::floats(&x, dtype);
                let norm = |given: &Buffer, seed| {
                    let normed = Buffer::new(rows * width, dtype);
                    let args = [given.into(), (&normed).into(), (&weight).into(), Arg::F32(eps), Arg::U32(width)];
                    launch(&named("rms_norm", dtype), (rows, 1, 1), 256, 0, &args, seed);
                    normed.to_f32()
                };
                let normed = in_any_order(|seed| norm(&given, seed));
                let oracle = reference::rms_norm(
                    &given.tensor((rows, width)),
                    &weight.tensor((1, width)).squeeze(0).unwrap(),
                    eps,
                );
                let found = distance(&normed, &flat(&oracle.unwrap()));
                assert!(found < rounding(dtype), "{dtype:?} {rows} x {width}: {found:e}");

                let sum = Buffer::floats(&x, dtype);
                let sum_and_norm = in_any_order(|seed| {
                    let (x, y) = (Buffer::floats(&x, dtype), Buffer::floats(&y, dtype));
                    let args = [(&x).into(), (&y).into(), (&weight).into(), Arg::F32(eps), Arg::U32(width)];
                    launch(&named("add_rms_norm", dtype), (rows, 1, 1), 256, 0, &args, seed);
                    [x.to_f32(), y.to_f32()].concat()
                });
                let y = Buffer::floats(&y, dtype).to_f32();
                let expected: Vec<f32> = sum.to_f32().iter().zip(&y).map(|(x, y)| x + y).collect();
                let expected = Buffer::floats(&expected, dtype);
                assert_eq!(sum_and_norm[..rows * width], expected.to_f32(), "{dtype:?} {rows} x {width}");
                assert_eq!(sum_and_norm[rows * width..], norm(&expected, 9), "{dtype:?} {rows} x {width}");
            }
        }
    }
}

#[test]
fn silu_mul_equals_the_oracle() {
    for dtype in DTYPES {
        for (rows, width) in [(1, 1), (3, 7), (2, 64), (2, 100), (1, 2048), (2, 4104)] {
            let gate_up = Buffer::floats(&random(rows * 2 * width, 20.0, 8), dtype);
            let gated = Buffer::new(rows * width, dtype);
            let args = [(&gate_up).into(), (&gated).into(), Arg::U32(width)];
            launch(&named("silu_mul", dtype), (rows, width.div_ceil(2048), 1), 256, 0, &args, 1);
            let oracle = reference::swiglu(&gate_up.tensor((rows, 2 * width))).unwrap();
            let found = distance(&gated.to_f32(), &flat(&oracle));
            assert!(found < rounding(dtype), "{dtype:?} {rows} x {width}: {found:e}");
        }
        let gate_up = Buffer::floats(&[-1000.0, -88.0, 0.0, 88.0, 1000.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype);
        let gated = Buffer::new(5, dtype);
        launch(&named("silu_mul", dtype), (1, 1, 1), 256, 0, &[(&gate_up).into(), (&gated).into(), Arg::U32(5)], 1);
        assert!(distance(&gated.to_f32(), &[0.0, 0.0, 0.0, 88.0, 1000.0]) < 1e-6);
    }
}

const LAYOUTS: [HeadLayout; 5] = [
    HeadLayout { num_heads: 8, num_kv_heads: 2, head_dim: 8 },
    HeadLayout { num_heads: 8, num_kv_heads: 2, head_dim: 16 },
    HeadLayout { num_heads: 3, num_kv_heads: 3, head_dim: 20 },
    HeadLayout { num_heads: 4, num_kv_heads: 1, head_dim: 128 },
    HeadLayout { num_heads: 7, num_kv_heads: 1, head_dim: 2 },
];

#[test]
fn rotary_equals_the_oracle_and_values_stay() {
    for (dtype, heads) in DTYPES.into_iter().flat_map(|dtype| LAYOUTS.map(|heads| (dtype, heads))) {
        let (width, half) = (heads.qkv_width(), heads.head_dim / 2);
        let qkv = Buffer::floats(&random(5 * width, 2.0, 9), dtype);
        let positions = [3u32, 0, 1, 7, 3];
        let tables =
            [random(8 * half, 1.0, 10), random(8 * half, 1.0, 11)].map(|table| Buffer::floats(&table, DType::F32));
        let of_tokens = |table: &Buffer| {
            let rows = Tensor::new(&positions, &Device::Cpu).unwrap();
            table.tensor((8, half)).index_select(&rows, 0).unwrap()
        };
        let (cos, sin) = (of_tokens(&tables[0]), of_tokens(&tables[1]));
        let oracle = flat(&reference::rotary_embedding(&qkv.tensor((5, width)), &cos, &sin, heads).unwrap());
        let positions = Buffer::u32(&positions);
        let mut args = vec![(&qkv).into(), (&positions).into(), (&tables[0]).into(), (&tables[1]).into()];
        args.extend([heads.num_heads, heads.num_kv_heads, heads.head_dim].map(Arg::U32));
        let before = qkv.to_f32();
        launch(&named("rotary", dtype), (5, 1, 1), 128, 0, &args, 1);
        let after = qkv.to_f32();
        let found = distance(&after, &oracle);
        assert!(found < rounding(dtype), "{dtype:?} {heads:?}: {found:e}");
        let values = heads.query_width() + heads.kv_width();
        for (before, after) in before.chunks(width).zip(after.chunks(width)) {
            assert_eq!(before[values..], after[values..]);
        }
    }
}

#[test]
fn the_choice_is_the_first_of_the_largest_with_its_logprob() {
    for vocab_size in [1, 5, 31, 768, 4096, 32_000] {
        let mut logits = random(4 * vocab_size, 8.0, 12);
        let largest = 11.0;
        logits[vocab_size / 2] = largest;
        logits[vocab_size - 1] = largest;
        logits[3 * vocab_size + vocab_size / 3] = f32::NAN;
        logits[2 * vocab_size] = f32::NEG_INFINITY;
        let targets: Vec<u32> = (0..4).map(|row| (row * 7919 % vocab_size) as u32).collect();
        let log_softmax = |row: usize, token: usize| {
            let row = &logits[row * vocab_size..][..vocab_size];
            let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            (f64::from(row[token]) - sum.ln()) as f32
        };
        let given = Buffer::floats(&logits, DType::F32);
        let choose = |logprobs: Option<&Buffer>, seed| {
            let tokens = Buffer::new(4, DType::U32);
            let logprobs = logprobs.map_or(Arg::Null, Arg::Buffer);
            let args = [(&given).into(), (&tokens).into(), logprobs, Arg::U32(vocab_size)];
            launch("argmax_logprob", (4, 1, 1), 512, 0, &args, seed);
            tokens.read::<u32>()
        };
        let logprobs = Buffer::new(4, DType::F32);
        let tokens = choose(Some(&logprobs), 1);
        assert_eq!(tokens, choose(None, 2));
        assert_eq!(tokens[0] as usize, if vocab_size == 1 { 0 } else { vocab_size / 2 });
        assert_eq!(tokens[2..], [u32::MAX; 2]);
        let row = &logits[vocab_size..2 * vocab_size];
        assert!(row.iter().all(|&logit| logit <= row[tokens[1] as usize]));
        let found = logprobs.to_f32();
        for row in 0..2 {
            let expected = log_softmax(row, tokens[row] as usize);
            assert!((found[row] - expected).abs() < 2e-6 * expected.abs().max(1.0), "{} {expected}", found[row]);
        }
        assert!(found[2].is_nan() && found[3].is_nan());

        let of_targets = in_any_order(|seed| {
            let (targets, logprobs) = (Buffer::u32(&targets), Buffer::new(4, DType::F32));
            let args = [(&given).into(), (&targets).into(), (&logprobs).into(), Arg::U32(vocab_size)];
            launch("target_logprobs", (4, 1, 1), 512, 0, &args, seed);
            logprobs.to_f32()
        });
        for row in 0..2 {
            let expected = log_softmax(row, targets[row] as usize);
            assert!((of_targets[row] - expected).abs() < 2e-6 * expected.abs().max(1.0), "{expected}");
        }
        assert!(of_targets[2].is_nan() && of_targets[3].is_nan());
    }
}

#[test]
fn positions_advance() {
    let (positions, ends) = (Buffer::u32(&[0, 7, 300]), Buffer::u32(&[1, 8, 301]));
    launch("advance_positions", (1, 1, 1), 256, 0, &[(&positions).into(), (&ends).into(), Arg::U32(3)], 1);
    assert_eq!((positions.read::<u32>(), ends.read::<u32>()), (vec![1, 8, 301], vec![2, 9, 302]));
}
