//! The matrix of a sweep: which settings each cell has, and which job makes a task's predictions in it.

use std::path::Path;

use serde_json::{Map, Value as Json};
use toml::{Table, Value};

use super::spec::{MetricSettings, SWEEP_SETTINGS, SweepFile, TaskFile, TaskKind};
use crate::error::{Error, Result, one_line};

/// A task in a cell of the matrix, before anything is read.
#[derive(Debug, Clone)]
pub struct CellTask {
    /// The task's place in the file.
    pub task: usize,
    /// The cell's number: cells with the same settings of the matrix have the same.
    pub cell: usize,
    /// The cell's settings of the matrix.
    pub matrix: Map<String, Json>,
    /// The settings of the job that makes the predictions, but for its input and output.
    pub job: Table,
    pub metrics: MetricSettings,
}

/// The names of all settings that a matrix varies, those of the whole sweep first.
pub fn matrix_keys(sweep: &SweepFile) -> Vec<String> {
    let mut keys: Vec<String> = Vec::new();
    for key in sweep.matrix.keys().chain(sweep.tasks.iter().flat_map(|task| task.matrix.keys())) {
        if !keys.contains(key) {
            keys.push(key.clone());
        }
    }
    keys
}

/// Every task in every cell: tasks in the order of the file, and for each the last key of the matrix varying fastest.
///
/// # Errors
/// [`Error::Config`] for settings that do not fit their task.
pub fn cells(path: &Path, sweep: &SweepFile) -> Result<Vec<CellTask>> {
    let mut known: Vec<Map<String, Json>> = Vec::new();
    let mut cells = Vec::new();
    for (place, task) in sweep.tasks.iter().enumerate() {
        let mut matrix = sweep.matrix.clone();
        for (key, values) in &task.matrix {
            if matrix.insert(key.clone(), values.clone()).is_some() {
                let message = format!("task '{}': {key} is in the matrix of the sweep too", task.name);
                return Err(Error::config(path, message));
            }
        }
        for combination in combinations(&matrix) {
            let wrong = |message: String| Error::config(path, format!("task '{}': {message}", task.name));
            let settings = to_json(&combination).map_err(wrong)?;
            let cell = known.iter().position(|other| *other == settings).unwrap_or_else(|| {
                known.push(settings.clone());
                known.len() - 1
            });
            let mut job = sweep.settings.clone();
            job.extend(task.settings.clone());
            job.extend(combination);
            let mut metrics = Table::new();
            for key in SWEEP_SETTINGS {
                if let Some(value) = job.remove(key) {
                    check_metric(task, key).map_err(wrong)?;
                    metrics.insert(key.to_owned(), value);
                }
            }
            let metrics: MetricSettings =
                metrics.try_into().map_err(|error: toml::de::Error| wrong(one_line(error.message())))?;
            if metrics.calibration_bins == 0 {
                return Err(wrong("calibration_bins = 0: expected at least 1".into()));
            }
            complete_job(task, &mut job).map_err(wrong)?;
            cells.push(CellTask { task: place, cell, matrix: settings, job, metrics });
        }
    }
    Ok(cells)
}

/// Every choice of one value for each key.
fn combinations(matrix: &Table) -> Vec<Table> {
    let mut combinations = vec![Table::new()];
    for (key, values) in matrix {
        let values = values.as_array().map(Vec::as_slice).unwrap_or_default();
        let with = |combination: &Table, value: &Value| {
            let mut combination = combination.clone();
            combination.insert(key.clone(), value.clone());
            combination
        };
        combinations =
            combinations.iter().flat_map(|combination| values.iter().map(|value| with(combination, value))).collect();
    }
    combinations
}

fn to_json(settings: &Table) -> Result<Map<String, Json>, String> {
    match serde_json::to_value(settings) {
        Ok(Json::Object(settings)) => Ok(settings),
        Ok(_) => Err("settings are no table".into()),
        Err(error) => Err(one_line(error)),
    }
}

/// Refuses a setting of the sweep that means nothing to the task.
fn check_metric(task: &TaskFile, key: &str) -> Result<(), String> {
    let fits = match key {
        "threshold" => matches!(task.kind, TaskKind::Classification | TaskKind::Tagging),
        "calibration_bins" => task.kind == TaskKind::Classification,
        "extract" => task.kind == TaskKind::Generation,
        "bio_mode" => task.kind == TaskKind::Tagging,
        _ if task.few_shot.is_none() => return Err(format!("{key} needs a few_shot table")),
        _ => true,
    };
    match fits {
        true => Ok(()),
        false => Err(format!("{key} does not fit {}; set it for the tasks that it fits", task.kind.name())),
    }
}

/// Adds what the task's kind implies.
fn complete_job(task: &TaskFile, job: &mut Table) -> Result<(), String> {
    job.insert("command".into(), task.kind.command().into());
    match task.kind {
        TaskKind::Classification => {
            if job.contains_key("top_k") {
                return Err("top_k: all scores are kept, because calibration and thresholds need them".into());
            }
            job.insert("top_k".into(), "all".into());
        }
        TaskKind::Tagging if job.get("aggregation").and_then(Value::as_str) == Some("none") => {
            return Err("aggregation = \"none\" gives tokens, not entities".into());
        }
        TaskKind::MultipleChoice => {
            for (key, made_of) in
                [("context_column", "prompt_template or text_column"), ("continuation_column", "choices_column")]
            {
                if job.contains_key(key) {
                    return Err(format!("{key} is made by the sweep, of {made_of}; leave it out"));
                }
            }
            if job.contains_key("chat_column") || job.contains_key("system") {
                return Err("multiple_choice has no chats; write the prompt with prompt_template".into());
            }
        }
        TaskKind::Perplexity => {
            for key in ["context_column", "continuation_column", "prompt_template", "chat_column", "system"] {
                if job.contains_key(key) {
                    return Err(format!("{key}: perplexity is that of whole texts; name them with text_column"));
                }
            }
            // Words and bytes of a text that was cut would be counted, but not scored.
            match job.get("overflow").and_then(Value::as_str) {
                None | Some("error") => job.insert("overflow".into(), "error".into()),
                Some(_) => {
                    return Err(
                        "overflow: perplexity needs whole texts; longer ones fail (overflow = \"error\")".into()
                    );
                }
            };
        }
        TaskKind::Tagging | TaskKind::Regression | TaskKind::Generation => {}
    }
    if task.few_shot.is_some() && job.contains_key("chat_column") {
        return Err("few_shot does not go with chat_column; write the prompt with prompt_template".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sweep(text: &str) -> Result<Vec<CellTask>> {
        let path = Path::new("sweep.toml");
        let sweep = SweepFile::new(path, toml::from_str(text).unwrap())?;
        cells(path, &sweep)
    }

    const TASK: &str =
        "[[task]]\nname = 'a'\nkind = 'classification'\ninput = ['x.parquet']\ntruth_column = 't'\n[task.settings]\n";

    #[test]
    fn cells_are_all_combinations_and_later_tables_win() {
        let text = format!(
            "output = 'o'\n[settings]\nmax_length = 5\nmodel = 'm'\n[matrix]\nprefix = ['', 'p']\nthreshold = [0.1, 0.9]\n\
             {TASK}max_length = 7\n{}kind = 'tagging'\ninput = ['y']\ntruth_column = 't'\n[task.matrix]\nstride = [1]\n",
            "[[task]]\nname = 'b'\n"
        );
        let cells = sweep(&text).unwrap();
        let summary: Vec<_> =
            cells.iter().map(|cell| (cell.task, cell.cell, cell.metrics.threshold.unwrap())).collect();
        assert_eq!(summary[..4], [(0, 0, 0.1), (0, 1, 0.9), (0, 2, 0.1), (0, 3, 0.9)]);
        assert_eq!(summary[4..], [(1, 4, 0.1), (1, 5, 0.9), (1, 6, 0.1), (1, 7, 0.9)]);
        assert_eq!(cells[0].job, cells[1].job, "a threshold is no setting of the job");
        assert_eq!(cells[2].job["max_length"].as_integer(), Some(7));
        assert_eq!(cells[2].job["prefix"].as_str(), Some("p"));
        assert_eq!(cells[4].job["command"].as_str(), Some("tag"));
        assert_eq!(cells[4].job["max_length"].as_integer(), Some(5));
    }

    #[test]
    fn mistakes_name_the_key_and_the_nearest_one() {
        let with = |text: &str| sweep(text).unwrap_err().to_string();
        for (text, says) in [
            ("outptu = 'o'".to_owned(), "the sweep has no key 'outptu'; did you mean 'output'?"),
            ("output = 'o'".to_owned(), "at least one [[task]]"),
            (format!("output = 'o'\n{}", TASK.replace("truth_column", "truth_colum")), "did you mean 'truth_column'?"),
            (
                format!("output = 'o'\n{}", TASK.replace("classification", "clasification")),
                "unknown variant `clasification`",
            ),
            (format!("output = 'o'\n{TASK}calibration_bin = 0"), ""),
            (format!("output = 'o'\n{TASK}calibration_bins = 0"), "at least 1"),
            (format!("output = 'o'\n{TASK}top_k = 1"), "top_k"),
            (format!("output = 'o'\n{TASK}extract = 'x'"), "extract does not fit classification"),
            (format!("output = 'o'\n{TASK}few_shot_count = 1"), "needs a few_shot table"),
            (format!("output = 'o'\n{TASK}keep = []"), "'keep' is made by the sweep"),
            (format!("output = 'o'\n{TASK}n = 2"), "one completion a row"),
            (format!("output = 'o'\n[matrix]\nmodel = []\n{TASK}"), "the list is empty"),
            (format!("output = 'o'\n[matrix]\nmodel = 'm'\n{TASK}"), "expected a list"),
            (format!("output = 'o'\n[matrix]\nmodel = ['m', 'm']\n{TASK}"), "is there twice"),
            (
                format!("output = 'o'\n[matrix]\nmodel = ['m']\n{TASK}[task.matrix]\nmodel = ['m']"),
                "matrix of the sweep too",
            ),
            (format!("output = 'o'\nconfidence = 95\n{TASK}"), "a share between 0 and 1"),
        ] {
            if says.is_empty() {
                // A key that sweeps do not know goes to the job, which checks it.
                assert_eq!(sweep(&text).unwrap()[0].job["calibration_bin"].as_integer(), Some(0));
                continue;
            }
            let error = with(&text);
            assert!(error.contains(says), "{text}: {error}");
            assert_eq!(sweep(&text).unwrap_err().exit_code(), crate::ExitCode::Config);
        }
    }
}
