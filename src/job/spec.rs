//! What a job is asked to do: the typed form of the flags.

use std::path::PathBuf;

use super::command::{CommandSpec, DEFAULT_STRIDE};
use super::devices::{DeviceChoice, Devices};
use crate::data::InputFormat;
use crate::data::sink::OnExisting;
use crate::data::store::Stores;
use crate::model::ComputeDtype;
use crate::text::Overflow;

/// Text in a packing window, in bytes: bounds memory where rows are long.
pub const DEFAULT_WINDOW_BYTES: usize = 64 << 20;

/// One job: a command over a dataset with a checkpoint.
#[derive(Debug, Clone)]
pub struct JobSpec {
    pub command: CommandSpec,
    /// A checkpoint folder, or a hub id in the local cache.
    pub model: String,
    /// Files, globs, folders, and URLs of object stores, in order.
    pub inputs: Vec<String>,
    /// Instead of what the files' names say.
    pub input_format: Option<InputFormat>,
    /// A folder, a file, or the same as a URL of an object store.
    pub output: PathBuf,
    /// Where URLs lead to.
    pub stores: Stores,
    pub on_existing: OnExisting,
    /// Where each row's prompt comes from.
    pub prompt: PromptSpec,
    /// Input columns to keep; all when `None`.
    pub keep: Option<Vec<String>>,
    /// Put before the names of result columns.
    pub prefix: String,
    /// A SQL condition over the input's columns.
    pub filter: Option<String>,
    /// At most so many rows, counted after the filter.
    pub limit: Option<u64>,
    /// The column that says what the result should be.
    pub truth_column: Option<String>,
    /// Tokens of a text, special tokens included; the checkpoint's limit when `None`.
    pub max_length: Option<usize>,
    /// What happens to a longer text; what suits the command when `None`.
    pub overflow: Option<Overflow>,
    /// Tokens that neighbouring chunks share.
    pub stride: Option<usize>,
    /// Where to compute.
    pub device: DeviceChoice,
    /// What to compute in.
    pub dtype: ComputeDtype,
    /// Padded tokens of a batch; what suits the device when `None`.
    pub max_batch_tokens: Option<usize>,
    /// Text in a packing window, in bytes.
    pub window_bytes: usize,
    /// Memory of the machine that batches, windows and caches are cut to fit, in bytes.
    pub memory_limit: Option<u64>,
    /// Rows of a unit.
    pub unit_rows: Option<u64>,
    /// Rows that are computed once more at the end, each alone, to see that their company changed nothing.
    pub audit: Option<u64>,
    /// Failed rows that are recorded and not fatal; any number when `None`.
    pub max_errors: Option<u64>,
}

/// Where each row's prompt comes from.
#[derive(Debug, Clone)]
pub enum PromptSpec {
    /// A column of texts, as they stand.
    Column(String),
    /// A text with columns in braces.
    Template(String),
    /// A column of chats, through the checkpoint's chat template.
    Chat {
        column: String,
        /// The system message of chats that have none.
        system: Option<String>,
    },
}

impl JobSpec {
    /// The columns that can hold nothing but text, whatever their values look like in CSV.
    pub fn text_columns(&self) -> Vec<&str> {
        match (self.command.continuation(), &self.prompt) {
            (Some(columns), _) => vec![&columns.context, &columns.continuation],
            (None, PromptSpec::Column(column)) => vec![column],
            (None, PromptSpec::Template(_) | PromptSpec::Chat { .. }) => Vec::new(),
        }
    }

    /// Padded tokens of a batch on `devices`.
    pub fn batch_tokens(&self, devices: &Devices) -> usize {
        self.max_batch_tokens.unwrap_or_else(|| devices.default_batch_tokens())
    }

    /// What happens to a text over the limit.
    pub fn overflow(&self) -> Overflow {
        self.overflow.unwrap_or(self.command.default_overflow())
    }

    /// Tokens that neighbouring chunks of at most `max_length` tokens share.
    pub fn stride(&self, max_length: usize) -> usize {
        self.stride.unwrap_or(DEFAULT_STRIDE.min(max_length / 4))
    }
}
