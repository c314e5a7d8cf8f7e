//! Whether scores are the probabilities that they claim to be.

/// Bins of [`expected_calibration_error`] where nothing is said.
pub const DEFAULT_BINS: usize = 15;

/// Rows whose confidence lies in one interval.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ReliabilityBin {
    pub rows: u64,
    /// Their mean confidence.
    pub confidence: f64,
    /// The share of them that is right.
    pub accuracy: f64,
}

/// Cuts `(confidence, whether right)` rows into `bins` intervals (k/bins, (k+1)/bins] of equal width; 0 is in the first.
///
/// The intervals of Guo et al., "On Calibration of Modern Neural Networks" (arXiv:1706.04599), and of scikit-learn's
/// `calibration_curve(strategy="uniform")`.
pub fn reliability_bins(rows: impl IntoIterator<Item = (f64, bool)>, bins: usize) -> Vec<ReliabilityBin> {
    let mut sums = vec![(0u64, 0.0, 0u64); bins];
    for (confidence, right) in rows {
        let bin = ((confidence * bins as f64).ceil() as usize).clamp(1, bins) - 1;
        sums[bin].0 += 1;
        sums[bin].1 += confidence;
        sums[bin].2 += u64::from(right);
    }
    let bin = |(rows, confidence, right): (u64, f64, u64)| match rows {
        0 => ReliabilityBin::default(),
        _ => ReliabilityBin { rows, confidence: confidence / rows as f64, accuracy: right as f64 / rows as f64 },
    };
    sums.into_iter().map(bin).collect()
}

/// The mean distance of confidence and accuracy over bins, weighted by their rows (Guo et al., equation 3).
pub fn expected_calibration_error(bins: &[ReliabilityBin]) -> f64 {
    let total: u64 = bins.iter().map(|bin| bin.rows).sum();
    let distance = |bin: &ReliabilityBin| bin.rows as f64 * (bin.accuracy - bin.confidence).abs();
    bins.iter().map(distance).sum::<f64>() / total as f64
}

/// The mean of −ln p(true class), with p kept from 0 by the smallest step of f64 at 1, as scikit-learn's `log_loss`.
pub fn log_loss(probabilities_of_truth: impl IntoIterator<Item = f64>) -> f64 {
    super::mean(probabilities_of_truth.into_iter().map(|p| -p.clamp(f64::EPSILON, 1.0 - f64::EPSILON).ln()))
}
