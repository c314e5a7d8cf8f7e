//! Text becomes token ids, as transformers makes them.

mod tokenizer;

pub use tokenizer::{Overflow, TextTokenizer, Tokenized};
