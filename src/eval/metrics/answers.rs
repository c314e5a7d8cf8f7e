//! Short answers: equal, equal after normalisation, found by a pattern, or sharing words.

use std::collections::HashMap;

use regex::Regex;

/// An answer as SQuAD's evaluation compares it (`evaluate-v1.1.py`): in lower case, without ASCII punctuation, articles
/// and extra white space.
pub fn normalize(text: &str) -> String {
    let text: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let words = text.split_inclusive(|c: char| !c.is_alphanumeric()).map(|word| {
        let bare = word.trim_end_matches(|c: char| !c.is_alphanumeric());
        if matches!(bare, "a" | "an" | "the") { word.replacen(bare, " ", 1) } else { word.to_owned() }
    });
    words.collect::<String>().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether two answers are equal once normalised.
pub fn normalized_match(truth: &str, predicted: &str) -> bool {
    normalize(truth) == normalize(predicted)
}

/// F1 of the words of two normalised answers, as SQuAD's `f1_score`; 0 without a word in common.
pub fn token_f1(truth: &str, predicted: &str) -> f64 {
    let (truth, predicted) = (normalize(truth), normalize(predicted));
    let mut missing: HashMap<&str, u64> = HashMap::new();
    truth.split_whitespace().for_each(|word| *missing.entry(word).or_default() += 1);
    let common = predicted.split_whitespace().filter(|word| match missing.get_mut(word) {
        Some(count) if *count > 0 => {
            *count -= 1;
            true
        }
        _ => false,
    });
    let common = common.count() as u64;
    super::ratio(2 * common, (truth.split_whitespace().count() + predicted.split_whitespace().count()) as u64)
}

/// The answer that a pattern finds in a longer text: of the first match the first group that holds anything, or all of it
/// where the pattern has no groups; without white space at its ends.
///
/// lm-evaluation-harness' `regex` filter with `group_select: 0` takes the same.
pub fn extract<'a>(pattern: &Regex, text: &'a str) -> Option<&'a str> {
    let captures = pattern.captures(text)?;
    let found = match captures.len() {
        1 => captures.get(0),
        _ => captures.iter().skip(1).flatten().find(|group| !group.is_empty()),
    };
    found.map(|found| found.as_str().trim())
}
