//! Where a text's tokens lie in it, and what they read, as transformers' pipelines tell it.

use tokenizers::models::ModelWrapper;
use tokenizers::{Decoder, Encoding};

use super::{TextTokenizer, TokenDetail};

/// A token of a text itself, not one that the tokenizer added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSpan {
    pub token_id: u32,
    /// Its number among the text's own tokens; a token that is in several chunks has one number.
    pub index: u32,
    /// Its place in its sequence.
    pub position: u32,
    /// The first of its characters in the text, counted in Unicode characters.
    pub start: u32,
    /// The character after its last.
    pub end: u32,
    /// Whether it goes on with the word of the token before it.
    pub continues_word: bool,
    /// What stands in the text where the vocabulary has no token for it.
    pub unknown_text: Option<Box<str>>,
}

impl TextTokenizer {
    /// Lets every sequence come with the spans of its tokens.
    pub fn with_spans(mut self) -> Self {
        self.spans = true;
        self
    }

    /// What a list of tokens reads, as `convert_tokens_to_string` of transformers (`tokenization_utils_tokenizers.py`).
    pub fn tokens_to_string(&self, tokens: Vec<String>) -> String {
        match self.tokenizer.get_decoder() {
            Some(decoder) => decoder.decode(tokens.clone()).unwrap_or_else(|_| tokens.concat()),
            None => tokens.join(" "),
        }
    }

    /// The spans of a text's first `sequences` sequences.
    pub(super) fn spans(&self, text: &str, encoding: &Encoding, sequences: usize) -> Vec<TokenDetail> {
        let characters: Vec<char> = text.chars().collect();
        let overlap = self.tokenizer.get_truncation().map_or(0, |truncation| truncation.stride) as u32;
        let unknown_id = self.unknown_id();
        let knows_words = self.knows_words();
        let mut next_index = 0;
        let sequence_spans = |encoding: &Encoding| {
            let mut spans = Vec::with_capacity(encoding.len());
            for (position, &token_id) in encoding.get_ids().iter().enumerate() {
                if encoding.get_special_tokens_mask()[position] == 1 {
                    continue;
                }
                let (start, end) = encoding.get_offsets()[position];
                let is_unknown = Some(token_id) == unknown_id;
                let continues_word = if knows_words {
                    encoding.get_tokens()[position].chars().count() != end - start
                } else {
                    // No space just before it, nor as its first character.
                    start > 0 && !characters[start - 1..characters.len().min(start + 1)].contains(&' ')
                };
                spans.push(TokenSpan {
                    token_id,
                    index: next_index + spans.len() as u32,
                    position: position as u32,
                    start: start as u32,
                    end: end as u32,
                    continues_word: continues_word && !is_unknown,
                    unknown_text: is_unknown.then(|| characters[start..end].iter().collect::<String>().into()),
                });
            }
            next_index = (next_index + spans.len() as u32).saturating_sub(overlap);
            TokenDetail { spans, ..TokenDetail::default() }
        };
        std::iter::once(encoding).chain(encoding.get_overflowing()).take(sequences).map(sequence_spans).collect()
    }

    /// Whether the tokens themselves tell which of them go on with a word.
    fn knows_words(&self) -> bool {
        match self.tokenizer.get_model() {
            ModelWrapper::BPE(bpe) => bpe.continuing_subword_prefix.as_ref().is_some_and(|prefix| !prefix.is_empty()),
            _ => false,
        }
    }

    fn unknown_id(&self) -> Option<u32> {
        let model = match self.tokenizer.get_model() {
            ModelWrapper::BPE(bpe) => bpe.unk_token.as_deref(),
            _ => None,
        };
        let token = self.config.unk_token.as_ref().map(|token| token.text()).or(model)?;
        self.tokenizer.token_to_id(token)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::text::Overflow;

    fn tokenizer() -> TextTokenizer {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/checkpoints/tagger-bio");
        TextTokenizer::open(&dir, usize::MAX).unwrap().with_spans()
    }

    #[test]
    fn offsets_are_those_of_transformers() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/goldens/tokenizer-tok1k.json");
        let golden: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for row in golden["rows"].as_array().unwrap() {
            let text = row["text"].as_str().unwrap();
            let tokenized = tokenizer().tokenize_one(text).unwrap();
            for span in &tokenized.details[0].spans {
                let theirs = &row["offsets"][span.position as usize];
                assert_eq!(serde_json::json!([span.start, span.end]), *theirs, "{text:?}");
            }
            assert_eq!(tokenized.details[0].spans.len() + 1, tokenized.chunks[0].len(), "all but the BOS");
        }
    }

    #[test]
    fn offsets_count_characters_also_of_emoji_combining_marks_crlf_and_bytes() {
        let text = "e\u{301}\r\n😀 日本";
        let characters: Vec<char> = text.chars().collect();
        let spans = tokenizer().tokenize_one(text).unwrap().details.remove(0).spans;
        assert_eq!(spans.last().unwrap().end as usize, characters.len());
        let emoji: Vec<_> = spans.iter().filter(|span| characters[span.start as usize] == '😀').collect();
        assert_eq!(emoji.len(), 4, "one token a byte");
        assert!(emoji.iter().all(|span| (span.start, span.end) == (4, 5)));
    }

    #[test]
    fn a_token_in_two_windows_has_one_number() {
        let text = "one two three four five six seven eight nine ten";
        let whole = tokenizer().tokenize_one(text).unwrap().details.remove(0).spans;
        let windows = tokenizer().with_limit(10, Overflow::Chunk, 3).unwrap().tokenize_one(text).unwrap();
        assert!(windows.chunks.len() > 2 && windows.chunks.len() == windows.details.len());
        for (chunk, detail) in windows.chunks.iter().zip(&windows.details) {
            for span in &detail.spans {
                let same = &whole[span.index as usize];
                assert_eq!((span.start, span.end, span.token_id), (same.start, same.end, same.token_id));
                assert_eq!(chunk[span.position as usize], span.token_id);
            }
        }
    }

    #[test]
    fn a_word_begins_after_a_space() {
        let spans = tokenizer().tokenize_one("Hello <unk> world").unwrap().details.remove(0).spans;
        let unknown = spans.iter().find(|span| span.unknown_text.is_some()).unwrap();
        assert_eq!((unknown.unknown_text.as_deref(), unknown.continues_word), (Some("<unk>"), false));
        assert!(!spans[0].continues_word && spans[1].continues_word);
    }
}
