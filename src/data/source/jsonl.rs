//! JSON Lines: one object per line; blank lines are no rows.
//!
//! One pass over a file checks every line, records where every [`OFFSET_ROWS`]th row starts and joins
//! the shapes of the values: integers with floats make floats, other scalars that differ make text (the
//! decoder writes numbers and booleans as text), what is always null is text. Lists and objects join
//! with their like only.

use std::collections::HashMap;
use std::fmt;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::json::ReaderBuilder;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::decode::{Batches, Columns, Layout, OFFSET_ROWS, Survey, corrupt_at, guarded};
use crate::data::store::StoredFile;
use crate::error::{Error, Result};

const BUFFER_BYTES: usize = 1 << 20;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// What the values of a column, or of a member of one, have in common.
#[derive(Debug, Clone, Default)]
pub(crate) enum Shape {
    #[default]
    Null,
    Boolean,
    Integer,
    Float,
    Text,
    List(Box<Shape>),
    Object(Members),
}

/// The members of an object in the order in which they were first seen.
#[derive(Debug, Clone, Default)]
pub(crate) struct Members {
    places: HashMap<String, usize>,
    shapes: Vec<(String, Shape)>,
}

/// Two values that no type holds: the path of names to them, and what they are.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub column: String,
    pub first: &'static str,
    pub second: &'static str,
}

impl Conflict {
    fn below(mut self, name: &str) -> Conflict {
        self.column = if self.column.is_empty() { name.to_owned() } else { format!("{name}.{}", self.column) };
        self
    }
}

impl Shape {
    fn name(&self) -> &'static str {
        match self {
            Shape::Null => "null",
            Shape::Boolean => "a boolean",
            Shape::Integer | Shape::Float => "a number",
            Shape::Text => "a string",
            Shape::List(_) => "a list",
            Shape::Object(_) => "an object",
        }
    }

    /// Widens this shape so that it holds `other` too.
    fn join(&mut self, other: Shape) -> Result<(), Conflict> {
        *self = match (std::mem::take(self), other) {
            (shape, Shape::Null) | (Shape::Null, shape) => shape,
            (Shape::List(mut items), Shape::List(others)) => {
                items.join(*others)?;
                Shape::List(items)
            }
            (Shape::Object(mut members), Shape::Object(others)) => {
                members.join(others)?;
                Shape::Object(members)
            }
            (first @ (Shape::List(_) | Shape::Object(_)), second)
            | (first, second @ (Shape::List(_) | Shape::Object(_))) => {
                return Err(Conflict { column: String::new(), first: first.name(), second: second.name() });
            }
            (Shape::Boolean, Shape::Boolean) => Shape::Boolean,
            (Shape::Integer, Shape::Integer) => Shape::Integer,
            (Shape::Integer | Shape::Float, Shape::Integer | Shape::Float) => Shape::Float,
            _ => Shape::Text,
        };
        Ok(())
    }

    fn data_type(&self) -> DataType {
        match self {
            Shape::Null | Shape::Text => DataType::Utf8,
            Shape::Boolean => DataType::Boolean,
            Shape::Integer => DataType::Int64,
            Shape::Float => DataType::Float64,
            Shape::List(items) => DataType::List(Arc::new(Field::new("item", items.data_type(), true))),
            Shape::Object(members) => DataType::Struct(members.fields(&[]).into()),
        }
    }
}

impl Members {
    fn member(&mut self, name: &str) -> &mut Shape {
        let place = match self.places.get(name) {
            Some(&place) => place,
            None => {
                self.places.insert(name.to_owned(), self.shapes.len());
                self.shapes.push((name.to_owned(), Shape::Null));
                self.shapes.len() - 1
            }
        };
        &mut self.shapes[place].1
    }

    /// Widens these members so that they hold `other`'s too.
    ///
    /// # Errors
    ///
    /// The first [`Conflict`]; these members are then of no more use.
    pub fn join(&mut self, other: Members) -> Result<(), Conflict> {
        for (name, shape) in other.shapes {
            self.member(&name).join(shape).map_err(|conflict| conflict.below(&name))?;
        }
        Ok(())
    }

    /// The members as nullable columns; scalars among `text_columns` are text.
    pub fn fields(&self, text_columns: &[String]) -> Vec<Field> {
        let data_type = |name: &String, shape: &Shape| match shape {
            Shape::Boolean | Shape::Integer | Shape::Float if text_columns.contains(name) => DataType::Utf8,
            shape => shape.data_type(),
        };
        self.shapes.iter().map(|(name, shape)| Field::new(name, data_type(name, shape), true)).collect()
    }
}

/// Reads one JSON value into a shape, without building it.
struct Observe<'a> {
    shape: &'a mut Shape,
    /// The first conflict in the line, if any: parsing goes on, so that a syntax error comes first.
    conflict: &'a mut Option<Conflict>,
}

impl Observe<'_> {
    fn admit<E>(self, shape: Shape) -> Result<(), E> {
        if let Err(conflict) = self.shape.join(shape) {
            self.conflict.get_or_insert(conflict);
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Observe<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Observe<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        self.admit(Shape::Boolean)
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        self.admit(Shape::Integer)
    }

    fn visit_u64<E>(self, number: u64) -> Result<(), E> {
        self.admit(if i64::try_from(number).is_ok() { Shape::Integer } else { Shape::Float })
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        self.admit(Shape::Float)
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        self.admit(Shape::Text)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        if let Shape::Null = self.shape {
            *self.shape = Shape::List(Box::default());
        }
        let Shape::List(shape) = self.shape else {
            while items.next_element::<IgnoredAny>()?.is_some() {}
            return self.admit(Shape::List(Box::default()));
        };
        while items.next_element_seed(Observe { shape, conflict: self.conflict })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if let Shape::Null = self.shape {
            *self.shape = Shape::Object(Members::default());
        }
        let Shape::Object(members) = self.shape else {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return self.admit(Shape::Object(Members::default()));
        };
        while let Some(name) = map.next_key::<String>()? {
            let mut below = None;
            map.next_value_seed(Observe { shape: members.member(&name), conflict: &mut below })?;
            if let Some(conflict) = below {
                self.conflict.get_or_insert(conflict.below(&name));
            }
        }
        Ok(())
    }
}

/// Reads the whole file once.
///
/// # Errors
///
/// [`Error::InputCorrupt`] with the line for what is not an object or does not fit the lines before it,
/// [`Error::Io`] where the file cannot be read.
pub(crate) fn survey(stored: &StoredFile) -> Result<Survey> {
    let path = stored.path();
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, stored.open()?);
    let mut root = Shape::Object(Members::default());
    let mut offsets = Vec::new();
    let (mut rows, mut line_number, mut byte) = (0u64, 0u64, 0u64);
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = reader.read_until(b'\n', &mut line).map_err(Error::io("read", path))?;
        if length == 0 {
            break;
        }
        line_number += 1;
        let mark = if byte == 0 && line.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
        let start = byte + mark as u64;
        byte += length as u64;
        // Exactly the bytes that the decoder takes for white space.
        if line[mark..].iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n')) {
            continue;
        }
        let place = || format!(", line {line_number}");
        observe(&mut root, &line[mark..]).map_err(|message| corrupt_at(path, place(), message))?;
        if rows.is_multiple_of(OFFSET_ROWS) {
            offsets.push(start);
        }
        rows += 1;
    }
    let members = if let Shape::Object(members) = root { members } else { Members::default() };
    let bytes_per_row = stored.size_bytes().checked_div(rows).unwrap_or(0);
    Ok(Survey { rows, bytes_per_row, layout: Layout::Lines { offsets }, columns: Columns::Jsonl(members) })
}

fn observe(root: &mut Shape, line: &[u8]) -> Result<(), String> {
    let mut conflict = None;
    let mut deserializer = serde_json::Deserializer::from_slice(line);
    let parsed = Observe { shape: root, conflict: &mut conflict }.deserialize(&mut deserializer);
    parsed.and_then(|()| deserializer.end()).map_err(|error| {
        // "… at line 1 column 7": the line is ours to say.
        let message = error.to_string();
        let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
        format!("not JSON ({message} at column {})", error.column())
    })?;
    match conflict {
        None => Ok(()),
        Some(Conflict { column, second, .. }) if column.is_empty() => Err(format!("{second}, not an object")),
        Some(Conflict { column, first, second }) => {
            Err(format!("'{column}' is {second}, but {first} in the lines before"))
        }
    }
}

/// Decodes from the nearest recorded row at or before `first_row`; the second value is that row.
///
/// # Errors
///
/// [`Error::InputCorrupt`], [`Error::Io`].
pub(crate) fn open(
    stored: &StoredFile,
    offsets: &[u64],
    schema: &SchemaRef,
    columns: &[&str],
    batch_rows: usize,
    first_row: u64,
) -> Result<(Batches, u64)> {
    let path = stored.path();
    let mut file = stored.open()?;
    let fields = schema.fields().iter().filter(|field| columns.contains(&field.name().as_str()));
    let schema = Arc::new(Schema::new(fields.cloned().collect::<Vec<_>>()));
    let recorded = (first_row / OFFSET_ROWS).min(offsets.len().saturating_sub(1) as u64);
    let offset = offsets.get(recorded as usize).copied().unwrap_or(0);
    guarded(path, String::new, || {
        file.seek(SeekFrom::Start(offset))?;
        let reader = ReaderBuilder::new(schema)
            .with_coerce_primitive(true)
            .with_batch_size(batch_rows)
            .build(BufReader::with_capacity(BUFFER_BYTES, file))?;
        Ok::<_, ArrowError>((Box::new(reader) as Batches, recorded * OFFSET_ROWS))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(lines: &[&str]) -> Result<Vec<Field>, String> {
        let mut root = Shape::Object(Members::default());
        for line in lines {
            observe(&mut root, line.as_bytes())?;
        }
        match root {
            Shape::Object(members) => Ok(members.fields(&["forced".to_owned()])),
            _ => unreachable!(),
        }
    }

    #[test]
    fn shapes_join_over_lines_in_the_order_seen() {
        let fields = fields(&[
            r#"{"z": 1, "a": null, "n": null, "mixed": 1, "forced": 5}"#,
            r#"{"z": 2.5, "a": [], "mixed": true, "o": {"x": 1}}"#,
            r#"{"a": [null, 18446744073709551615], "mixed": "t", "o": {"y": [["s"]]}}"#,
        ])
        .unwrap();
        let list = |items| DataType::List(Arc::new(Field::new("item", items, true)));
        let object = vec![Field::new("x", DataType::Int64, true), Field::new("y", list(list(DataType::Utf8)), true)];
        let expected = [
            ("z", DataType::Float64),
            ("a", list(DataType::Float64)),
            ("n", DataType::Utf8),
            ("mixed", DataType::Utf8),
            ("forced", DataType::Utf8),
            ("o", DataType::Struct(object.into())),
        ];
        assert_eq!(fields, expected.map(|(name, data_type)| Field::new(name, data_type, true)));
    }

    #[test]
    fn what_no_type_holds_is_named() {
        let conflict = fields(&[r#"{"a": {"b": [1]}}"#, r#"{"a": {"b": [{"c": 2}]}}"#]).unwrap_err();
        assert_eq!(conflict, "'a.b' is an object, but a number in the lines before");
        assert_eq!(fields(&["[1]"]).unwrap_err(), "a list, not an object");
        assert_eq!(fields(&["1"]).unwrap_err(), "a number, not an object");
        let syntax = fields(&[r#"{"a": }"#]).unwrap_err();
        assert!(syntax.contains("column 7") && !syntax.contains("line"), "{syntax}");
        assert!(fields(&["{} {}"]).unwrap_err().contains("trailing"));
        assert!(fields(&[&"[".repeat(100_000)]).is_err());
    }
}
