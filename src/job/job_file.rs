//! Job files: the settings of one command as TOML, one job a file.
//!
//! A key is a flag in snake_case, and its value is checked as the flag's: a file becomes the arguments of the command that
//! it names, and goes through their parser. Paths are relative to the file, so that a job is the same from anywhere.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, FromArgMatches, ValueHint};
use serde::Serialize;
use sha2::{Digest, Sha256};
use toml::de::DeTable;
use toml::{Table, Value};

use super::settings::{Job, JobParser, MessageSettings, job_command};
use super::variables::Variables;
use crate::data::sink::OnExisting;
use crate::error::{Error, Result, nearest_name, one_line};

/// A TOML file whose keys can be told by line.
#[derive(Debug, Clone)]
pub struct JobFile {
    /// As the user wrote it.
    path: PathBuf,
    /// The folder that paths are relative to, without links.
    dir: PathBuf,
    settings: Table,
    /// The line of each key, counted from one.
    lines: BTreeMap<String, usize>,
    sha256: String,
}

/// Which file a job was read from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JobFileIdentity {
    pub path: PathBuf,
    /// Of its content, before variables.
    pub sha256: String,
}

impl JobFile {
    /// Reads a file of settings; what they mean is not looked at.
    ///
    /// # Errors
    /// [`Error::Config`] with the line when it is not TOML, or cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|error| Error::config(path, error))?;
        let resolved = fs::canonicalize(path).map_err(|error| Error::config(path, error))?;
        let dir = resolved.parent().unwrap_or(Path::new("/")).to_owned();
        Self::parse(path, dir, &text)
    }

    /// Takes `text` for the content of the file `path` in the folder `dir`.
    ///
    /// # Errors
    /// As [`JobFile::read`].
    pub fn parse(path: &Path, dir: PathBuf, text: &str) -> Result<Self> {
        let line_of = |offset: usize| text.as_bytes()[..offset].iter().filter(|byte| **byte == b'\n').count() + 1;
        let malformed = |error: toml::de::Error| {
            let line = error.span().map_or(String::new(), |span| format!("line {}: ", line_of(span.start)));
            Error::config(path, format!("{line}{}", one_line(error.message())))
        };
        let keys = DeTable::parse(text).map_err(malformed)?;
        let lines = keys.get_ref().keys().map(|key| (key.get_ref().to_string(), line_of(key.span().start))).collect();
        let settings = toml::from_str(text).map_err(malformed)?;
        let sha256 = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { path: path.to_owned(), dir, settings, lines, sha256 })
    }

    /// The settings as they stand in the file.
    pub fn settings(&self) -> &Table {
        &self.settings
    }

    /// Where the file wants its report and its metrics, as far as that can be told of a file that may be wrong.
    pub fn messages(&self, variables: &Variables) -> MessageSettings {
        let place = |key: &str| -> Option<PathBuf> {
            let text = variables.expand(self.settings.get(key)?.as_str()?, &mut Vec::new()).ok()?;
            let parser = job_command();
            let arg = job_commands(&parser).find_map(|command| find_arg(command, key))?;
            Some(self.resolved(arg, &text).into()).filter(|_| !text.is_empty())
        };
        MessageSettings { report: place("report"), prometheus: place("prometheus"), ..MessageSettings::default() }
    }

    /// The same file with other settings, for what derives jobs from one.
    pub fn with_settings(&self, settings: Table) -> Self {
        Self { settings, ..self.clone() }
    }

    /// The job that the file asks for; it goes on with its own unfinished output.
    ///
    /// # Errors
    /// [`Error::Config`] with line and key, [`Error::Usage`] for a variable that was set and is not in the file.
    pub fn job(&self, variables: &Variables) -> Result<Job> {
        let settings = self.expanded(variables)?;
        let name = match settings.get("command") {
            Some(Value::String(name)) => name.as_str(),
            Some(_) => return Err(self.wrong("command", "expected the name of a command in quotes")),
            None => return Err(Error::config(&self.path, "the key 'command' is missing; say which command to run")),
        };
        let mut parser = job_command();
        let command = parser.find_subcommand(name).ok_or_else(|| {
            let known: Vec<&str> = job_commands(&parser).map(clap::Command::get_name).collect();
            let known = known.join(", ");
            self.wrong("command", format!("no command '{name}' for a job; choose one of {known}"))
        })?;
        let mut args: Vec<OsString> = vec!["job".into(), name.into()];
        for (key, value) in settings.iter().filter(|(key, _)| *key != "command") {
            let arg = find_arg(command, key).ok_or_else(|| self.unknown_key(command, key))?;
            args.extend(self.arguments(arg, key, value)?);
        }
        let matches = parser.try_get_matches_from_mut(args).map_err(|error| self.refused(&error))?;
        let parsed = JobParser::from_arg_matches(&matches).map_err(|error| self.refused(&error))?;
        let mut job = parsed.settings.into_job().map_err(|error| match error {
            Error::Usage(message) => Error::config(&self.path, message),
            error => error,
        })?;
        job.file = Some(JobFileIdentity { path: self.path.clone(), sha256: self.sha256.clone() });
        if job.spec.on_existing == OnExisting::Refuse {
            job.spec.on_existing = OnExisting::ResumeIfOurs;
        }
        Ok(job)
    }

    /// The settings with the values of their variables.
    fn expanded(&self, variables: &Variables) -> Result<Table> {
        let mut used = Vec::new();
        let mut settings = self.settings.clone();
        for (key, value) in &mut settings {
            expand(value, variables, &mut used).map_err(|message| self.wrong(key, message))?;
        }
        for name in variables.set_names() {
            if !used.iter().any(|used| used == name) {
                let nearest = nearest_name(name, used.iter().map(String::as_str));
                let hint = nearest.map_or(String::new(), |name| format!("; did you mean '{name}'?"));
                let file = self.path.display();
                return Err(Error::Usage(format!("--set {name}: there is no ${{{name}}} in {file}{hint}")));
            }
        }
        Ok(settings)
    }

    /// A setting as arguments of the command line.
    fn arguments(&self, arg: &Arg, key: &str, value: &Value) -> Result<Vec<OsString>> {
        let flag = format!("--{}", arg.get_long().unwrap_or(key));
        if matches!(arg.get_action(), ArgAction::SetTrue) {
            return match value {
                Value::Boolean(true) => Ok(vec![flag.into()]),
                Value::Boolean(false) => Ok(Vec::new()),
                Value::String(text) if text == "true" => Ok(vec![flag.into()]),
                Value::String(text) if text == "false" => Ok(Vec::new()),
                other => Err(self.wrong(key, format!("expected true or false, found {}", describe(other)))),
            };
        }
        let takes_many = matches!(arg.get_action(), ArgAction::Append);
        let values = match value {
            // As --keep '' does: a list was given, and it is empty.
            Value::Array(values) if values.is_empty() && arg.get_value_delimiter().is_some() => {
                return Ok(vec![format!("{flag}=").into()]);
            }
            Value::Array(values) if takes_many => values.as_slice(),
            value => std::slice::from_ref(value),
        };
        let is_text = arg.get_value_parser().type_id() == std::any::TypeId::of::<String>()
            || arg.get_value_parser().type_id() == std::any::TypeId::of::<PathBuf>();
        let argument = |value: &Value| -> Result<OsString> {
            let value = match value {
                Value::String(text) => self.resolved(arg, text),
                Value::Integer(_) | Value::Float(_) if !is_text => value.to_string(),
                other => {
                    let expected = match (is_text, takes_many) {
                        (true, true) => "texts in quotes",
                        (true, false) => "a text in quotes",
                        (false, _) => "a number or a text",
                    };
                    return Err(self.wrong(key, format!("expected {expected}, found {}", describe(other))));
                }
            };
            Ok(format!("{flag}={value}").into())
        };
        values.iter().map(argument).collect()
    }

    /// A value whose argument is a path, from the file's folder on.
    fn resolved(&self, arg: &Arg, text: &str) -> String {
        let is_folder_or_name = matches!(arg.get_value_hint(), ValueHint::DirPath);
        let is_path = is_folder_or_name || matches!(arg.get_value_hint(), ValueHint::AnyPath | ValueHint::FilePath);
        if !is_path || text.is_empty() || text.contains("://") || Path::new(text).is_absolute() {
            return text.to_owned();
        }
        let mut dir = self.dir.as_path();
        let mut parts = Path::new(text).components().peekable();
        // The folder has no links, so that its parent is the one above it.
        while let Some(part) = parts.peek() {
            match part {
                Component::CurDir => {}
                Component::ParentDir => dir = dir.parent().unwrap_or(dir),
                _ => break,
            }
            parts.next();
        }
        let rest: PathBuf = parts.collect();
        let path = dir.join(&rest);
        // What is no folder beside the file may be the name of a checkpoint in the local cache.
        if is_folder_or_name && !text.starts_with('.') && !path.exists() {
            return text.to_owned();
        }
        let is_glob = text.contains(['*', '?', '[']) && !path.exists();
        let dir = dir.to_string_lossy();
        let dir = if is_glob { glob::Pattern::escape(&dir) } else { dir.into_owned() };
        Path::new(&dir).join(rest).to_string_lossy().into_owned()
    }

    fn wrong(&self, key: &str, message: impl std::fmt::Display) -> Error {
        let line = self.lines.get(key).map_or(String::new(), |line| format!("line {line}: "));
        Error::config(&self.path, format!("{line}{key}: {message}"))
    }

    fn unknown_key(&self, command: &clap::Command, key: &str) -> Error {
        let flag = key.replace('_', "-");
        let alias_of = |arg: &&Arg| arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&&flag[..]));
        let keys: Vec<String> = keys(command).collect();
        let nearest = match command.get_arguments().find(alias_of).and_then(Arg::get_long) {
            Some(long) => Some(key_of(long)),
            None => nearest_name(key, keys.iter().map(String::as_str)).map(str::to_owned),
        };
        let hint = nearest.map_or(String::new(), |nearest| format!("; did you mean '{nearest}'?"));
        let line = self.lines.get(key).map_or(String::new(), |line| format!("line {line}: "));
        Error::config(&self.path, format!("{line}{} has no key '{key}'{hint}", command.get_name()))
    }

    /// The parser's refusal, in the words of the file.
    fn refused(&self, error: &clap::Error) -> Error {
        let texts = |kind| match error.get(kind) {
            Some(ContextValue::String(text)) => vec![text.clone()],
            Some(ContextValue::Strings(texts)) => texts.clone(),
            _ => Vec::new(),
        };
        let keys_of = |kind| texts(kind).iter().map(|flag| key_of_usage(flag)).collect::<Vec<_>>();
        let invalid = keys_of(ContextKind::InvalidArg);
        let key = invalid.first().map_or("", String::as_str);
        match error.kind() {
            ErrorKind::MissingRequiredArgument => {
                let missing = invalid.join("', '");
                Error::config(&self.path, format!("the key '{missing}' is missing"))
            }
            ErrorKind::ArgumentConflict => {
                let prior = keys_of(ContextKind::PriorArg).join("' and '");
                self.wrong(key, format!("does not go with '{prior}'; leave one of them out"))
            }
            _ => {
                let value = texts(ContextKind::InvalidValue).join(", ");
                let valid = texts(ContextKind::ValidValue);
                let why = match std::error::Error::source(error) {
                    Some(source) => source.to_string(),
                    None if !valid.is_empty() => match nearest_name(&value, valid.iter().map(String::as_str)) {
                        Some(nearest) => format!("did you mean '{nearest}'? One of {} is expected", valid.join(", ")),
                        None => format!("expected one of {}", valid.join(", ")),
                    },
                    None => one_line(error.to_string()).trim_start_matches("error: ").to_owned(),
                };
                self.wrong(key, format!("'{value}' does not fit: {why}"))
            }
        }
    }
}

/// The commands that a job file can name.
pub(super) fn job_commands(parser: &clap::Command) -> impl Iterator<Item = &clap::Command> {
    parser.get_subcommands()
}

/// The keys that a command's job file can have.
pub(super) fn keys(command: &clap::Command) -> impl Iterator<Item = String> {
    command.get_arguments().filter(|arg| is_setting(arg)).filter_map(|arg| arg.get_long()).map(key_of)
}

/// The setting of a key.
pub(super) fn find_arg<'a>(command: &'a clap::Command, key: &str) -> Option<&'a Arg> {
    command.get_arguments().filter(|arg| is_setting(arg)).find(|arg| arg.get_long().map(key_of).as_deref() == Some(key))
}

fn is_setting(arg: &Arg) -> bool {
    !matches!(arg.get_id().as_str(), "help" | "version")
}

fn key_of(long: &str) -> String {
    long.replace('-', "_")
}

/// The key in a usage such as `--max-length <TOKENS>`.
fn key_of_usage(usage: &str) -> String {
    let long = usage.trim_start_matches('-');
    key_of(long.split([' ', '=', '[', '<']).next().unwrap_or(long))
}

fn expand(value: &mut Value, variables: &Variables, used: &mut Vec<String>) -> Result<(), String> {
    match value {
        Value::String(text) => *text = variables.expand(text, used)?,
        Value::Array(values) => values.iter_mut().try_for_each(|value| expand(value, variables, used))?,
        Value::Table(table) => table.iter_mut().try_for_each(|(_, value)| expand(value, variables, used))?,
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Datetime(_) => {}
    }
    Ok(())
}

fn describe(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a text",
        Value::Integer(_) | Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date; write it in quotes",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{CommandSpec, PromptSpec};

    const TICKETS: &str = "\
command = \"classify\"
model = \"./models/tickets\"
input = [\"../data/tickets.parquet\", \"../more/*.csv\"]
output = \"out-${date:-2026-01-01}\"
max_batch_tokens = \"16k\"
top_k = 3
";

    fn job(text: &str, set: &[(&str, &str)]) -> Result<Job> {
        let set = set.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        JobFile::parse(Path::new("jobs/a.toml"), "/srv/jobs [1]".into(), text)?.job(&Variables::new(set))
    }

    #[track_caller]
    fn refused(text: &str) -> String {
        let error = job(text, &[]).unwrap_err();
        assert_eq!(error.exit_code(), crate::ExitCode::Config);
        let message = error.to_string();
        message.strip_prefix("jobs/a.toml: ").unwrap_or_else(|| panic!("{message}")).to_owned()
    }

    #[test]
    fn keys_are_flags_and_paths_are_relative_to_the_file() {
        let spec = job(TICKETS, &[("date", "2026-07-01")]).unwrap().spec;
        assert_eq!(spec.output, Path::new("/srv/jobs [1]/out-2026-07-01"));
        assert_eq!(spec.inputs, ["/srv/data/tickets.parquet", "/srv/more/*.csv"]);
        assert_eq!(spec.model, "/srv/jobs [1]/models/tickets");
        assert_eq!((spec.max_batch_tokens, spec.on_existing), (16 << 10, OnExisting::ResumeIfOurs));
        assert!(matches!(spec.prompt, PromptSpec::Column(column) if column == "text"), "as without the flag");
        let CommandSpec::Classify(options) = spec.command else { panic!("another command") };
        assert_eq!((options.top_k, options.threshold), (Some(crate::heads::TopK::N(3)), 0.5));
        assert!(job(TICKETS, &[]).unwrap().spec.output.ends_with("out-2026-01-01"));
        let overwrite = format!("{TICKETS}overwrite = true");
        assert_eq!(job(&overwrite, &[]).unwrap().spec.on_existing, OnExisting::Overwrite);
    }

    #[test]
    fn names_addresses_and_absolute_paths_stay_as_they_are() {
        let text = |model: &str, input: &str| {
            format!("command = \"embed\"\nmodel = \"{model}\"\ninput = [\"{input}\"]\noutput = \"/tmp/x\"\nkeep = []")
        };
        let spec = job(&text("org/name@main", "s3://bucket/*.parquet"), &[]).unwrap().spec;
        assert_eq!((&spec.model[..], &spec.inputs[0][..]), ("org/name@main", "s3://bucket/*.parquet"));
        assert_eq!(spec.keep, Some(Vec::new()), "an empty list is not a missing one");
        assert_eq!(job(&text("./m", "*.csv"), &[]).unwrap().spec.inputs[0], "/srv/jobs [[]1[]]/*.csv");
    }

    #[test]
    fn what_is_wrong_is_told_with_line_and_key() {
        let with = |line: &str| format!("{TICKETS}{line}\n");
        assert_eq!(
            refused(&with("max_lenght = 5")),
            "line 7: classify has no key 'max_lenght'; did you mean 'max_length'?"
        );
        assert_eq!(refused(&with("model_id = 'x'")), "line 7: classify has no key 'model_id'; did you mean 'model'?");
        assert_eq!(
            refused(&with("temperature = 1.0")).split(';').next().unwrap(),
            "line 7: classify has no key 'temperature'"
        );
        assert!(refused(&with("max_length = 0")).starts_with("line 7: max_length: '0' does not fit: "));
        assert!(refused(&with("max_length = 1.5")).contains("max_length: '1.5'"));
        assert!(refused(&with("overflow = 'chunks'")).contains("did you mean 'chunk'?"));
        assert!(
            refused(&with("unit_rows = true")).contains("unit_rows: expected a number or a text, found true or false")
        );
        assert!(refused(&with("text_column = 5")).contains("text_column: expected a text in quotes, found a number"));
        assert!(refused(&with("limit = [1, 2]")).contains("limit: expected a number or a text, found a list"));
        assert!(refused(&with("quiet = 1")).contains("quiet: expected true or false"));
        assert!(refused(&with("prefix = 2026-01-01")).contains("write it in quotes"));
        let both = refused(&with("prompt_template = '{a}'\nchat_column = 'b'"));
        assert!(both.contains("chat_column") && both.contains("prompt_template"), "{both}");
        assert!(refused(&with("top_k = 'all'")).starts_with("line 7: duplicate key"));
        assert!(refused(&with("a = = 1")).starts_with("line 7: "));
        assert_eq!(refused("model = 'x'"), "the key 'command' is missing; say which command to run");
        assert_eq!(refused("command = 'embed'\nmodel = 'x'\noutput = 'y'"), "the key 'input' is missing");
        assert!(
            refused("command = 'inspect'").contains("line 1: command: no command 'inspect' for a job; choose one of")
        );
        assert!(
            refused(&with("prefix = '${nowhere_to_be_found}'"))
                .contains("line 7: prefix: variable 'nowhere_to_be_found'")
        );
    }

    #[test]
    fn a_wrong_file_still_says_where_its_report_goes() {
        let file = |text: &str| JobFile::parse(Path::new("jobs/a.toml"), "/srv/jobs".into(), text).unwrap();
        let report =
            |text: &str| file(text).messages(&Variables::new(BTreeMap::from([("day".into(), "1".into())]))).report;
        assert_eq!(report("comand = 'x'\nreport = '../r-${day}.json'"), Some("/srv/r-1.json".into()));
        assert_eq!(report("report = '${nowhere_to_be_found}'"), None);
        assert_eq!(report("report = 5"), None);
    }

    #[test]
    fn variables_give_numbers_and_switches_too() {
        let text = format!("{TICKETS}limit = '${{n}}'\nquiet = '${{quiet:-true}}'\n");
        let job = job(&text, &[("n", "7")]).unwrap();
        assert_eq!((job.spec.limit, job.messages.quiet), (Some(7), true));
    }

    #[test]
    fn a_variable_that_is_set_in_vain_is_told() {
        let error = job(TICKETS, &[("dat", "x")]).unwrap_err();
        assert_eq!(error.exit_code(), crate::ExitCode::Usage);
        assert!(error.to_string().contains("did you mean 'date'?"), "{error}");
    }
}
