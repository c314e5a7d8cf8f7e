//! How much a value would differ on other rows of the same kind: the percentile bootstrap (Efron 1979).

use rayon::prelude::*;

/// How rows are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bootstrap {
    /// Resamples; 0 gives no intervals.
    pub resamples: u64,
    /// The share of resampled values that lie in an interval.
    pub confidence: f64,
    /// The same seed draws the same rows for every cell, which pairs them.
    pub seed: u64,
}

impl Bootstrap {
    /// Several statistics of each resample of `rows` rows: `[statistic][resample]`.
    ///
    /// `statistics` is given row numbers, drawn with replacement, and gives `count` values.
    pub fn values(
        &self,
        rows: usize,
        count: usize,
        statistics: &(dyn Fn(&[usize]) -> Vec<f64> + Sync),
    ) -> Vec<Vec<f64>> {
        let resamples = if rows == 0 { 0 } else { self.resamples };
        let draw = |resample| -> Vec<usize> { (0..rows).map(|n| self.row(resample, n as u64, rows as u64)).collect() };
        let resampled: Vec<Vec<f64>> =
            (0..resamples).into_par_iter().map(|resample| statistics(&draw(resample))).collect();
        (0..count).map(|statistic| resampled.iter().map(|values| values[statistic]).collect()).collect()
    }

    /// The interval that holds the middle `confidence` of resampled values; `None` where too few of them are numbers.
    pub fn interval(&self, values: &[f64]) -> Option<(f64, f64)> {
        let mut values: Vec<f64> = values.iter().copied().filter(|value| !value.is_nan()).collect();
        if values.is_empty() {
            return None;
        }
        values.sort_unstable_by(f64::total_cmp);
        let tail = (1.0 - self.confidence) / 2.0;
        Some((percentile(&values, tail), percentile(&values, 1.0 - tail)))
    }

    /// The row at place `n` of a resample: a number of SplitMix64 (Steele, Lea, Flood 2014), whatever the thread.
    fn row(&self, resample: u64, n: u64, rows: u64) -> usize {
        let mixed = split_mix(split_mix(self.seed ^ split_mix(resample)) ^ n);
        // The high half of a 128-bit product maps 64 random bits evenly to 0..rows (Lemire 2019).
        ((u128::from(mixed) * u128::from(rows)) >> 64) as usize
    }
}

/// One step of SplitMix64.
pub fn split_mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Between the two nearest of sorted values, as NumPy's `percentile`.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}
