//! MistralForCausalLM, reading: how likely each token of a text is, given those before it.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, UInt32Array};
use arrow::datatypes::{DataType, Field};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::{Head, HeadOutput, TokenLogprob, check_architecture};
use crate::batch::PackedBatch;
use crate::error::Result;
use crate::kernels::Linear;
use crate::kernels::{self, cuda};
use crate::model::{Architecture, Checkpoint, MistralModel};
use crate::text::{TextTokenizer, TokenDetail};

/// Positions whose logits are held at a time: `[256, vocab_size]`, 32 MiB for a vocabulary of 32,768.
const LOGITS_BLOCK: usize = 256;
/// The same on a CUDA device, where wide products are fast: 256 MiB for that vocabulary.
const DEVICE_LOGITS_BLOCK: usize = 2048;

/// Log-likelihoods by a causal language model.
#[derive(Debug)]
pub struct Score {
    /// `[vocab_size, hidden]`
    lm_head: Linear,
    /// Names the tokens of `token_logprobs`, where they are asked for.
    tokenizer: Option<TextTokenizer>,
}

impl Score {
    /// Reads the head's weights; with a `tokenizer`, each token's log-probability is listed as well.
    ///
    /// # Errors
    /// As [`Score::check`], and [`crate::Error::Config`] when `lm_head.weight` is unusable.
    pub fn load(checkpoint: &Checkpoint, tokenizer: Option<TextTokenizer>, device: &Device) -> Result<Self> {
        Self::check(checkpoint)?;
        Ok(Self { lm_head: Linear::new(&checkpoint.lm_head(device)?)?, tokenizer })
    }

    /// Accepts a causal language model.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when the checkpoint is none.
    pub fn check(checkpoint: &Checkpoint) -> Result<()> {
        check_architecture(checkpoint, "score", &[Architecture::CausalLm])
    }

    /// The result columns, in order.
    pub fn fields_of(token_logprobs: bool) -> Vec<Field> {
        let mut fields = vec![
            Field::new("logprob", DataType::Float64, true),
            Field::new("scored_tokens", DataType::UInt32, true),
            Field::new("perplexity", DataType::Float64, true),
        ];
        if token_logprobs {
            fields.push(TokenLogprob::field());
        }
        fields
    }

    /// Log-probabilities of `targets`, one for each of `hidden_states` `[positions, hidden]`.
    fn logprobs(&self, hidden_states: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
        if hidden_states.device().is_cuda() {
            return self.logprobs_on_device(hidden_states, targets);
        }
        let vocab_size = self.lm_head.outputs();
        let mut logprobs = Vec::with_capacity(targets.len());
        for (block, targets) in targets.chunks(LOGITS_BLOCK).enumerate() {
            let hidden_states = hidden_states.narrow(0, block * LOGITS_BLOCK, targets.len())?;
            let logits = self.lm_head.forward(&hidden_states)?.flatten_all()?.to_vec1::<f32>()?; // [block · vocab_size]
            logprobs.par_extend(
                logits.par_chunks(vocab_size).zip(targets).map(|(logits, &target)| log_softmax(logits, target)),
            );
        }
        Ok(logprobs)
    }

    /// The same on a CUDA device: only the log-probabilities come to the host.
    fn logprobs_on_device(&self, hidden_states: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
        let mut blocks = Vec::new();
        for (block, targets) in targets.chunks(DEVICE_LOGITS_BLOCK).enumerate() {
            let hidden_states = hidden_states.narrow(0, block * DEVICE_LOGITS_BLOCK, targets.len())?;
            let logits = self.lm_head.forward(&hidden_states)?; // [block, vocab_size]
            let targets = kernels::indices(targets, hidden_states.device())?;
            blocks.push(cuda::Download::begin(&cuda::target_logprobs(&logits, &targets)?)?);
        }
        let mut logprobs = Vec::with_capacity(targets.len());
        for block in blocks {
            logprobs.extend(block.f32()?);
        }
        Ok(logprobs)
    }
}

impl Head for Score {
    fn fields(&self) -> Vec<Field> {
        Self::fields_of(self.tokenizer.is_some())
    }

    fn forward(&self, model: &MistralModel, batch: &PackedBatch, details: &[&TokenDetail]) -> Result<Vec<HeadOutput>> {
        // The hidden state at a position tells the token after it; nothing tells a sequence's first.
        let scored: Vec<_> = details
            .iter()
            .enumerate()
            .map(|(b, detail)| {
                let range = batch.range(b);
                (range.start + detail.context_len.max(1)).min(range.end)..range.end
            })
            .collect();
        let positions: Vec<u32> = scored.iter().cloned().flatten().map(|token| token as u32 - 1).collect();
        if positions.is_empty() {
            return Ok(vec![HeadOutput::Logprobs(Vec::new()); scored.len()]);
        }
        let targets: Vec<u32> = scored.iter().cloned().flatten().map(|token| batch.input_ids[token]).collect();
        let hidden_states = model.forward_at(batch, &positions)?; // [positions, hidden]
        let logprobs = self.logprobs(&hidden_states, &targets)?;
        let mut tokens =
            targets.into_iter().zip(logprobs).map(|(token_id, logprob)| TokenLogprob { token_id, logprob });
        Ok(scored.into_iter().map(|range| HeadOutput::Logprobs(tokens.by_ref().take(range.len()).collect())).collect())
    }

    /// The tokens of all chunks; but a text to score is never cut into several.
    fn merge(&self, chunks: Vec<HeadOutput>) -> HeadOutput {
        HeadOutput::Logprobs(chunks.iter().flat_map(HeadOutput::logprobs).copied().collect())
    }

    fn columns(&self, rows: &[Option<HeadOutput>]) -> Result<Vec<ArrayRef>> {
        let tokens = || rows.iter().map(|row| row.as_ref().map(HeadOutput::logprobs));
        let logprobs: Float64Array = tokens().map(|tokens| tokens.map(sum)).collect();
        let scored: UInt32Array = tokens().map(|tokens| tokens.map(|tokens| tokens.len() as u32)).collect();
        let perplexity: Float64Array = tokens().map(|tokens| tokens.and_then(perplexity)).collect();
        let mut columns: Vec<ArrayRef> = vec![Arc::new(logprobs), Arc::new(scored), Arc::new(perplexity)];
        if let Some(tokenizer) = &self.tokenizer {
            columns.push(TokenLogprob::column(tokens(), tokenizer));
        }
        Ok(columns)
    }
}

/// The logarithm of `target`'s share in the softmax of `logits`.
fn log_softmax(logits: &[f32], target: u32) -> f32 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // Tens of thousands of small terms: summed in f64.
    let total: f64 = logits.iter().map(|logit| f64::from((logit - highest).exp())).sum();
    (f64::from(logits[target as usize] - highest) - total.ln()) as f32
}

fn sum(tokens: &[TokenLogprob]) -> f64 {
    // Not `sum()`, which is −0.0 for no token.
    tokens.iter().fold(0.0, |sum, token| sum + f64::from(token.logprob))
}

/// exp(−mean log-probability); none without a token.
fn perplexity(tokens: &[TokenLogprob]) -> Option<f64> {
    (!tokens.is_empty()).then(|| (-sum(tokens) / tokens.len() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Array, AsArray};
    use arrow::datatypes::{Float64Type, UInt32Type};

    #[test]
    fn log_softmax_is_the_logarithm_of_the_share() {
        assert!((log_softmax(&[0.0, 3f32.ln()], 1) - 0.75f32.ln()).abs() < 1e-6);
        assert_eq!(log_softmax(&[1000.0, 0.0], 1), -1000.0, "neither overflow nor minus infinity");
    }

    #[test]
    fn a_text_without_a_scored_token_has_no_perplexity() {
        let lm_head = Tensor::zeros((1, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
        let head = Score { lm_head: Linear::new(&lm_head).unwrap(), tokenizer: None };
        let tokens = [-1.0, -3.0].map(|logprob| TokenLogprob { token_id: 7, logprob }).to_vec();
        let rows = [Some(HeadOutput::Logprobs(tokens)), Some(HeadOutput::Logprobs(Vec::new())), None];
        let columns = head.columns(&rows).unwrap();
        for (column, field) in columns.iter().zip(head.fields()) {
            assert_eq!(column.data_type(), field.data_type());
        }
        let logprobs: Vec<_> = columns[0].as_primitive::<Float64Type>().iter().collect();
        assert_eq!(logprobs, [Some(-4.0), Some(0.0), None]);
        let scored: Vec<_> = columns[1].as_primitive::<UInt32Type>().iter().collect();
        assert_eq!(scored, [Some(2), Some(0), None]);
        let perplexities = columns[2].as_primitive::<Float64Type>();
        assert_eq!(perplexities.value(0), 2f64.exp());
        assert!(perplexities.is_null(1) && perplexities.is_null(2));
    }
}
