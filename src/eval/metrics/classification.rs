//! One label a row: confusion matrix, and what follows from it.

use super::Hits;

/// Counts of rows by their true and their predicted class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfusionMatrix {
    classes: usize,
    /// `[true class, predicted class]`
    counts: Vec<u64>,
}

impl ConfusionMatrix {
    /// Counts pairs of (true class, predicted class), each under `classes`.
    pub fn new(classes: usize, rows: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let mut counts = vec![0; classes * classes];
        for (truth, predicted) in rows {
            counts[truth * classes + predicted] += 1;
        }
        Self { classes, counts }
    }

    /// Rows of a true class with a predicted class.
    pub fn count(&self, truth: usize, predicted: usize) -> u64 {
        self.counts[truth * self.classes + predicted]
    }

    /// All rows.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The share of rows on the diagonal.
    pub fn accuracy(&self) -> f64 {
        let correct: u64 = (0..self.classes).map(|class| self.count(class, class)).sum();
        correct as f64 / self.total() as f64
    }

    /// Each class's hits.
    pub fn hits(&self) -> Vec<Hits> {
        let classes = 0..self.classes;
        let hits = |class| Hits {
            correct: self.count(class, class),
            predicted: classes.clone().map(|truth| self.count(truth, class)).sum(),
            expected: classes.clone().map(|predicted| self.count(class, predicted)).sum(),
        };
        classes.clone().map(hits).collect()
    }

    /// Matthews correlation coefficient for any number of classes (Gorodkin 2004), as scikit-learn's
    /// `matthews_corrcoef`; 0 where one side is a single class.
    pub fn matthews_correlation(&self) -> f64 {
        let total = self.total() as f64;
        let hits = self.hits();
        let sum = |product: fn(&Hits) -> f64| hits.iter().map(product).sum::<f64>();
        let correct = sum(|class| class.correct as f64);
        let covariance = correct * total - sum(|class| class.expected as f64 * class.predicted as f64);
        let predicted = total * total - sum(|class| (class.predicted as f64).powi(2));
        let expected = total * total - sum(|class| (class.expected as f64).powi(2));
        if total == 0.0 {
            f64::NAN
        } else if predicted * expected == 0.0 {
            0.0
        } else {
            covariance / (predicted * expected).sqrt()
        }
    }
}
