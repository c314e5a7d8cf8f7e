//! A sweep file: what is varied, and what it is measured on.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};
use toml::Table;

use super::metrics::calibration::DEFAULT_BINS;
use super::metrics::tagging::BioMode;
use crate::error::{Error, Result, nearest_name, one_line};
use crate::job::schema;

/// Resamples behind an interval where nothing is said.
pub const DEFAULT_RESAMPLES: u64 = 1000;
/// The share of resampled values in an interval where nothing is said.
pub const DEFAULT_CONFIDENCE: f64 = 0.95;

/// An evaluation sweep: every combination of the matrix, on every task.
///
/// Paths are relative to the file. Settings have the names of job files, and stand in `[settings]` for all tasks, in a
/// task's own settings, or with several values in a matrix.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SweepFile {
    /// Folder to write predictions, runs.parquet, comparisons.parquet and report.html to.
    pub output: PathBuf,
    /// Headline of the report; the file's name where it is missing.
    #[serde(default)]
    pub title: Option<String>,
    /// Resamples of the rows behind each confidence interval; 0 gives none. Default 1000.
    #[serde(default)]
    pub resamples: Option<u64>,
    /// The share of resampled values that an interval holds. Default 0.95.
    #[serde(default)]
    pub confidence: Option<f64>,
    /// Seed of the resamples. Default 0.
    #[serde(default)]
    pub bootstrap_seed: u64,
    /// Job settings of every task, and metric settings.
    #[serde(default)]
    #[schemars(with = "SettingsTable")]
    pub settings: Table,
    /// Lists of values: every combination of them is a cell.
    #[serde(default)]
    #[schemars(with = "MatrixTable")]
    pub matrix: Table,
    /// What every cell is measured on.
    #[serde(default, rename = "task")]
    #[schemars(length(min = 1))]
    pub tasks: Vec<TaskFile>,
}

/// A dataset with what is right, and how it is measured.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskFile {
    /// Names the task in tables, folders and the report: letters, digits, `-` and `_`.
    pub name: String,
    /// What is measured.
    pub kind: TaskKind,
    /// The dataset: files, globs or folders.
    #[schemars(length(min = 1))]
    pub input: Vec<String>,
    /// The column that says what is right; all kinds but perplexity need it. Of multiple_choice it holds the right
    /// choice's number, counted from 0, or its text.
    #[serde(default)]
    pub truth_column: Option<String>,
    /// Column with the list of choices of a multiple_choice task.
    #[serde(default)]
    pub choices_column: Option<String>,
    /// Put between a context and each choice of a multiple_choice task. Default one space.
    #[serde(default)]
    pub choice_delimiter: Option<String>,
    /// Solved examples before each prompt.
    #[serde(default)]
    pub few_shot: Option<FewShotFile>,
    /// Job settings of this task, and metric settings.
    #[serde(default)]
    #[schemars(with = "SettingsTable")]
    pub settings: Table,
    /// More of the matrix, for this task alone.
    #[serde(default)]
    #[schemars(with = "MatrixTable")]
    pub matrix: Table,
}

/// Where solved examples come from.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FewShotFile {
    /// A dataset other than the one that is measured.
    pub source: String,
    /// One example as text, with columns in braces: "Q: {question}\nA: {answer}".
    pub template: String,
    /// Put between examples, and between them and the prompt. Default a blank line.
    #[serde(default)]
    pub separator: Option<String>,
    /// Examples before each prompt; `few_shot_count` in a matrix or in settings goes before it.
    #[serde(default)]
    pub count: usize,
    /// Chooses the examples and their order; `few_shot_seed` in a matrix or in settings goes before it. Default 0.
    #[serde(default)]
    pub seed: u64,
}

/// What a task measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// Labels: accuracy, F1, Matthews correlation, calibration.
    Classification,
    /// Entities: F1 of whole entities.
    Tagging,
    /// Numbers: errors and correlations.
    Regression,
    /// Completions: exact and normalised match, F1 of words, BLEU, ROUGE-L, chrF.
    Generation,
    /// Choices by log-likelihood: acc, acc_norm, acc_bytes.
    MultipleChoice,
    /// Perplexity per word, byte and token.
    Perplexity,
}

impl TaskKind {
    /// The name in a sweep file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Classification => "classification",
            Self::Tagging => "tagging",
            Self::Regression => "regression",
            Self::Generation => "generation",
            Self::MultipleChoice => "multiple_choice",
            Self::Perplexity => "perplexity",
        }
    }

    /// The command that makes the predictions.
    pub fn command(self) -> &'static str {
        match self {
            Self::Classification | Self::Regression => "classify",
            Self::Tagging => "tag",
            Self::Generation => "generate",
            Self::MultipleChoice | Self::Perplexity => "score",
        }
    }

    /// What the numbers of the report mean, in a sentence.
    pub fn in_words(self) -> &'static str {
        match self {
            Self::Classification => {
                "macro F1 averages over classes that occur; coverage is the share of rows over the threshold."
            }
            Self::Tagging => "an entity counts when its borders and its type are right.",
            Self::Regression => "errors of the predicted numbers, and their correlations with the true ones.",
            Self::Generation => {
                "token F1 and normalised match as SQuAD; BLEU (13a) and chrF as sacrebleu, from 0 to 100; ROUGE-L without stemming."
            }
            Self::MultipleChoice => {
                "the likeliest choice; acc_norm divides its log-likelihood by characters, acc_bytes by bytes, as lm-evaluation-harness."
            }
            Self::Perplexity => "per word, byte and token, as lm-evaluation-harness; lower is better.",
        }
    }
}

/// Settings that shape what is measured and not what is predicted.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MetricSettings {
    /// The score from which a prediction counts.
    pub threshold: Option<f32>,
    /// Bins of equal width for the calibration error and the reliability curve.
    #[schemars(range(min = 1))]
    pub calibration_bins: usize,
    /// What of a completion is the answer, as a regular expression.
    pub extract: Option<String>,
    /// How strictly tags are read as entities.
    pub bio_mode: BioMode,
    /// Examples before each prompt.
    pub few_shot_count: Option<usize>,
    /// Chooses the examples and their order.
    pub few_shot_seed: Option<u64>,
}

impl Default for MetricSettings {
    fn default() -> Self {
        Self {
            threshold: None,
            calibration_bins: DEFAULT_BINS,
            extract: None,
            bio_mode: BioMode::default(),
            few_shot_count: None,
            few_shot_seed: None,
        }
    }
}

/// The settings that a sweep adds to those of job files.
pub const SWEEP_SETTINGS: [&str; 6] =
    ["threshold", "calibration_bins", "extract", "bio_mode", "few_shot_count", "few_shot_seed"];

/// The settings of job files that a sweep makes itself.
pub const OWN_SETTINGS: [&str; 7] = ["command", "input", "output", "truth_column", "resume", "overwrite", "keep"];

/// The settings of job files that are those of a whole process: the command line has them.
pub const PROCESS_SETTINGS: [&str; 8] =
    ["report", "openlineage", "prometheus", "progress", "log_format", "quiet", "verbose", "dry_run"];

/// The JSON Schema of sweep files.
pub fn schema() -> Json {
    let mut schema = schema::for_toml(schemars::schema_for!(SweepFile).to_value());
    schema["title"] = "mistral-batch sweep file".into();
    schema
}

/// Settings of jobs and sweeps by name, for the schema.
struct SettingsTable;
/// Lists of values by the name of the setting, for the schema.
struct MatrixTable;

impl JsonSchema for SettingsTable {
    fn schema_name() -> Cow<'static, str> {
        "Settings".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "object", "properties": known_settings(generator), "additionalProperties": false })
    }
}

impl JsonSchema for MatrixTable {
    fn schema_name() -> Cow<'static, str> {
        "Matrix".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let lists: Map<String, Json> = known_settings(generator)
            .into_iter()
            .map(|(key, schema)| (key, json!({ "type": "array", "items": schema, "minItems": 1, "uniqueItems": true })))
            .collect();
        json_schema!({ "type": "object", "properties": lists, "additionalProperties": false })
    }
}

/// The settings that a sweep file can give to jobs, and those of its own.
fn known_settings(generator: &mut SchemaGenerator) -> Map<String, Json> {
    let mut known = schema::settings();
    let has_meaning = |key: &str| !OWN_SETTINGS.contains(&key) && !PROCESS_SETTINGS.contains(&key) && key != "n";
    known.retain(|key, _| has_meaning(key));
    let metrics = MetricSettings::json_schema(generator).to_value();
    let metrics = metrics["properties"].as_object().cloned().unwrap_or_default();
    // Unlike a job's, these numbers are read as they stand.
    known.extend(metrics.into_iter().map(|(key, schema)| (key, schema::for_toml(schema))));
    known
}

const SWEEP_KEYS: [&str; 8] =
    ["output", "title", "resamples", "confidence", "bootstrap_seed", "settings", "matrix", "task"];
const TASK_KEYS: [&str; 9] =
    ["name", "kind", "input", "truth_column", "choices_column", "choice_delimiter", "few_shot", "settings", "matrix"];
const FEW_SHOT_KEYS: [&str; 5] = ["source", "template", "separator", "count", "seed"];

impl SweepFile {
    /// Reads the settings of a sweep file; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn new(path: &Path, settings: Table) -> Result<Self> {
        let wrong = |message: String| Error::config(path, message);
        check_keys(&settings, &SWEEP_KEYS, "the sweep").map_err(wrong)?;
        for task in settings.get("task").and_then(toml::Value::as_array).into_iter().flatten() {
            let Some(task) = task.as_table() else { continue };
            let name = task.get("name").and_then(toml::Value::as_str).unwrap_or("");
            check_keys(task, &TASK_KEYS, &format!("task '{name}'")).map_err(wrong)?;
            if let Some(few_shot) = task.get("few_shot").and_then(toml::Value::as_table) {
                check_keys(few_shot, &FEW_SHOT_KEYS, &format!("few_shot of task '{name}'")).map_err(wrong)?;
            }
        }
        let sweep: Self = settings.try_into().map_err(|error: toml::de::Error| wrong(one_line(error.message())))?;
        sweep.check().map_err(wrong)?;
        Ok(sweep)
    }

    fn check(&self) -> Result<(), String> {
        if self.tasks.is_empty() {
            return Err("a sweep needs at least one [[task]]".into());
        }
        if let Some(confidence) = self.confidence.filter(|confidence| !(*confidence > 0.0 && *confidence < 1.0)) {
            return Err(format!("confidence = {confidence}: expected a share between 0 and 1"));
        }
        check_settings(&self.settings, "[settings]")?;
        check_matrix(&self.matrix, "[matrix]")?;
        for (place, task) in self.tasks.iter().enumerate() {
            let name = &task.name;
            let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            if name.is_empty() || !name.chars().all(is_plain) {
                return Err(format!("task '{name}': a name has letters, digits, - and _ only"));
            }
            if self.tasks[..place].iter().any(|other| other.name == *name) {
                return Err(format!("task '{name}' is there twice"));
            }
            check_settings(&task.settings, &format!("settings of task '{name}'"))?;
            check_matrix(&task.matrix, &format!("matrix of task '{name}'"))?;
            task.check().map_err(|message| format!("task '{name}': {message}"))?;
        }
        Ok(())
    }
}

impl TaskFile {
    fn check(&self) -> Result<(), String> {
        let kind = self.kind.name();
        if self.input.is_empty() {
            return Err("input names no file".into());
        }
        match (self.kind, &self.truth_column) {
            (TaskKind::Perplexity, Some(_)) => {
                return Err("perplexity compares with nothing; leave truth_column out".into());
            }
            (TaskKind::Perplexity, None) | (_, Some(_)) => {}
            (_, None) => return Err(format!("{kind} needs a truth_column")),
        }
        match (self.kind, &self.choices_column) {
            (TaskKind::MultipleChoice, None) => return Err("multiple_choice needs a choices_column".into()),
            (TaskKind::MultipleChoice, Some(_)) => {}
            (_, Some(_)) => return Err(format!("choices_column does not fit {kind}")),
            (_, None) if self.choice_delimiter.is_some() => {
                return Err(format!("choice_delimiter does not fit {kind}"));
            }
            (_, None) => {}
        }
        if self.few_shot.is_some() && matches!(self.kind, TaskKind::Perplexity | TaskKind::Tagging) {
            return Err(format!("few_shot does not fit {kind}"));
        }
        Ok(())
    }
}

/// Refuses a key that is not in `known`, with the nearest one that is.
fn check_keys(table: &Table, known: &[&str], of: &str) -> Result<(), String> {
    match table.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => {
            let hint = match nearest_name(key, known.iter().copied()) {
                Some(near) => format!("did you mean '{near}'?"),
                None => format!("it has {}", known.join(", ")),
            };
            Err(format!("{of} has no key '{key}'; {hint}"))
        }
    }
}

fn check_settings(table: &Table, of: &str) -> Result<(), String> {
    let own = |key: &&String| OWN_SETTINGS.contains(&key.as_str());
    if let Some(key) = table.keys().find(|key| PROCESS_SETTINGS.contains(&key.as_str())) {
        let flag = key.replace('_', "-");
        return Err(format!("{of}: '{key}' is of the whole sweep; give --{flag} to mistral-batch eval"));
    }
    match table.keys().find(own) {
        Some(key) => Err(format!("{of}: '{key}' is made by the sweep; leave it out")),
        None if table.contains_key("n") => Err(format!("{of}: 'n': a sweep measures one completion a row")),
        None => Ok(()),
    }
}

fn check_matrix(table: &Table, of: &str) -> Result<(), String> {
    check_settings(table, of)?;
    for (key, values) in table {
        match values.as_array() {
            None => return Err(format!("{of}: {key}: expected a list of values")),
            Some(values) if values.is_empty() => return Err(format!("{of}: {key}: the list is empty")),
            Some(values) => {
                if let Some(twice) = values.iter().enumerate().find(|(place, v)| values[..*place].contains(v)) {
                    return Err(format!("{of}: {key}: {} is there twice", twice.1));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_are_checked_are_those_that_are_read() {
        let schema = serde_json::to_value(schemars::schema_for!(SweepFile)).unwrap();
        let names = |of: &serde_json::Value| -> Vec<String> { of.as_object().unwrap().keys().cloned().collect() };
        let [mut sweep, mut task] = [&schema["properties"], &schema["$defs"]["TaskFile"]["properties"]].map(names);
        sweep.sort();
        task.sort();
        let sorted = |keys: &[&str]| {
            let mut keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
            keys.sort();
            keys
        };
        assert_eq!(sweep, sorted(&SWEEP_KEYS));
        assert_eq!(task, sorted(&TASK_KEYS));
    }
}
