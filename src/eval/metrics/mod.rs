//! What results are worth: one idea a file, pure functions of rows in memory.
//!
//! Every function is compared with scikit-learn, seqeval, sacrebleu, rouge-score or lm-evaluation-harness on fixed
//! inputs: `tests/goldens/metrics/`.

pub mod answers;
pub mod bleu;
pub mod bootstrap;
pub mod calibration;
pub mod chrf;
pub mod classification;
pub mod multi_label;
pub mod multiple_choice;
pub mod perplexity;
pub mod regression;
pub mod rouge;
pub mod significance;
pub mod tagging;

#[cfg(test)]
mod tests;

/// `numerator / denominator`, and 0 where there is nothing to divide by, as scikit-learn's `zero_division=0`.
fn ratio(numerator: u64, denominator: u64) -> f64 {
    if denominator == 0 { 0.0 } else { numerator as f64 / denominator as f64 }
}

/// The mean, and NaN of nothing.
pub fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, count) = values.into_iter().fold((0.0, 0u64), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { f64::NAN } else { sum / count as f64 }
}

/// Hits of a set of predictions, from which precision, recall and F1 are told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hits {
    /// Predicted and true.
    pub correct: u64,
    /// Predicted.
    pub predicted: u64,
    /// True: the support.
    pub expected: u64,
}

impl Hits {
    /// The share of predictions that are true.
    pub fn precision(&self) -> f64 {
        ratio(self.correct, self.predicted)
    }

    /// The share of what is true that was predicted.
    pub fn recall(&self) -> f64 {
        ratio(self.correct, self.expected)
    }

    /// The harmonic mean of precision and recall: 2·correct / (predicted + expected).
    pub fn f1(&self) -> f64 {
        ratio(2 * self.correct, self.predicted + self.expected)
    }

    /// Whether anything was predicted or true.
    pub fn is_present(&self) -> bool {
        self.predicted + self.expected > 0
    }
}

impl std::ops::AddAssign for Hits {
    fn add_assign(&mut self, other: Self) {
        self.correct += other.correct;
        self.predicted += other.predicted;
        self.expected += other.expected;
    }
}

/// F1 over all classes together.
pub fn micro_f1(classes: &[Hits]) -> f64 {
    let mut total = Hits::default();
    classes.iter().for_each(|class| total += *class);
    if total.is_present() { total.f1() } else { f64::NAN }
}

/// The mean F1 of the classes that were predicted or true at all, as scikit-learn averages where no labels are named.
pub fn macro_f1(classes: &[Hits]) -> f64 {
    mean(classes.iter().filter(|class| class.is_present()).map(Hits::f1))
}
