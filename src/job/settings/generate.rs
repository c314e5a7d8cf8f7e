//! The settings of `mistral-batch generate`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum, ValueHint};
use schemars::JsonSchema;
use serde_json::Value;

use super::common::CommonSettings;
use super::values::{Count, count};
use super::{Job, MessageSettings};
use crate::error::{Error, Result};
use crate::generation::{Batching, Grammar, SamplingParams};
use crate::job::{CommandSpec, GenerateOptions};

/// Complete each prompt with a MistralForCausalLM checkpoint.
///
/// Appends completion, finish_reason (stop or length), prompt_tokens, completion_tokens, num_tokens, truncated and error to
/// the input's columns. Greedy unless --temperature is given. Prompts that are too long lose their beginning.
#[derive(Debug, Clone, Args, JsonSchema)]
#[command(after_help = "\
Examples:
  mistral-batch generate -i prompts.parquet --text-column prompt --model ./mistral-7b -o answers
  mistral-batch generate -i chats.jsonl --chat-column messages --model org/name-instruct --max-tokens 200 -o answers.jsonl
  mistral-batch generate -i reviews.csv --prompt-template \"Review: {review} Sentiment:\" --choices positive,negative,mixed --model ./m -o rated.csv
  mistral-batch generate -i names.csv --prompt-template \"Write a haiku about {name}:\" --temperature 0.8 --top-p 0.95 --seed 7 --model ./m -o haikus.csv")]
pub struct GenerateSettings {
    #[command(flatten)]
    #[schemars(flatten)]
    common: CommonSettings,

    /// Tokens of a completion at most [default: what generation_config.json says, else 256]
    #[schemars(range(min = 1))]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Generation")]
    max_tokens: Option<u64>,

    /// Tokens before a stop token or stop string may end a completion
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Generation")]
    min_tokens: usize,

    /// Randomness: 0 takes the likeliest token, higher is more random
    #[arg(long, value_name = "T", default_value_t = 0.0, help_heading = "Generation")]
    temperature: f32,

    /// Draw from the K likeliest tokens only
    #[arg(long, value_name = "K", help_heading = "Generation")]
    top_k: Option<usize>,

    /// Draw from the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Generation")]
    top_p: f32,

    /// Draw from tokens of at least this share of the likeliest one's probability
    #[arg(long, value_name = "P", default_value_t = 0.0, help_heading = "Generation")]
    min_p: f32,

    /// Over 1 makes tokens of prompt and completion less likely to come again
    #[arg(long, value_name = "X", default_value_t = 1.0, help_heading = "Generation")]
    repetition_penalty: f32,

    /// Never repeat a sequence of so many tokens; 0 is off
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Generation")]
    no_repeat_ngram_size: usize,

    /// Taken from a token's logit each time it came in the completion
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true, help_heading = "Generation")]
    frequency_penalty: f32,

    /// Taken from a token's logit once it came in the completion
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true, help_heading = "Generation")]
    presence_penalty: f32,

    /// End the completion before this text; repeatable
    #[arg(long, value_name = "TEXT", help_heading = "Generation")]
    stop: Vec<String>,

    /// Token ids that end the completion, instead of the checkpoint's
    #[arg(long, value_name = "ID,ID", value_delimiter = ',', help_heading = "Generation")]
    stop_token_ids: Option<Vec<u32>>,

    /// Go on beyond end-of-text tokens
    #[arg(long, conflicts_with = "stop_token_ids", help_heading = "Generation")]
    ignore_eos: bool,

    /// Completions of each row, in the column completions; needs a temperature
    #[schemars(range(min = 1, max = 1024))]
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Generation")]
    n: u32,

    /// Also list every generated token with its log-probability in token_logprobs
    #[arg(long, help_heading = "Generation")]
    logprobs: bool,

    /// Seed of the random draws: the same row and seed give the same completion, whatever the batch
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Generation")]
    seed: u64,

    /// Complete with one of these texts, separated by commas; --choice takes one that has a comma
    #[arg(
        long,
        value_name = "A,B,C",
        value_delimiter = ',',
        conflicts_with_all = ["json_schema", "regex"],
        help_heading = "Constrained output"
    )]
    choices: Vec<String>,

    /// One more choice, as it stands; repeatable
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["json_schema", "regex"], help_heading = "Constrained output")]
    choice: Vec<String>,

    /// Complete with JSON that is valid against the schema in this file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "regex", help_heading = "Constrained output")]
    json_schema: Option<PathBuf>,

    /// Complete with a text that matches this regular expression as a whole
    #[arg(long, value_name = "PATTERN", help_heading = "Constrained output")]
    regex: Option<String>,

    /// Struct column whose fields (max_tokens, temperature, top_p, stop, seed, …) override these flags row by row
    #[arg(long, value_name = "COLUMN", help_heading = "Generation")]
    params_column: Option<String>,

    /// Refill a finished completion's place at once, or compute left-padded rectangles to their end, for comparison
    #[arg(long, value_enum, value_name = "HOW", default_value = "in-flight", help_heading = "Running")]
    batching: BatchingArg,

    /// Memory for keys and values of live completions, in bytes; accepts 512M [default: 2G on the CPU, what is free on a GPU]
    #[arg(long, value_name = "BYTES", value_parser = count, help_heading = "Running")]
    #[schemars(with = "Option<Count>")]
    kv_cache_memory: Option<u64>,
}

#[derive(Debug, Clone, Copy, ValueEnum, JsonSchema)]
#[schemars(rename_all = "kebab-case")]
enum BatchingArg {
    /// In flight: whoever ends makes room for the next in the very next step
    InFlight,
    /// The plain way: a padded rectangle waits for its longest completion
    Static,
}

impl GenerateSettings {
    pub(super) fn messages(&self) -> &MessageSettings {
        self.common.messages()
    }

    /// What completions have to be, if anything.
    fn grammar(&self) -> Result<Option<Grammar>> {
        let grammar = match (&self.json_schema, &self.regex) {
            (Some(path), _) => Grammar::JsonSchema(read_schema(path)?),
            (None, Some(pattern)) => Grammar::Regex(pattern.clone()),
            (None, None) if self.choices.is_empty() && self.choice.is_empty() => return Ok(None),
            (None, None) => Grammar::Choices(self.choices.iter().chain(&self.choice).cloned().collect()),
        };
        let place = self.json_schema.as_ref().map_or(String::new(), |path| format!(" {}", path.display()));
        let failed = |message: String| Error::Usage(format!("{}{place}: {message}", grammar.flag()));
        grammar.check().map_err(failed)?;
        Ok(Some(grammar))
    }

    pub(super) fn into_job(self) -> Result<Job> {
        let grammar = self.grammar()?;
        let params = SamplingParams {
            min_tokens: self.min_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            no_repeat_ngram_size: self.no_repeat_ngram_size,
            stop: self.stop,
            logprobs: self.logprobs,
            seed: self.seed,
            ..SamplingParams::default()
        };
        Ok(self.common.into_job(CommandSpec::Generate(GenerateOptions {
            params,
            max_tokens: self.max_tokens.map(|tokens| tokens as usize),
            stop_token_ids: self.stop_token_ids,
            ignore_eos: self.ignore_eos,
            samples: self.n,
            params_column: self.params_column,
            batching: match self.batching {
                BatchingArg::InFlight => Batching::InFlight,
                BatchingArg::Static => Batching::Static,
            },
            grammar,
            kv_cache_bytes: self.kv_cache_memory,
        })))
    }
}

/// A JSON schema without what is of no matter in it: the order of its keys is, since it is the output's.
fn read_schema(path: &Path) -> Result<String> {
    let failed = |message: String| Error::Usage(format!("--json-schema {}: {message}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let schema: Value = serde_json::from_str(&text).map_err(|error| failed(format!("no JSON: {error}")))?;
    Ok(schema.to_string())
}
