//! Numbers against numbers; rows are (truth, predicted).

use super::mean;

/// Mean of squared errors.
pub fn mean_squared_error(rows: &[(f64, f64)]) -> f64 {
    mean(rows.iter().map(|(truth, predicted)| (predicted - truth).powi(2)))
}

/// Mean of absolute errors.
pub fn mean_absolute_error(rows: &[(f64, f64)]) -> f64 {
    mean(rows.iter().map(|(truth, predicted)| (predicted - truth).abs()))
}

/// Pearson's correlation; NaN where one side is constant, as SciPy's `pearsonr`.
pub fn pearson(rows: &[(f64, f64)]) -> f64 {
    let (truth_mean, predicted_mean) = (mean(rows.iter().map(|row| row.0)), mean(rows.iter().map(|row| row.1)));
    let (mut covariance, mut truth_square, mut predicted_square) = (0.0, 0.0, 0.0);
    for (truth, predicted) in rows {
        let (truth, predicted) = (truth - truth_mean, predicted - predicted_mean);
        covariance += truth * predicted;
        truth_square += truth * truth;
        predicted_square += predicted * predicted;
    }
    covariance / (truth_square.sqrt() * predicted_square.sqrt())
}

/// Spearman's correlation: Pearson's of the ranks, equal values sharing their mean rank, as SciPy's `spearmanr`.
pub fn spearman(rows: &[(f64, f64)]) -> f64 {
    let truths = ranks(rows.iter().map(|row| row.0));
    let predictions = ranks(rows.iter().map(|row| row.1));
    pearson(&truths.into_iter().zip(predictions).collect::<Vec<_>>())
}

fn ranks(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let values: Vec<f64> = values.collect();
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    for equal in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let first = order.partition_point(|&index| values[index] < values[equal[0]]);
        let rank = first as f64 + (equal.len() - 1) as f64 / 2.0;
        equal.iter().for_each(|&index| ranks[index] = rank);
    }
    ranks
}
