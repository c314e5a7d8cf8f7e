//! What chat templates expect of Python, where minijinja differs from it.

use std::fmt::Write as _;

use chrono::{DateTime, Local};
use minijinja::value::{Kwargs, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;
use serde_json::Value as Json;

/// A value as Python's `str()` gives it: lists and dicts with the `repr()` of their members.
pub fn to_str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map => repr(value),
        _ => value.to_string(),
    }
}

/// A value as Python's `repr()` gives it.
fn repr(value: &Value) -> String {
    let members = || value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::String => repr_of_text(value.as_str().unwrap_or_default()),
        ValueKind::Seq => format!("[{}]", members().map(|member| repr(&member)).collect::<Vec<_>>().join(", ")),
        ValueKind::Map => {
            let member = |key: Value| format!("{}: {}", repr(&key), repr(&value.get_item(&key).unwrap_or_default()));
            format!("{{{}}}", members().map(member).collect::<Vec<_>>().join(", "))
        }
        _ => value.to_string(),
    }
}

fn repr_of_text(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for symbol in text.chars() {
        match symbol {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            _ if symbol == quote => out.extend(['\\', quote]),
            _ if is_printable(symbol) => out.push(symbol),
            _ => {
                let code = u32::from(symbol);
                // A String takes all that is written.
                let _ = match code {
                    0..=0xff => write!(out, "\\x{code:02x}"),
                    0x100..=0xffff => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
    out
}

/// Whether `repr()` shows the character itself: no control, separator or invisible format character.
fn is_printable(symbol: char) -> bool {
    let is_format = matches!(symbol, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    symbol == ' ' || !(symbol.is_control() || symbol.is_whitespace() || is_format)
}

/// The lines of a text as `str.splitlines()` cuts it, which knows more ends than `\n` and `\r\n`.
fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let is_end = |symbol: char| matches!(symbol, '\n'..='\r' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        let end = &rest[at..];
        let length = if end.starts_with("\r\n") { 2 } else { end.chars().next().map_or(0, char::len_utf8) };
        lines.push(&rest[..if keep_ends { at + length } else { at }]);
        rest = &end[length..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// Whether Python's `str.strip()` takes the character away: four separators that Unicode does not count as white space.
fn is_space(symbol: char) -> bool {
    symbol.is_whitespace() || matches!(symbol, '\x1c'..='\x1f')
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Left,
    Right,
    Both,
}

fn strip<'a>(text: &'a str, characters: Option<&str>, side: Side) -> &'a str {
    let stripped = |symbol: char| characters.map_or_else(|| is_space(symbol), |set| set.contains(symbol));
    let text = if side == Side::Right { text } else { text.trim_start_matches(stripped) };
    if side == Side::Left { text } else { text.trim_end_matches(stripped) }
}

/// The filter `trim`.
pub fn trim(value: &Value, characters: Option<&str>) -> String {
    strip(&to_str(value), characters, Side::Both).to_owned()
}

/// The test `sequence`: what has a length and can be indexed, texts and dicts among it.
pub fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
}

/// The methods of Python's types; most are minijinja-contrib's.
///
/// Its `find` counts bytes, its `count` of the empty text does not end, and its `strip` and `splitlines` know fewer
/// characters than Python's.
///
/// # Errors
/// When there is no such method, or it does not take these arguments.
pub fn call_method(state: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, method, args);
    };
    let index = |place: Option<usize>| place.map_or(-1, |place| text[..place].chars().count() as i64);
    match method {
        "strip" | "lstrip" | "rstrip" => {
            let side = match method {
                "lstrip" => Side::Left,
                "rstrip" => Side::Right,
                _ => Side::Both,
            };
            let (characters,): (Option<&str>,) = from_args(args)?;
            Ok(strip(text, characters, side).into())
        }
        "find" => from_args(args).map(|(part,): (&str,)| index(text.find(part)).into()),
        "rfind" => from_args(args).map(|(part,): (&str,)| index(text.rfind(part)).into()),
        "count" => from_args(args).map(|(part,): (&str,)| text.matches(part).count().into()),
        "splitlines" => {
            let (keep_ends,): (Option<bool>,) = from_args(args)?;
            Ok(split_lines(text, keep_ends.unwrap_or(false)).into_iter().map(Value::from).collect())
        }
        "removeprefix" => from_args(args).map(|(part,): (&str,)| text.strip_prefix(part).unwrap_or(text).into()),
        "removesuffix" => from_args(args).map(|(part,): (&str,)| text.strip_suffix(part).unwrap_or(text).into()),
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// The global `strftime_now`, with the time at which the run began: all rows of a run see the same.
///
/// # Errors
/// When the format is none that `strftime` knows.
pub fn strftime(now: &DateTime<Local>, format: &str) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", now.format(format))
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know '{format}'")))?;
    Ok(text)
}

/// The filter `tojson` as transformers defines it: Python's `json.dumps`, which escapes nothing for HTML.
///
/// # Errors
/// When an argument is of another type than in Python, or there is no such argument.
pub fn tojson(value: Value, ensure_ascii: Option<bool>, kwargs: Kwargs) -> Result<String, Error> {
    let ensure_ascii = ensure_ascii.or(kwargs.get("ensure_ascii")?).unwrap_or(false);
    let indent: Option<Value> = kwargs.get("indent")?;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(indent)?.min(MAX_INDENT)),
        }),
    };
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    let (item_separator, key_separator) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }, ": "),
        Some([item, key]) => (&item[..], &key[..]),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson takes two separators")),
    };
    let json = serde_json::to_value(&value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, format!("tojson: {error}")))?;
    let style =
        JsonStyle { ensure_ascii, indent, item_separator, key_separator, sort_keys: sort_keys.unwrap_or(false) };
    let mut out = String::new();
    style.write(&json, 0, &mut out);
    Ok(out)
}

/// Spaces of a level; more would only fill memory.
const MAX_INDENT: usize = 64;

/// How `json.dumps` was asked to print.
struct JsonStyle<'a> {
    ensure_ascii: bool,
    /// What a level is indented by; everything on one line when `None`.
    indent: Option<String>,
    item_separator: &'a str,
    key_separator: &'a str,
    sort_keys: bool,
}

impl JsonStyle<'_> {
    fn write(&self, json: &Json, level: usize, out: &mut String) {
        match json {
            Json::String(text) => self.write_text(text, out),
            Json::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
                Some(number) => out.push_str(&float(number)),
                None => out.push_str(&number.to_string()),
            },
            Json::Array(items) if !items.is_empty() => {
                out.push('[');
                for (place, item) in items.iter().enumerate() {
                    self.separate(place, level + 1, out);
                    self.write(item, level + 1, out);
                }
                self.break_line(level, out);
                out.push(']');
            }
            Json::Object(members) if !members.is_empty() => {
                let mut members: Vec<_> = members.iter().collect();
                if self.sort_keys {
                    members.sort_by_key(|(key, _)| *key);
                }
                out.push('{');
                for (place, (key, value)) in members.into_iter().enumerate() {
                    self.separate(place, level + 1, out);
                    self.write_text(key, out);
                    out.push_str(self.key_separator);
                    self.write(value, level + 1, out);
                }
                self.break_line(level, out);
                out.push('}');
            }
            // Null, booleans, and empty lists and objects, in which Python and serde_json agree.
            other => out.push_str(&other.to_string()),
        }
    }

    fn separate(&self, place: usize, level: usize, out: &mut String) {
        if place > 0 {
            out.push_str(self.item_separator);
        }
        self.break_line(level, out);
    }

    fn break_line(&self, level: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), level));
        }
    }

    fn write_text(&self, text: &str, out: &mut String) {
        let quoted = Json::from(text).to_string();
        if !self.ensure_ascii {
            out.push_str(&quoted);
            return;
        }
        for symbol in quoted.chars() {
            if matches!(symbol, ' '..='~') {
                out.push(symbol);
                continue;
            }
            for unit in symbol.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}"); // a String takes all that is written
            }
        }
    }
}

/// A float as Python's `repr()` gives it: as Rust's, but exponents have a sign and two digits.
fn float(number: f64) -> String {
    let text = format!("{number:?}");
    match text.split_once('e') {
        None => text,
        Some((mantissa, exponent)) => {
            let (sign, digits) = exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
            format!("{mantissa}e{sign}{digits:0>2}")
        }
    }
}
