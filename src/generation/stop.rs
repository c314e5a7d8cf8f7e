//! When a completion ends, and what its text is.

use serde::Serialize;

use super::SamplingParams;

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop token or a stop string.
    Stop,
    /// [`SamplingParams::max_tokens`].
    Length,
}

impl FinishReason {
    /// The name in the output.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Turns token ids into text, leaving special tokens out.
pub trait Decode {
    /// # Errors
    /// A message for the row's `error` column.
    fn decode(&self, token_ids: &[u32]) -> Result<String, String>;
}

/// Tokens in front of the longest stop string that are decoded with it: special tokens, which have no text, may stand
/// between its own, and the first token of a decoded piece may lose a space.
const MARGIN_TOKENS: usize = 16;

/// Why the completion ends with its last token, if it does.
///
/// # Errors
/// A message for the row, when its tokens cannot be decoded.
pub fn finish_reason(
    completion: &[u32],
    params: &SamplingParams,
    decoder: &impl Decode,
) -> Result<Option<FinishReason>, String> {
    if completion.len() >= params.min_tokens {
        if completion.last().is_some_and(|id| params.stop_token_ids.contains(id)) {
            return Ok(Some(FinishReason::Stop));
        }
        if let Some(longest) = params.stop.iter().map(String::len).max() {
            // A token with a text has a byte at least, so a stop string that ended just now began within these.
            let tail = decoder.decode(&completion[completion.len().saturating_sub(longest + MARGIN_TOKENS)..])?;
            if first_stop(&tail, &params.stop, 0).is_some()
                && stop_position(&decoder.decode(completion)?, completion, params, decoder)?.is_some()
            {
                return Ok(Some(FinishReason::Stop));
            }
        }
    }
    Ok((completion.len() >= params.max_tokens).then_some(FinishReason::Length))
}

/// The completion's text, up to the first stop string.
///
/// # Errors
/// A message for the row, when its tokens cannot be decoded.
pub fn text(completion: &[u32], params: &SamplingParams, decoder: &impl Decode) -> Result<String, String> {
    let mut text = decoder.decode(completion)?;
    if let Some(end) = stop_position(&text, completion, params, decoder)? {
        text.truncate(end);
    }
    Ok(text)
}

/// Where the first stop string begins that is not over before the minimum of tokens.
fn stop_position(
    text: &str,
    completion: &[u32],
    params: &SamplingParams,
    decoder: &impl Decode,
) -> Result<Option<usize>, String> {
    if params.stop.is_empty() || completion.len() < params.min_tokens {
        return Ok(None);
    }
    let exempt = match params.min_tokens {
        0 | 1 => 0,
        tokens => decoder.decode(&completion[..tokens - 1])?.len(),
    };
    Ok(first_stop(text, &params.stop, exempt))
}

/// Where the first stop string begins that ends after byte `exempt`.
fn first_stop(text: &str, stop: &[String], exempt: usize) -> Option<usize> {
    let find = |stop: &String| {
        let from = (exempt + 1).saturating_sub(stop.len());
        let from = (from..=text.len()).find(|&from| text.is_char_boundary(from))?;
        text[from..].find(stop.as_str()).map(|start| from + start)
    };
    stop.iter().filter_map(find).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Token n is the n-th of a few pieces; 0 is special.
    struct Pieces;

    impl Decode for Pieces {
        fn decode(&self, token_ids: &[u32]) -> Result<String, String> {
            let pieces = ["", "a", "b", " E", "ND", "é", "END"];
            token_ids.iter().map(|&id| pieces.get(id as usize).copied().ok_or(format!("no token {id}"))).collect()
        }
    }

    fn params(stop: &[&str]) -> SamplingParams {
        SamplingParams {
            max_tokens: 100,
            stop: stop.iter().map(|s| s.to_string()).collect(),
            stop_token_ids: vec![0],
            ..SamplingParams::default()
        }
    }

    fn ends(ids: &[u32], params: &SamplingParams) -> Option<FinishReason> {
        finish_reason(ids, params, &Pieces).unwrap()
    }

    #[test]
    fn a_stop_string_may_cross_tokens_and_is_left_out() {
        let params = params(&["END", "é!"]);
        assert_eq!(ends(&[1, 2, 3], &params), None);
        assert_eq!(ends(&[1, 2, 3, 4], &params), Some(FinishReason::Stop));
        assert_eq!(text(&[1, 2, 3, 4], &params, &Pieces).unwrap(), "ab ");
        let long = [vec![1; 500], vec![3, 4]].concat();
        assert_eq!(ends(&long, &SamplingParams { max_tokens: 1000, ..params.clone() }), Some(FinishReason::Stop));
        assert_eq!(text(&long, &params, &Pieces).unwrap(), "a".repeat(500) + " ");
    }

    #[test]
    fn tokens_and_lengths_end_a_completion_too() {
        let params = SamplingParams { max_tokens: 4, min_tokens: 2, ..params(&["b"]) };
        assert_eq!(ends(&[1, 1], &params), None);
        assert_eq!(ends(&[1, 0], &params), Some(FinishReason::Stop));
        assert_eq!(ends(&[0], &params), None, "before the minimum");
        assert_eq!(ends(&[2], &params), None, "before the minimum");
        assert_eq!(ends(&[1, 1, 1, 1], &params), Some(FinishReason::Length));
        assert_eq!(ends(&[1, 1, 1, 0], &params), Some(FinishReason::Stop));
        assert_eq!(finish_reason(&[99], &self::params(&["b"]), &Pieces).unwrap_err(), "no token 99");
    }

    #[test]
    fn a_stop_string_within_the_minimum_is_text_like_any_other() {
        let params = SamplingParams { min_tokens: 3, ..params(&["a", "bb"]) };
        assert_eq!(ends(&[1, 1, 2], &params), None);
        assert_eq!(ends(&[1, 1, 2, 2], &params), Some(FinishReason::Stop));
        assert_eq!(text(&[1, 1, 2, 2], &params, &Pieces).unwrap(), "aa");
        assert_eq!(ends(&[1, 2, 1], &params), Some(FinishReason::Stop));
        assert_eq!(text(&[1, 2, 1], &params, &Pieces).unwrap(), "ab");
        assert_eq!(text(&[5, 2, 2], &params, &Pieces).unwrap(), "é");
    }
}
