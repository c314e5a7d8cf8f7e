//! What a task's prompts are made of before a job reads them: solved examples, and one row for each choice.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, ListArray, RecordBatch, StringBuilder, UInt64Builder};
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{DataType, UInt64Type};

use super::metrics::bootstrap::split_mix;
use super::scoring::CHOICE_COLUMNS;
use super::spec::FewShotFile;
use crate::data::InputFormat;
use crate::data::dataset::{Dataset, DatasetOptions};
use crate::data::filter::RowFilter;
use crate::data::source::{WindowOptions, WindowReader};
use crate::data::units::cut_units;
use crate::error::{Error, Result};
use crate::text::{Prompt, PromptTemplate};

/// Put between examples where nothing is said.
const DEFAULT_SEPARATOR: &str = "\n\n";

/// Solved examples as one text, which every prompt of the task begins with.
///
/// The examples are drawn without replacement by `seed`; the same seed draws the same first ones for every count.
///
/// # Errors
/// As [`Dataset::open`], and [`Error::Config`]-worthy messages as [`Error::Usage`] when the source is the dataset itself
/// or has too few rows.
pub fn examples(few_shot: &FewShotFile, source: String, count: usize, seed: u64, inputs: &[String]) -> Result<String> {
    if count == 0 {
        return Ok(String::new());
    }
    let dataset = open(vec![source], None, Vec::new())?;
    let measured = open(inputs.to_vec(), None, Vec::new())?;
    let files = |dataset: &Dataset| -> BTreeSet<PathBuf> {
        let canonical = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
        dataset.files.iter().map(|file| canonical(&file.path)).collect()
    };
    if let Some(file) = files(&dataset).intersection(&files(&measured)).next() {
        return Err(Error::Usage(format!(
            "few_shot: {} is measured too; its answers would be given away",
            file.display()
        )));
    }
    let template = PromptTemplate::parse(&few_shot.template)?;
    let rows = read(&dataset, &template_columns(&dataset, &template)?)?;
    let texts: Vec<String> = render(&template, &rows)?.into_iter().flatten().collect();
    if texts.len() < count {
        return Err(Error::Usage(format!(
            "few_shot: {count} examples wanted, {} has {}",
            few_shot.source,
            texts.len()
        )));
    }
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by_key(|&row| (split_mix(split_mix(seed) ^ row as u64), row));
    let separator = few_shot.separator.as_deref().unwrap_or(DEFAULT_SEPARATOR);
    Ok(order[..count].iter().map(|&row| format!("{}{separator}", texts[row])).collect())
}

/// A text as a template that gives it back.
pub fn as_template(text: &str) -> String {
    text.replace('{', "{{").replace('}', "}}")
}

/// Where the choices of a task come from.
pub struct ChoiceSource<'a> {
    pub inputs: Vec<String>,
    pub format: Option<InputFormat>,
    /// The prompt, with columns in braces.
    pub template: String,
    pub choices_column: &'a str,
    pub truth_column: &'a str,
    /// Put between a context and each choice.
    pub delimiter: &'a str,
    pub filter: Option<&'a str>,
    pub limit: Option<u64>,
}

/// One row for each choice of each document, in [`CHOICE_COLUMNS`].
///
/// A document without prompt or choices has one row of nulls, so that it is seen and not compared.
///
/// # Errors
/// As [`Dataset::open`], and [`Error::Usage`] when a column does not fit, or a truth is no number or text of a choice.
pub fn choices(source: &ChoiceSource) -> Result<RecordBatch> {
    let dataset = open(source.inputs.clone(), source.format, Vec::new())?;
    let template = PromptTemplate::parse(&source.template)?;
    let mut columns = template_columns(&dataset, &template)?;
    for (column, key) in [(source.choices_column, "choices_column"), (source.truth_column, "truth_column")] {
        dataset.column(column, key)?;
        columns.push(column.to_owned());
    }
    let filter = source.filter.map(|sql| RowFilter::compile(sql, &dataset.schema)).transpose()?;
    columns.extend(filter.iter().flat_map(RowFilter::columns));
    let mut rows = read(&dataset, &columns)?;
    if let Some(filter) = filter {
        rows = filter.for_schema(rows.schema_ref())?.apply(&rows)?.0;
    }
    rows = rows.slice(0, rows.num_rows().min(source.limit.unwrap_or(u64::MAX).try_into().unwrap_or(usize::MAX)));

    let contexts = render(&template, &rows)?;
    let choices = text_lists(&rows, source.choices_column)?;
    let answers = answers(&rows, source.truth_column, &choices)?;
    let (mut documents, mut right) = (UInt64Builder::new(), UInt64Builder::new());
    let [mut texts, mut context_texts, mut continuations] = [(); 3].map(|()| StringBuilder::new());
    for (document, ((context, choices), answer)) in contexts.iter().zip(choices).zip(answers).enumerate() {
        let choices = choices.filter(|choices| context.is_some() && !choices.is_empty());
        let choices = choices.map_or(vec![None], |choices| choices.into_iter().map(Some).collect());
        for choice in choices {
            documents.append_value(document as u64);
            right.append_option(answer);
            context_texts.append_option(choice.as_ref().and(context.as_ref()));
            continuations.append_option(choice.as_ref().map(|choice| format!("{}{choice}", source.delimiter)));
            texts.append_option(choice);
        }
    }
    let names = CHOICE_COLUMNS;
    Ok(RecordBatch::try_from_iter_with_nullable([
        (names.document, Arc::new(documents.finish()) as ArrayRef, true),
        (names.choice, Arc::new(texts.finish()), true),
        (names.answer, Arc::new(right.finish()), true),
        (names.context, Arc::new(context_texts.finish()), true),
        (names.continuation, Arc::new(continuations.finish()), true),
    ])?)
}

fn open(inputs: Vec<String>, format: Option<InputFormat>, text_columns: Vec<String>) -> Result<Dataset> {
    Dataset::open(&DatasetOptions { inputs, format, text_columns, ..DatasetOptions::default() })
}

/// All rows of some columns, in memory: datasets of evaluations are small.
fn read(dataset: &Dataset, columns: &[String]) -> Result<RecordBatch> {
    let file_rows: Vec<u64> = dataset.files.iter().map(|file| file.rows).collect();
    let units = cut_units(&file_rows, u64::MAX, None);
    let projection = Some(columns.to_vec());
    let options = WindowOptions { projection, window_rows: usize::MAX, window_bytes: usize::MAX };
    let reader = WindowReader::new(Arc::new(dataset.clone()), units, options)?;
    let schema = reader.schema();
    let batches = reader.map(|window| Ok(window?.batch)).collect::<Result<Vec<_>>>()?;
    Ok(concat_batches(&schema, &batches)?)
}

fn template_columns(dataset: &Dataset, template: &PromptTemplate) -> Result<Vec<String>> {
    for column in template.columns() {
        let found = dataset.column(column, "prompt_template")?.data_type();
        if !PromptTemplate::accepts(found) {
            return Err(Error::Usage(format!(
                "prompt_template: column '{column}' has type {found}, which has no text of its own"
            )));
        }
    }
    Ok(template.columns().map(str::to_owned).collect())
}

fn column<'a>(rows: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef> {
    rows.column_by_name(name).ok_or_else(|| Error::Internal(format!("column '{name}' was not read")))
}

fn render(template: &PromptTemplate, rows: &RecordBatch) -> Result<Vec<Option<String>>> {
    let columns = template.columns().map(|name| column(rows, name).cloned()).collect::<Result<Vec<_>>>()?;
    let text = |prompt: Prompt| match prompt {
        Prompt::Text { text, .. } => Some(text.into_owned()),
        Prompt::Null | Prompt::Failed(_) => None,
    };
    Ok(template.render(&columns, rows.num_rows())?.into_iter().map(text).collect())
}

/// Each row's choices.
fn text_lists(rows: &RecordBatch, name: &str) -> Result<Vec<Option<Vec<String>>>> {
    let found = column(rows, name)?;
    let lists: ListArray = match found.data_type() {
        DataType::List(item) | DataType::LargeList(item) if !item.data_type().is_nested() => {
            cast(found, &DataType::List(item.clone()))?.as_list::<i32>().clone()
        }
        other => {
            return Err(Error::Usage(format!(
                "choices_column '{name}' has type {other}, but a list of texts is needed"
            )));
        }
    };
    let row = |list: ArrayRef| -> Result<Vec<String>> {
        Ok(cast(&list, &DataType::Utf8)?.as_string::<i32>().iter().map(|text| text.unwrap_or("").to_owned()).collect())
    };
    lists.iter().map(|list| list.map(row).transpose()).collect()
}

/// The number of each row's right choice.
fn answers(rows: &RecordBatch, name: &str, choices: &[Option<Vec<String>>]) -> Result<Vec<Option<u64>>> {
    let found = column(rows, name)?;
    let wrong = |row: usize, value: &str| {
        Error::Usage(format!(
            "truth_column '{name}', row {row}: '{value}' is none of the choices, counted from 0 or by text"
        ))
    };
    if found.data_type().is_integer() {
        let numbers = cast(found, &DataType::UInt64)?;
        let signed = cast(found, &DataType::Utf8)?;
        let row = |(row, choices): (usize, &Option<Vec<String>>)| match choices {
            _ if found.is_null(row) => Ok(None),
            None => Ok(None),
            Some(choices) => {
                let number = numbers.is_valid(row).then(|| numbers.as_primitive::<UInt64Type>().value(row));
                number
                    .filter(|number| *number < choices.len() as u64)
                    .map(Some)
                    .ok_or_else(|| wrong(row, signed.as_string::<i32>().value(row)))
            }
        };
        return choices.iter().enumerate().map(row).collect();
    }
    if found.data_type().is_nested() {
        let found = found.data_type();
        return Err(Error::Usage(format!(
            "truth_column '{name}' has type {found}, but a choice's number or text is needed"
        )));
    }
    let texts = cast(found, &DataType::Utf8)?;
    let texts = texts.as_string::<i32>();
    let row = |(row, (text, choices)): (usize, (Option<&str>, &Option<Vec<String>>))| match (text, choices) {
        (Some(text), Some(choices)) => {
            let number = choices.iter().position(|choice| choice == text);
            number.map(|number| Some(number as u64)).ok_or_else(|| wrong(row, text))
        }
        _ => Ok(None),
    };
    texts.iter().zip(choices).enumerate().map(row).collect()
}
