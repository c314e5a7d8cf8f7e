//! The settings of `mistral-batch generate`.

use clap::Args;
use schemars::JsonSchema;

use super::Job;
use super::common::CommonSettings;
use super::values::{Count, count};
use crate::generation::SamplingParams;
use crate::job::{CommandSpec, DEFAULT_KV_CACHE_BYTES, GenerateOptions};

/// Complete each prompt with a MistralForCausalLM checkpoint.
///
/// Appends completion, finish_reason (stop or length), prompt_tokens, completion_tokens, num_tokens, truncated and error to
/// the input's columns. Greedy unless --temperature is given. Prompts that are too long lose their beginning.
#[derive(Debug, Clone, Args, JsonSchema)]
#[command(after_help = "\
Examples:
  mistral-batch generate -i prompts.parquet --text-column prompt --model ./mistral-7b -o answers
  mistral-batch generate -i chats.jsonl --chat-column messages --model org/name-instruct --max-tokens 200 -o answers.jsonl
  mistral-batch generate -i names.csv --prompt-template \"Write a haiku about {name}:\" --temperature 0.8 --top-p 0.95 --seed 7 --model ./m -o haikus.csv")]
pub struct GenerateSettings {
    #[command(flatten)]
    #[schemars(flatten)]
    common: CommonSettings,

    /// Tokens of a completion at most [default: what generation_config.json says, else 256]
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
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Generation")]
    n: u32,

    /// Also list every generated token with its log-probability in token_logprobs
    #[arg(long, help_heading = "Generation")]
    logprobs: bool,

    /// Seed of the random draws: the same row and seed give the same completion, whatever the batch
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Generation")]
    seed: u64,

    /// Memory for keys and values of live completions, in bytes; accepts 512M and 2G
    #[arg(long, value_name = "BYTES", value_parser = count, default_value_t = DEFAULT_KV_CACHE_BYTES, help_heading = "Running")]
    #[schemars(with = "Count")]
    kv_cache_memory: u64,
}

impl GenerateSettings {
    pub(super) fn into_job(self) -> Job {
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
        self.common.into_job(CommandSpec::Generate(GenerateOptions {
            params,
            max_tokens: self.max_tokens.map(|tokens| tokens as usize),
            stop_token_ids: self.stop_token_ids,
            ignore_eos: self.ignore_eos,
            samples: self.n,
            kv_cache_bytes: self.kv_cache_memory,
        }))
    }
}
