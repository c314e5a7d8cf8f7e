//! How surprised a model is by texts: per token, per word and per byte, as lm-evaluation-harness' wikitext task.

/// Sums of log-likelihood and lengths; additive over texts.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TextLikelihood {
    /// Sum of the tokens' natural log-probabilities.
    pub logprob: f64,
    /// Tokens that were scored.
    pub tokens: u64,
    /// Pieces between runs of white space, an empty first or last piece included: `len(re.split(r"\s+", text))`.
    pub words: u64,
    /// UTF-8 bytes.
    pub bytes: u64,
}

impl TextLikelihood {
    /// The sums of one text.
    pub fn new(text: &str, logprob: f64, tokens: u64) -> Self {
        let characters = text.chars().map(char::is_whitespace);
        // A run of white space ends where the next character is none.
        let runs = characters.clone().zip(characters.skip(1).chain([false])).filter(|&(here, next)| here && !next);
        let words = 1 + runs.count() as u64;
        Self { logprob, tokens, words, bytes: text.len() as u64 }
    }

    /// exp(−logprob / tokens).
    pub fn token_perplexity(&self) -> f64 {
        (-self.logprob / self.tokens as f64).exp()
    }

    /// exp(−logprob / words).
    pub fn word_perplexity(&self) -> f64 {
        (-self.logprob / self.words as f64).exp()
    }

    /// exp(−logprob / bytes).
    pub fn byte_perplexity(&self) -> f64 {
        (-self.logprob / self.bytes as f64).exp()
    }

    /// −log₂ likelihood per byte.
    pub fn bits_per_byte(&self) -> f64 {
        -self.logprob / self.bytes as f64 / std::f64::consts::LN_2
    }
}

impl std::ops::AddAssign for TextLikelihood {
    fn add_assign(&mut self, other: Self) {
        self.logprob += other.logprob;
        self.tokens += other.tokens;
        self.words += other.words;
        self.bytes += other.bytes;
    }
}
