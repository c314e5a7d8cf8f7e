//! Which of several answers is likeliest, as lm-evaluation-harness decides (`api/task.py`, `process_results`, 0.4.13).

/// What a choice's log-likelihood is divided by before choices are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LengthNorm {
    /// Nothing: the harness' `acc`.
    None,
    /// Unicode characters of the choice: `acc_norm`.
    Characters,
    /// UTF-8 bytes of the choice: `acc_bytes`.
    Bytes,
}

/// The index of the likeliest choice; the first of several equal ones, as argmax does. `None` without choices.
///
/// `choices` are (text, log-likelihood); the text is without the space that separates it from its context.
pub fn likeliest<'a>(choices: impl IntoIterator<Item = (&'a str, f64)>, norm: LengthNorm) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (index, (text, logprob)) in choices.into_iter().enumerate() {
        let length = match norm {
            LengthNorm::None => 1,
            LengthNorm::Characters => text.chars().count(),
            LengthNorm::Bytes => text.len(),
        };
        let score = logprob / length as f64;
        if best.is_none_or(|(_, highest)| score > highest) {
            best = Some((index, score));
        }
    }
    best.map(|(index, _)| index)
}
