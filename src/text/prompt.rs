//! What a row asks the model, and `--prompt-template`: a text with columns in braces.

use std::borrow::Cow;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::{can_cast_types, cast};
use arrow::datatypes::DataType;

use crate::error::{Error, Result};

/// A row's prompt, before it is tokenized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt<'a> {
    /// The row has none, and gets no result.
    Null,
    /// What the model is to read.
    Text {
        text: Cow<'a, str>,
        /// Whether the tokenizer puts BOS before it; a chat template writes its own.
        add_special_tokens: bool,
    },
    /// It could not be made; the message is for the row's `error` column.
    Failed(String),
}

impl<'a> From<Option<&'a str>> for Prompt<'a> {
    fn from(text: Option<&'a str>) -> Self {
        match text {
            None => Self::Null,
            Some(text) => Self::Text { text: Cow::Borrowed(text), add_special_tokens: true },
        }
    }
}

/// A text with columns in braces: `Subject: {subject}` and, for literal braces, `{{` and `}}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptTemplate {
    source: String,
    pieces: Vec<Piece>,
    /// The columns that it names, each once, in the order of their first use.
    columns: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Literal(String),
    /// A place in `columns`.
    Column(usize),
}

impl PromptTemplate {
    /// Parses a template.
    ///
    /// # Errors
    /// [`Error::Usage`] for a brace without its other half, an empty name, and a template without any column.
    pub fn parse(source: &str) -> Result<Self> {
        let usage = |message: String| Error::Usage(format!("--prompt-template: {message}"));
        let (mut pieces, mut columns) = (Vec::new(), Vec::<String>::new());
        let mut literal = String::new();
        let mut rest = source;
        while let Some(at) = rest.find(['{', '}']) {
            let (before, from_brace) = rest.split_at(at);
            let (brace, after) = from_brace.split_at(1);
            literal.push_str(before);
            if let Some(after) = after.strip_prefix(brace) {
                literal.push_str(brace);
                rest = after;
                continue;
            }
            let place = source.len() - from_brace.len();
            if brace == "}" {
                return Err(usage(format!(
                    "the '}}' at byte {place} closes nothing; a literal brace is written '}}}}'"
                )));
            }
            let end = after.find(['{', '}']).filter(|&end| after[end..].starts_with('}'));
            let Some(name) = end.map(|end| &after[..end]) else {
                return Err(usage(format!(
                    "the '{{' at byte {place} is not closed; a literal brace is written '{{{{'"
                )));
            };
            if name.is_empty() {
                return Err(usage(format!("the braces at byte {place} name no column")));
            }
            let column = columns.iter().position(|known| known == name).unwrap_or_else(|| {
                columns.push(name.to_owned());
                columns.len() - 1
            });
            pieces.push(Piece::Literal(std::mem::take(&mut literal)));
            pieces.push(Piece::Column(column));
            rest = &after[name.len() + 1..];
        }
        if columns.is_empty() {
            return Err(usage("it names no column, so that all rows would be the same; write {column}".into()));
        }
        literal.push_str(rest);
        pieces.push(Piece::Literal(literal));
        Ok(Self { source: source.to_owned(), pieces, columns })
    }

    /// The template as it was written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The columns that it names, each once.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(String::as_str)
    }

    /// Whether values of this type have one obvious text: text, numbers, booleans, dates and times.
    pub fn accepts(data_type: &DataType) -> bool {
        use DataType::{Binary, BinaryView, FixedSizeBinary, LargeBinary};
        match data_type {
            Binary | BinaryView | FixedSizeBinary(_) | LargeBinary => false,
            DataType::Dictionary(_, values) => Self::accepts(values),
            other => !other.is_nested() && can_cast_types(other, &DataType::Utf8),
        }
    }

    /// The rows' prompts, from the columns in the order of [`PromptTemplate::columns`].
    ///
    /// A row with a null in any of them is null.
    ///
    /// # Errors
    /// When a column is of a type that [`PromptTemplate::accepts`] does not.
    pub fn render(&self, columns: &[ArrayRef], rows: usize) -> Result<Vec<Prompt<'static>>> {
        let texts = columns.iter().map(|column| cast(column, &DataType::Utf8)).collect::<Result<Vec<_>, _>>()?;
        let texts: Vec<_> = texts.iter().map(|text| text.as_string::<i32>()).collect();
        let row_text = |row: usize| -> Option<String> {
            let piece = |piece| match piece {
                &Piece::Column(column) => texts[column].is_valid(row).then(|| texts[column].value(row)),
                Piece::Literal(text) => Some(text.as_str()),
            };
            self.pieces.iter().map(piece).collect()
        };
        let prompt = |row| match row_text(row) {
            None => Prompt::Null,
            Some(text) => Prompt::Text { text: Cow::Owned(text), add_special_tokens: true },
        };
        Ok((0..rows).map(prompt).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExitCode;
    use arrow::array::{
        BooleanArray, Date32Array, DictionaryArray, Float64Array, Int64Array, LargeStringArray, StringArray,
        StringViewArray, TimestampSecondArray,
    };
    use arrow::datatypes::{Field, Int8Type};
    use std::sync::Arc;

    fn render(template: &str, columns: Vec<ArrayRef>) -> Vec<Option<String>> {
        let template = PromptTemplate::parse(template).unwrap();
        assert_eq!(template.columns().count(), columns.len());
        assert!(columns.iter().all(|column| PromptTemplate::accepts(column.data_type())));
        let prompts = template.render(&columns, columns[0].len()).unwrap();
        let text = |prompt| match prompt {
            Prompt::Null => None,
            Prompt::Text { text, add_special_tokens: true } => Some(text.into_owned()),
            other => panic!("{other:?}"),
        };
        prompts.into_iter().map(text).collect()
    }

    #[test]
    fn braces_name_columns_and_doubled_braces_are_braces() {
        let text = || Arc::new(StringArray::from(vec!["{b} ü", "x"])) as ArrayRef;
        let other = || Arc::new(StringArray::from(vec!["1", "2"])) as ArrayRef;
        let rendered = render("{{{a}}} {{a}} é{b}{a}{{", vec![text(), other()]);
        assert_eq!(rendered, [Some("{{b} ü} {a} é1{b} ü{".into()), Some("{x} {a} é2x{".into())]);
        assert_eq!(render("Query: {a}\n", vec![text()])[1].as_deref(), Some("Query: x\n"));
        assert_eq!(render("{my column é}", vec![other()])[0].as_deref(), Some("1"));
    }

    #[test]
    fn a_null_in_any_column_makes_a_null_prompt() {
        let a = Arc::new(StringArray::from(vec![Some("x"), None, Some("y")])) as ArrayRef;
        let b = Arc::new(Int64Array::from(vec![Some(1), Some(2), None])) as ArrayRef;
        assert_eq!(render("{a}{b}", vec![a, b]), [Some("x1".into()), None, None]);
    }

    #[test]
    fn values_read_as_arrow_displays_them() {
        let one = |column: ArrayRef| render("<{a}>", vec![column]).remove(0).unwrap();
        assert_eq!(one(Arc::new(Int64Array::from(vec![-7]))), "<-7>");
        assert_eq!(one(Arc::new(Float64Array::from(vec![1.5]))), "<1.5>");
        assert_eq!(one(Arc::new(BooleanArray::from(vec![true]))), "<true>");
        assert_eq!(one(Arc::new(Date32Array::from(vec![19_723]))), "<2024-01-01>");
        assert_eq!(one(Arc::new(TimestampSecondArray::from(vec![0]))), "<1970-01-01T00:00:00>");
        assert_eq!(one(Arc::new(LargeStringArray::from(vec!["é"]))), "<é>");
        assert_eq!(
            one(Arc::new(StringViewArray::from(vec!["long enough for a buffer"]))),
            "<long enough for a buffer>"
        );
        let words: DictionaryArray<Int8Type> = ["word"].into_iter().collect();
        assert_eq!(one(Arc::new(words)), "<word>");
    }

    #[test]
    fn nested_and_binary_columns_have_no_obvious_text() {
        let item = Arc::new(Field::new_list_field(DataType::Utf8, true));
        assert!(!PromptTemplate::accepts(&DataType::List(item.clone())));
        assert!(!PromptTemplate::accepts(&DataType::Struct(vec![item].into())));
        assert!(!PromptTemplate::accepts(&DataType::Binary));
    }

    #[test]
    fn mistakes_in_a_template_are_usage_errors_that_name_the_place() {
        for (template, says) in [
            ("Subject: {a", "'{' at byte 9 is not closed"),
            ("{a{b}}", "'{' at byte 0 is not closed"),
            ("{a}}", "'}' at byte 3 closes nothing"),
            ("} {a}", "'}' at byte 0 closes nothing"),
            ("{a} {}", "at byte 4 name no column"),
            ("no column, {{a}}", "names no column"),
        ] {
            let error = PromptTemplate::parse(template).unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::Usage);
            assert!(error.to_string().contains(says), "{template}: {error}");
        }
    }
}
