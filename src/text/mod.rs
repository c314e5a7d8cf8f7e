//! Text becomes token ids, as transformers makes them.

mod continuation;
mod spans;
mod tokenizer;

pub use spans::TokenSpan;
pub use tokenizer::{Overflow, TextTokenizer, TokenDetail, Tokenized};
