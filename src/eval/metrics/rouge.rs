//! ROUGE-L (Lin 2004) of one row: how long a common subsequence of words is, as rouge-score's `rougeL` without stemming.

/// F1 of the longest common subsequence, from 0 to 1.
pub fn rouge_l(reference: &str, hypothesis: &str) -> f64 {
    let (reference, hypothesis) = (words(reference), words(hypothesis));
    super::ratio(2 * longest_common_subsequence(&reference, &hypothesis), (reference.len() + hypothesis.len()) as u64)
}

/// Runs of ASCII letters and digits in lower case (rouge-score's `tokenize.py`).
fn words(text: &str) -> Vec<String> {
    let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    text.to_lowercase().split(|c| !is_part(c)).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn longest_common_subsequence(a: &[String], b: &[String]) -> u64 {
    let mut lengths = vec![0; b.len() + 1];
    for left in a {
        let mut diagonal = 0;
        for (j, right) in b.iter().enumerate() {
            let above = lengths[j + 1];
            lengths[j + 1] = if left == right { diagonal + 1 } else { lengths[j].max(above) };
            diagonal = above;
        }
    }
    lengths[b.len()]
}
