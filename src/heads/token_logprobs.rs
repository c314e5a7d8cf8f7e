//! The `token_logprobs` column: how likely each token was.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Builder, ListBuilder, StringBuilder, StructBuilder, UInt32Builder};
use arrow::datatypes::{DataType, Field, Fields};

use crate::text::TextTokenizer;

/// How likely a token was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    pub token_id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

impl TokenLogprob {
    /// `token_logprobs` List<Struct{token Utf8, token_id UInt32, logprob Float32}>.
    pub fn field() -> Field {
        Field::new("token_logprobs", DataType::List(Arc::new(item())), true)
    }

    /// The column of [`TokenLogprob::field`], one entry a token; tokens are named as in the vocabulary.
    pub fn column<'a>(rows: impl Iterator<Item = Option<&'a [TokenLogprob]>>, tokenizer: &TextTokenizer) -> ArrayRef {
        let entries = StructBuilder::new(
            fields(),
            vec![
                Box::new(StringBuilder::new()) as Box<_>,
                Box::new(UInt32Builder::new()),
                Box::new(Float32Builder::new()),
            ],
        );
        let mut list = ListBuilder::new(entries).with_field(item());
        for row in rows {
            for token in row.unwrap_or_default() {
                let entry = list.values();
                if let Some(tokens) = entry.field_builder::<StringBuilder>(0) {
                    tokens.append_value(tokenizer.token(token.token_id).unwrap_or_default());
                }
                if let Some(ids) = entry.field_builder::<UInt32Builder>(1) {
                    ids.append_value(token.token_id);
                }
                if let Some(logprobs) = entry.field_builder::<Float32Builder>(2) {
                    logprobs.append_value(token.logprob);
                }
                entry.append(true);
            }
            list.append(row.is_some());
        }
        Arc::new(list.finish())
    }
}

fn fields() -> Fields {
    Fields::from(vec![
        Field::new("token", DataType::Utf8, false),
        Field::new("token_id", DataType::UInt32, false),
        Field::new("logprob", DataType::Float32, false),
    ])
}

fn item() -> Field {
    Field::new("item", DataType::Struct(fields()), false)
}
