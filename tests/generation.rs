//! Generation: cached = uncached, in-flight = one by one, and both = transformers.

use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch};
use candle_core::{Device, Tensor};
use mistral_batch::batch::{LeftPaddedBatch, PackedBatch, Sequence};
use mistral_batch::generation::{
    CausalLm, Completion, FinishReason, Generated, GenerationDefaults, Request, SamplingParams, Scheduler,
    SchedulerLimits, StaticBatches,
};
use mistral_batch::model::{Checkpoint, KvCache, MistralModel, reference};
use mistral_batch::text::TextTokenizer;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

#[path = "generation/constraint.rs"]
mod constraint;

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
        let model = MistralModel::load(&checkpoint, &Device::Cpu).unwrap();
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
        let model = MistralModel::load(&checkpoint(name), &Device::Cpu).unwrap();
        let vocab_size = model.config().vocab_size;
        let prompts: Vec<_> = (0..40).map(|i| tokens(i, 1 + (i as usize * 13) % 60, vocab_size)).collect();
        let mut caches: Vec<_> = prompts.iter().map(|_| KvCache::new(model.config(), 80)).collect();
        let mut alone: Vec<_> = caches.iter().map(|cache| cache.fork().unwrap()).collect();
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
    let model = MistralModel::load(&checkpoint("lm-window"), &Device::Cpu).unwrap();
    let mut cache = KvCache::new(model.config(), 20);
    model.forward_cached(&packed(&[(0, &[5, 6, 7])]), &mut [&mut cache]).unwrap();
    for wrong in [packed(&[(2, &[8])]), packed(&[(4, &[8])]), packed(&[(3, &[])]), packed(&[(3, &[8]), (3, &[8])])] {
        assert!(model.forward_cached(&wrong, &mut [&mut cache]).is_err(), "{wrong:?}");
    }
    assert!(model.forward_cached(&packed(&[(3, &[8])]), &mut [&mut cache]).is_ok());
}

/// A checkpoint ready to generate.
struct Lm {
    checkpoint: Checkpoint,
    model: CausalLm,
    tokenizer: TextTokenizer,
}

impl Lm {
    fn open(checkpoint: Checkpoint) -> Self {
        let model = CausalLm::load(&checkpoint, &Device::Cpu).unwrap();
        let tokenizer = TextTokenizer::open(&checkpoint.dir, checkpoint.config.vocab_size).unwrap();
        Self { checkpoint, model, tokenizer }
    }

    fn golden(name: &str) -> Self {
        Self::open(checkpoint(name))
    }

    /// Completions of `requests`, in their order, all in flight within `limits`.
    fn generate(&self, requests: &[Request], limits: SchedulerLimits) -> Vec<Generated> {
        let mut scheduler = Scheduler::new(&self.model, &self.tokenizer, limits);
        requests.iter().for_each(|request| scheduler.push(request.clone()).unwrap());
        let mut completions: Vec<Completion> = Vec::new();
        while !scheduler.is_idle() {
            completions.extend(scheduler.step().unwrap());
        }
        assert_eq!(completions.len(), requests.iter().map(|request| request.samples.len()).sum::<usize>());
        completions.sort_by_key(|completion| (completion.row, completion.sample));
        completions.into_iter().map(|completion| completion.result.unwrap()).collect()
    }

    /// The same in static batches.
    fn generate_static(&self, requests: &[Request], limits: SchedulerLimits) -> Vec<Generated> {
        let mut batches = StaticBatches::new(&self.model, &self.tokenizer, limits);
        requests.iter().for_each(|request| batches.push(request.clone()).unwrap());
        let mut completions: Vec<Completion> = Vec::new();
        while !batches.is_idle() {
            completions.extend(batches.step().unwrap());
        }
        completions.sort_by_key(|completion| (completion.row, completion.sample));
        completions.into_iter().map(|completion| completion.result.unwrap()).collect()
    }

    fn one_by_one(&self, requests: &[Request]) -> Vec<Generated> {
        requests.iter().flat_map(|request| self.generate(std::slice::from_ref(request), ROOMY)).collect()
    }
}

const ROOMY: SchedulerLimits = SchedulerLimits { kv_cache_bytes: 1 << 30, max_rows: 64, prefill_tokens: 4096 };

fn requests(prompts: &[Vec<u32>], params: SamplingParams) -> Vec<Request> {
    let params = Arc::new(params);
    let prompts = prompts.iter().cloned().enumerate();
    prompts
        .map(|(row, prompt_ids)| Request {
            row,
            samples: 0..1,
            random_key: row as u64,
            prompt_ids,
            params: Arc::clone(&params),
        })
        .collect()
}

/// Greedy tokens in the plainest way: the whole left-padded batch, recomputed for each token.
fn static_greedy(checkpoint: &Checkpoint, prompts: &[Vec<u32>], max_tokens: usize) -> Vec<Vec<u32>> {
    let config = &checkpoint.config;
    let model = MistralModel::load(checkpoint, &Device::Cpu).unwrap();
    let shape = [config.vocab_size, config.hidden_size];
    let head = if config.tie_word_embeddings {
        checkpoint.base_tensor("embed_tokens.weight", &shape, &Device::Cpu)
    } else {
        checkpoint.weights.tensor("lm_head.weight", &shape, &Device::Cpu)
    };
    let head = head.unwrap().t().unwrap();
    let mut rows: Vec<_> =
        prompts.iter().enumerate().map(|(row, ids)| Sequence { row, input_ids: ids.clone() }).collect();
    for _ in 0..max_tokens {
        let batch = LeftPaddedBatch::new(&rows, 0);
        let hidden = reference::padded_forward(&model, &batch).unwrap();
        let last = hidden.narrow(1, batch.width() - 1, 1).unwrap().squeeze(1).unwrap();
        let next = last.matmul(&head).unwrap().argmax(1).unwrap().to_vec1::<u32>().unwrap();
        rows.iter_mut().zip(next).for_each(|(row, next)| row.input_ids.push(next));
    }
    rows.into_iter().zip(prompts).map(|(row, prompt)| row.input_ids[prompt.len()..].to_vec()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn golden_file(name: &str) -> Value {
    let path = format!("{}/tests/goldens/goldens/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

const GOLDENS: [&str; 2] = ["lm-window", "lm-full-tied-bf16"];

/// Every greedy golden: past the window, with penalties, minimum lengths and several end tokens. The smallest margin
/// between the first and the second token is 3e-3, a hundred times the rounding of f32, so tokens are compared.
#[test]
fn greedy_tokens_and_texts_equal_those_of_transformers() {
    for name in GOLDENS {
        let lm = Lm::golden(name);
        let mut compared = 0;
        for case in golden_file(name)["generation"].as_array().unwrap() {
            let options = &case["options"];
            if options.get("num_beams").is_some() {
                continue;
            }
            let count = |key: &str| options[key].as_u64().unwrap_or(0) as usize;
            let params = SamplingParams {
                max_tokens: count("max_new_tokens"),
                min_tokens: count("min_new_tokens"),
                no_repeat_ngram_size: count("no_repeat_ngram_size"),
                repetition_penalty: options["repetition_penalty"].as_f64().unwrap_or(1.0) as f32,
                stop_token_ids: ids(&options["eos_token_id"]),
                ..SamplingParams::default()
            };
            let prompts: Vec<_> = case["prompt_ids"].as_array().unwrap().iter().map(ids).collect();
            let requests = requests(&prompts, params);
            let generated = lm.generate(&requests, ROOMY);
            assert_eq!(generated, lm.one_by_one(&requests));
            for (row, generated) in generated.iter().enumerate() {
                let expected = ids(&case["one_by_one"][row]);
                let what = format!("{name}, {}, row {row}", case["name"]);
                assert_eq!(generated.token_ids, expected, "{what}");
                assert_eq!(generated.text, case["one_by_one_text"][row].as_str().unwrap(), "{what}");
                let stopped = requests[row].params.stop_token_ids.contains(&expected[expected.len() - 1]);
                assert_eq!(generated.finish_reason == FinishReason::Stop, stopped, "{what}");
                assert_eq!(generated.prompt_tokens, prompts[row].len());
                compared += 1;
            }
        }
        assert_eq!(compared, 20);
    }
}

/// A row's tokens, text and log-probabilities are the same to the bit whoever shares its steps, and whatever slots are
/// refilled when.
#[test]
fn in_flight_equals_one_by_one_equals_static() {
    for name in GOLDENS {
        let lm = Lm::golden(name);
        let prompts: Vec<_> =
            (0..18).map(|i| tokens(i, 1 + (i as usize * 17) % 70, lm.checkpoint.config.vocab_size)).collect();
        let mut requests = requests(&prompts, SamplingParams { logprobs: true, ..SamplingParams::default() });
        for (i, request) in requests.iter_mut().enumerate() {
            let params = Arc::make_mut(&mut request.params);
            params.max_tokens = 1 + i * 7 % 30;
            // Every third row is drawn, some with all settings at once.
            if i % 3 == 0 {
                params.temperature = 0.9;
                params.top_p = if i % 2 == 0 { 0.95 } else { 1.0 };
                params.top_k = (i % 4 == 0).then_some(50);
                params.min_p = 0.01;
                params.frequency_penalty = 0.1;
            }
        }
        let alone = lm.one_by_one(&requests);
        let tight = SchedulerLimits {
            kv_cache_bytes: 5 * KvCache::bytes(&lm.checkpoint.config, 110),
            max_rows: 7,
            prefill_tokens: 90,
        };
        for limits in [ROOMY, tight, SchedulerLimits { max_rows: 3, ..ROOMY }] {
            assert_eq!(lm.generate(&requests, limits), alone, "{name}, {limits:?}");
            // Other arithmetic, token for token the same.
            for (row, (plain, alone)) in lm.generate_static(&requests, limits).iter().zip(&alone).enumerate() {
                assert_eq!(
                    (&plain.token_ids, &plain.text),
                    (&alone.token_ids, &alone.text),
                    "{name}, row {row}, {limits:?}"
                );
                assert_eq!((plain.finish_reason, plain.prompt_tokens), (alone.finish_reason, alone.prompt_tokens));
                assert!(largest_difference(&plain.logprobs, &alone.logprobs) < 1e-4, "{name}, row {row}");
            }
        }

        let greedy: Vec<_> = (0..18).filter(|i| i % 3 != 0).collect();
        let prompts: Vec<_> = greedy.iter().map(|&i| prompts[i].clone()).collect();
        for (&i, expected) in greedy.iter().zip(static_greedy(&lm.checkpoint, &prompts, 30)) {
            assert_eq!(alone[i].token_ids, expected[..alone[i].token_ids.len()], "{name}, row {i}");
        }
    }
}

/// The log-probabilities that come with tokens are those of the whole text in transformers.
#[test]
fn logprobs_equal_those_of_transformers() {
    for name in GOLDENS {
        let lm = Lm::golden(name);
        for row in golden_file(name)["rows"].as_array().unwrap() {
            let text = ids(&row["input_ids"]);
            let expected: Vec<f64> = serde_json::from_value(row["token_logprobs_f64"].clone()).unwrap();
            // One completion of one token for each prefix; the greedy token is seldom the text's, so the text's own is forced.
            for end in (1..text.len()).step_by(5) {
                let mut request = requests(
                    &[text[..end].to_vec()],
                    SamplingParams { max_tokens: 1, logprobs: true, ..SamplingParams::default() },
                );
                let forced = text[end];
                Arc::make_mut(&mut request[0].params).stop_token_ids =
                    (0..lm.checkpoint.config.vocab_size as u32).filter(|&id| id != forced).collect();
                Arc::make_mut(&mut request[0].params).min_tokens = 1;
                let generated = &lm.generate(&request, ROOMY)[0];
                assert_eq!(generated.token_ids, [forced]);
                let difference = (f64::from(generated.logprobs[0]) - expected[end - 1]).abs();
                assert!(difference < 1e-5 * expected[end - 1].abs().max(1.0), "{name}, {end}: {difference}");
            }
        }
    }
}

/// Samples of a prompt that is computed once are those of a prompt computed for each.
#[test]
fn samples_of_one_prompt_are_those_of_a_prompt_each() {
    for name in GOLDENS {
        let lm = Lm::golden(name);
        let vocab_size = lm.checkpoint.config.vocab_size;
        let prompts: Vec<_> = (0..9).map(|i| tokens(i, 1 + (i as usize * 23) % 90, vocab_size)).collect();
        let params = SamplingParams { max_tokens: 17, temperature: 1.0, logprobs: true, ..SamplingParams::default() };
        let mut together = requests(&prompts, params);
        let mut apart = Vec::new();
        for (i, request) in together.iter_mut().enumerate() {
            Arc::make_mut(&mut request.params).max_tokens = 1 + i * 5 % 17;
            request.samples = 0..1 + i as u32 % 5;
            apart.extend(request.samples.clone().map(|k| Request { samples: k..k + 1, ..request.clone() }));
        }
        let expected = lm.one_by_one(&apart);
        let bytes = KvCache::bytes(&lm.checkpoint.config, 110);
        for (max_rows, caches) in [(64, 1000), (1, 1000), (3, 1000), (64, 3), (64, 2), (64, 1)] {
            let limits = SchedulerLimits { max_rows, kv_cache_bytes: caches * bytes, prefill_tokens: 200 };
            let mut scheduler = Scheduler::new(&lm.model, &lm.tokenizer, limits);
            together.iter().for_each(|request| scheduler.push(request.clone()).unwrap());
            let mut completions: Vec<Completion> = Vec::new();
            while !scheduler.is_idle() {
                completions.extend(scheduler.step().unwrap());
                assert!(scheduler.live() <= max_rows);
            }
            completions.sort_by_key(|completion| (completion.row, completion.sample));
            let got: Vec<_> = completions.into_iter().map(|completion| completion.result.unwrap()).collect();
            assert_eq!(got, expected, "{name}, {max_rows} rows, {caches} caches");
            assert!(scheduler.stats().peak_kv_cache_bytes <= limits.kv_cache_bytes);
            if caches >= 2 {
                let computed: usize = prompts.iter().map(Vec::len).sum();
                assert_eq!(scheduler.stats().prompt_tokens as usize, computed, "each prompt once");
            }
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_text_and_another_seed_another() {
    let lm = Lm::golden("lm-window");
    let prompt = tokens(3, 20, lm.checkpoint.config.vocab_size);
    let drawn = |seed: u64, sample: u32, row: u64| {
        let params = SamplingParams { max_tokens: 12, temperature: 1.0, seed, ..SamplingParams::default() };
        let mut request = requests(std::slice::from_ref(&prompt), params).remove(0);
        (request.samples, request.random_key) = (sample..sample + 1, row);
        lm.generate(&[request], ROOMY).remove(0).token_ids
    };
    assert_eq!(drawn(1, 0, 0), drawn(1, 0, 0));
    for (seed, sample, row) in [(2, 0, 0), (1, 1, 0), (1, 0, 1)] {
        assert_ne!(drawn(1, 0, 0), drawn(seed, sample, row));
    }
}

/// Every stretch of three characters of a golden text, wherever its tokens end, ends the text where it first comes up.
#[test]
fn a_stop_string_ends_the_text_wherever_tokens_end() {
    let lm = Lm::golden("lm-window");
    let prompt = tokens(3, 9, lm.checkpoint.config.vocab_size);
    let whole = lm.one_by_one(&requests(
        std::slice::from_ref(&prompt),
        SamplingParams { max_tokens: 30, ..SamplingParams::default() },
    ));
    let (whole, all_tokens) = (&whole[0].text, &whole[0].token_ids);
    let characters: Vec<char> = whole.chars().collect();
    let stops: Vec<String> = characters.windows(3).map(|window| window.iter().collect()).collect();
    // An unfinished character is shown as a replacement until its last byte is there.
    for stop in stops.iter().filter(|stop| !stop.contains(char::REPLACEMENT_CHARACTER)) {
        let params = SamplingParams { max_tokens: 30, stop: vec![stop.clone()], ..SamplingParams::default() };
        let generated = lm.one_by_one(&requests(std::slice::from_ref(&prompt), params)).remove(0);
        assert_eq!(generated.finish_reason, FinishReason::Stop, "{stop:?}");
        assert_eq!(generated.text, whole[..whole.find(stop.as_str()).unwrap()], "{stop:?}");
        assert!(all_tokens.starts_with(&generated.token_ids));
    }
}

#[test]
fn the_demo_checkpoint_sorts_digits() {
    let sample_data = format!("{}/sample-data", env!("CARGO_MANIFEST_DIR"));
    let lm = Lm::open(Checkpoint::open(&format!("{sample_data}/models/digit-sorter")).unwrap());
    let read = |name: &str| -> RecordBatch {
        let file = std::fs::File::open(format!("{sample_data}/{name}.parquet")).unwrap();
        ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap().next().unwrap().unwrap()
    };
    let defaults = GenerationDefaults::read(&lm.checkpoint.dir, &lm.checkpoint.config).unwrap();
    let params = SamplingParams {
        max_tokens: defaults.max_tokens,
        stop_token_ids: defaults.eos_token_ids,
        ..SamplingParams::default()
    };
    // As the chat template renders one user turn; the tokenizer adds the BOS.
    let (rows, expected) = (read("sorting"), read("sorting-expected"));
    let strings = |batch: &RecordBatch, column: &str| -> Vec<String> {
        let column = batch.column_by_name(column).unwrap().as_string::<i32>();
        column.iter().map(|text| text.unwrap().to_owned()).collect()
    };
    assert_eq!(strings(&rows, "id"), strings(&expected, "id"));
    let prompts: Vec<_> = strings(&rows, "prompt")
        .iter()
        .take(100)
        .map(|prompt| lm.tokenizer.tokenize_one(&format!("[INST] {prompt}[/INST]")).unwrap().chunks.remove(0))
        .collect();
    let generated = lm.generate(&requests(&prompts, params), SchedulerLimits { max_rows: 16, ..ROOMY });
    let answers = strings(&rows, "answer");
    for (row, (generated, expected)) in generated.iter().zip(strings(&expected, "completion")).enumerate() {
        assert_eq!(generated.text, expected, "row {row}");
    }
    let right = generated.iter().zip(&answers).filter(|(generated, answer)| generated.text.trim() == **answer).count();
    assert!(right >= 95, "{right} of 100 sorted");
}
