//! The rectangular batch that rows are planned in, and the padding-free form that is computed.

use super::Sequence;

/// A batch whose rows end at column T − 1, shorter ones padded on the left.
///
/// With lengths 3 and 1 and padding 0:
///
/// ```text
/// input_ids  [B, T] = 5 6 7
///                     0 0 8
/// seq_lens   [B]    = 3 1
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftPaddedBatch {
    /// `[B, T]`, row by row.
    input_ids: Vec<u32>,
    /// Real tokens of each row, `[B]`.
    seq_lens: Vec<usize>,
    /// [`Sequence::row`] of each row, `[B]`.
    rows: Vec<usize>,
    /// T: the longest row.
    width: usize,
}

/// The same tokens without padding, sequences end to end: what the model computes.
///
/// The batch above unpads to
///
/// ```text
/// input_ids     [N]     = 5 6 7 8
/// position_ids  [N]     = 0 1 2 0
/// cu_seq_lens   [B + 1] = 0 3 4
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedBatch {
    /// Token ids, `[N]`.
    pub input_ids: Vec<u32>,
    /// Position of each token in its own sequence, from its first real token, `[N]`.
    pub position_ids: Vec<u32>,
    /// Cumulative lengths, `[B + 1]`: sequence b is tokens `cu_seq_lens[b]..cu_seq_lens[b + 1]`.
    pub cu_seq_lens: Vec<u32>,
}

impl LeftPaddedBatch {
    /// Pads `sequences` on the left with `pad_token_id` to the longest of them.
    ///
    /// The padding id is never computed on, so any id of the vocabulary does.
    pub fn new(sequences: &[Sequence], pad_token_id: u32) -> Self {
        let width = sequences.iter().map(|s| s.input_ids.len()).max().unwrap_or(0);
        let mut input_ids = Vec::with_capacity(width * sequences.len());
        for sequence in sequences {
            input_ids.resize(input_ids.len() + width - sequence.input_ids.len(), pad_token_id);
            input_ids.extend_from_slice(&sequence.input_ids);
        }
        Self {
            input_ids,
            seq_lens: sequences.iter().map(|s| s.input_ids.len()).collect(),
            rows: sequences.iter().map(|s| s.row).collect(),
            width,
        }
    }

    /// Token ids with padding, `[B, T]` row by row.
    pub fn input_ids(&self) -> &[u32] {
        &self.input_ids
    }

    /// Real tokens of each row, `[B]`.
    pub fn seq_lens(&self) -> &[usize] {
        &self.seq_lens
    }

    /// [`Sequence::row`] of each row, `[B]`: where its result belongs.
    pub fn rows(&self) -> &[usize] {
        &self.rows
    }

    /// B, the number of rows.
    pub fn num_rows(&self) -> usize {
        self.rows.len()
    }

    /// T, the length of the longest row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Tokens with padding: B · T, what the budget bounds.
    pub fn padded_tokens(&self) -> usize {
        self.width * self.num_rows()
    }

    /// Tokens without padding.
    pub fn real_tokens(&self) -> usize {
        self.seq_lens.iter().sum()
    }

    /// The real tokens of row `b`.
    pub fn row_input_ids(&self, b: usize) -> &[u32] {
        let end = (b + 1) * self.width;
        &self.input_ids[end - self.seq_lens[b]..end]
    }

    /// The same rows in two batches of half as many, or `None` for a single row.
    pub fn halves(&self) -> Option<[Self; 2]> {
        let middle = self.num_rows() / 2;
        let part = |rows: std::ops::Range<usize>| Self {
            input_ids: self.input_ids[rows.start * self.width..rows.end * self.width].to_vec(),
            seq_lens: self.seq_lens[rows.clone()].to_vec(),
            rows: self.rows[rows].to_vec(),
            width: self.width,
        };
        (middle > 0).then(|| [part(0..middle), part(middle..self.num_rows())])
    }

    /// Drops the padding: the door through which a batch goes to the model.
    pub fn unpad(&self) -> PackedBatch {
        let real_tokens = self.real_tokens();
        let mut packed = PackedBatch {
            input_ids: Vec::with_capacity(real_tokens),
            position_ids: Vec::with_capacity(real_tokens),
            cu_seq_lens: Vec::with_capacity(self.num_rows() + 1),
        };
        packed.cu_seq_lens.push(0);
        for b in 0..self.num_rows() {
            packed.input_ids.extend_from_slice(self.row_input_ids(b));
            packed.position_ids.extend(0..self.seq_lens[b] as u32);
            packed.cu_seq_lens.push(packed.input_ids.len() as u32);
        }
        packed
    }
}

impl PackedBatch {
    /// B, the number of sequences.
    pub fn num_sequences(&self) -> usize {
        self.cu_seq_lens.len() - 1
    }

    /// N, the number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Where sequence `b` lies among the N tokens.
    pub fn range(&self, b: usize) -> std::ops::Range<usize> {
        self.cu_seq_lens[b] as usize..self.cu_seq_lens[b + 1] as usize
    }

    /// The longest sequence, in tokens.
    pub fn max_seq_len(&self) -> usize {
        (0..self.num_sequences()).map(|b| self.range(b).len()).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(row: usize, input_ids: &[u32]) -> Sequence {
        Sequence { row, input_ids: input_ids.to_vec() }
    }

    #[test]
    fn pads_on_the_left_and_unpads_to_the_same_tokens() {
        let batch = LeftPaddedBatch::new(&[sequence(4, &[5, 6, 7]), sequence(2, &[8])], 0);
        assert_eq!(batch.input_ids(), [5, 6, 7, 0, 0, 8]);
        assert_eq!((batch.width(), batch.padded_tokens(), batch.real_tokens()), (3, 6, 4));
        assert_eq!(batch.rows(), [4, 2]);
        let packed = batch.unpad();
        assert_eq!(packed.input_ids, [5, 6, 7, 8]);
        assert_eq!(packed.position_ids, [0, 1, 2, 0]);
        assert_eq!(packed.cu_seq_lens, [0, 3, 4]);
        assert_eq!((packed.num_sequences(), packed.num_tokens(), packed.max_seq_len()), (2, 4, 3));
    }

    #[test]
    fn the_padding_id_does_not_reach_the_model() {
        let rows = [sequence(0, &[1, 2]), sequence(1, &[1])];
        assert_eq!(LeftPaddedBatch::new(&rows, 0).unpad(), LeftPaddedBatch::new(&rows, 9).unpad());
    }

    #[test]
    fn a_pad_id_inside_a_text_is_a_token_like_any_other() {
        let batch = LeftPaddedBatch::new(&[sequence(0, &[1, 0, 0, 2]), sequence(1, &[0])], 0);
        assert_eq!(batch.unpad().input_ids, [1, 0, 0, 2, 0]);
    }
}
