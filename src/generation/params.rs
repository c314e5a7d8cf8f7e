//! What a request asks of its completion.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Constraint;
use crate::error::{Error, Result};
use crate::model::MistralConfig;

/// Settings of one row's completion; the defaults are greedy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SamplingParams {
    /// Tokens at most.
    pub max_tokens: usize,
    /// Tokens before any stop token or stop string ends the completion.
    pub min_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only the `top_k` likeliest tokens, and what ties with the last of them; `None` is all.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that reach this probability together; 1 is all.
    pub top_p: f32,
    /// Only tokens of at least this share of the likeliest one's probability; 0 is all.
    pub min_p: f32,
    /// Makes tokens of the prompt and the completion less likely (above 1) or likelier (below); 1 is off.
    pub repetition_penalty: f32,
    /// Taken from a token's logit for each time it stands in the completion; 0 is off.
    pub frequency_penalty: f32,
    /// Taken from a token's logit once it stands in the completion; 0 is off.
    pub presence_penalty: f32,
    /// No sequence of so many tokens comes twice in prompt and completion; 0 is off.
    pub no_repeat_ngram_size: usize,
    /// Tokens that end the completion; none of them with `--ignore-eos`.
    pub stop_token_ids: Vec<u32>,
    /// Texts that end the completion and are left out of it.
    pub stop: Vec<String>,
    /// Whether each token's log-probability is kept.
    pub logprobs: bool,
    /// The same seed gives the same row the same completion.
    pub seed: u64,
    /// What the completion has to be.
    #[serde(skip)]
    pub constraint: Option<Constraint>,
}

/// Tokens of a completion when neither the user nor the checkpoint says how many.
pub const DEFAULT_MAX_TOKENS: usize = 256;

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            max_tokens: DEFAULT_MAX_TOKENS,
            min_tokens: 0,
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            no_repeat_ngram_size: 0,
            stop_token_ids: Vec::new(),
            stop: Vec::new(),
            logprobs: false,
            seed: 0,
            constraint: None,
        }
    }
}

/// A setting that means nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadSetting {
    /// The field of [`SamplingParams`].
    pub name: &'static str,
    /// What is wrong with its value.
    pub problem: String,
}

impl std::fmt::Display for BadSetting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.name, self.problem)
    }
}

impl BadSetting {
    /// The same with the setting named as a flag.
    pub fn of_flag(&self) -> String {
        format!("--{} {}", self.name.replace('_', "-"), self.problem)
    }
}

impl SamplingParams {
    /// Whether the next token is the likeliest one, whatever came before.
    pub fn is_plain_greedy(&self) -> bool {
        self.temperature == 0.0
            && self.min_tokens == 0
            && self.repetition_penalty == 1.0
            && self.frequency_penalty == 0.0
            && self.presence_penalty == 0.0
            && self.no_repeat_ngram_size == 0
            && self.constraint.is_none()
    }

    /// Refuses settings that mean nothing.
    ///
    /// # Errors
    /// The first such setting.
    pub fn check(&self) -> Result<(), BadSetting> {
        let refuse = |name: &'static str, problem: String| Err(BadSetting { name, problem });
        let number = |name: &'static str, value: f32, wanted: &str, fits: bool| {
            if fits { Ok(()) } else { refuse(name, format!("is {value}; it has to be {wanted}")) }
        };
        number("temperature", self.temperature, "0 or more", self.temperature >= 0.0 && self.temperature.is_finite())?;
        number("top_p", self.top_p, "over 0 and up to 1", self.top_p > 0.0 && self.top_p <= 1.0)?;
        number("min_p", self.min_p, "from 0 to 1", (0.0..=1.0).contains(&self.min_p))?;
        let penalty = self.repetition_penalty;
        number("repetition_penalty", penalty, "over 0", penalty > 0.0 && penalty.is_finite())?;
        number("frequency_penalty", self.frequency_penalty, "a finite number", self.frequency_penalty.is_finite())?;
        number("presence_penalty", self.presence_penalty, "a finite number", self.presence_penalty.is_finite())?;
        if self.top_k == Some(0) {
            return refuse("top_k", "is 0; leave it out for all tokens".into());
        }
        if self.max_tokens == 0 {
            return refuse("max_tokens", "is 0; a completion has at least one token".into());
        }
        if let Some(needed) = self.constraint.as_ref().and_then(Constraint::max_tokens)
            && self.max_tokens < needed
        {
            return refuse(
                "max_tokens",
                format!("is {}, and the longest of the choices can take {needed} tokens", self.max_tokens),
            );
        }
        if self.min_tokens > self.max_tokens {
            return refuse(
                "min_tokens",
                format!("is {}, more than the {} tokens that a completion may have", self.min_tokens, self.max_tokens),
            );
        }
        if self.stop.iter().any(String::is_empty) {
            return refuse("stop", "holds an empty text".into());
        }
        Ok(())
    }
}

/// What a checkpoint says about its own generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenerationDefaults {
    /// The tokens that end a completion.
    pub eos_token_ids: Vec<u32>,
    /// Tokens of a completion at most.
    pub max_tokens: usize,
}

#[derive(Deserialize)]
struct RawGenerationConfig {
    eos_token_id: Option<OneOrMany>,
    max_new_tokens: Option<usize>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl GenerationDefaults {
    /// Reads `generation_config.json` of a checkpoint folder; what it does not say comes from `config.json`.
    ///
    /// Its sampling settings are not taken over: a run is greedy unless it is asked otherwise.
    ///
    /// # Errors
    /// [`Error::Config`] when the file is there and cannot be read.
    pub fn read(dir: &Path, config: &MistralConfig) -> Result<Self> {
        let path = dir.join("generation_config.json");
        let raw = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| Error::config(&path, error))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                RawGenerationConfig { eos_token_id: None, max_new_tokens: None }
            }
            Err(error) => return Err(Error::config(&path, error)),
        };
        let eos_token_ids = match raw.eos_token_id {
            None => config.eos_token_ids.clone(),
            Some(OneOrMany::One(id)) => vec![id],
            Some(OneOrMany::Many(ids)) => ids,
        };
        let max_tokens = raw.max_new_tokens.filter(|&tokens| tokens > 0).unwrap_or(DEFAULT_MAX_TOKENS);
        Ok(Self { eos_token_ids, max_tokens })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_mean_nothing_are_named() {
        let refuse = |change: fn(&mut SamplingParams)| {
            let mut params = SamplingParams::default();
            change(&mut params);
            params.check().unwrap_err().of_flag()
        };
        assert!(SamplingParams::default().check().is_ok());
        assert!(refuse(|p| p.temperature = -1.0).starts_with("--temperature is -1"));
        assert!(refuse(|p| p.temperature = f32::NAN).contains("temperature"));
        assert!(refuse(|p| p.top_p = 0.0).contains("top-p"));
        assert!(refuse(|p| p.min_p = 1.5).contains("min-p"));
        assert!(refuse(|p| p.top_k = Some(0)).contains("top-k"));
        assert!(refuse(|p| p.repetition_penalty = 0.0).contains("repetition-penalty"));
        assert!(refuse(|p| p.presence_penalty = f32::INFINITY).contains("presence-penalty"));
        assert!(refuse(|p| p.max_tokens = 0).contains("max-tokens"));
        assert!(refuse(|p| p.min_tokens = 1000).starts_with("--min-tokens is 1000"));
        assert!(refuse(|p| p.stop = vec![String::new()]).contains("stop"));
    }

    #[test]
    fn the_checkpoint_says_where_its_texts_end() {
        let dir = tempfile::tempdir().unwrap();
        let config = MistralConfig::parse(r#"{"model_type": "mistral", "eos_token_id": [2, 7]}"#).unwrap();
        let read = |text: &str| {
            std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
            GenerationDefaults::read(dir.path(), &config)
        };
        let defaults = GenerationDefaults::read(dir.path(), &config).unwrap();
        assert_eq!((defaults.eos_token_ids, defaults.max_tokens), (vec![2, 7], DEFAULT_MAX_TOKENS));
        assert_eq!(read(r#"{"eos_token_id": 5, "temperature": 0.7}"#).unwrap().eos_token_ids, [5]);
        let both = read(r#"{"eos_token_id": [5, 6], "max_new_tokens": 20}"#).unwrap();
        assert_eq!((both.eos_token_ids, both.max_tokens), (vec![5, 6], 20));
        assert_eq!(read("[").unwrap_err().exit_code(), crate::ExitCode::Config);
    }
}
