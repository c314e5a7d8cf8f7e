//! What is read off the hidden states: one file a head.

mod aggregation;
mod embedding;
mod score;
mod sequence_classification;
mod token_classification;
mod token_logprobs;

use arrow::array::ArrayRef;
use arrow::datatypes::Field;

use crate::batch::PackedBatch;
use crate::error::{Error, Result};
use crate::model::{Architecture, Checkpoint, MistralModel};
use crate::text::{TokenDetail, TokenSpan};

pub use aggregation::{Aggregation, Entity};
pub use embedding::{EmbedOptions, Embedding, Pooling};
pub use score::Score;
pub use sequence_classification::{ClassifyOptions, FunctionToApply, SequenceClassification, TaskKind, TopK};
pub use token_classification::{TagOptions, TokenClassification};
pub use token_logprobs::TokenLogprob;

/// A head turns a batch into one output per sequence, and outputs into result columns.
pub trait Head: Send + Sync {
    /// The result columns that this head appends, in order.
    fn fields(&self) -> Vec<Field>;

    /// Runs model and head: one output per sequence of the batch, in its order; `details` has what is known of each.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn forward(&self, model: &MistralModel, batch: &PackedBatch, details: &[&TokenDetail]) -> Result<Vec<HeadOutput>>;

    /// Makes the outputs of one text's chunks, given in text order, into its result; there is at least one.
    fn merge(&self, chunks: Vec<HeadOutput>) -> HeadOutput;

    /// Makes the result columns from one output per row; a row without one is null.
    ///
    /// # Errors
    /// When a column cannot be built.
    fn columns(&self, rows: &[Option<HeadOutput>]) -> Result<Vec<ArrayRef>>;
}

/// What a head computes for one sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum HeadOutput {
    /// A number for each label, or for each dimension of a vector: logits until they are merged.
    Values(Vec<f32>),
    /// The scored tokens, in text order.
    Logprobs(Vec<TokenLogprob>),
    /// The text's own tokens, in text order.
    Tags(Vec<TaggedToken>),
}

/// A token of a text with its labels' scores.
#[derive(Debug, Clone, PartialEq)]
pub struct TaggedToken {
    pub span: TokenSpan,
    /// The probability of each label.
    pub scores: Vec<f32>,
}

impl HeadOutput {
    /// Whether every number is one.
    pub fn is_finite(&self) -> bool {
        match self {
            Self::Values(values) => values.iter().all(|value| value.is_finite()),
            Self::Logprobs(tokens) => tokens.iter().all(|token| token.logprob.is_finite()),
            Self::Tags(tokens) => tokens.iter().flat_map(|token| &token.scores).all(|score| score.is_finite()),
        }
    }

    /// Every number in it.
    pub fn numbers(&self) -> Vec<f64> {
        match self {
            Self::Values(values) => values.iter().copied().map(f64::from).collect(),
            Self::Logprobs(tokens) => tokens.iter().map(|token| f64::from(token.logprob)).collect(),
            Self::Tags(tokens) => tokens.iter().flat_map(|token| &token.scores).copied().map(f64::from).collect(),
        }
    }

    /// The numbers of [`HeadOutput::Values`].
    fn values(&self) -> &[f32] {
        match self {
            Self::Values(values) => values,
            _ => &[],
        }
    }

    /// The tokens of [`HeadOutput::Tags`].
    fn tags(&self) -> &[TaggedToken] {
        match self {
            Self::Tags(tokens) => tokens,
            _ => &[],
        }
    }

    /// The tokens of [`HeadOutput::Logprobs`].
    fn logprobs(&self) -> &[TokenLogprob] {
        match self {
            Self::Logprobs(tokens) => tokens,
            _ => &[],
        }
    }
}

/// Refuses a checkpoint whose class is not one of those that `command` works with.
///
/// # Errors
/// [`Error::Config`] naming both.
pub fn check_architecture(checkpoint: &Checkpoint, command: &str, wanted: &[Architecture]) -> Result<()> {
    let found = checkpoint.config.architecture;
    if wanted.contains(&found) {
        return Ok(());
    }
    let wanted: Vec<_> = wanted.iter().map(|wanted| wanted.class_name()).collect();
    let message = format!("is a {}, but {command} needs a {}", found.class_name(), wanted.join(" or a "));
    Err(Error::config(&checkpoint.dir, message))
}

/// The label of the highest score; the first of several equal ones, as argmax does.
fn best_label(scores: &[f32]) -> usize {
    let mut best = 0;
    for (index, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = index;
        }
    }
    best
}

/// Logits as shares of one.
fn softmax(logits: &[f32]) -> Vec<f32> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f32> = logits.iter().map(|logit| (logit - highest).exp()).collect();
    let total: f32 = exponentials.iter().sum();
    exponentials.iter().map(|value| value / total).collect()
}
