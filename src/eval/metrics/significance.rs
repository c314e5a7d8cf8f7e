//! Whether two cells differ by more than chance on the same rows.

/// McNemar's exact test of two cells' right and wrong rows: the two-sided p-value.
///
/// Of the rows that only one of them got right, each cell's share is binomial with p = ½ where they are equally good.
/// Equals SciPy's `binomtest(b, b + c, 0.5)`; 1 where they never differ.
pub fn mcnemar_exact(only_first: u64, only_second: u64) -> f64 {
    let (fewer, total) = (only_first.min(only_second), only_first + only_second);
    // ln of total choose k, halved for each row; exact in f64 up to rounding and never overflowing.
    let mut log_term = total as f64 * 0.5f64.ln();
    let mut tail = 0.0;
    for k in 0..=fewer {
        tail += log_term.exp();
        log_term += ((total - k) as f64 / (k + 1) as f64).ln();
    }
    (2.0 * tail).min(1.0)
}

/// The paired bootstrap test: the two-sided p-value of no difference, from both cells' values on the same resamples.
///
/// Twice the share of resamples on the rarer side of 0, each side counted with one resample more, so that no finite number
/// of them claims certainty (Davison & Hinkley 1997). Resamples where a value is undefined are left out; 1 without any.
pub fn paired_bootstrap(first: &[f64], second: &[f64]) -> f64 {
    let differences: Vec<f64> = first.iter().zip(second).map(|(a, b)| a - b).filter(|d| !d.is_nan()).collect();
    let at_most = differences.iter().filter(|difference| **difference <= 0.0).count();
    let at_least = differences.iter().filter(|difference| **difference >= 0.0).count();
    (2.0 * (at_most.min(at_least) + 1) as f64 / (differences.len() + 1) as f64).min(1.0)
}
