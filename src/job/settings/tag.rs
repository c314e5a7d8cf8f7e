//! The settings of `mistral-batch tag`.

use clap::{Args, ValueEnum};
use schemars::JsonSchema;

use super::common::CommonSettings;
use super::{Job, MessageSettings};
use crate::heads::{Aggregation, TagOptions};
use crate::job::CommandSpec;

/// Find and label parts of each text with a MistralForTokenClassification checkpoint.
///
/// Appends entities (a list of entity, score, start, end and word), num_tokens, truncated and error to the input's
/// columns. start and end count Unicode characters of the text. A text over the limit is computed in overlapping
/// windows (--max-length, --stride) and its entities are told as if it had been one.
#[derive(Debug, Clone, Args, JsonSchema)]
#[command(after_help = "\
Examples:
  mistral-batch tag -i letters.parquet --model ./pii-tagger -o found
  mistral-batch tag -i letters.parquet --model ./pii-tagger --aggregation first -o found.jsonl
  mistral-batch tag -i books/ --model ./pii-tagger --max-length 512 --stride 128 -o found")]
pub struct TagSettings {
    #[command(flatten)]
    #[schemars(flatten)]
    common: CommonSettings,

    /// How tokens are fused into entities
    #[arg(long, value_enum, value_name = "HOW", default_value = "simple", help_heading = "Tagging")]
    aggregation: AggregationArg,

    /// Leave out entities of these labels; '' to leave out none
    #[arg(long, value_name = "A,B", value_delimiter = ',', default_value = "O", help_heading = "Tagging")]
    ignore_labels: Vec<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum, JsonSchema)]
#[schemars(rename_all = "kebab-case")]
enum AggregationArg {
    /// Every token is an entity of its own
    None,
    /// Neighbouring tokens of one label are an entity; a B- label begins a new one
    Simple,
    /// As simple, with a word labelled as its first token is
    First,
    /// As simple, with a word labelled by the mean of its tokens' scores
    Average,
    /// As simple, with a word labelled as its surest token is
    Max,
}

impl TagSettings {
    pub(super) fn messages(&self) -> &MessageSettings {
        self.common.messages()
    }

    pub(super) fn into_job(self) -> Job {
        let options = TagOptions {
            aggregation: match self.aggregation {
                AggregationArg::None => Aggregation::None,
                AggregationArg::Simple => Aggregation::Simple,
                AggregationArg::First => Aggregation::First,
                AggregationArg::Average => Aggregation::Average,
                AggregationArg::Max => Aggregation::Max,
            },
            ignore_labels: self.ignore_labels,
        };
        self.common.into_job(CommandSpec::Tag(options))
    }
}
