//! chrF (Popović 2015) over a corpus with one reference a row, as sacrebleu's defaults: character n-grams up to 6 without
//! white space, no words, β = 2.

use std::collections::HashMap;

const MAX_ORDER: usize = 6;
/// How much more recall counts than precision.
const BETA: f64 = 2.0;

/// What chrF needs to know of a row; additive over rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ChrfCounts {
    /// n-grams of the hypothesis, of the reference, and of both, by n − 1.
    counts: [[u64; 3]; MAX_ORDER],
}

impl ChrfCounts {
    /// The counts of one row.
    pub fn new(reference: &str, hypothesis: &str) -> Self {
        let characters = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<Vec<char>>();
        let (reference, hypothesis) = (characters(reference), characters(hypothesis));
        let mut counts = Self::default();
        for n in 1..=MAX_ORDER {
            let (reference, hypothesis) = (ngrams(&reference, n), ngrams(&hypothesis, n));
            let common = hypothesis.iter().map(|(ngram, count)| count.min(reference.get(ngram).unwrap_or(&0))).sum();
            // An order without n-grams in the reference says nothing of the hypothesis.
            let of_hypothesis = if reference.is_empty() { 0 } else { hypothesis.values().sum() };
            counts.counts[n - 1] = [of_hypothesis, reference.values().sum(), common];
        }
        counts
    }

    /// chrF from 0 to 100.
    pub fn score(&self) -> f64 {
        let (mut precision, mut recall, mut orders) = (0.0, 0.0, 0.0);
        for [hypothesis, reference, common] in self.counts {
            if hypothesis > 0 && reference > 0 {
                precision += common as f64 / hypothesis as f64;
                recall += common as f64 / reference as f64;
                orders += 1.0;
            }
        }
        if precision + recall == 0.0 {
            return 0.0;
        }
        let (precision, recall, factor) = (precision / orders, recall / orders, BETA * BETA);
        100.0 * (1.0 + factor) * precision * recall / (factor * precision + recall)
    }
}

impl std::ops::AddAssign for ChrfCounts {
    fn add_assign(&mut self, other: Self) {
        for (ours, theirs) in self.counts.iter_mut().flatten().zip(other.counts.iter().flatten()) {
            *ours += theirs;
        }
    }
}

fn ngrams(characters: &[char], n: usize) -> HashMap<&[char], u64> {
    let mut counts = HashMap::new();
    characters.windows(n).for_each(|ngram| *counts.entry(ngram).or_default() += 1);
    counts
}
