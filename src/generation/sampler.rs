//! From logits to the next token, as transformers' logits processors (`generation/logits_process.py`, 5.23).
//!
//! In their order: repetition penalty, no repeated n-grams, minimum length; then, where tokens are drawn,
//! temperature, top-k, top-p and min-p. The frequency and presence penalties, which transformers lacks, follow the
//! repetition penalty and count the completion's tokens (OpenAI's API reference, as vLLM computes them).

use std::collections::HashMap;

use super::{SamplingParams, TokenMask};

/// The token that was chosen, and how likely the model found it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    pub token_id: u32,
    /// The logarithm of its probability before any of the settings changed it.
    pub logprob: f32,
}

/// What a random draw depends on, and nothing else: not the batch, not the machine, not the draws before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrawKey {
    /// [`SamplingParams::seed`].
    pub seed: u64,
    /// The row's number in the input, or another key of the row.
    pub row: u64,
    /// Which of the row's completions.
    pub sample: u32,
    /// Tokens of the completion so far.
    pub step: u32,
}

impl DrawKey {
    /// A uniform number in [0, 1): SplitMix64 (Steele, Lea, Flood 2014) over the four parts, each mixed in before the next.
    pub fn uniform(self) -> f64 {
        let sample_and_step = u64::from(self.sample) << 32 | u64::from(self.step);
        let mixed = [self.row, sample_and_step]
            .into_iter()
            .fold(split_mix(self.seed), |state, part| split_mix(state ^ part.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        (mixed >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn split_mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Chooses the next token of a row from its `logits [vocab]`, which are changed on the way.
///
/// `prompt` and `completion` are the row's tokens so far; only `allowed` tokens are chosen. `None` when there is none left
/// to choose.
pub fn sample(
    logits: &mut [f32],
    params: &SamplingParams,
    allowed: Option<&TokenMask>,
    prompt: &[u32],
    completion: &[u32],
    key: DrawKey,
) -> Option<Sampled> {
    let total = params.logprobs.then(|| (log_sum_exp(logits), logits.to_vec()));
    penalize(logits, params, prompt, completion);
    if let Some(allowed) = allowed {
        allowed.apply(logits);
    }
    if logits.iter().all(|&logit| logit == f32::NEG_INFINITY) {
        return None;
    }
    let token = if params.temperature == 0.0 {
        likeliest(logits)
    } else {
        warp(logits, params);
        draw(logits, key.uniform())
    };
    let logprob = total.map_or(0.0, |(total, raw)| (f64::from(raw[token]) - total) as f32);
    Some(Sampled { token_id: token as u32, logprob })
}

/// Applies what depends on the tokens so far: penalties, forbidden n-grams, the minimum length.
fn penalize(logits: &mut [f32], params: &SamplingParams, prompt: &[u32], completion: &[u32]) {
    let penalty = params.repetition_penalty;
    if penalty != 1.0 {
        let mut seen: Vec<u32> = prompt.iter().chain(completion).copied().collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            }
        }
    }
    if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
        let mut counts: HashMap<u32, u32> = HashMap::new();
        completion.iter().for_each(|&id| *counts.entry(id).or_default() += 1);
        for (id, count) in counts {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
            }
        }
    }
    if params.no_repeat_ngram_size > 0 {
        let tokens: Vec<u32> = prompt.iter().chain(completion).copied().collect();
        let size = params.no_repeat_ngram_size;
        if tokens.len() + 1 >= size {
            let begun = &tokens[tokens.len() + 1 - size..];
            for ngram in tokens.windows(size).filter(|ngram| ngram[..size - 1] == *begun) {
                if let Some(logit) = logits.get_mut(ngram[size - 1] as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
    if completion.len() < params.min_tokens {
        for &id in &params.stop_token_ids {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// Applies temperature, top-k, top-p and min-p: what is not to be drawn becomes −∞.
fn warp(logits: &mut [f32], params: &SamplingParams) {
    if params.temperature != 1.0 {
        logits.iter_mut().for_each(|logit| *logit /= params.temperature);
    }
    if let Some(k) = params.top_k.filter(|&k| k < logits.len()) {
        let mut sorted = logits.to_vec();
        let (_, &mut least, _) = sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        logits.iter_mut().filter(|logit| **logit < least).for_each(|logit| *logit = f32::NEG_INFINITY);
    }
    if params.top_p < 1.0 {
        keep_top_p(logits, f64::from(params.top_p));
    }
    if params.min_p > 0.0 {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let least = f64::from(params.min_p).ln();
        logits
            .iter_mut()
            .filter(|logit| f64::from(**logit - largest) < least)
            .for_each(|logit| *logit = f32::NEG_INFINITY);
    }
}

/// Drops the least likely tokens whose probabilities add up to no more than `1 − top_p`, but never the likeliest.
fn keep_top_p(logits: &mut [f32], top_p: f64) {
    let total = log_sum_exp(logits);
    let probability = |logit: f32| (f64::from(logit) - total).exp();
    // However many tokens there are below this probability, together they stay under 1 − top_p: no need to sort them.
    let negligible = ((1.0 - top_p) / logits.len() as f64).ln() + total;
    let mut dropped = 0.0;
    let mut candidates = Vec::new();
    for (token, logit) in logits.iter_mut().enumerate() {
        if f64::from(*logit) < negligible {
            dropped += probability(*logit);
            *logit = f32::NEG_INFINITY;
        } else {
            candidates.push(token);
        }
    }
    // Ascending; of equal tokens the last of the vocabulary go first.
    candidates.sort_unstable_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)));
    candidates.pop();
    for token in candidates {
        dropped += probability(logits[token]);
        if dropped > 1.0 - top_p {
            break;
        }
        logits[token] = f32::NEG_INFINITY;
    }
}

/// The first of the largest logits.
fn likeliest(logits: &[f32]) -> usize {
    let mut best = 0;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = token;
        }
    }
    best
}

/// Draws from the softmax of the logits: the first token up to which the probabilities exceed `uniform`.
fn draw(logits: &[f32], uniform: f64) -> usize {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let weight = |logit: &f32| (f64::from(*logit) - largest).exp();
    let wanted = uniform * logits.iter().map(weight).sum::<f64>();
    let mut sum = 0.0;
    for (token, logit) in logits.iter().enumerate() {
        sum += weight(logit);
        if sum > wanted {
            return token;
        }
    }
    likeliest(logits)
}

/// ln Σ exp(logit), in f64.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    largest + logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn floats(value: &Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
    }

    #[test]
    fn probabilities_equal_those_of_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/goldens/sampling.json");
        let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let order = ["repetition_penalty", "temperature", "top_k", "top_p", "min_p"];
        assert_eq!(golden["order"], serde_json::json!(order));
        let previous: Vec<u32> = serde_json::from_value(golden["previous_ids"].clone()).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let options = &case["options"];
            let number = |name: &str, default: f64| options[name].as_f64().unwrap_or(default) as f32;
            let params = SamplingParams {
                temperature: number("temperature", 1.0),
                top_k: options["top_k"].as_u64().map(|k| k as usize),
                top_p: number("top_p", 1.0),
                min_p: number("min_p", 0.0),
                repetition_penalty: number("repetition_penalty", 1.0),
                ..SamplingParams::default()
            };
            let name = case["logits"].as_str().unwrap();
            let mut logits = floats(&golden["logits"][name]);
            penalize(&mut logits, &params, &previous, &[]);
            warp(&mut logits, &params);
            let total = log_sum_exp(&logits);
            for (token, expected) in floats(&case["probs_f32"]).into_iter().enumerate() {
                let probability = (f64::from(logits[token]) - total).exp() as f32;
                let what = format!("{name} {options}: token {token}: {probability} and {expected}");
                assert_eq!(probability > 0.0, expected > 0.0, "{what}");
                assert!((probability - expected).abs() < 1e-5, "{what}");
            }
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.5f32, 0.25, 0.125, 0.125].map(f32::ln);
        let mut counts = [0f64; 4];
        for row in 0..40_000 {
            let key = DrawKey { seed: 7, row, sample: 0, step: 3 };
            counts[draw(&logits, key.uniform())] += 1.0;
        }
        for (count, share) in counts.iter().zip([0.5, 0.25, 0.125, 0.125]) {
            assert!((count / 40_000.0 - share).abs() < 0.01, "{counts:?}");
        }
        assert_eq!(draw(&[0.0, f32::NEG_INFINITY], 0.999_999_999), 0);
    }

    #[test]
    fn every_part_of_the_key_changes_the_draw() {
        let key = DrawKey { seed: 1, row: 1, sample: 1, step: 1 };
        let others = [
            DrawKey { seed: 2, ..key },
            DrawKey { row: 2, ..key },
            DrawKey { sample: 2, ..key },
            DrawKey { step: 2, ..key },
            DrawKey { row: 0, sample: 0, ..key },
        ];
        assert!(others.iter().all(|other| other.uniform() != key.uniform()));
        assert_eq!(key.uniform(), DrawKey { ..key }.uniform());
    }

    fn next(params: SamplingParams, logits: &[f32], prompt: &[u32], completion: &[u32]) -> Sampled {
        let key = DrawKey { seed: 0, row: 0, sample: 0, step: completion.len() as u32 };
        sample(&mut logits.to_vec(), &params, None, prompt, completion, key).unwrap()
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest_and_reports_the_models_probability() {
        let params = SamplingParams { repetition_penalty: 100.0, logprobs: true, ..SamplingParams::default() };
        let sampled = next(params, &[1.0, 2.0, 2.0, 0.0], &[1, 9999], &[]);
        assert_eq!(sampled.token_id, 2);
        let total = (1f64.exp() + 2.0 * 2f64.exp() + 1.0).ln();
        assert!((f64::from(sampled.logprob) - (2.0 - total)).abs() < 1e-6);
        assert_eq!(next(SamplingParams::default(), &[1.0, 2.0, 2.0], &[], &[]).token_id, 1);
    }

    #[test]
    fn frequency_counts_and_presence_does_not() {
        let logits = [0.0, 1.0, 0.5];
        let frequency = |value| SamplingParams { frequency_penalty: value, ..SamplingParams::default() };
        let presence = |value| SamplingParams { presence_penalty: value, ..SamplingParams::default() };
        assert_eq!(next(frequency(0.3), &logits, &[], &[1]).token_id, 1);
        assert_eq!(next(frequency(0.3), &logits, &[], &[1, 1]).token_id, 2);
        assert_eq!(next(presence(0.3), &logits, &[], &[1, 1, 1]).token_id, 1);
        assert_eq!(next(presence(0.6), &logits, &[], &[1]).token_id, 2);
        assert_eq!(next(presence(0.6), &logits, &[1], &[]).token_id, 1, "the prompt does not count");
    }

    #[test]
    fn no_ngram_comes_twice_and_no_end_too_early() {
        let logits = [0.0, 3.0, 2.0, 1.0];
        let ngram = |size| SamplingParams { no_repeat_ngram_size: size, ..SamplingParams::default() };
        assert_eq!(next(ngram(2), &logits, &[3, 1], &[3]).token_id, 2, "3 1 was there");
        assert_eq!(next(ngram(1), &logits, &[1, 2], &[]).token_id, 3);
        assert_eq!(next(ngram(3), &logits, &[3], &[]).token_id, 1);
        let ends = SamplingParams { min_tokens: 2, stop_token_ids: vec![1], ..SamplingParams::default() };
        assert_eq!(next(ends.clone(), &logits, &[], &[0]).token_id, 2);
        assert_eq!(next(ends, &logits, &[], &[0, 0]).token_id, 1);
    }
}
