//! The model against itself: packed = padded oracle, alone = in company, and how far the window sees.

mod cuda_on_cpu;

use candle_core::{Device, Tensor};
use mistral_batch::batch::{LeftPaddedBatch, Sequence};
use mistral_batch::model::{Checkpoint, MistralModel, reference};

const CHECKPOINTS: [&str; 5] =
    ["cls-window-sharded", "cls-multilabel-bf16", "cls-nopad", "cls-regression-f16", "embedder"];

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(&format!("{}/tests/goldens/checkpoints/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn model(name: &str) -> MistralModel {
    MistralModel::load(&checkpoint(name), &Device::Cpu).unwrap()
}

/// Deterministic token ids that look random.
fn sequence(row: usize, length: usize, vocab_size: usize) -> Sequence {
    let ids = (0..length).scan(row as u64 * 7919 + 17, |state, _| {
        *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        Some(3 + ((*state >> 33) as usize % (vocab_size - 3)) as u32)
    });
    Sequence { row, input_ids: ids.collect() }
}

fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.to_vec2().unwrap()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn packed_rows_equal_the_padded_oracle() {
    for name in CHECKPOINTS {
        let model = model(name);
        let vocab_size = model.config().vocab_size;
        let lengths = [1, 2, 7, 15, 16, 17, 31, 32, 33, 90, 200];
        let sequences: Vec<_> = lengths.iter().enumerate().map(|(row, &n)| sequence(row, n, vocab_size)).collect();
        let batch = LeftPaddedBatch::new(&sequences, 0);
        let packed = batch.unpad();
        let ours = rows(&model.forward(&packed).unwrap());
        let oracle = reference::padded_forward(&model, &batch).unwrap().to_vec3::<f32>().unwrap();
        for (b, &length) in batch.seq_lens().iter().enumerate() {
            for position in 0..length {
                let ours = &ours[packed.range(b).start + position];
                let oracle = &oracle[b][batch.width() - length + position];
                let difference = largest_difference(ours, oracle);
                assert!(difference < 2e-5, "{name}: row of {length}, position {position}: {difference}");
            }
        }
    }
}

#[test]
fn a_row_alone_equals_itself_in_any_company() {
    let model = model("cls-window-sharded");
    let vocab_size = model.config().vocab_size;
    let probe = sequence(99, 40, vocab_size);
    let alone = rows(&model.forward(&LeftPaddedBatch::new(std::slice::from_ref(&probe), 0).unpad()).unwrap());
    for company in [vec![1], vec![300], vec![40; 7], vec![3, 100, 5, 17, 64]] {
        let mut sequences: Vec<_> = company.iter().enumerate().map(|(row, &n)| sequence(row, n, vocab_size)).collect();
        for place in [0, sequences.len()] {
            sequences.insert(place, probe.clone());
            let packed = LeftPaddedBatch::new(&sequences, 0).unpad();
            let together = rows(&model.forward(&packed).unwrap());
            for (position, index) in packed.range(place).enumerate() {
                let difference = largest_difference(&together[index], &alone[position]);
                assert!(difference < 1e-5, "with {company:?} at {place}: {difference}");
            }
            sequences.remove(place);
        }
    }
}

#[test]
fn chosen_positions_equal_the_same_rows_of_the_whole() {
    let model = model("cls-multilabel-bf16");
    let vocab_size = model.config().vocab_size;
    let sequences: Vec<_> = [9, 4, 30].iter().enumerate().map(|(row, &n)| sequence(row, n, vocab_size)).collect();
    let packed = LeftPaddedBatch::new(&sequences, 0).unpad();
    let whole = rows(&model.forward(&packed).unwrap());
    let positions = [8u32, 12, 42, 0];
    let chosen = rows(&model.forward_at(&packed, &positions).unwrap());
    for (chosen, &position) in chosen.iter().zip(&positions) {
        assert!(largest_difference(chosen, &whole[position as usize]) < 1e-5);
    }
}

/// With L layers and a window of W positions, its own included, a token reaches L·(W − 1) positions on, and no further.
#[test]
fn the_window_sees_exactly_w_positions() {
    let model = model("cls-window-sharded");
    let config = model.config();
    let (layers, window) = (config.num_hidden_layers, config.sliding_window.unwrap());
    let reach = layers * (window - 1);
    let last_of = |length: usize, first_token: u32| {
        let mut sequence = sequence(5, length, config.vocab_size);
        sequence.input_ids[0] = first_token;
        rows(&model.forward(&LeftPaddedBatch::new(&[sequence], 0).unpad()).unwrap()).pop().unwrap()
    };
    for (length, reached) in [(reach, true), (reach + 1, true), (reach + 2, false), (reach + 3, false)] {
        let changed = last_of(length, 10) != last_of(length, 20);
        assert_eq!(changed, reached, "length {length}, {layers} layers, window {window}");
    }
}

#[test]
fn without_a_window_everything_is_seen() {
    let model = model("cls-multilabel-bf16");
    assert_eq!(model.config().sliding_window, None);
    let last_of = |first_token: u32| {
        let mut sequence = sequence(5, 400, model.config().vocab_size);
        sequence.input_ids[0] = first_token;
        rows(&model.forward(&LeftPaddedBatch::new(&[sequence], 0).unpad()).unwrap()).pop().unwrap()
    };
    assert_ne!(last_of(10), last_of(20));
}
