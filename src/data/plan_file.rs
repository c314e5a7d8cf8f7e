//! The plan that an output keeps as `_plan.json`, and the mark of success that is written last.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::commit::{Published, TempFile, nonce};
use super::store::Location;
use crate::error::{Error, Result};

/// The plan's name in the directory of parts.
pub const PLAN_NAME: &str = "_plan.json";
/// The name of the mark that a directory of parts is complete.
pub const SUCCESS_NAME: &str = "_SUCCESS.json";

/// What a run set out to do: made once, kept with the output, compared by every later run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanFile {
    /// The program's version.
    pub version: String,
    /// [`fingerprint`] of `settings`.
    pub fingerprint: String,
    /// What determines results: command, settings, output schema, the checkpoint's content.
    pub settings: Value,
    /// What may differ when the job is resumed, as `max_batch_tokens`.
    pub notes: Value,
    /// An array with one stamp for each input file, in order; its `path` names the file in messages.
    pub inputs: Value,
    /// Rows in a unit.
    pub unit_rows: u64,
    /// Number of units.
    pub units: u64,
    /// Rows of all units, before any `--where`.
    pub rows: u64,
}

/// How a plan stands to another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Comparison {
    /// The same settings over the same inputs.
    Same,
    /// The same settings over inputs that are not the ones of then.
    InputsChanged {
        /// The input that differs, or the output where the stamps have no path.
        path: Option<String>,
        /// What differs.
        difference: String,
    },
    /// Another job.
    Another {
        /// The first setting that differs.
        difference: String,
    },
}

impl PlanFile {
    /// A plan of this version of the program; the fingerprint is computed here.
    pub fn new(settings: Value, notes: Value, inputs: Value, unit_rows: u64, units: u64, rows: u64) -> Self {
        let fingerprint = fingerprint(&settings);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self { version, fingerprint, settings, notes, inputs, unit_rows, units, rows }
    }

    /// Hex SHA-256 of what decides which rows a unit holds: the inputs and the unit rule.
    ///
    /// Parts carry it beside the fingerprint, so that a part of the same job over other inputs is never taken for ours.
    pub fn rows_digest(&self) -> String {
        fingerprint(&serde_json::json!([self.inputs, self.unit_rows, self.units, self.rows]))
    }

    /// Compares this plan with the one that an output holds.
    pub fn compare(&self, theirs: &PlanFile) -> Comparison {
        if self.fingerprint != theirs.fingerprint {
            return Comparison::Another { difference: first_difference(&self.settings, &theirs.settings) };
        }
        if canonical(&self.inputs) != canonical(&theirs.inputs) {
            let (path, difference) = input_difference(&self.inputs, &theirs.inputs);
            return Comparison::InputsChanged { path, difference };
        }
        for (name, ours, theirs) in [
            ("unit_rows", self.unit_rows, theirs.unit_rows),
            ("units", self.units, theirs.units),
            ("rows", self.rows, theirs.rows),
        ] {
            if ours != theirs {
                return Comparison::Another { difference: format!("{name}: {ours}, was {theirs}") };
            }
        }
        Comparison::Same
    }

    /// The first note that differs from the plan that is being resumed, as `max_batch_tokens: 8192, was 16384`.
    pub fn changed_note(&self, theirs: &PlanFile) -> Option<String> {
        (canonical(&self.notes) != canonical(&theirs.notes)).then(|| first_difference(&self.notes, &theirs.notes))
    }

    /// The plan as a reader of its JSON gets it, so that numbers compare equal with those of a stored plan.
    pub(super) fn as_stored(&self) -> Result<PlanFile> {
        to_json(self).and_then(|text| {
            serde_json::from_str(&text)
                .map_err(|error| Error::Internal(format!("the plan does not round-trip: {error}")))
        })
    }
}

/// The mark that an output is complete.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SuccessFile {
    /// The program's version.
    pub version: String,
    /// The plan's fingerprint.
    pub fingerprint: String,
    /// Rows in the output.
    pub rows: u64,
    /// Parts that the output was made of.
    pub parts: u64,
    /// What the run has to say about itself. Null in a single-file output: the same job gives the same file.
    pub summary: Value,
}

/// Hex SHA-256 of the canonical JSON of `settings`: keys sorted, no spaces.
pub fn fingerprint(settings: &Value) -> String {
    hex(&Sha256::digest(canonical(settings)))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// JSON with sorted keys and no spaces: equal values give equal text.
fn canonical(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(key, _)| *key);
            let entries: Vec<String> = entries
                .into_iter()
                .map(|(key, value)| format!("{}:{}", Value::from(key.as_str()), canonical(value)))
                .collect();
            format!("{{{}}}", entries.join(","))
        }
        Value::Array(values) => format!("[{}]", values.iter().map(canonical).collect::<Vec<_>>().join(",")),
        scalar => scalar.to_string(),
    }
}

/// The first key at which two JSON values differ, with both values in short: `settings.max_length: 128, was 256`.
///
/// Empty when they are equal.
pub fn first_difference(ours: &Value, theirs: &Value) -> String {
    difference_at(String::new(), Some(ours), Some(theirs)).unwrap_or_default()
}

fn difference_at(path: String, ours: Option<&Value>, theirs: Option<&Value>) -> Option<String> {
    match (ours, theirs) {
        (Some(Value::Object(ours)), Some(Value::Object(theirs))) => {
            let mut keys: Vec<&String> =
                ours.keys().chain(theirs.keys().filter(|key| !ours.contains_key(*key))).collect();
            keys.sort();
            keys.into_iter().find_map(|key| {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                difference_at(path, ours.get(key), theirs.get(key))
            })
        }
        (Some(Value::Array(ours)), Some(Value::Array(theirs))) => (0..ours.len().max(theirs.len()))
            .find_map(|index| difference_at(format!("{path}[{index}]"), ours.get(index), theirs.get(index))),
        (Some(ours), Some(theirs)) if canonical(ours) == canonical(theirs) => None,
        (ours, theirs) => {
            let key = if path.is_empty() { String::new() } else { format!("{path}: ") };
            Some(format!("{key}{}, was {}", in_short(ours), in_short(theirs)))
        }
    }
}

fn in_short(value: Option<&Value>) -> String {
    const LONGEST: usize = 60;
    let Some(value) = value else { return "not set".to_owned() };
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// The first input that differs: its path where its stamp has one, and how it differs.
fn input_difference(ours: &Value, theirs: &Value) -> (Option<String>, String) {
    let path_of = |stamp: &Value| stamp.get("path").and_then(Value::as_str).map(str::to_owned);
    let (Value::Array(ours), Value::Array(theirs)) = (ours, theirs) else {
        return (None, first_difference(ours, theirs));
    };
    for index in 0..ours.len().max(theirs.len()) {
        match (ours.get(index), theirs.get(index)) {
            (Some(our), Some(their)) if canonical(our) == canonical(their) => {}
            (Some(our), Some(their)) if path_of(our) == path_of(their) => {
                return (path_of(our), first_difference(our, their));
            }
            (Some(our), Some(their)) if theirs.len() == ours.len() => {
                return (path_of(our), format!("{} stood in its place", path_of(their).unwrap_or_default()));
            }
            (our, their) => {
                let path = our.or(their).and_then(path_of);
                return (path, format!("{} input file(s), were {}", ours.len(), theirs.len()));
            }
        }
    }
    (None, String::new())
}

pub(super) fn to_json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(|error| Error::Internal(format!("cannot write JSON: {error}")))
}

/// The key of a published JSON object that tells which attempt put it there.
const NONCE_KEY: &str = "nonce";

/// Publishes a JSON file in `dir` like a part: whole or not at all, never over another file.
///
/// In an object store it carries a nonce, so that a request of ours whose reply was lost is known by what is there.
pub(super) fn publish_json(dir: &Location, name: &str, value: &impl Serialize) -> Result<Published> {
    let place = dir.join(name);
    if !place.is_object() {
        return write_json_in(dir, name, value)?.publish(&place);
    }
    let mut json = serde_json::to_value(value).map_err(|error| Error::Internal(error.to_string()))?;
    let nonce = Value::from(nonce());
    if let Value::Object(keys) = &mut json {
        keys.insert(NONCE_KEY.to_owned(), nonce.clone());
    }
    let published = write_json_in(dir, name, &json)?.publish(&place)?;
    if published == Published::AlreadyThere
        && let Some(there) = read_json::<Value>(&place)?.ours()
        && there.get(NONCE_KEY) == Some(&nonce)
    {
        return Ok(Published::Now);
    }
    Ok(published)
}

/// Writes JSON into a temporary file that will stand in `dir`.
pub(super) fn write_json_in(dir: &Location, name: &str, value: &impl Serialize) -> Result<TempFile> {
    let mut temp = TempFile::create_in(dir, name)?;
    let text = to_json(value)? + "\n";
    temp.write_all(text.as_bytes()).map_err(Error::io("write", temp.path()))?;
    Ok(temp)
}

/// What a JSON file of ours holds.
#[derive(Debug)]
pub(super) enum JsonFile<T> {
    Missing,
    /// A file, but not one of ours.
    Foreign,
    Ours(T),
}

impl<T> JsonFile<T> {
    pub(super) fn ours(self) -> Option<T> {
        match self {
            Self::Ours(value) => Some(value),
            _ => None,
        }
    }
}

pub(super) fn read_json<T: DeserializeOwned>(place: &Location) -> Result<JsonFile<T>> {
    match place.read() {
        Ok(Some(bytes)) => Ok(serde_json::from_slice(&bytes).map_or(JsonFile::Foreign, JsonFile::Ours)),
        Ok(None) => Ok(JsonFile::Missing),
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::IsADirectory => Ok(JsonFile::Foreign),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_fingerprint_does_not_depend_on_the_order_of_keys() {
        let one = json!({"a": 1, "b": {"c": [1, 2], "d": "é\n"}});
        let other = json!({"b": {"d": "é\n", "c": [1, 2]}, "a": 1});
        assert_eq!(fingerprint(&one), fingerprint(&other));
        assert_ne!(fingerprint(&one), fingerprint(&json!({"a": 1, "b": {"c": [2, 1], "d": "é\n"}})));
        assert_eq!(fingerprint(&json!({})), hex(&Sha256::digest("{}")));
        assert_eq!(fingerprint(&one).len(), 64);
    }

    #[test]
    fn the_first_difference_is_named_with_both_values() {
        let theirs = json!({"command": "classify", "settings": {"max_length": 256, "stop": ["a", "b"]}});
        let with = |pointer: &str, value: Value| {
            let mut ours = theirs.clone();
            *ours.pointer_mut(pointer).unwrap() = value;
            first_difference(&ours, &theirs)
        };
        assert_eq!(with("/settings/max_length", json!(128)), "settings.max_length: 128, was 256");
        assert_eq!(with("/command", json!("tag")), r#"command: "tag", was "classify""#);
        assert_eq!(with("/settings/stop", json!(["a"])), r#"settings.stop[1]: not set, was "b""#);
        assert_eq!(with("/settings", json!({"max_length": 256})), r#"settings.stop: not set, was ["a","b"]"#);
        assert_eq!(first_difference(&theirs, &theirs), "");
        assert!(first_difference(&json!({"p": "é".repeat(500)}), &json!({"p": 1})).len() < 200);
    }

    #[test]
    fn plans_compare_by_settings_then_inputs_then_units() {
        let inputs = json!([{"path": "a.parquet", "size": 10}, {"path": "b.parquet", "size": 20}]);
        let plan = PlanFile::new(json!({"x": 0.1}), json!({"n": 1}), inputs, 4, 2, 8);
        assert_eq!(plan.as_stored().unwrap().compare(&plan), Comparison::Same);

        let mut other = plan.clone();
        other.notes = json!({"n": 2});
        assert_eq!(other.compare(&plan), Comparison::Same);
        assert_eq!(other.changed_note(&plan).unwrap(), "n: 2, was 1");

        other.inputs[1]["size"] = json!(21);
        let Comparison::InputsChanged { path, difference } = other.compare(&plan) else { panic!() };
        assert_eq!((path.as_deref(), difference.as_str()), (Some("b.parquet"), "size: 21, was 20"));
        other.inputs = json!([plan.inputs[0]]);
        let Comparison::InputsChanged { difference, .. } = other.compare(&plan) else { panic!() };
        assert_eq!(difference, "1 input file(s), were 2");

        let rule = PlanFile { unit_rows: 8, ..plan.clone() };
        assert_eq!(rule.compare(&plan), Comparison::Another { difference: "unit_rows: 8, was 4".to_owned() });
        assert_ne!(rule.rows_digest(), plan.rows_digest());
    }
}
