//! One call of a function, with its model and options resolved.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arrow::datatypes::DataType;

use super::functions::{CallOptions, ModelFunction};
use super::models::SqlModel;

/// A function over a model with options: everything about a call but the text.
#[derive(Debug, Clone)]
pub struct ModelCall {
    pub function: Arc<dyn ModelFunction>,
    pub model: Arc<SqlModel>,
    pub options: CallOptions,
    /// What the function gives for each row.
    pub return_type: DataType,
}

impl ModelCall {
    /// Tells the engine of this call from others' of the model.
    pub fn engine_key(&self) -> String {
        format!("{}{}", self.function.name(), self.options)
    }

    fn key(&self) -> (&str, &str, String) {
        (self.function.name(), self.model.name(), self.options.to_string())
    }
}

impl PartialEq for ModelCall {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key() && Arc::ptr_eq(&self.model, &other.model)
    }
}

impl Eq for ModelCall {}

impl Hash for ModelCall {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl PartialOrd for ModelCall {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        self.key().partial_cmp(&other.key())
    }
}

impl fmt::Display for ModelCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, model={}", self.function.name(), self.model.name())?;
        if !self.options.is_empty() {
            write!(f, ", options={}", self.options)?;
        }
        Ok(())
    }
}
