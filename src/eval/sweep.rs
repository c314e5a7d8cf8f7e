//! Plans a sweep and runs it: predictions once each, then what they are worth.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use regex::Regex;
use serde::Serialize;
use serde_json::{Map, Value as Json, json};
use sha2::{Digest, Sha256};
use toml::{Table, Value};

use super::cells::{CellTask, cells, matrix_keys};
use super::metrics::bootstrap::Bootstrap;
use super::prepare::{ChoiceSource, as_template, choices, examples};
use super::report;
use super::results::{PredictionCost, SweepResults, TaskRun, comparisons, replace_file, write_table};
use super::scoring::{self, CHOICE_COLUMNS, Outcome, Predictions};
use super::spec::{DEFAULT_CONFIDENCE, DEFAULT_RESAMPLES, SweepFile, TaskFile, TaskKind};
use crate::data::commit::{OutputLock, create_dirs_durably};
use crate::data::sink::OnExisting;
use crate::error::{Error, Result, nearest_name};
use crate::job::{
    self, AuditReport, Job, JobFile, JobIdentity, JobSpec, ModelCache, PromptSpec, RunControl, Variables,
};

/// The file that marks a folder as a sweep's.
const MARK_NAME: &str = "_sweep.json";
/// Where predictions lie below the output.
const PREDICTIONS: &str = "predictions";
/// Where the inputs of multiple-choice predictions lie below the output.
const PREPARED: &str = "prepared";
/// Put between a context and a choice where nothing is said, as lm-evaluation-harness does.
const DEFAULT_CHOICE_DELIMITER: &str = " ";
/// Hexadecimal digits that name a prediction.
const KEY_DIGITS: usize = 16;

/// A sweep that was checked: every cell has a job.
pub struct SweepPlan {
    path: PathBuf,
    sweep: SweepFile,
    /// The output folder.
    pub output: PathBuf,
    cells: Vec<PlannedCell>,
    /// Where the jobs compute, as their settings say.
    pub devices: Vec<String>,
    /// Threads to compute with; all cores when `None`.
    pub threads: Option<u64>,
}

/// A task in a cell with the job of its predictions.
struct PlannedCell {
    cell: CellTask,
    spec: JobSpec,
    /// What job that is; a prepared input is written before it can be told.
    identity: Option<JobIdentity>,
    extract: Option<Regex>,
    /// The prepared input of a multiple-choice task: its place and its rows.
    prepared: Option<(PathBuf, RecordBatch)>,
}

/// What a sweep did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SweepSummary {
    /// Tasks in cells that were measured.
    pub runs: usize,
    /// Different predictions among them.
    pub predictions: usize,
    /// Those that an earlier run of the sweep had finished.
    pub predictions_reused: usize,
    /// How often weights were read.
    pub model_loads: u64,
    /// What the audits of this run's predictions found, where `audit` asks for them.
    pub audits: BTreeMap<String, AuditReport>,
    /// The first measure of every task in every cell.
    pub results: Vec<RunSummary>,
}

/// What a task in a cell is worth, by the task's first measure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunSummary {
    pub task: String,
    pub cell: usize,
    /// The cell's settings of the matrix.
    pub settings: Map<String, Json>,
    /// As `accuracy`.
    pub measure: &'static str,
    /// Null where nothing could be compared.
    pub value: f64,
    /// Both ends of the bootstrap interval.
    pub interval: Option<(f64, f64)>,
    /// Rows or documents that were compared.
    pub compared: usize,
    /// The folder of its predictions, relative to the sweep's.
    pub predictions: String,
}

impl SweepPlan {
    /// Reads and checks a sweep file; no weight is read and nothing is written.
    ///
    /// # Errors
    /// [`Error::Config`] for the file, and what reading its datasets gives.
    pub fn new(path: &Path, variables: &Variables) -> Result<Self> {
        let file = JobFile::read(path)?;
        let settings = expanded(path, file.settings(), variables)?;
        let sweep = SweepFile::new(path, settings)?;
        let dir = fs::canonicalize(path).map_err(|error| Error::config(path, error))?;
        let dir = dir.parent().unwrap_or(Path::new("/")).to_owned();
        let output = joined(&dir, &sweep.output);
        let mut plan =
            Self { path: path.to_owned(), output, cells: Vec::new(), devices: Vec::new(), threads: None, sweep };
        for (place, cell) in cells(path, &plan.sweep)?.into_iter().enumerate() {
            let task = &plan.sweep.tasks[cell.task];
            let wrong = |message: String| Error::config(path, format!("task '{}': {message}", task.name));
            let (planned, job) = plan_cell(&file, &dir, &plan.output, task, cell).map_err(|error| match error {
                // A column or a setting that a sweep file names wrongly is the file's fault.
                Error::Usage(_) | Error::ColumnMissing { .. } | Error::ColumnType { .. } => wrong(error.to_string()),
                other => other,
            })?;
            if place > 0 && plan.threads != job.threads {
                return Err(wrong("threads: all cells of a sweep run in one process; set it in [settings]".into()));
            }
            plan.threads = job.threads;
            plan.devices.push(job.device);
            plan.cells.push(planned);
        }
        plan.devices.dedup();
        Ok(plan)
    }

    /// Audits `rows` rows of each prediction, whatever the settings say.
    pub fn audit(&mut self, rows: u64) {
        self.cells.iter_mut().for_each(|planned| planned.spec.audit = Some(rows));
    }

    /// The datasets of all tasks, as the jobs name them; choices and few-shot examples are made of them.
    pub fn inputs(&self) -> Vec<String> {
        let dir = self.path.canonicalize().ok();
        let dir = dir.as_deref().and_then(Path::parent).unwrap_or(Path::new("/"));
        let place = |place: &String| match place.contains("://") {
            true => place.clone(),
            false => joined(dir, Path::new(place)).to_string_lossy().into_owned(),
        };
        let of_task = |task: &TaskFile| -> Vec<String> {
            task.input.iter().chain(task.few_shot.iter().map(|few_shot| &few_shot.source)).map(place).collect()
        };
        self.sweep.tasks.iter().flat_map(of_task).collect()
    }

    /// The checkpoints of all cells.
    pub fn models(&self) -> Vec<String> {
        self.cells.iter().map(|planned| planned.spec.model.clone()).collect()
    }

    /// The cells in words, one a line.
    pub fn describe(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut keys = Vec::new();
        for planned in &self.cells {
            let task = &self.sweep.tasks[planned.cell.task];
            let settings: Vec<String> =
                planned.cell.matrix.iter().map(|(key, value)| format!("{key} = {value}")).collect();
            let settings = if settings.is_empty() { String::new() } else { format!(", {}", settings.join(", ")) };
            let (rows, key) = match (&planned.identity, &planned.prepared) {
                (Some(identity), _) => (identity.rows, prediction_name(&task.name, identity)),
                (None, prepared) => {
                    let rows = prepared.as_ref().map_or(0, |(_, rows)| rows.num_rows() as u64);
                    (rows, format!("{:?}", planned.spec))
                }
            };
            if !keys.contains(&key) {
                keys.push(key.clone());
            }
            let number = keys.iter().position(|known| *known == key).unwrap_or_default();
            let cell = planned.cell.cell;
            lines.push(format!("cell {cell}: {}, {rows} rows, predictions {number}{settings}", task.name));
        }
        lines.push(format!("{} runs of {} different predictions", self.cells.len(), keys.len()));
        lines
    }

    fn bootstrap(&self) -> Bootstrap {
        Bootstrap {
            resamples: self.sweep.resamples.unwrap_or(DEFAULT_RESAMPLES),
            confidence: self.sweep.confidence.unwrap_or(DEFAULT_CONFIDENCE),
            seed: self.sweep.bootstrap_seed,
        }
    }

    /// Makes the predictions that are not there yet, measures them, and writes tables and report.
    ///
    /// # Errors
    /// Whatever stopped a job or the writing; finished predictions stay, and the same sweep goes on from there.
    pub async fn run(&self, control: Arc<RunControl>, overwrite: bool) -> Result<SweepSummary> {
        let _lock = open_output(&self.output)?;
        let models = Arc::new(ModelCache::default());
        // Every cell's predictions, by name; the order of cells decides which are made first.
        let mut done: BTreeMap<String, bool> = BTreeMap::new();
        let mut runs = Vec::new();
        let mut audits = BTreeMap::new();
        for planned in &self.cells {
            control.check()?;
            let task = &self.sweep.tasks[planned.cell.task];
            if let Some((place, rows)) = &planned.prepared
                && !place.exists()
            {
                create_dirs_durably(&self.output.join(PREPARED))?;
                write_table(place, rows)?;
            }
            let identity = match &planned.identity {
                Some(identity) => identity.clone(),
                None => job::identify(&planned.spec)?,
            };
            let name = prediction_name(&task.name, &identity);
            let folder = self.output.join(PREDICTIONS).join(&name);
            if !done.contains_key(&name) {
                let on_existing = if overwrite { OnExisting::Overwrite } else { OnExisting::Resume };
                let spec = JobSpec { output: folder.clone(), on_existing, ..planned.spec.clone() };
                control.notice(format!("predictions/{name}: {} rows", identity.rows));
                let report = job::run_sharing(spec, control.clone(), models.clone()).await?;
                done.insert(name.clone(), report.status == "nothing_to_do");
                audits.extend(report.details.and_then(|details| details.audit).map(|audit| (name.clone(), audit)));
            }
            let run = TaskRun::new(
                task.name.clone(),
                task.kind,
                planned.cell.cell,
                planned.cell.matrix.clone(),
                format!("{PREDICTIONS}/{name}"),
                identity.fingerprint,
                cost(&folder)?,
            );
            let outcome = self.outcome(task, planned, &folder)?;
            runs.push(run.measured(outcome, &self.bootstrap()));
        }
        let results = runs.iter().filter_map(RunSummary::new).collect();
        self.write(runs)?;
        Ok(SweepSummary {
            runs: self.cells.len(),
            predictions: done.len(),
            predictions_reused: done.values().filter(|reused| **reused).count(),
            model_loads: models.loads(),
            audits,
            results,
        })
    }

    fn outcome(&self, task: &TaskFile, planned: &PlannedCell, folder: &Path) -> Result<Outcome> {
        let text_column = match &planned.spec.prompt {
            PromptSpec::Column(column) => column.as_str(),
            PromptSpec::Template(_) | PromptSpec::Chat { .. } => "",
        };
        let prefix = planned.spec.prefix.as_str();
        let results = [
            "predicted_label",
            "predicted_score",
            "predicted_scores",
            "predicted_labels",
            "predicted_value",
            "entities",
            "completion",
            "logprob",
            "scored_tokens",
        ];
        let names = CHOICE_COLUMNS;
        let mut columns: Vec<String> = results.iter().map(|name| format!("{prefix}{name}")).collect();
        let truth_column = task.truth_column.as_deref().unwrap_or("");
        match &planned.prepared {
            Some(_) => columns.extend([names.document, names.choice, names.answer].map(str::to_owned)),
            None => columns.extend([truth_column.to_owned(), text_column.to_owned()]),
        }
        let rows = read_parts(folder, &columns)?;
        let predictions = Predictions { rows: &rows, prefix, truth_column };
        let metrics = &planned.cell.metrics;
        let outcome = match task.kind {
            TaskKind::Classification => {
                scoring::classification(&predictions, metrics.threshold, metrics.calibration_bins)
            }
            TaskKind::Tagging => scoring::tagging(&predictions, text_column, metrics.threshold, metrics.bio_mode),
            TaskKind::Regression => scoring::regression(&predictions),
            TaskKind::Generation => scoring::generation(&predictions, planned.extract.as_ref()),
            TaskKind::MultipleChoice => scoring::multiple_choice(&predictions),
            TaskKind::Perplexity => scoring::perplexity(&predictions, text_column),
        };
        outcome.map_err(|error| match error {
            Error::Usage(message) => Error::config(&self.path, format!("task '{}': {message}", task.name)),
            other => other,
        })
    }

    /// Writes the tables and the report.
    fn write(&self, runs: Vec<TaskRun>) -> Result<()> {
        let title = self.sweep.title.clone().unwrap_or_else(|| {
            self.path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
        });
        let comparisons = comparisons(&runs);
        let keys = matrix_keys(&self.sweep);
        let results = SweepResults { title, bootstrap: self.bootstrap(), keys, runs, comparisons };
        write_table(&self.output.join("runs.parquet"), &results.runs_table()?)?;
        write_table(&self.output.join("comparisons.parquet"), &results.comparisons_table()?)?;
        let place = self.output.join("report.html");
        let html = report::html(&results)?;
        replace_file(&place, |mut file| file.write_all(html.as_bytes()).map_err(Error::io("write", &place)))
    }
}

impl RunSummary {
    /// `None` of a task that measures nothing.
    fn new(run: &TaskRun) -> Option<Self> {
        let headline = run.headline()?;
        Some(Self {
            task: run.task.clone(),
            cell: run.cell,
            settings: run.settings.clone(),
            measure: headline.measure.name,
            value: headline.value,
            interval: headline.interval,
            compared: run.compared,
            predictions: run.predictions.clone(),
        })
    }
}

/// Locks the output and marks it as a sweep's.
fn open_output(output: &Path) -> Result<OutputLock> {
    let mark = output.join(MARK_NAME);
    if !mark.exists() && fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_some()) {
        let message = "holds files that are not a sweep's; choose another output".to_owned();
        return Err(Error::CannotCreate { path: output.to_owned(), message });
    }
    create_dirs_durably(output)?;
    let lock = OutputLock::acquire(output)?;
    if !mark.exists() {
        let text = json!({ "sweep_of": "mistral-batch", "version": env!("CARGO_PKG_VERSION") }).to_string();
        replace_file(&mark, |mut file| file.write_all(text.as_bytes()).map_err(Error::io("write", &mark)))?;
    }
    Ok(lock)
}

/// `path` from `dir` on, which has no links, so that the parent of a folder is the one above it.
fn joined(dir: &Path, path: &Path) -> PathBuf {
    path.components().fold(dir.to_owned(), |mut place, part| {
        match part {
            Component::CurDir => {}
            Component::ParentDir => drop(place.pop()),
            part => place.push(part),
        }
        place
    })
}

/// The job of a cell's predictions.
fn plan_cell(file: &JobFile, dir: &Path, output: &Path, task: &TaskFile, cell: CellTask) -> Result<(PlannedCell, Job)> {
    let mut table = cell.job.clone();
    table.insert("input".into(), Value::Array(task.input.iter().cloned().map(Value::String).collect()));
    table.insert("output".into(), output.to_string_lossy().into_owned().into());
    let extract = match &cell.metrics.extract {
        None => None,
        Some(pattern) => {
            let wrong = |error| Error::Usage(format!("extract: {}", pattern_error(&error)));
            Some(Regex::new(pattern).map_err(wrong)?)
        }
    };
    if let Some(few_shot) = &task.few_shot {
        let job = derive(file, &table)?;
        let count = cell.metrics.few_shot_count.unwrap_or(few_shot.count);
        let seed = cell.metrics.few_shot_seed.unwrap_or(few_shot.seed);
        let source = joined(dir, Path::new(&few_shot.source)).to_string_lossy().into_owned();
        let shots = examples(few_shot, source, count, seed, &job.spec.inputs)?;
        let template = format!("{}{}", as_template(&shots), template_of(&job.spec.prompt));
        table.remove("text_column");
        table.insert("prompt_template".into(), template.into());
    }
    if task.kind != TaskKind::MultipleChoice {
        let job = derive(file, &table)?;
        let identity = job::identify(&job.spec)?;
        if let Some(column) = task.truth_column.as_deref()
            && identity.output_schema.field_with_name(column).is_err()
        {
            let names = identity.output_schema.fields().iter().map(|field| field.name().as_str());
            let hint = nearest_name(column, names).map_or(String::new(), |name| format!("; did you mean '{name}'?"));
            return Err(Error::Usage(format!("truth_column: no column '{column}'{hint}")));
        }
        return Ok((
            PlannedCell { cell, spec: job.spec.clone(), identity: Some(identity), extract, prepared: None },
            job,
        ));
    }

    let job = derive(file, &table)?;
    let source = ChoiceSource {
        inputs: job.spec.inputs.clone(),
        format: job.spec.input_format,
        template: template_of(&job.spec.prompt),
        choices_column: task.choices_column.as_deref().unwrap_or_default(),
        truth_column: task.truth_column.as_deref().unwrap_or_default(),
        delimiter: task.choice_delimiter.as_deref().unwrap_or(DEFAULT_CHOICE_DELIMITER),
        filter: job.spec.filter.as_deref(),
        limit: job.spec.limit,
    };
    let rows = choices(&source)?;
    // Told by its content, so that the same choices are the same input.
    let digest = hex(&Sha256::digest(format!("{rows:?} {}", content(&rows)?)));
    let place = output.join(PREPARED).join(format!("{}-{}.parquet", task.name, &digest[..KEY_DIGITS]));
    for key in ["text_column", "prompt_template", "where", "limit", "input_format"] {
        table.remove(key);
    }
    table.insert("input".into(), Value::Array(vec![place.to_string_lossy().into_owned().into()]));
    table.insert("context_column".into(), CHOICE_COLUMNS.context.into());
    table.insert("continuation_column".into(), CHOICE_COLUMNS.continuation.into());
    let job = derive(file, &table)?;
    Ok((PlannedCell { cell, spec: job.spec.clone(), identity: None, extract, prepared: Some((place, rows)) }, job))
}

/// The rows as CSV, to be told by their content.
fn content(rows: &RecordBatch) -> Result<String> {
    let mut text = Vec::new();
    arrow::csv::Writer::new(&mut text).write(rows)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A job of settings whose variables have their values already.
fn derive(file: &JobFile, settings: &Table) -> Result<Job> {
    let mut settings = settings.clone();
    settings.iter_mut().for_each(|(_, value)| escape_variables(value));
    file.with_settings(settings).job(&Variables::default())
}

fn escape_variables(value: &mut Value) {
    match value {
        Value::String(text) => *text = text.replace("${", "$${"),
        Value::Array(values) => values.iter_mut().for_each(escape_variables),
        _ => {}
    }
}

/// The settings with the values of their variables.
fn expanded(path: &Path, settings: &Table, variables: &Variables) -> Result<Table> {
    fn expand(value: &mut Value, variables: &Variables, used: &mut Vec<String>) -> Result<(), String> {
        match value {
            Value::String(text) => *text = variables.expand(text, used)?,
            Value::Array(values) => return values.iter_mut().try_for_each(|value| expand(value, variables, used)),
            Value::Table(table) => {
                return table.iter_mut().try_for_each(|(_, value)| expand(value, variables, used));
            }
            _ => {}
        }
        Ok(())
    }
    let (mut settings, mut used) = (Value::Table(settings.clone()), Vec::new());
    expand(&mut settings, variables, &mut used).map_err(|message| Error::config(path, message))?;
    if let Some(name) = variables.set_names().find(|name| !used.iter().any(|used| used == name)) {
        return Err(Error::Usage(format!("--set {name}: there is no ${{{name}}} in {}", path.display())));
    }
    match settings {
        Value::Table(settings) => Ok(settings),
        _ => Err(Error::Internal("settings are no table".into())),
    }
}

/// A prompt as a template over columns.
fn template_of(prompt: &PromptSpec) -> String {
    match prompt {
        PromptSpec::Template(template) => template.clone(),
        PromptSpec::Column(column) | PromptSpec::Chat { column, .. } => format!("{{{column}}}"),
    }
}

/// The last line of a regular expression's error says what is wrong.
fn pattern_error(error: &regex::Error) -> String {
    error.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

/// The name of a prediction: its task, and what it is made of.
fn prediction_name(task: &str, identity: &JobIdentity) -> String {
    let digest = hex(&Sha256::digest(format!("{} {}", identity.fingerprint, identity.rows_digest)));
    format!("{task}-{}", &digest[..KEY_DIGITS])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a finished prediction took, from its mark of success.
fn cost(folder: &Path) -> Result<PredictionCost> {
    let place = folder.join("_SUCCESS.json");
    let text = fs::read_to_string(&place).map_err(Error::io("read", &place))?;
    let success: Json = serde_json::from_str(&text).map_err(|error| Error::corrupt(&place, error))?;
    let number = |name: &str| success["summary"][name].as_f64().unwrap_or(f64::NAN);
    Ok(PredictionCost {
        rows_failed: number("rows_failed") as u64,
        rows_truncated: number("rows_truncated") as u64,
        tokens: number("tokens") as u64,
        seconds: success["summary"]["timings"]["pipeline_seconds"].as_f64().unwrap_or(f64::NAN),
        tokens_per_second: number("tokens_per_second"),
    })
}

/// Those of `columns` that a folder of parts has, all rows in their order.
fn read_parts(folder: &Path, columns: &[String]) -> Result<RecordBatch> {
    let entries = fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let mut parts: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    parts.retain(|part| part.extension().is_some_and(|extension| extension == "parquet"));
    parts.sort();
    let mut batches = Vec::new();
    for part in &parts {
        let file = fs::File::open(part).map_err(Error::io("open", part))?;
        let reader = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| Error::corrupt(part, error))?;
        let wanted = reader.schema().fields().iter().enumerate().filter(|(_, field)| columns.contains(field.name()));
        let mask = ProjectionMask::roots(reader.parquet_schema(), wanted.map(|(place, _)| place));
        let reader = reader.with_projection(mask).build().map_err(|error| Error::corrupt(part, error))?;
        for batch in reader {
            batches.push(batch.map_err(|error| Error::corrupt(part, error))?);
        }
    }
    let Some(first) = batches.first() else {
        return Err(Error::Usage("the dataset has no rows".into()));
    };
    Ok(concat_batches(&first.schema(), &batches)?)
}
