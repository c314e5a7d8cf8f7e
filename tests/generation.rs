//! Generation: cached = uncached, in-flight = one by one, and both = transformers.

use candle_core::{Device, Tensor};
use mistral_batch::batch::PackedBatch;
use mistral_batch::model::{Checkpoint, KvCache, MistralModel, WeightLayout};

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(&format!("{}/tests/goldens/checkpoints/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.to_vec2().unwrap()
}

/// Deterministic token ids that look random.
fn tokens(seed: u64, length: usize, vocab_size: usize) -> Vec<u32> {
    let ids = (0..length).scan(seed * 7919 + 17, |state, _| {
        *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        Some(3 + ((*state >> 33) as usize % (vocab_size - 3)) as u32)
    });
    ids.collect()
}

/// New tokens of sequences that have had `past` tokens each.
fn packed(new: &[(usize, &[u32])]) -> PackedBatch {
    let mut batch = PackedBatch { input_ids: Vec::new(), position_ids: Vec::new(), cu_seq_lens: vec![0] };
    for (past, ids) in new {
        batch.input_ids.extend_from_slice(ids);
        batch.position_ids.extend((*past..past + ids.len()).map(|position| position as u32));
        batch.cu_seq_lens.push(batch.input_ids.len() as u32);
    }
    batch
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn the_cached_forward_equals_the_uncached_one() {
    for name in ["lm-window", "lm-full-tied-bf16"] {
        let checkpoint = checkpoint(name);
        let plain = MistralModel::load(&checkpoint, &Device::Cpu).unwrap();
        let model = MistralModel::load_with_layout(&checkpoint, &Device::Cpu, WeightLayout::Packed).unwrap();
        let window = model.config().sliding_window.unwrap_or(64);
        for length in [window - 1, window, window + 1, 2 * window, 3 * window + 5] {
            let ids = tokens(length as u64, length, model.config().vocab_size);
            let expected = rows(&plain.forward(&packed(&[(0, &ids)])).unwrap());
            for prompt in [1, 2, window - 1, window, window + 1, length] {
                let mut cache = KvCache::new(model.config(), length);
                let mut past = 0;
                for end in (prompt.min(length)..=length).chain([length]).filter(|&end| end > 0) {
                    if end == past {
                        continue;
                    }
                    let hidden = model.forward_cached(&packed(&[(past, &ids[past..end])]), &mut [&mut cache]).unwrap();
                    past = end;
                    let difference = largest_difference(&rows(&hidden)[0], &expected[end - 1]);
                    assert!(difference < 1e-5, "{name}: prompt of {prompt}, position {}: {difference}", end - 1);
                }
                assert_eq!((cache.len(), cache.capacity() <= window.max(length)), (length, true));
            }
        }
    }
}

#[test]
fn a_cached_step_is_the_same_to_the_bit_in_any_company() {
    for name in ["lm-window", "lm-full-tied-bf16"] {
        let model = MistralModel::load_with_layout(&checkpoint(name), &Device::Cpu, WeightLayout::Packed).unwrap();
        let vocab_size = model.config().vocab_size;
        let prompts: Vec<_> = (0..40).map(|i| tokens(i, 1 + (i as usize * 13) % 60, vocab_size)).collect();
        let mut caches: Vec<_> = prompts.iter().map(|_| KvCache::new(model.config(), 80)).collect();
        let mut alone: Vec<_> = caches.clone();
        let mut new: Vec<_> = prompts.clone();
        for step in 0..6 {
            // From the third step on every other row is decoded in company of prompts' worth of tokens.
            if step >= 2 {
                new.iter_mut().step_by(2).for_each(|ids| ids.truncate(1));
            }
            let batch: Vec<_> = caches.iter().map(KvCache::len).zip(new.iter().map(Vec::as_slice)).collect();
            let together = model.forward_cached(&packed(&batch), &mut caches.iter_mut().collect::<Vec<_>>()).unwrap();
            for (b, together) in rows(&together).iter().enumerate() {
                let batch = packed(&[(alone[b].len(), &new[b])]);
                let own = model.forward_cached(&batch, &mut [&mut alone[b]]).unwrap();
                assert_eq!(&rows(&own)[0], together, "{name}: row {b}, step {step}");
            }
            for (b, new) in new.iter_mut().enumerate() {
                *new = tokens(1000 + (step * 100 + b) as u64, 1 + b % 3, vocab_size);
            }
        }
    }
}

#[test]
fn a_batch_that_does_not_go_on_where_the_cache_ends_is_refused() {
    let model = MistralModel::load_with_layout(&checkpoint("lm-window"), &Device::Cpu, WeightLayout::Packed).unwrap();
    let mut cache = KvCache::new(model.config(), 20);
    model.forward_cached(&packed(&[(0, &[5, 6, 7])]), &mut [&mut cache]).unwrap();
    for wrong in [packed(&[(2, &[8])]), packed(&[(4, &[8])]), packed(&[(3, &[])]), packed(&[(3, &[8]), (3, &[8])])] {
        assert!(model.forward_cached(&wrong, &mut [&mut cache]).is_err(), "{wrong:?}");
    }
    assert!(model.forward_cached(&packed(&[(3, &[8])]), &mut [&mut cache]).is_ok());
}
