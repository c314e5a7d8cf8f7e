//! The commands with a model: what each needs of a checkpoint, and the head that serves it.
//!
//! The one place where a command meets its head; everything else about a job is the same for all of them.

use std::path::Path;

use arrow::datatypes::{DataType, Field};
use candle_core::Device;
use serde::Serialize;
use serde_json::Value;

use super::devices::Devices;
use super::generation::GenerateOptions;
use super::models::ModelCache;
use super::row_params::RowParams;
use super::spec::{JobSpec, PromptSpec};
use super::truth::TruthKind;
use crate::data::dataset::Dataset;
use crate::engine::{BATCHES_PER_DEVICE, Engine, generate_fields};
use crate::error::{Error, Result};
use crate::heads::{
    Aggregation, ClassifyOptions, EmbedOptions, Embedding, Head, Score, SequenceClassification, TagOptions, TaskKind,
    TokenClassification, check_architecture,
};
use crate::model::{Architecture, Checkpoint};
use crate::text::{Overflow, TextTokenizer};

/// Tokens that neighbouring chunks share where nothing is said; a quarter of the limit where that is less.
pub const DEFAULT_STRIDE: usize = 64;

/// The command of a job with its own settings.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub enum CommandSpec {
    Classify(ClassifyOptions),
    Embed(EmbedOptions),
    Score(ScoreOptions),
    Tag(TagOptions),
    Generate(GenerateOptions),
}

/// Settings of `score`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScoreOptions {
    /// Adds `token_logprobs`.
    pub logprobs: bool,
    /// Scores a continuation given its context instead of a whole text.
    pub continuation: Option<ContinuationColumns>,
}

/// The columns of a context and its continuation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ContinuationColumns {
    pub context: String,
    pub continuation: String,
}

impl CommandSpec {
    /// The command's name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Classify(_) => "classify",
            Self::Embed(_) => "embed",
            Self::Score(_) => "score",
            Self::Tag(_) => "tag",
            Self::Generate(_) => "generate",
        }
    }

    /// The columns of a context and its continuation, where those are scored.
    pub fn continuation(&self) -> Option<&ContinuationColumns> {
        match self {
            Self::Score(options) => options.continuation.as_ref(),
            _ => None,
        }
    }

    /// The columns that the command appends, before those of every command; no weight is read.
    ///
    /// # Errors
    /// [`Error::Config`] when the checkpoint has another head, [`Error::Usage`] when an option does not fit it.
    pub fn fields(&self, checkpoint: &Checkpoint) -> Result<Vec<Field>> {
        match self {
            Self::Classify(options) => {
                let (task, _) = SequenceClassification::plan(checkpoint, options)?;
                Ok(SequenceClassification::fields_of(task, options))
            }
            Self::Embed(_) => {
                Embedding::check(checkpoint)?;
                Ok(Embedding::fields_of(checkpoint.config.hidden_size))
            }
            Self::Score(options) => {
                Score::check(checkpoint)?;
                Ok(Score::fields_of(options.logprobs))
            }
            Self::Tag(_) => {
                TokenClassification::check(checkpoint)?;
                Ok(TokenClassification::fields_of())
            }
            Self::Generate(options) => {
                check_architecture(checkpoint, "generate", &[Architecture::CausalLm])?;
                Ok(generate_fields(options.samples, options.params.logprobs))
            }
        }
    }

    /// What determines the command's results, for the plan's settings.
    ///
    /// # Errors
    /// [`Error::Usage`] when options do not fit each other or the checkpoint.
    pub fn settings(&self, checkpoint: &Checkpoint) -> Result<Value> {
        match self {
            Self::Generate(options) => options.settings(checkpoint),
            Self::Classify(_) | Self::Embed(_) | Self::Score(_) | Self::Tag(_) => {
                serde_json::to_value(self).map_err(|error| Error::Internal(error.to_string()))
            }
        }
    }

    /// The settings that rows bring themselves, checked against the data, as a grammar is.
    ///
    /// # Errors
    /// As [`GenerateOptions::row_params`].
    pub fn row_params(
        &self,
        checkpoint: &Checkpoint,
        tokenizer: &TextTokenizer,
        dataset: &Dataset,
    ) -> Result<Option<RowParams>> {
        match self {
            Self::Generate(options) => options.row_params(checkpoint, tokenizer, dataset),
            Self::Classify(_) | Self::Embed(_) | Self::Score(_) | Self::Tag(_) => Ok(None),
        }
    }

    /// Loads the command's head, and the model where `models` does not hold it, on each of `devices`.
    ///
    /// # Errors
    /// As [`CommandSpec::fields`], and when weights are unusable or a device has no memory for them.
    pub fn engine(
        &self,
        spec: &JobSpec,
        checkpoint: &Checkpoint,
        tokenizer: TextTokenizer,
        models: &ModelCache,
        devices: &Devices,
    ) -> Result<Engine> {
        if let Self::Generate(options) = self {
            let generator = options.generator(checkpoint, spec, &tokenizer, models, devices)?;
            return Ok(Engine::generating(generator, tokenizer));
        }
        let mut engine: Option<Engine> = None;
        for (replica, device) in devices.iter().enumerate() {
            let head = self.head(checkpoint, &tokenizer, device)?;
            let model = models.base(checkpoint, device, replica)?;
            engine = Some(match engine {
                None => {
                    let max_batch_tokens = match spec.max_batch_tokens {
                        Some(tokens) => tokens,
                        None => devices.default_batch_tokens().min(model.batch_tokens_that_fit(BATCHES_PER_DEVICE)?),
                    };
                    Engine::new(model, head, tokenizer.clone(), max_batch_tokens)
                }
                Some(engine) => engine.with_replica(model, head)?,
            });
        }
        engine.ok_or_else(|| Error::Internal("there is no device to compute on".into()))
    }

    /// Loads the command's head.
    fn head(&self, checkpoint: &Checkpoint, tokenizer: &TextTokenizer, device: &Device) -> Result<Box<dyn Head>> {
        Ok(match self {
            Self::Classify(options) => Box::new(SequenceClassification::load(checkpoint, options.clone(), device)?),
            Self::Embed(options) => Box::new(Embedding::new(checkpoint, *options)?),
            Self::Score(options) => {
                let names = options.logprobs.then(|| tokenizer.clone());
                Box::new(Score::load(checkpoint, names, device)?)
            }
            Self::Tag(options) => {
                Box::new(TokenClassification::load(checkpoint, options.clone(), tokenizer.clone(), device)?)
            }
            Self::Generate(_) => return Err(Error::Internal("a generator has no head".into())),
        })
    }

    /// How results compare with a truth column of type `truth`.
    ///
    /// # Errors
    /// [`Error::ColumnType`] when they do not, [`Error::Usage`] when the command's results are no predictions.
    pub fn truth(&self, checkpoint: &Checkpoint, column: &str, truth: &DataType, path: &Path) -> Result<TruthKind> {
        match self {
            Self::Classify(options) => {
                let (task, _) = SequenceClassification::plan(checkpoint, options)?;
                TruthKind::of(task, column, truth, path)
            }
            // A completion is right when it is the truth, letter by letter.
            Self::Generate(_) => TruthKind::of(TaskKind::SingleLabel, column, truth, path),
            Self::Tag(TagOptions { aggregation: Aggregation::None, .. }) => Err(Error::Usage(
                "--truth-column compares whole entities, which --aggregation none does not give".into(),
            )),
            Self::Tag(_) => TruthKind::of_entities(column, truth, path),
            Self::Embed(_) | Self::Score(_) => Err(Error::Usage(format!(
                "--truth-column does not fit {}: its results are no predictions that could be right",
                self.name()
            ))),
        }
    }

    /// What happens to a long text where nothing is said.
    pub fn default_overflow(&self) -> Overflow {
        match self {
            // What is asked about stands at the end.
            Self::Score(ScoreOptions { continuation: Some(_), .. }) | Self::Generate(_) => Overflow::TruncateLeft,
            Self::Tag(_) => Overflow::Chunk,
            Self::Classify(_) | Self::Embed(_) | Self::Score(_) => Overflow::TruncateRight,
        }
    }

    /// Sets the tokenizer up for the command, with texts of at most `max_length` tokens.
    ///
    /// # Errors
    /// [`Error::Usage`] when the limit leaves no room for text, [`Error::Config`] when a token that is needed is missing.
    pub fn tokenizer(
        &self,
        spec: &JobSpec,
        checkpoint: &Checkpoint,
        tokenizer: TextTokenizer,
        max_length: usize,
    ) -> Result<TextTokenizer> {
        let tokenizer = match self {
            Self::Embed(EmbedOptions { append_eos: true, .. }) => {
                tokenizer.with_appended_eos(checkpoint.config.eos_token_ids.first().copied())?
            }
            Self::Score(options) => {
                check_score_overflow(options, spec.overflow())?;
                tokenizer
            }
            Self::Tag(_) if !matches!(spec.prompt, PromptSpec::Column(_)) => {
                return Err(Error::Usage(
                    "tag needs a --text-column: the offsets of its entities count in a text of the input".into(),
                ));
            }
            Self::Tag(_) => tokenizer.with_spans(),
            Self::Generate(_) if spec.overflow() == Overflow::Chunk => {
                return Err(Error::Usage(
                    "--overflow chunk does not fit generate: a prompt is completed as a whole".into(),
                ));
            }
            _ => tokenizer,
        };
        tokenizer.with_limit(max_length, spec.overflow(), spec.stride(max_length))
    }
}

fn check_score_overflow(options: &ScoreOptions, overflow: Overflow) -> Result<()> {
    match overflow {
        Overflow::Chunk => {
            Err(Error::Usage("--overflow chunk does not fit score: a text's tokens are scored in one sequence".into()))
        }
        Overflow::TruncateRight if options.continuation.is_some() => Err(Error::Usage(
            "--overflow truncate-right would drop the continuation that is to be scored; use truncate-left or error"
                .into(),
        )),
        _ => Ok(()),
    }
}
