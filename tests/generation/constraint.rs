//! Constrained output of models with random weights, which know nothing of what they are asked for: every completion keeps
//! to its grammar, in any company.

use std::collections::BTreeSet;
use std::sync::Arc;

use mistral_batch::generation::{Constraint, Grammar};
use serde_json::json;

use super::*;

const SEEDS: u64 = 40;

impl Lm {
    fn constrained(&self, grammar: Grammar, temperature: f32, max_tokens: usize) -> Vec<Request> {
        let constraint = Constraint::compile(grammar, &self.tokenizer.token_bytes().unwrap()).unwrap();
        let eos = GenerationDefaults::read(&self.checkpoint.dir, &self.checkpoint.config).unwrap().eos_token_ids;
        let params = SamplingParams {
            max_tokens,
            temperature,
            stop_token_ids: eos,
            constraint: Some(constraint),
            ..SamplingParams::default()
        };
        let prompts: Vec<_> =
            (0..SEEDS).map(|i| tokens(i, 1 + (i as usize * 7) % 23, self.checkpoint.config.vocab_size)).collect();
        requests(&prompts, params)
    }

    /// What comes of each request, in order.
    fn results(&self, requests: &[Request], limits: SchedulerLimits) -> Vec<Result<Generated, String>> {
        let mut scheduler = Scheduler::new(&self.model, &self.tokenizer, limits);
        requests.iter().for_each(|request| scheduler.push(request.clone()).unwrap());
        let mut completions: Vec<Completion> = Vec::new();
        while !scheduler.is_idle() {
            completions.extend(scheduler.step().unwrap());
        }
        completions.sort_by_key(|completion| completion.row);
        completions.into_iter().map(|completion| completion.result).collect()
    }
}

#[test]
fn choices_are_made_whatever_their_bytes() {
    let choices =
        ["a", "ab", "abc", " a", "with, comma", "naïve", "日本語", "🙂🏽", "line\nbreak", "say \"so\"", "<s>", "▁"];
    let choices = choices.map(str::to_owned).to_vec();
    for name in GOLDENS {
        let lm = Lm::golden(name);
        let mut drawn = BTreeSet::new();
        for temperature in [0.0, 1.0, 5.0] {
            let requests = lm.constrained(Grammar::Choices(choices.clone()), temperature, 20);
            for generated in lm.generate(&requests, ROOMY) {
                assert!(choices.contains(&generated.text), "{name}: {generated:?}");
                assert_eq!(generated.finish_reason, FinishReason::Stop);
                drawn.insert(generated.text);
            }
        }
        assert!(drawn.len() > 6, "{name}: {drawn:?}");
        assert!(drawn.contains("a") && drawn.contains("ab"), "a choice that begins another, and the other: {drawn:?}");
    }
}

#[test]
fn every_json_is_valid_against_its_schema() {
    let schema = json!({
        "type": "object",
        "properties": {
            "label": {"enum": ["billing", "bug", "größe"]},
            "urgent": {"type": "boolean"},
            "score": {"type": "integer", "minimum": 0, "maximum": 10},
            "note": {"type": "string", "maxLength": 6},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-c]{1,3}$"}, "maxItems": 2}
        },
        "required": ["label", "urgent", "score", "tags"],
        "additionalProperties": false
    });
    for name in GOLDENS {
        let lm = Lm::golden(name);
        let mut seen = BTreeSet::new();
        for temperature in [0.0, 1.0] {
            let requests = lm.constrained(Grammar::JsonSchema(schema.to_string()), temperature, 400);
            for generated in lm.generate(&requests, ROOMY) {
                let value: Value = serde_json::from_str(&generated.text).unwrap();
                let keys: BTreeSet<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
                assert!(keys.is_superset(&["label", "urgent", "score", "tags"].into()), "{value}");
                assert!(keys.is_subset(&["label", "urgent", "score", "tags", "note"].into()), "{value}");
                assert!(["billing", "bug", "größe"].contains(&value["label"].as_str().unwrap()), "{value}");
                // On one line, with no more than a space anywhere.
                let outside: Vec<_> = generated.text.split('"').step_by(2).collect();
                let spaced = |part: &&str| part.contains("  ") || part.contains('\n');
                assert!(!outside.iter().any(spaced), "{}", generated.text);
                assert!(value["urgent"].is_boolean() && value["score"].as_u64().unwrap() <= 10, "{value}");
                assert!(value["note"].as_str().is_none_or(|note| note.chars().count() <= 6), "{value}");
                let tags = value["tags"].as_array().unwrap();
                let fits = |tag: &Value| {
                    let tag = tag.as_str().unwrap();
                    (1..=3).contains(&tag.len()) && tag.bytes().all(|byte| matches!(byte, b'a'..=b'c'))
                };
                assert!(tags.len() <= 2 && tags.iter().all(fits), "{value}");
                assert_eq!(generated.finish_reason, FinishReason::Stop);
                seen.insert(generated.text);
            }
        }
        assert!(seen.len() > 30, "{name}: {}", seen.len());
    }
}

#[test]
fn every_completion_matches_its_pattern_alone_and_in_company() {
    let dates = Grammar::Regex(r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]( é{1,4})?".into());
    let matches = |text: &str| {
        let (date, rest) = text.split_at(10);
        let ascii = date
            .bytes()
            .enumerate()
            .all(|(i, byte)| if i == 4 || i == 7 { byte == b'-' } else { byte.is_ascii_digit() });
        let month: u32 = date[5..7].parse().unwrap();
        let rest =
            rest.is_empty() || rest.strip_prefix(' ').is_some_and(|es| !es.is_empty() && es.chars().all(|c| c == 'é'));
        ascii && (1..=12).contains(&month) && rest
    };
    for name in GOLDENS {
        let lm = Lm::golden(name);
        let mut requests = lm.constrained(dates.clone(), 1.0, 40);
        for (i, request) in requests.iter_mut().enumerate() {
            let params = Arc::make_mut(&mut request.params);
            params.logprobs = true;
            params.temperature = [0.0, 0.7, 1.0, 3.0][i % 4];
            params.top_p = if i % 3 == 0 { 0.9 } else { 1.0 };
            params.min_tokens = i % 5;
        }
        let alone: Vec<_> =
            requests.iter().flat_map(|request| lm.results(std::slice::from_ref(request), ROOMY)).collect();
        for result in &alone {
            let generated = result.as_ref().unwrap();
            assert!(matches(&generated.text), "{generated:?}");
        }
        for limits in [ROOMY, SchedulerLimits { max_rows: 3, ..ROOMY }, SchedulerLimits { prefill_tokens: 20, ..ROOMY }]
        {
            assert_eq!(lm.results(&requests, limits), alone, "{name}, {limits:?}");
        }
    }
}

#[test]
fn a_text_that_is_cut_is_an_error_and_never_half_an_answer() {
    let lm = Lm::golden("lm-window");
    let number = || Grammar::Regex(r"[0-9]{12}".into());
    for result in lm.results(&lm.constrained(number(), 1.0, 2), ROOMY) {
        let message = result.unwrap_err();
        assert_eq!(message, "cut at max_tokens (2) before the text was complete under --regex; raise --max-tokens");
    }

    // A stop string ends the text where it comes up: 5 and what follows is lost, unless nothing is.
    let mut requests = lm.constrained(Grammar::Regex(r"[0-9]{4}|[0-4]{1,3}".into()), 1.0, 20);
    requests.iter_mut().for_each(|request| Arc::make_mut(&mut request.params).stop = vec!["5".into()]);
    let (mut whole, mut cut) = (0, 0);
    for result in lm.results(&requests, ROOMY) {
        match result {
            Ok(generated) => {
                assert!(!generated.text.is_empty() && !generated.text.contains('5'), "{generated:?}");
                whole += 1;
            }
            Err(message) => {
                assert!(message.contains("stop string"), "{message}");
                cut += 1;
            }
        }
    }
    assert!(whole > 5 && cut > 2, "{whole} {cut}");

    // The settings may forbid what the grammar demands.
    let mut requests = lm.constrained(Grammar::Regex(r"(ab){6}".into()), 0.0, 20);
    requests.iter_mut().for_each(|request| Arc::make_mut(&mut request.params).no_repeat_ngram_size = 1);
    assert!(lm.results(&requests, ROOMY).into_iter().all(|result| result.unwrap_err().contains("no token is left")));

    // Choices always fit: less than their longest could take is refused.
    let requests = lm.constrained(Grammar::Choices(vec!["no".into(), "perhaps".into()]), 0.0, 7);
    let message = requests[0].params.check().unwrap_err().of_flag();
    assert_eq!(message, "--max-tokens is 7, and the longest of the choices can take 8 tokens");
}
