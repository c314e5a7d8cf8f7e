//! JSON Schemas of job files, and each command's output columns: made of the types that the program works with.

use std::collections::BTreeMap;

use arrow::datatypes::Field;
use clap::Arg;
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::job_file::{find_arg, keys};
use super::settings::{ClassifySettings, EmbedSettings, GenerateSettings, ScoreSettings, TagSettings, job_command};
use crate::engine::{common_fields, generate_fields};
use crate::heads::{ClassifyOptions, Embedding, Score, SequenceClassification, TaskKind, TokenClassification, TopK};

/// The generated files about jobs, by path below the folder of schemas.
pub fn files() -> BTreeMap<String, Value> {
    let mut files = BTreeMap::from([("job.schema.json".to_owned(), job_schema())]);
    for (command, schema) in output_schemas() {
        files.insert(format!("outputs/{command}.json"), schema);
    }
    files
}

/// The schema of a job file: one alternative a command.
pub fn job_schema() -> Value {
    let commands = [
        ("classify", properties::<ClassifySettings>()),
        ("embed", properties::<EmbedSettings>()),
        ("generate", properties::<GenerateSettings>()),
        ("score", properties::<ScoreSettings>()),
        ("tag", properties::<TagSettings>()),
    ];
    let parser = job_command();
    let alternatives: Vec<Value> = commands
        .into_iter()
        .filter_map(|(name, properties)| Some(command_schema(parser.find_subcommand(name)?, properties)))
        .collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mistral-batch job file",
        "description": "The settings of one command. ${name} and ${name:-default} in texts come from --set and the environment.",
        "type": "object",
        "oneOf": alternatives,
    })
}

/// The fields of `T` by key, as their types and doc comments describe them.
fn properties<T: JsonSchema>() -> Map<String, Value> {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let schema = SchemaGenerator::new(settings).into_root_schema_for::<T>();
    schema.get("properties").and_then(Value::as_object).cloned().unwrap_or_default()
}

/// A command's alternative: the fields' types, with what the flags' parser knows of defaults and of what is required.
fn command_schema(command: &clap::Command, types: Map<String, Value>) -> Value {
    let mut properties = Map::new();
    properties
        .insert("command".to_owned(), json!({ "const": command.get_name(), "description": "The command to run" }));
    let mut required = vec!["command".to_owned()];
    for key in keys(command) {
        let Some(mut schema) = types.get(&key).cloned() else { continue };
        if let Some(arg) = find_arg(command, &key) {
            if arg.is_required_set() {
                required.push(key.clone());
            }
            schema = for_toml(schema);
            if let (Some(default), Some(object)) = (default_of(arg, &schema), schema.as_object_mut()) {
                object.insert("default".to_owned(), default);
            }
        }
        properties.insert(key, with_variables(schema));
    }
    json!({
        "title": command.get_name(),
        "description": command.get_about().map(ToString::to_string),
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

fn default_of(arg: &Arg, schema: &Value) -> Option<Value> {
    let text = arg.get_default_values().first()?.to_str()?;
    let is_text = schema["type"] == "string" || schema["type"] == "array" || schema.get("oneOf").is_some();
    let value = if is_text { json!(text) } else { serde_json::from_str(text).unwrap_or_else(|_| json!(text)) };
    Some(if schema["type"] == "array" { json!([value]) } else { value })
}

/// The settings of all commands by key; where commands differ about one, any of their alternatives.
pub fn settings() -> Map<String, Value> {
    let mut settings: Map<String, Value> = Map::new();
    for alternative in job_schema()["oneOf"].as_array().into_iter().flatten() {
        for (key, schema) in alternative["properties"].as_object().into_iter().flatten() {
            match settings.get_mut(key) {
                None => drop(settings.insert(key.clone(), schema.clone())),
                Some(known) if known == schema => {}
                Some(known) => match known.get_mut("anyOf").and_then(Value::as_array_mut) {
                    Some(alternatives) if alternatives.iter().all(|other| other["description"].is_string()) => {
                        if !alternatives.contains(schema) {
                            alternatives.push(schema.clone());
                        }
                    }
                    _ => *known = json!({ "anyOf": [known.take(), schema] }),
                },
            }
        }
    }
    settings
}

/// A schema without nulls, which TOML has none of (a key that is not there is how a setting is left out), and without the
/// names of machine types, which mean nothing to an editor.
pub fn for_toml(schema: Value) -> Value {
    let mut object = match schema {
        Value::Object(object) => object,
        Value::Array(all) => return Value::Array(all.into_iter().map(for_toml).collect()),
        other => return other,
    };
    if object.get("format").is_some_and(Value::is_string) {
        object.remove("format");
    }
    if object.get("default").is_some_and(Value::is_null) {
        object.remove("default");
    }
    if let Some(Value::Array(types)) = object.get_mut("type") {
        types.retain(|name| name != "null");
        if let [only] = &types[..] {
            let only = only.clone();
            object.insert("type".to_owned(), only);
        }
    }
    if let Some(Value::Array(values)) = object.get_mut("enum") {
        values.retain(|value| !value.is_null());
    }
    if let Some(Value::Array(mut alternatives)) = object.remove("anyOf") {
        alternatives.retain(|alternative| alternative["type"] != "null");
        match &alternatives[..] {
            [Value::Object(only)] => {
                for (key, value) in only {
                    object.entry(key.clone()).or_insert_with(|| value.clone());
                }
            }
            _ => drop(object.insert("anyOf".to_owned(), Value::Array(alternatives))),
        }
    }
    Value::Object(object.into_iter().map(|(key, value)| (key, for_toml(value))).collect())
}

/// A setting's schema that also admits a text with a `${variable}`, and for a list its only value.
pub fn with_variables(schema: Value) -> Value {
    let Value::Object(mut object) = for_toml(schema) else { return Value::Null };
    let pattern = || json!("\\$\\{");
    let variable = json!({ "type": "string", "pattern": pattern() });
    // Each value of an enum may have a description, and is an alternative then.
    let alternatives = match object.remove("oneOf").or_else(|| object.remove("anyOf")) {
        Some(Value::Array(alternatives)) => Some(alternatives),
        _ => object.remove("enum").map(|values| {
            object.remove("type");
            vec![json!({ "enum": values })]
        }),
    };
    if let Some(mut alternatives) = alternatives {
        alternatives.push(variable);
        object.insert("anyOf".to_owned(), Value::Array(alternatives));
        return Value::Object(object);
    }
    match object.get("type").and_then(Value::as_str) {
        Some(name @ ("integer" | "number" | "boolean")) => {
            object.insert("type".to_owned(), json!([name, "string"]));
            object.insert("pattern".to_owned(), pattern());
        }
        Some("array") => {
            object.insert("type".to_owned(), json!(["array", "string"]));
            if let Some(items) = object.remove("items") {
                object.insert("items".to_owned(), with_variables(items));
            }
        }
        _ => {}
    }
    Value::Object(object)
}

/// The columns that each command appends, in order, by what shapes them.
fn output_schemas() -> Vec<(&'static str, Value)> {
    let plain = ClassifyOptions::default();
    let listed = ClassifyOptions { top_k: Some(TopK::All), ..ClassifyOptions::default() };
    let classify = |task, options| SequenceClassification::fields_of(task, options);
    vec![
        (
            "classify",
            outputs(&[
                ("a single-label checkpoint", classify(TaskKind::SingleLabel, &plain)),
                ("a single-label checkpoint with --top-k", classify(TaskKind::SingleLabel, &listed)),
                ("a multi-label checkpoint", classify(TaskKind::MultiLabel, &plain)),
                ("a multi-label checkpoint with --top-k", classify(TaskKind::MultiLabel, &listed)),
                ("a regression checkpoint", classify(TaskKind::Regression, &plain)),
            ]),
        ),
        (
            "embed",
            outputs(&[("a hidden size of 4096; the list is as long as the checkpoint's", Embedding::fields_of(4096))]),
        ),
        (
            "generate",
            outputs(&[
                ("one completion a row", generate_fields(1, false)),
                ("--n over 1", generate_fields(2, false)),
                ("--logprobs", generate_fields(1, true)),
            ]),
        ),
        ("score", outputs(&[("no flag", Score::fields_of(false)), ("--logprobs", Score::fields_of(true))])),
        ("tag", outputs(&[("every checkpoint", TokenClassification::fields_of())])),
    ]
}

fn outputs(variants: &[(&str, Vec<Field>)]) -> Value {
    let describe = |field: &Field| json!({ "name": field.name(), "type": field.data_type().to_string(), "nullable": field.is_nullable() });
    let variants: Vec<Value> = variants
        .iter()
        .map(|(when, fields)| {
            let fields: Vec<Value> = fields.iter().chain(&common_fields()).map(describe).collect();
            json!({ "when": when, "fields": fields })
        })
        .collect();
    json!({ "description": "Arrow columns appended to the input's", "variants": variants })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_setting_admits_a_variable_and_none_admits_null() {
        let fields = properties::<GenerateSettings>();
        let schema = |key: &str| with_variables(fields[key].clone());
        let variable = json!({ "type": "string", "pattern": "\\$\\{" });
        assert_eq!(schema("overflow")["anyOf"][0]["const"], "truncate-left");
        assert_eq!(schema("overflow")["anyOf"][4], variable);
        assert_eq!(schema("kv_cache_memory")["anyOf"][2], variable);
        assert_eq!(schema("max_length")["type"], json!(["integer", "string"]));
        assert_eq!((&schema("max_length")["minimum"], &schema("max_errors")["minimum"]), (&json!(1), &json!(0)));
        assert_eq!(schema("stop_token_ids")["items"]["type"], json!(["integer", "string"]));
        let text = job_schema().to_string();
        assert!(!text.contains("null") && !text.contains("\"format\":\"u"), "{text}");
    }

    #[test]
    fn flags_and_the_schema_have_the_same_keys() {
        let schema = job_schema();
        let alternatives = schema["oneOf"].as_array().unwrap();
        let parser = job_command();
        let commands: Vec<_> = parser.get_subcommands().collect();
        assert_eq!(alternatives.len(), commands.len());
        for command in commands {
            let alternative = alternatives.iter().find(|a| a["title"] == command.get_name()).unwrap();
            let described: BTreeSet<String> =
                alternative["properties"].as_object().unwrap().keys().filter(|k| *k != "command").cloned().collect();
            assert_eq!(described, keys(command).collect(), "{}", command.get_name());
            for (key, property) in alternative["properties"].as_object().unwrap() {
                assert!(property["description"].is_string(), "{key} has no description: {property}");
            }
        }
        let fields = properties::<ClassifySettings>();
        let classify = parser.find_subcommand("classify").unwrap();
        assert_eq!(
            fields.keys().cloned().collect::<BTreeSet<_>>(),
            keys(classify).collect(),
            "no field without a flag"
        );
    }
}
