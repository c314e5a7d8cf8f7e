//! BLEU (Papineni et al. 2002) over a corpus with one reference a row, as sacrebleu's defaults: tokenizer 13a, n-grams
//! up to 4, exponential smoothing, case kept.

use std::collections::HashMap;

const MAX_ORDER: usize = 4;

/// What BLEU needs to know of a row; additive over rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BleuCounts {
    /// n-grams of the hypothesis that are in the reference, by n − 1.
    pub correct: [u64; MAX_ORDER],
    /// n-grams of the hypothesis, by n − 1.
    pub total: [u64; MAX_ORDER],
    pub hypothesis_tokens: u64,
    pub reference_tokens: u64,
}

impl BleuCounts {
    /// The counts of one row.
    pub fn new(reference: &str, hypothesis: &str) -> Self {
        let (reference, hypothesis) = (tokenize_13a(reference), tokenize_13a(hypothesis));
        let (reference, hypothesis): (Vec<&str>, Vec<&str>) =
            (reference.split_whitespace().collect(), hypothesis.split_whitespace().collect());
        let mut counts = Self {
            hypothesis_tokens: hypothesis.len() as u64,
            reference_tokens: reference.len() as u64,
            ..Self::default()
        };
        for n in 1..=MAX_ORDER {
            let (reference, hypothesis) = (ngrams(&reference, n), ngrams(&hypothesis, n));
            counts.total[n - 1] = hypothesis.values().sum();
            let common = hypothesis.iter().map(|(ngram, count)| count.min(reference.get(ngram).unwrap_or(&0)));
            counts.correct[n - 1] = common.sum();
        }
        counts
    }

    /// BLEU from 0 to 100.
    pub fn score(&self) -> f64 {
        if self.correct == [0; MAX_ORDER] {
            return 0.0;
        }
        let (hypothesis, reference) = (self.hypothesis_tokens as f64, self.reference_tokens as f64);
        let brevity_penalty = if hypothesis < reference { (1.0 - reference / hypothesis).exp() } else { 1.0 };
        let mut smoothing = 1.0;
        let mut log_sum = 0.0;
        for (&correct, &total) in self.correct.iter().zip(&self.total) {
            if total == 0 {
                // sacrebleu leaves such a precision at 0, whose logarithm it takes for −9999999999.
                return 0.0;
            }
            let precision = if correct == 0 {
                smoothing *= 2.0;
                100.0 / (smoothing * total as f64)
            } else {
                100.0 * correct as f64 / total as f64
            };
            log_sum += precision.ln();
        }
        brevity_penalty * (log_sum / MAX_ORDER as f64).exp()
    }
}

impl std::ops::AddAssign for BleuCounts {
    fn add_assign(&mut self, other: Self) {
        for n in 0..MAX_ORDER {
            self.correct[n] += other.correct[n];
            self.total[n] += other.total[n];
        }
        self.hypothesis_tokens += other.hypothesis_tokens;
        self.reference_tokens += other.reference_tokens;
    }
}

fn ngrams<'a, 'b>(tokens: &'b [&'a str], n: usize) -> HashMap<&'b [&'a str], u64> {
    let mut counts = HashMap::new();
    tokens.windows(n).for_each(|ngram| *counts.entry(ngram).or_default() += 1);
    counts
}

/// Separates words and punctuation by spaces as mteval-v13a does (sacrebleu's `tokenizer_13a.py`, `tokenizer_re.py`).
fn tokenize_13a(text: &str) -> String {
    let mut text = text.trim_end().replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    if text.contains('&') {
        text = text.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
    }
    let mut spaced = String::with_capacity(2 * text.len() + 2);
    spaced.push(' ');
    for character in text.chars() {
        // Punctuation but ' , - and . stands alone.
        match character {
            ' '..='&' | '('..='+' | ':'..='@' | '/' | '['..='`' | '{'..='~' => spaced.extend([' ', character, ' ']),
            _ => spaced.push(character),
        }
    }
    spaced.push(' ');
    let is_stop = |c: char| c == '.' || c == ',';
    let is_digit = |c: char| c.is_ascii_digit();
    // Full stops and commas belong to numbers only, and a dash after a number does not.
    let spaced = replace_pairs(&spaced, |a, b| !is_digit(a) && is_stop(b), |a, b| [a, ' ', b, ' ']);
    let spaced = replace_pairs(&spaced, |a, b| is_stop(a) && !is_digit(b), |a, b| [' ', a, ' ', b]);
    replace_pairs(&spaced, |a, b| is_digit(a) && b == '-', |a, b| [a, ' ', b, ' '])
}

/// Replaces pairs of neighbouring characters, from the left and without overlap, as a regular expression would.
fn replace_pairs(text: &str, matches: impl Fn(char, char) -> bool, by: impl Fn(char, char) -> [char; 4]) -> String {
    let mut replaced = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match characters.next_if(|&next| matches(character, next)) {
            Some(next) => replaced.extend(by(character, next)),
            None => replaced.push(character),
        }
    }
    replaced
}
