//! The settings of `mistral-batch classify`.

use clap::{Args, ValueEnum};
use schemars::JsonSchema;

use super::common::CommonSettings;
use super::{Job, MessageSettings};
use crate::heads::{ClassifyOptions, FunctionToApply, TopK};
use crate::job::CommandSpec;

/// Label each text with a MistralForSequenceClassification checkpoint.
///
/// Appends predicted_label and predicted_score (or predicted_value for a regression checkpoint), num_tokens, truncated
/// and error to the input's columns. A multi-label checkpoint also gives predicted_labels: every label over --threshold.
#[derive(Debug, Clone, Args, JsonSchema)]
#[command(after_help = "\
Examples:
  mistral-batch classify -i tickets.parquet --model ./ticket-classifier -o labelled
  mistral-batch classify -i data/ --where \"lang = 'en'\" --limit 1000 --model org/name -o sample.parquet
  mistral-batch classify -i test.csv --model ./ticket-classifier -o out --truth-column topic")]
pub struct ClassifySettings {
    #[command(flatten)]
    #[schemars(flatten)]
    common: CommonSettings,

    /// Also list the N best labels with their scores in predicted_scores, or all of them
    #[arg(long, value_name = "N|all", value_parser = top_k, help_heading = "Classification")]
    #[schemars(with = "Option<TopKValue>")]
    top_k: Option<TopK>,

    /// Score from which a multi-label checkpoint's label is predicted
    #[arg(long, value_name = "SCORE", default_value_t = 0.5, help_heading = "Classification")]
    threshold: f32,

    /// What makes scores of the logits [default: what the checkpoint's problem type implies]
    #[arg(long, value_enum, value_name = "FUNCTION", help_heading = "Classification")]
    function_to_apply: Option<Function>,
}

/// How `top_k` is written, for the job file's schema.
#[derive(JsonSchema)]
#[schemars(untagged)]
#[allow(dead_code)] // it stands for a type of a lower floor, which the flags parse
enum TopKValue {
    N(#[schemars(range(min = 1))] u64),
    All(AllLabels),
}

#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
#[allow(dead_code)]
enum AllLabels {
    All,
}

#[derive(Debug, Clone, Copy, ValueEnum, JsonSchema)]
#[schemars(rename_all = "kebab-case")]
enum Function {
    /// Each label on its own
    Sigmoid,
    /// Labels share a total of one
    Softmax,
    /// The raw logits
    None,
}

impl ClassifySettings {
    pub(super) fn messages(&self) -> &MessageSettings {
        self.common.messages()
    }

    pub(super) fn into_job(self) -> Job {
        let options = ClassifyOptions {
            function_to_apply: self.function_to_apply.map(|function| match function {
                Function::Sigmoid => FunctionToApply::Sigmoid,
                Function::Softmax => FunctionToApply::Softmax,
                Function::None => FunctionToApply::None,
            }),
            top_k: self.top_k,
            threshold: self.threshold,
        };
        self.common.into_job(CommandSpec::Classify(options))
    }
}

fn top_k(text: &str) -> Result<TopK, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(TopK::N(n)),
        _ if text == "all" => Ok(TopK::All),
        _ => Err("expected a number from 1 on, or all".into()),
    }
}
