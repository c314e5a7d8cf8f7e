//! Rows become prompts, and prompts become token ids, as transformers makes them.

mod chat;
mod continuation;
mod prompt;
mod spans;
mod token_bytes;
mod tokenizer;

pub use chat::{ChatTemplate, Message, parse_messages};
pub use prompt::{Prompt, PromptTemplate};
pub use spans::TokenSpan;
pub use token_bytes::TokenBytes;
pub use tokenizer::{Overflow, TextTokenizer, TokenDetail, Tokenized};
