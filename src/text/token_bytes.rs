//! The bytes that each token adds to a decoded text.

use serde_json::Value;

use super::TextTokenizer;
use crate::error::{Error, Result};

/// Tokens longer than any text needs at once; the longest that a grammar's walk over the vocabulary takes is 1,024 bytes.
const MAX_TOKEN_BYTES: usize = 1000;

/// What the tokens of a vocabulary are in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBytes {
    /// By token id; `None` for tokens that leave no text behind, such as special ones.
    pub tokens: Vec<Option<Vec<u8>>>,
    /// Whether a space at the very beginning of a decoded text is dropped, as SentencePiece's decoder does.
    pub drops_first_space: bool,
}

/// How the decoder makes bytes of a token as it stands in the vocabulary.
#[derive(Debug, Default)]
struct Decoder {
    /// GPT-2's alphabet of one character a byte.
    byte_level: bool,
    /// Pieces that are replaced, SentencePiece's `▁` above all.
    replacements: Vec<(String, String)>,
    /// Tokens such as `<0x0A>` are single bytes.
    byte_fallback: bool,
    /// From here on tokens are joined.
    fused: bool,
    drops_first_space: bool,
}

impl TextTokenizer {
    /// The bytes of every token that the model can give.
    ///
    /// # Errors
    /// [`Error::Config`] for a decoder whose tokens have no bytes of their own: neither byte-level nor SentencePiece's.
    pub fn token_bytes(&self) -> Result<TokenBytes> {
        let failed = |message: String| Error::config(&self.path, message);
        let decoder = serde_json::to_value(self.tokenizer.get_decoder()).map_err(|error| failed(error.to_string()))?;
        let decoder = Decoder::parse(&decoder).map_err(|found| {
            failed(format!("constrained output needs a byte-level or SentencePiece decoder, and this one is {found}"))
        })?;
        let added = self.tokenizer.get_added_tokens_decoder();
        let bytes = |id: u32| {
            let special = added.get(&id).is_some_and(|token| token.special);
            let token = self.tokenizer.id_to_token(id).filter(|_| !special)?;
            Some(decoder.bytes(&token)).filter(|bytes| (1..=MAX_TOKEN_BYTES).contains(&bytes.len()))
        };
        let tokens = (0..self.vocab_size as u32).map(bytes).collect();
        Ok(TokenBytes { tokens, drops_first_space: decoder.drops_first_space })
    }
}

impl Decoder {
    /// Reads a decoder as `tokenizer.json` has it; the error is the part that is not understood.
    fn parse(decoder: &Value) -> Result<Self, String> {
        let single = std::slice::from_ref(decoder);
        let steps = match decoder["type"].as_str() {
            Some("Sequence") => decoder["decoders"].as_array().map_or(single, Vec::as_slice),
            _ => single,
        };
        let mut parsed = Self::default();
        for step in steps {
            let text = |key: &str| step[key].as_str().map(str::to_owned);
            match step["type"].as_str() {
                Some("ByteLevel") if steps.len() == 1 => parsed.byte_level = true,
                Some("Replace") if !parsed.fused && !parsed.byte_fallback => {
                    let pattern = step["pattern"]["String"].as_str().map(str::to_owned);
                    let replacement = pattern.zip(text("content")).ok_or_else(|| step.to_string())?;
                    parsed.replacements.push(replacement);
                }
                Some("ByteFallback") if !parsed.fused => parsed.byte_fallback = true,
                Some("Fuse") => parsed.fused = true,
                Some("Strip")
                    if parsed.fused
                        && text("content").as_deref() == Some(" ")
                        && step["start"] == 1
                        && step["stop"] == 0 =>
                {
                    parsed.drops_first_space = true;
                }
                _ => return Err(step.to_string()),
            }
        }
        if parsed.byte_level || parsed.byte_fallback { Ok(parsed) } else { Err(decoder.to_string()) }
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        if self.byte_level {
            // A token with a character outside the alphabet, as added ones may have, stands for itself.
            return token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec());
        }
        let token = self.replacements.iter().fold(token.to_owned(), |token, (from, to)| token.replace(from, to));
        let byte = token.strip_prefix("<0x").and_then(|token| token.strip_suffix('>')).filter(|hex| hex.len() == 2);
        match byte.filter(|_| self.byte_fallback).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => vec![byte],
            None => token.into_bytes(),
        }
    }
}

/// The byte that a character of GPT-2's alphabet stands for: printable ones for themselves, the others from U+0100 on.
fn byte_of(character: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let code = u32::from(character);
    match u8::try_from(code) {
        Ok(byte) => printable(byte).then_some(byte),
        Err(_) => (0..=u8::MAX).filter(|&byte| !printable(byte)).nth((code - 0x100) as usize),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn checkpoint(name: &str) -> TextTokenizer {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/checkpoints").join(name);
        TextTokenizer::open(&dir, 5000).unwrap()
    }

    /// The bytes of any text's tokens, joined, are what the tokenizer decodes them to.
    #[test]
    fn joined_bytes_are_the_decoded_text() {
        for name in ["lm-window", "lm-full-tied-bf16", "cls-nopad"] {
            let tokenizer = checkpoint(name);
            let bytes = tokenizer.token_bytes().unwrap();
            assert!(bytes.drops_first_space);
            for text in [
                "plain words",
                "  two spaces",
                "line\nline\ttab",
                "é 日本語 🙂 \u{1f3fd}",
                "a<0x0A>b",
                "▁",
                "<s>x</s>y",
            ] {
                let ids = tokenizer.tokenize_one(text).unwrap().chunks.remove(0);
                let joined: Vec<u8> =
                    ids.iter().filter_map(|&id| bytes.tokens[id as usize].clone()).flatten().collect();
                let joined = String::from_utf8(joined).unwrap();
                let joined = joined.strip_prefix(' ').unwrap_or(&joined);
                assert_eq!(joined, tokenizer.decode(&ids).unwrap(), "{name}: {text:?}");
            }
            assert!(bytes.tokens[..3].iter().all(Option::is_none), "special tokens leave no text");
            assert!(bytes.tokens[4999].is_none(), "nor do ids that the tokenizer does not know");
            assert_eq!(bytes.tokens.iter().flatten().filter(|bytes| bytes.as_slice() == [0x0a]).count(), 1);
        }
    }

    #[test]
    fn byte_level_characters_are_bytes() {
        let decoder = Decoder::parse(&json!({"type": "ByteLevel", "add_prefix_space": false})).unwrap();
        assert_eq!(decoder.bytes("ĠHello"), b" Hello");
        assert_eq!(decoder.bytes("Ċ"), b"\n");
        assert_eq!(decoder.bytes("Ã©"), "é".as_bytes());
        assert_eq!(decoder.bytes("日"), "日".as_bytes(), "not of the alphabet");
        assert!(!decoder.drops_first_space);
        // Every byte has a character of its own: this is the table of transformers' bytes_to_unicode.
        let mut bytes: Vec<u8> = (0x21..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=u8::MAX).collect::<Vec<_>>());
    }

    #[test]
    fn other_decoders_are_refused() {
        for decoder in [
            json!(null),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true}),
            json!({"type": "Sequence", "decoders": [{"type": "Fuse"}]}),
            json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
        ] {
            assert!(Decoder::parse(&decoder).is_err(), "{decoder}");
        }
    }
}
