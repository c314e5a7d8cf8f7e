//! A continuation given its context, as evaluation harnesses score answers.

use rayon::prelude::*;
use tokenizers::Encoding;

use super::{TextTokenizer, TokenDetail, Tokenized};

impl TextTokenizer {
    /// Tokenizes each context with its continuation on all cores; a null in either makes a null.
    pub fn tokenize_continuations(
        &self,
        contexts: &[Option<&str>],
        continuations: &[Option<&str>],
    ) -> Vec<Option<Result<Tokenized, String>>> {
        contexts
            .par_iter()
            .zip(continuations)
            .map(|(context, continuation)| Some(self.tokenize_continuation((*context)?, (*continuation)?)))
            .collect()
    }

    /// The ids of context + continuation, of which those from position len(ids(context)) on are the continuation's.
    ///
    /// The two are tokenized as one text, so that a token may reach over the border. Under a limit that drops the
    /// beginning, the continuation moves forward with what is kept.
    ///
    /// # Errors
    /// As [`TextTokenizer::tokenize_one`].
    pub fn tokenize_continuation(&self, context: &str, continuation: &str) -> Result<Tokenized, String> {
        let special_tokens = self.special_tokens_per_text();
        let context_tokens = whole_len(&self.encode(context, true)?, special_tokens) - special_tokens;
        let encoding = self.encode(&[context, continuation].concat(), true)?;
        // Tokens that end a text stand behind the continuation, not between it and its context.
        let leading = encoding.get_special_tokens_mask().iter().take_while(|&&special| special == 1).count();
        let dropped = whole_len(&encoding, special_tokens) - encoding.len();
        let context_len = leading + context_tokens.saturating_sub(dropped);
        let mut tokenized = self.check(&encoding)?;
        tokenized.details = vec![TokenDetail { context_len, ..TokenDetail::default() }];
        Ok(tokenized)
    }
}

/// The length of a text before it was truncated, told from what was cut off; special tokens count once.
fn whole_len(encoding: &Encoding, special_tokens: usize) -> usize {
    let pieces = std::iter::once(encoding).chain(encoding.get_overflowing());
    special_tokens + pieces.map(|piece| piece.len().saturating_sub(special_tokens)).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::text::Overflow;

    fn tokenizer() -> TextTokenizer {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/checkpoints/lm-window");
        TextTokenizer::open(&dir, usize::MAX).unwrap()
    }

    #[test]
    fn the_continuation_starts_where_the_contexts_ids_end() {
        let tokenizer = tokenizer();
        let (context, continuation) = ("The capital of France is", " Paris");
        let whole = tokenizer.tokenize_one("The capital of France is Paris").unwrap();
        let ours = tokenizer.tokenize_continuation(context, continuation).unwrap();
        assert_eq!((&ours.chunks, ours.details[0].context_len), (&whole.chunks, 12));
        assert_eq!(tokenizer.tokenize_continuation("", "Paris").unwrap().details[0].context_len, 1, "the BOS");
        assert_eq!(tokenizer.tokenize_continuations(&[Some("a"), None], &[None, Some("b")]), [None, None]);
    }

    #[test]
    fn a_limit_keeps_the_continuation() {
        let (context, continuation) = ("The capital of France is", " Paris");
        let whole = tokenizer().tokenize_continuation(context, continuation).unwrap().chunks.remove(0); // 12 + 3 ids
        let limited = |limit| {
            let tokenizer = tokenizer().with_limit(limit, Overflow::TruncateLeft, 0).unwrap();
            tokenizer.tokenize_continuation(context, continuation).unwrap()
        };
        let eight = limited(8);
        assert_eq!(eight.chunks[0], [&whole[..1], &whole[8..]].concat());
        assert_eq!((eight.details[0].context_len, eight.truncated), (5, true));
        let three = limited(3);
        assert_eq!(three.chunks[0], [&whole[..1], &whole[13..]].concat());
        assert_eq!(three.details[0].context_len, 1, "part of the continuation is lost, the rest is scored");
        assert!(!limited(15).truncated);
    }
}
