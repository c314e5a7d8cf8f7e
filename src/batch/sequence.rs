//! One tokenized text on its way to the model.

/// The token ids of one text, or of one chunk of a long one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Which sequence of its window this is: the row's number, but for the extra chunks of long texts.
    pub row: usize,
    /// Token ids with the tokenizer's special tokens, without padding; never empty.
    pub input_ids: Vec<u32>,
}
