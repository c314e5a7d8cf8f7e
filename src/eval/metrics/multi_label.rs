//! Any number of labels a row.

use std::collections::BTreeSet;

use super::Hits;

/// Each class's hits over rows of (true classes, predicted classes), each class under `classes`.
pub fn hits<'a>(
    classes: usize,
    rows: impl IntoIterator<Item = (&'a BTreeSet<usize>, &'a BTreeSet<usize>)>,
) -> Vec<Hits> {
    let mut hits = vec![Hits::default(); classes];
    for (truth, predicted) in rows {
        truth.iter().for_each(|&class| hits[class].expected += 1);
        predicted.iter().for_each(|&class| hits[class].predicted += 1);
        truth.intersection(predicted).for_each(|&class| hits[class].correct += 1);
    }
    hits
}
