//! `mistral-batch classify`.

use clap::{Args, ValueEnum};

use super::common::CommonArgs;
use crate::error::Result;
use crate::heads::{ClassifyOptions, FunctionToApply, TopK};
use crate::job::CommandSpec;

/// Label each text with a MistralForSequenceClassification checkpoint.
///
/// Appends predicted_label and predicted_score (or predicted_value for a regression checkpoint), num_tokens, truncated
/// and error to the input's columns. A multi-label checkpoint also gives predicted_labels: every label over --threshold.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mistral-batch classify -i tickets.parquet --model ./ticket-classifier -o labelled
  mistral-batch classify -i data/ --where \"lang = 'en'\" --limit 1000 --model org/name -o sample.parquet
  mistral-batch classify -i test.csv --model ./ticket-classifier -o out --truth-column topic")]
pub struct ClassifyArgs {
    #[command(flatten)]
    common: CommonArgs,

    /// Also list the N best labels with their scores in predicted_scores, or all of them
    #[arg(long, value_name = "N|all", value_parser = top_k, help_heading = "Classification")]
    top_k: Option<TopK>,

    /// Score from which a multi-label checkpoint's label is predicted
    #[arg(long, value_name = "SCORE", default_value_t = 0.5, help_heading = "Classification")]
    threshold: f32,

    /// What makes scores of the logits [default: what the checkpoint's problem type implies]
    #[arg(long, value_enum, value_name = "FUNCTION", help_heading = "Classification")]
    function_to_apply: Option<Function>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Function {
    /// Each label on its own
    Sigmoid,
    /// Labels share a total of one
    Softmax,
    /// The raw logits
    None,
}

impl ClassifyArgs {
    pub fn run(self) -> Result<()> {
        let options = ClassifyOptions {
            function_to_apply: self.function_to_apply.map(|function| match function {
                Function::Sigmoid => FunctionToApply::Sigmoid,
                Function::Softmax => FunctionToApply::Softmax,
                Function::None => FunctionToApply::None,
            }),
            top_k: self.top_k,
            threshold: self.threshold,
        };
        self.common.run(CommandSpec::Classify(options))
    }
}

fn top_k(text: &str) -> Result<TopK, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(TopK::N(n)),
        _ if text == "all" => Ok(TopK::All),
        _ => Err("expected a number from 1 on, or all".into()),
    }
}
