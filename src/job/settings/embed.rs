//! The settings of `mistral-batch embed`.

use clap::{Args, ValueEnum};
use schemars::JsonSchema;

use super::common::CommonSettings;
use super::{Job, MessageSettings};
use crate::heads::{EmbedOptions, Pooling};
use crate::job::CommandSpec;

/// Turn each text into a vector with a MistralModel checkpoint.
///
/// Appends embedding (a list of as many numbers as the model's hidden size), num_tokens, truncated and error to the
/// input's columns. The base model of a MistralForCausalLM checkpoint serves as well. Under --overflow chunk a long
/// text's vector is the mean of its chunks' vectors.
#[derive(Debug, Clone, Args, JsonSchema)]
#[command(after_help = "\
Examples:
  mistral-batch embed -i docs.parquet --model ./embedder --pooling mean --normalize -o vectors.parquet
  mistral-batch embed -i queries.jsonl --model org/e5-mistral --append-eos --normalize -o queries.arrow
  mistral-batch embed -i books/ --model ./embedder --overflow chunk --stride 32 -o vectors")]
pub struct EmbedSettings {
    #[command(flatten)]
    #[schemars(flatten)]
    common: CommonSettings,

    /// Which tokens' hidden states make the vector
    #[arg(long, value_enum, value_name = "HOW", default_value = "last", help_heading = "Embedding")]
    pooling: PoolingArg,

    /// Scale every vector to length one, so that a product of two is their cosine
    #[arg(long, help_heading = "Embedding")]
    normalize: bool,

    /// End every text with the end-of-sequence token, as models like e5-mistral want; it counts towards --max-length
    #[arg(long, help_heading = "Embedding")]
    append_eos: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum, JsonSchema)]
#[schemars(rename_all = "kebab-case")]
enum PoolingArg {
    /// The last token
    Last,
    /// The mean of all tokens
    Mean,
}

impl EmbedSettings {
    pub(super) fn messages(&self) -> &MessageSettings {
        self.common.messages()
    }

    pub(super) fn into_job(self) -> Job {
        let pooling = match self.pooling {
            PoolingArg::Last => Pooling::Last,
            PoolingArg::Mean => Pooling::Mean,
        };
        let options = EmbedOptions { pooling, normalize: self.normalize, append_eos: self.append_eos };
        self.common.into_job(CommandSpec::Embed(options))
    }
}
