//! The functions: one file each, and what they share.

mod ai_classify;
mod ai_classify_scores;
mod ai_embed;
mod ai_generate;
mod ai_logprob;
mod ai_score;
mod ai_tag;
mod marker;
mod options;

use std::fmt::Debug;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, RecordBatch};
use arrow::buffer::NullBuffer;
use arrow::datatypes::DataType;
use datafusion::logical_expr::ScalarUDF;

use super::models::{ModelRegistry, SqlModel};
use crate::engine::Engine;
use crate::error::Result;

pub use marker::ModelFunctionMarker;
pub use options::CallOptions;

/// What a function is, beside being a marker in a query.
pub trait ModelFunction: Debug + Send + Sync {
    /// The name in SQL.
    fn name(&self) -> &'static str;

    /// Other names for the same.
    fn aliases(&self) -> &'static [&'static str] {
        &[]
    }

    /// The options that the last argument may name.
    fn option_names(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether the first argument may be a chat instead of a text.
    fn accepts_chats(&self) -> bool {
        false
    }

    /// Whether rows are completed token by token, so that a query's rows are best computed in one stream.
    fn generates(&self) -> bool {
        false
    }

    /// What the function gives for each row; no weight is read.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when the checkpoint's head does not fit.
    fn return_type(&self, model: &SqlModel) -> Result<DataType>;

    /// Refuses options whose values mean nothing; no weight is read.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] naming the option.
    fn check_options(&self, _model: &SqlModel, _options: &CallOptions) -> Result<()> {
        Ok(())
    }

    /// Loads what computes the results.
    ///
    /// # Errors
    /// As [`ModelFunction::return_type`] and [`ModelFunction::check_options`], and when weights are unusable.
    fn engine(&self, model: &SqlModel, options: &CallOptions) -> Result<Engine>;

    /// Makes the function's column of the engine's columns, named as the commands name them.
    ///
    /// # Errors
    /// When a column cannot be built.
    fn result(&self, columns: &RecordBatch) -> Result<ArrayRef>;
}

/// All functions, over `models`.
pub fn all(models: &Arc<ModelRegistry>) -> Vec<ScalarUDF> {
    let functions = kinds();
    functions.into_iter().map(|function| ModelFunctionMarker::new(function, models.clone()).into()).collect()
}

/// What each function is.
pub fn kinds() -> Vec<Arc<dyn ModelFunction>> {
    vec![
        Arc::new(ai_classify::AiClassify),
        Arc::new(ai_classify_scores::AiClassifyScores),
        Arc::new(ai_score::AiScore),
        Arc::new(ai_tag::AiTag),
        Arc::new(ai_generate::AiGenerate),
        Arc::new(ai_embed::AiEmbed),
        Arc::new(ai_logprob::AiLogprob),
    ]
}

/// A column by its name, which the engine gives.
fn column<'a>(columns: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef> {
    columns.column_by_name(name).ok_or_else(|| crate::Error::Internal(format!("the engine gave no column '{name}'")))
}

/// Null where a row has neither tokens nor an error: its text is null.
fn has_text(columns: &RecordBatch) -> Result<NullBuffer> {
    let (tokens, errors) = (column(columns, "num_tokens")?, column(columns, "error")?);
    Ok((0..columns.num_rows()).map(|row| tokens.is_valid(row) || errors.is_valid(row)).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_functions_share_a_name() {
        let mut names = BTreeSet::new();
        for function in kinds() {
            for name in function.aliases().iter().chain([&function.name()]) {
                assert!(names.insert(name.to_string()), "{name}");
                assert!(name.starts_with("ai_"), "{name}");
            }
        }
    }
}
