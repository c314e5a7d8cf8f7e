//! Text becomes token ids, as transformers makes them.

mod continuation;
mod tokenizer;

pub use tokenizer::{Overflow, TextTokenizer, TokenDetail, Tokenized};
