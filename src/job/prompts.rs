//! Where a job's prompts come from: a text column, a template over columns, or chats.

use std::path::Path;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::DataType;
use serde_json::{Value, json};

use super::command::ContinuationColumns;
use super::spec::{JobSpec, PromptSpec};
use crate::data::dataset::Dataset;
use crate::data::text_column::{as_text, is_text};
use crate::error::{Error, Result};
use crate::text::{ChatTemplate, Prompt, PromptTemplate, TextTokenizer};

/// A source of prompts that was checked against the data and the checkpoint.
#[derive(Debug)]
pub enum PromptSource {
    /// Texts as they stand.
    Column(String),
    /// A text with columns in it.
    Template(PromptTemplate),
    /// Chats, through the checkpoint's chat template.
    Chat { column: String, system: Option<String>, template: Box<ChatTemplate> },
    /// A context that is given and the continuation that is scored.
    Continuation { context: String, continuation: String },
}

/// The texts of some rows.
pub enum RowTexts<'a> {
    Prompts(Vec<Prompt<'a>>),
    Continuations { contexts: Vec<Option<&'a str>>, continuations: Vec<Option<&'a str>> },
}

impl PromptSource {
    /// Checks that the columns are there and can be read, and that the checkpoint has a template where one is needed.
    ///
    /// # Errors
    /// [`Error::ColumnMissing`], [`Error::ColumnType`], [`Error::Usage`] for a bad template, [`Error::Config`] for a
    /// checkpoint without a chat template.
    pub fn new(spec: &JobSpec, dataset: &Dataset, tokenizer: &TextTokenizer) -> Result<Self> {
        if let Some(ContinuationColumns { context, continuation }) = spec.command.continuation() {
            check_column(dataset, context, "--context-column", "text", is_text)?;
            check_column(dataset, continuation, "--continuation-column", "text", is_text)?;
            return Ok(Self::Continuation { context: context.clone(), continuation: continuation.clone() });
        }
        match &spec.prompt {
            PromptSpec::Column(column) => {
                check_column(dataset, column, "--text-column", "text", is_text)?;
                Ok(Self::Column(column.clone()))
            }
            PromptSpec::Template(source) => {
                let template = PromptTemplate::parse(source)?;
                for column in template.columns() {
                    let found = dataset.column(column, "--prompt-template")?.data_type();
                    if !PromptTemplate::accepts(found) {
                        return Err(Error::Usage(format!(
                            "--prompt-template: column '{column}' has type {found}, which has no text of its own; \
                             name columns of text, numbers, booleans, dates or times"
                        )));
                    }
                }
                Ok(Self::Template(template))
            }
            PromptSpec::Chat { column, system } => {
                let expected = "a list of structs with role and content, or their JSON as text,";
                check_column(dataset, column, "--chat-column", expected, ChatTemplate::accepts)?;
                let template = Box::new(tokenizer.chat_template()?);
                Ok(Self::Chat { column: column.clone(), system: system.clone(), template })
            }
        }
    }

    /// The input columns that prompts are made of.
    pub fn columns(&self) -> Vec<&str> {
        match self {
            Self::Column(column) | Self::Chat { column, .. } => vec![column],
            Self::Template(template) => template.columns().collect(),
            Self::Continuation { context, continuation } => vec![context, continuation],
        }
    }

    /// What determines the prompts, for the plan's settings.
    pub fn settings(&self) -> Value {
        match self {
            Self::Column(column) => json!({ "text_column": column }),
            Self::Template(template) => json!({ "prompt_template": template.source() }),
            Self::Chat { column, system, template } => {
                json!({ "chat_column": column, "system": system, "chat_template_sha256": template.sha256() })
            }
            Self::Continuation { context, continuation } => {
                json!({ "context_column": context, "continuation_column": continuation })
            }
        }
    }

    /// The texts of some rows.
    ///
    /// # Errors
    /// [`Error::Internal`] when a column was not read, or is of another type than planned.
    pub fn rows<'a>(&self, batch: &'a RecordBatch) -> Result<RowTexts<'a>> {
        Ok(RowTexts::Prompts(match self {
            Self::Column(name) => texts(batch, name)?.into_iter().map(Prompt::from).collect(),
            Self::Template(template) => {
                let columns =
                    template.columns().map(|name| column(batch, name).cloned()).collect::<Result<Vec<_>>>()?;
                template.render(&columns, batch.num_rows())?
            }
            Self::Chat { column: name, system, template } => {
                template.prompts(column(batch, name)?, system.as_deref())?
            }
            Self::Continuation { context, continuation } => {
                let (contexts, continuations) = (texts(batch, context)?, texts(batch, continuation)?);
                return Ok(RowTexts::Continuations { contexts, continuations });
            }
        }))
    }
}

fn texts<'a>(batch: &'a RecordBatch, name: &str) -> Result<Vec<Option<&'a str>>> {
    let texts = as_text(column(batch, name)?).ok_or_else(|| Error::Internal(format!("column '{name}' is not text")))?;
    Ok(texts.iter().collect())
}

fn column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef> {
    batch.column_by_name(name).ok_or_else(|| Error::Internal(format!("column '{name}' was not read")))
}

fn check_column(
    dataset: &Dataset,
    column: &str,
    flag: &'static str,
    expected: &'static str,
    accepts: fn(&DataType) -> bool,
) -> Result<()> {
    let found = dataset.column(column, flag)?.data_type();
    if accepts(found) {
        return Ok(());
    }
    let path = dataset.files.first().map_or(Path::new(""), |file| &file.path).to_owned();
    Err(Error::ColumnType { column: column.to_owned(), path, found: found.to_string(), expected, flag })
}
