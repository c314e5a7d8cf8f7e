//! The settings of `mistral-batch score`.

use clap::Args;
use schemars::JsonSchema;

use super::common::CommonSettings;
use super::{Job, MessageSettings};
use crate::job::{CommandSpec, ContinuationColumns, ScoreOptions};

/// Tell how likely each text is with a MistralForCausalLM checkpoint.
///
/// Appends logprob (the sum of the tokens' natural log-probabilities), scored_tokens, perplexity, num_tokens, truncated
/// and error to the input's columns. Every token of a text but its first is scored; with --context-column and
/// --continuation-column those of the continuation are, given the context: what evaluation harnesses rank answers by.
#[derive(Debug, Clone, Args, JsonSchema)]
#[command(after_help = "\
Examples:
  mistral-batch score -i essays.parquet --model ./mistral-7b -o likelihoods
  mistral-batch score -i answers.jsonl --context-column question --continuation-column answer --model ./mistral-7b -o ranked.csv
  mistral-batch score -i essays.parquet --model ./mistral-7b --logprobs -o tokens.parquet

A context and its continuation are joined as they are: begin the continuation with the space that separates them.")]
pub struct ScoreSettings {
    #[command(flatten)]
    #[schemars(flatten)]
    common: CommonSettings,

    /// Column that holds what is given; it is not scored
    #[arg(
        long,
        value_name = "COLUMN",
        requires = "continuation_column",
        conflicts_with_all = ["text_column", "prompt_template", "chat_column"],
        help_heading = "Scoring"
    )]
    context_column: Option<String>,

    /// Column that holds what is scored; the context before it is shortened where both are too long
    #[arg(long, value_name = "COLUMN", requires = "context_column", help_heading = "Scoring")]
    continuation_column: Option<String>,

    /// Also list every scored token with its log-probability in token_logprobs
    #[arg(long, help_heading = "Scoring")]
    logprobs: bool,
}

impl ScoreSettings {
    pub(super) fn messages(&self) -> &MessageSettings {
        self.common.messages()
    }

    pub(super) fn into_job(self) -> Job {
        let continuation = self
            .context_column
            .zip(self.continuation_column)
            .map(|(context, continuation)| ContinuationColumns { context, continuation });
        self.common.into_job(CommandSpec::Score(ScoreOptions { logprobs: self.logprobs, continuation }))
    }
}
