//! Chats become prompts through the checkpoint's chat template, as transformers renders it.
//!
//! A template is a program that came with a checkpoint, so it runs with limits: [`MAX_STEPS`] instructions, a recursion
//! limit, and no way to load other templates. What goes wrong in it is its row's failure.

mod python;

use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Fields};
use arrow::json::writer::{EncoderOptions, make_encoder};
use minijinja::value::Value;
use minijinja::{Environment, Error as JinjaError, ErrorKind, escape_formatter};
use rayon::prelude::*;
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

use self::python::{call_method, is_sequence, strftime, to_str, tojson, trim};
use super::prompt::Prompt;
use crate::error::{Error, Result, one_line};

/// Instructions that a template may run for one chat: some thousands of messages, or about a second.
const MAX_STEPS: u64 = 5_000_000;
/// Nested blocks and calls in a template; its stack is that of one of our worker threads.
const MAX_RECURSION: usize = 200;
/// The template's name in its environment; its ending asks for no HTML escapes.
const NAME: &str = "chat";
/// Fields under which a message's reasoning is passed; the first is the one that templates read.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// One message of a chat: `role`, `content`, and what else the template reads.
pub type Message = serde_json::Map<String, Json>;

/// A checkpoint's chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and so on, where the tokenizer has them.
    special_tokens: Vec<(&'static str, String)>,
    sha256: String,
}

impl ChatTemplate {
    /// Compiles a template's source; `special_tokens` are variables in it.
    ///
    /// # Errors
    /// A message with the line of a syntax error.
    pub fn new(source: &str, special_tokens: Vec<(&'static str, String)>) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(MAX_STEPS));
        environment.set_recursion_limit(MAX_RECURSION);
        environment.set_unknown_method_callback(call_method);
        environment.set_formatter(|out, state, value| escape_formatter(out, state, &Value::from(to_str(value))));
        environment.add_filter("string", |value: &Value| to_str(value));
        environment.add_filter("tojson", tojson);
        environment.add_filter("trim", trim);
        environment.add_test("sequence", is_sequence);
        let now = chrono::Local::now();
        environment.add_function("strftime_now", move |format: &str| strftime(&now, format));
        environment.add_function("raise_exception", |message: &Value| {
            Err::<Value, _>(JinjaError::new(ErrorKind::InvalidOperation, to_str(message)))
        });
        environment.add_template_owned(NAME, prepare_source(source)).map_err(|error| describe(&error))?;
        Ok(Self { environment, special_tokens, sha256: format!("{:x}", Sha256::digest(source)) })
    }

    /// SHA-256 of the template's source.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Renders one chat; with `add_generation_prompt` the text ends where an answer begins.
    ///
    /// # Errors
    /// A message for the row's `error` column: the template refused the chat, failed, or did not end.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, String> {
        let messages: Vec<Cow<Message>> = messages.iter().map(alias_reasoning).collect();
        let variables = [
            ("messages", Value::from_serialize(&messages)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let tokens = self.special_tokens.iter().map(|(name, token)| (*name, Value::from(token.as_str())));
        let context: Value = variables.into_iter().chain(tokens).collect();
        // A panic in the template engine is this row's failure, not the run's.
        catch_unwind(AssertUnwindSafe(|| self.environment.get_template(NAME)?.render(context)))
            .map_err(|_| "the chat template made its engine panic".to_owned())?
            .map_err(|error: JinjaError| match error.kind() {
                ErrorKind::OutOfFuel => format!("the chat template did not end within {MAX_STEPS} steps"),
                _ => format!("the chat template failed: {}", describe(&error)),
            })
    }

    /// Whether a column of this type can hold chats: lists of structs with `role` and `content`, or their JSON as text.
    pub fn accepts(data_type: &DataType) -> bool {
        use DataType::{Dictionary, FixedSizeList, LargeList, LargeUtf8, List, Struct, Utf8, Utf8View};
        let is_message = |fields: &Fields| ["role", "content"].iter().all(|name| fields.find(name).is_some());
        match data_type {
            Utf8 | LargeUtf8 | Utf8View => true,
            Dictionary(_, values) => matches!(values.as_ref(), Utf8 | LargeUtf8 | Utf8View),
            List(item) | LargeList(item) | FixedSizeList(item, _) => {
                matches!(item.data_type(), Struct(fields) if is_message(fields))
            }
            _ => false,
        }
    }

    /// The rows' prompts, on all cores; `system` goes before chats that have no system message of their own.
    ///
    /// A prompt ends where an answer begins, unless the chat's last message is the assistant's.
    ///
    /// # Errors
    /// When the column is of a type that [`ChatTemplate::accepts`] does not.
    pub fn prompts(&self, column: &ArrayRef, system: Option<&str>) -> Result<Vec<Prompt<'static>>> {
        let prompt = |chat: &Option<Cow<str>>| match chat.as_deref().map(|chat| self.prompt(chat, system)) {
            None => Prompt::Null,
            Some(Ok(text)) => Prompt::Text { text: Cow::Owned(text), add_special_tokens: false },
            Some(Err(message)) => Prompt::Failed(message),
        };
        if column.data_type().is_nested() {
            let chats = json_texts(column)?;
            return Ok(chats.par_iter().map(prompt).collect());
        }
        let texts = cast(column, &DataType::Utf8)?;
        let chats: Vec<_> = texts.as_string::<i32>().iter().map(|text| text.map(Cow::Borrowed)).collect();
        Ok(chats.par_iter().map(prompt).collect())
    }

    fn prompt(&self, chat: &str, system: Option<&str>) -> Result<String, String> {
        let mut messages = parse_messages(chat)?;
        let role_is = |message: &Message, role: &str| message["role"] == role;
        if let Some(system) = system
            && !messages.iter().any(|message| role_is(message, "system"))
        {
            let entry = |name: &str, value: &str| (name.to_owned(), Json::from(value));
            messages.insert(0, Message::from_iter([entry("role", "system"), entry("content", system)]));
        }
        let answered = messages.last().is_some_and(|message| role_is(message, "assistant"));
        self.render(&messages, !answered)
    }
}

/// The messages of a JSON array of objects, each of which has a role.
///
/// # Errors
/// A message for the row's `error` column.
pub fn parse_messages(json: &str) -> Result<Vec<Message>, String> {
    let chat: Json = serde_json::from_str(json).map_err(|error| format!("the chat is not JSON: {error}"))?;
    let Json::Array(messages) = chat else {
        return Err("the chat is not a JSON array of messages".into());
    };
    let message = |(index, message)| match message {
        Json::Object(message) if message.get("role").is_some_and(Json::is_string) => Ok(message),
        Json::Object(_) => Err(format!("message {} of the chat has no role", index + 1)),
        _ => Err(format!("message {} of the chat is not an object with role and content", index + 1)),
    };
    messages.into_iter().enumerate().map(message).collect()
}

/// Each row of a nested column as JSON; fields that are null are there as null, as they are in Python.
fn json_texts(column: &ArrayRef) -> Result<Vec<Option<Cow<'static, str>>>> {
    let field = Field::new("chat", column.data_type().clone(), true).into();
    let options = EncoderOptions::default().with_explicit_nulls(true);
    let mut encoder = make_encoder(&field, column, &options)?;
    let mut text = |row| {
        if encoder.is_null(row) {
            return Ok(None);
        }
        let mut json = Vec::new();
        encoder.encode(row, &mut json);
        let json = String::from_utf8(json).map_err(|error| Error::Internal(one_line(error)))?;
        Ok(Some(Cow::Owned(json)))
    };
    (0..column.len()).map(&mut text).collect()
}

/// As transformers since 5: reasoning is found under each name that templates know.
fn alias_reasoning(message: &Message) -> Cow<'_, Message> {
    let field = |name: &&str| message.get(*name).filter(|reasoning| !reasoning.is_null());
    let Some(reasoning) = REASONING_FIELDS.iter().find_map(field) else { return Cow::Borrowed(message) };
    let mut aliased = message.clone();
    aliased.entry("thinking").or_insert_with(|| reasoning.clone());
    aliased.insert("reasoning_content".into(), reasoning.clone());
    Cow::Owned(aliased)
}

/// The source with line ends as Jinja reads them, and transformers' `generation` blocks as plain scopes.
///
/// Those blocks mark the assistant's part for training; they print what is in them.
fn prepare_source(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut prepared = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        prepared.push_str(before);
        rest = tag;
        let Some((inside, _)) = tag.split_once("%}") else { break };
        let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        if let Some(replacement) = match word {
            "generation" => Some("with"),
            "endgeneration" => Some("endwith"),
            _ => None,
        } {
            prepared.push_str(&inside.replace(word, replacement));
            rest = &tag[inside.len()..];
        }
    }
    prepared.push_str(rest);
    prepared
}

/// A template error in one line; what `raise_exception` said stands as it is.
fn describe(error: &JinjaError) -> String {
    let line = error.line().map_or(String::new(), |line| format!(" (line {line} of the template)"));
    match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) => one_line(detail) + &line,
        (kind, Some(detail)) => format!("{kind}: {}{line}", one_line(detail)),
        (kind, None) => format!("{kind}{line}"),
    }
}

#[cfg(test)]
mod tests;
