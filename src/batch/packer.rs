//! Cuts a window of sequences into batches of similar length.

use std::ops::AddAssign;

use super::{LeftPaddedBatch, Sequence};

/// Packs sequences into [`LeftPaddedBatch`]es under a budget of padded tokens.
///
/// The budget counts what a rectangular batch holds: longest row × rows ≤ `max_batch_tokens`. A sequence longer
/// than the budget runs alone. Batches are a pure function of the sequences, so a resumed job cuts the same ones.
#[derive(Debug, Clone, Copy)]
pub struct Packer {
    max_batch_tokens: usize,
    pad_token_id: u32,
}

/// How many tokens batches hold, and how many of them are real.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Padding {
    pub real_tokens: u64,
    pub padded_tokens: u64,
}

impl Padding {
    /// Share of the rectangular batches that padding fills, in percent.
    ///
    /// The model computes without padding; this says how ragged the batches are, and what an engine
    /// that computes rectangles would waste on them.
    pub fn waste_percent(&self) -> f64 {
        if self.padded_tokens == 0 {
            return 0.0;
        }
        100.0 * (self.padded_tokens - self.real_tokens) as f64 / self.padded_tokens as f64
    }
}

impl AddAssign for Padding {
    fn add_assign(&mut self, other: Self) {
        self.real_tokens += other.real_tokens;
        self.padded_tokens += other.padded_tokens;
    }
}

impl Packer {
    /// A packer whose batches hold at most `max_batch_tokens` tokens, padding included.
    pub fn new(max_batch_tokens: usize, pad_token_id: u32) -> Self {
        Self { max_batch_tokens, pad_token_id }
    }

    /// Cuts `sequences` into batches, longest first, each of neighbours in length.
    ///
    /// Longest first, so that what needs most memory is met at once and not at the end.
    pub fn pack(&self, mut sequences: Vec<Sequence>) -> Vec<LeftPaddedBatch> {
        // Stable: equal lengths stay in row order, which keeps the cut deterministic.
        sequences.sort_by_key(|s| std::cmp::Reverse(s.input_ids.len()));
        let mut batches = Vec::new();
        let mut rest = &sequences[..];
        while let Some(longest) = rest.first() {
            let width = longest.input_ids.len().max(1);
            let rows = (self.max_batch_tokens / width).clamp(1, rest.len());
            let (batch, later) = rest.split_at(rows);
            batches.push(LeftPaddedBatch::new(batch, self.pad_token_id));
            rest = later;
        }
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sequences(lengths: &[usize]) -> Vec<Sequence> {
        lengths.iter().enumerate().map(|(row, &n)| Sequence { row, input_ids: vec![row as u32 + 1; n] }).collect()
    }

    #[test]
    fn similar_lengths_share_a_batch() {
        let batches = Packer::new(20, 0).pack(sequences(&[2, 9, 3, 10]));
        let rows: Vec<_> = batches.iter().map(|b| b.rows().to_vec()).collect();
        assert_eq!(rows, [vec![3, 1], vec![2, 0]]);
        assert_eq!(batches[0].padded_tokens(), 20);
    }

    #[test]
    fn a_row_over_the_budget_runs_alone() {
        let batches = Packer::new(8, 0).pack(sequences(&[20, 1, 30, 2]));
        let rows: Vec<_> = batches.iter().map(|b| b.rows().to_vec()).collect();
        assert_eq!(rows, [vec![2], vec![0], vec![3, 1]]);
    }

    #[test]
    fn nothing_packs_to_nothing() {
        assert!(Packer::new(8, 0).pack(Vec::new()).is_empty());
    }

    #[test]
    fn waste_counts_padding_only() {
        let mut padding = Padding { real_tokens: 6, padded_tokens: 8 };
        padding += Padding { real_tokens: 2, padded_tokens: 2 };
        assert_eq!(padding.waste_percent(), 20.0);
        assert_eq!(Padding::default().waste_percent(), 0.0);
    }

    proptest! {
        #[test]
        fn every_row_comes_out_once_and_every_batch_keeps_the_budget(
            lengths in prop::collection::vec(1usize..200, 0..300),
            budget in 1usize..1000,
        ) {
            let batches = Packer::new(budget, 0).pack(sequences(&lengths));
            let mut seen = vec![0; lengths.len()];
            for batch in &batches {
                prop_assert!(batch.padded_tokens() <= budget || batch.num_rows() == 1);
                for (b, &row) in batch.rows().iter().enumerate() {
                    seen[row] += 1;
                    prop_assert_eq!(batch.row_input_ids(b), &vec![row as u32 + 1; lengths[row]][..]);
                }
            }
            prop_assert!(seen.iter().all(|&times| times == 1));
        }

        #[test]
        fn the_cut_does_not_depend_on_the_order_of_distinct_lengths(
            order in Just((1usize..60).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let widths = |lengths: &[usize]| -> Vec<Vec<usize>> {
                Packer::new(256, 0).pack(sequences(lengths)).iter().map(|b| b.seq_lens().to_vec()).collect()
            };
            let mut sorted = order.clone();
            sorted.sort_unstable();
            prop_assert_eq!(widths(&order), widths(&sorted));
        }
    }
}
