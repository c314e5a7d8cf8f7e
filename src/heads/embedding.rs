//! MistralModel: one vector per text.

use std::sync::Arc;

use arrow::array::{ArrayRef, FixedSizeListArray, Float32Array};
use arrow::buffer::NullBuffer;
use arrow::datatypes::{DataType, Field};
use serde::{Deserialize, Serialize};

use super::{Head, HeadOutput, check_architecture};
use crate::batch::PackedBatch;
use crate::error::Result;
use crate::kernels;
use crate::model::{Architecture, Checkpoint, MistralModel};
use crate::text::TokenDetail;

/// Below this length a vector is not scaled up any more, as in torch's `normalize`.
const SHORTEST_NORM: f32 = 1e-12;

/// Which hidden states make the vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// That of the last token, which saw the whole text.
    Last,
    /// The mean over all tokens, special ones included.
    Mean,
}

/// Settings of `embed` that shape its results.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EmbedOptions {
    pub pooling: Pooling,
    /// Scales every vector to length one.
    pub normalize: bool,
    /// Ends every text with the end-of-sequence token.
    pub append_eos: bool,
}

/// The headless head: pooled hidden states after the final norm.
#[derive(Debug)]
pub struct Embedding {
    options: EmbedOptions,
    hidden_size: usize,
}

impl Embedding {
    /// A head for the checkpoint; it has no weights of its own.
    ///
    /// # Errors
    /// As [`Embedding::check`].
    pub fn new(checkpoint: &Checkpoint, options: EmbedOptions) -> Result<Self> {
        Self::check(checkpoint)?;
        Ok(Self { options, hidden_size: checkpoint.config.hidden_size })
    }

    /// Accepts a base model, also inside of a causal language model, whose last layer is one to embed with.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when the checkpoint was trained to classify.
    pub fn check(checkpoint: &Checkpoint) -> Result<()> {
        check_architecture(checkpoint, "embed", &[Architecture::Base, Architecture::CausalLm])
    }

    /// `embedding`: FixedSizeList<Float32, hidden>.
    pub fn fields_of(hidden_size: usize) -> Vec<Field> {
        vec![Field::new("embedding", DataType::FixedSizeList(item(), hidden_size as i32), true)]
    }
}

impl Head for Embedding {
    fn fields(&self) -> Vec<Field> {
        Self::fields_of(self.hidden_size)
    }

    fn forward(&self, model: &MistralModel, batch: &PackedBatch, _: &[&TokenDetail]) -> Result<Vec<HeadOutput>> {
        let vectors = match self.options.pooling {
            Pooling::Last => {
                let last: Vec<u32> = batch.cu_seq_lens[1..].iter().map(|end| end - 1).collect();
                kernels::host_rows(&model.forward_at(batch, &last)?)? // [B, hidden]
            }
            Pooling::Mean => kernels::mean_rows(&model.forward(batch)?, &batch.cu_seq_lens)?, // [B, hidden]
        };
        Ok(vectors.into_iter().map(HeadOutput::Values).collect())
    }

    /// Chunks of one text count alike: their vectors are averaged, and only then scaled.
    fn merge(&self, chunks: Vec<HeadOutput>) -> HeadOutput {
        let count = chunks.len() as f32;
        let mut sum = vec![0.0; self.hidden_size];
        for chunk in &chunks {
            sum.iter_mut().zip(chunk.values()).for_each(|(sum, value)| *sum += value);
        }
        let mut mean: Vec<f32> = sum.into_iter().map(|sum| sum / count).collect();
        if self.options.normalize {
            let norm = mean.iter().map(|value| value * value).sum::<f32>().sqrt().max(SHORTEST_NORM);
            mean.iter_mut().for_each(|value| *value /= norm);
        }
        HeadOutput::Values(mean)
    }

    fn columns(&self, rows: &[Option<HeadOutput>]) -> Result<Vec<ArrayRef>> {
        let mut values = Vec::with_capacity(rows.len() * self.hidden_size);
        for row in rows {
            match row {
                Some(output) => values.extend_from_slice(output.values()),
                None => values.resize(values.len() + self.hidden_size, 0.0), // a null row has its place all the same
            }
        }
        let nulls: NullBuffer = rows.iter().map(Option::is_some).collect();
        let values = Arc::new(Float32Array::from(values));
        Ok(vec![Arc::new(FixedSizeListArray::try_new(item(), self.hidden_size as i32, values, Some(nulls))?)])
    }
}

fn item() -> Arc<Field> {
    Arc::new(Field::new("item", DataType::Float32, false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Array, AsArray};
    use arrow::datatypes::Float32Type;

    fn head(normalize: bool) -> Embedding {
        Embedding { options: EmbedOptions { pooling: Pooling::Last, normalize, append_eos: false }, hidden_size: 2 }
    }

    #[test]
    fn chunks_are_averaged_and_then_scaled() {
        let chunks = || vec![HeadOutput::Values(vec![6.0, 0.0]), HeadOutput::Values(vec![0.0, 8.0])];
        assert_eq!(head(false).merge(chunks()), HeadOutput::Values(vec![3.0, 4.0]));
        assert_eq!(head(true).merge(chunks()), HeadOutput::Values(vec![0.6, 0.8]));
        assert_eq!(
            head(true).merge(vec![HeadOutput::Values(vec![0.0, 0.0])]),
            HeadOutput::Values(vec![0.0, 0.0]),
            "no NaN"
        );
    }

    #[test]
    fn a_row_without_a_result_is_null() {
        let columns = head(false).columns(&[Some(HeadOutput::Values(vec![1.0, 2.0])), None]).unwrap();
        assert_eq!(columns[0].data_type(), head(false).fields()[0].data_type());
        assert_eq!((columns[0].len(), columns[0].is_null(0), columns[0].is_null(1)), (2, false, true));
        let first = columns[0].as_fixed_size_list().value(0);
        assert_eq!(first.as_primitive::<Float32Type>().values(), &[1.0, 2.0]);
    }
}
