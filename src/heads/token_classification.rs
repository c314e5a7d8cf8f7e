//! MistralForTokenClassification: labelled stretches of each text.
//!
//! A text over the limit is computed in overlapping windows whose tokens are joined again before they are grouped, so
//! that no entity is lost, doubled or cut at a seam. A token is taken from the first window that holds it: the model
//! looks backwards only, and there it sees most of the text before it.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Builder, ListBuilder, StringBuilder, StructBuilder, UInt32Builder};
use arrow::datatypes::{DataType, Field, Fields};
use candle_core::{Device, Tensor};
use serde::Serialize;

use super::aggregation::{Aggregation, Entity, Reader, aggregate};
use super::{Head, HeadOutput, TaggedToken, check_architecture, softmax};
use crate::batch::PackedBatch;
use crate::error::Result;
use crate::kernels;
use crate::model::{Architecture, Checkpoint, MistralModel};
use crate::text::{TextTokenizer, TokenDetail};

/// Settings of `tag` that shape its results.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TagOptions {
    pub aggregation: Aggregation,
    /// Entities of these labels are left out.
    pub ignore_labels: Vec<String>,
}

/// The head of a MistralForTokenClassification checkpoint.
#[derive(Debug)]
pub struct TokenClassification {
    /// `[labels, hidden]`
    score: Tensor,
    /// Of each label.
    bias: Vec<f32>,
    labels: Vec<String>,
    /// Tells what tokens read.
    tokenizer: TextTokenizer,
    options: TagOptions,
}

impl TokenClassification {
    /// Reads the head's weights.
    ///
    /// # Errors
    /// As [`TokenClassification::check`], and [`crate::Error::Config`] when the weights are unusable.
    pub fn load(
        checkpoint: &Checkpoint,
        options: TagOptions,
        tokenizer: TextTokenizer,
        device: &Device,
    ) -> Result<Self> {
        Self::check(checkpoint)?;
        let config = &checkpoint.config;
        let labels = config.num_labels();
        Ok(Self {
            score: checkpoint.hidden_matrix("score.weight", &[labels, config.hidden_size], device)?,
            bias: checkpoint.weights.tensor("score.bias", &[labels], &Device::Cpu)?.to_vec1()?,
            labels: config.labels.clone(),
            tokenizer,
            options,
        })
    }

    /// Accepts a token classifier.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when the checkpoint is none.
    pub fn check(checkpoint: &Checkpoint) -> Result<()> {
        check_architecture(checkpoint, "tag", &[Architecture::TokenClassification])
    }

    /// `entities`: List<Struct{entity, score, start, end, word}>.
    pub fn fields_of() -> Vec<Field> {
        vec![Field::new("entities", DataType::List(Arc::new(entity_item())), true)]
    }

    fn entities(&self, tokens: &[TaggedToken]) -> Vec<Entity> {
        let mut entities = aggregate(tokens, &self.labels, self.options.aggregation, &self.tokenizer);
        entities.retain(|entity| !self.options.ignore_labels.contains(&entity.label));
        entities
    }
}

impl Head for TokenClassification {
    fn fields(&self) -> Vec<Field> {
        Self::fields_of()
    }

    fn forward(&self, model: &MistralModel, batch: &PackedBatch, details: &[&TokenDetail]) -> Result<Vec<HeadOutput>> {
        let positions: Vec<u32> = details
            .iter()
            .enumerate()
            .flat_map(|(b, detail)| detail.spans.iter().map(move |span| batch.cu_seq_lens[b] + span.position))
            .collect();
        if positions.is_empty() {
            return Ok(vec![HeadOutput::Tags(Vec::new()); details.len()]);
        }
        let hidden_states = model.forward_at(batch, &positions)?; // [positions, hidden]
        let mut logits = kernels::project(&hidden_states, &self.score)?; // [positions, labels]
        logits.iter_mut().for_each(|row| row.iter_mut().zip(&self.bias).for_each(|(logit, bias)| *logit += bias));
        let mut logits = logits.into_iter();
        let tagged = |detail: &&TokenDetail| {
            let tokens = detail.spans.iter().zip(logits.by_ref());
            HeadOutput::Tags(
                tokens.map(|(span, logits)| TaggedToken { span: span.clone(), scores: softmax(&logits) }).collect(),
            )
        };
        Ok(details.iter().map(tagged).collect())
    }

    /// The tokens of the whole text, each from the first window that holds it.
    fn merge(&self, chunks: Vec<HeadOutput>) -> HeadOutput {
        let mut joined: Vec<TaggedToken> = Vec::new();
        for chunk in chunks {
            let HeadOutput::Tags(tokens) = chunk else { continue };
            let next = joined.last().map_or(0, |token| token.span.index + 1);
            joined.extend(tokens.into_iter().filter(|token| token.span.index >= next));
        }
        HeadOutput::Tags(joined)
    }

    fn columns(&self, rows: &[Option<HeadOutput>]) -> Result<Vec<ArrayRef>> {
        let entries = StructBuilder::new(
            entity_fields(),
            vec![
                Box::new(StringBuilder::new()) as Box<_>,
                Box::new(Float32Builder::new()),
                Box::new(UInt32Builder::new()),
                Box::new(UInt32Builder::new()),
                Box::new(StringBuilder::new()),
            ],
        );
        let mut list = ListBuilder::new(entries).with_field(entity_item());
        for row in rows {
            for entity in row.iter().flat_map(|output| self.entities(output.tags())) {
                let entry = list.values();
                if let Some(labels) = entry.field_builder::<StringBuilder>(0) {
                    labels.append_value(&entity.label);
                }
                if let Some(scores) = entry.field_builder::<Float32Builder>(1) {
                    scores.append_value(entity.score);
                }
                for (field, offset) in [(2, entity.start), (3, entity.end)] {
                    if let Some(offsets) = entry.field_builder::<UInt32Builder>(field) {
                        offsets.append_value(offset);
                    }
                }
                if let Some(words) = entry.field_builder::<StringBuilder>(4) {
                    words.append_value(&entity.word);
                }
                entry.append(true);
            }
            list.append(row.is_some());
        }
        Ok(vec![Arc::new(list.finish())])
    }
}

impl Reader for TextTokenizer {
    fn token(&self, token: &TaggedToken) -> String {
        match &token.span.unknown_text {
            Some(text) => text.to_string(),
            None => TextTokenizer::token(self, token.span.token_id).unwrap_or_default(),
        }
    }

    fn join(&self, tokens: Vec<String>) -> String {
        self.tokens_to_string(tokens)
    }
}

fn entity_fields() -> Fields {
    Fields::from(vec![
        Field::new("entity", DataType::Utf8, false),
        Field::new("score", DataType::Float32, false),
        Field::new("start", DataType::UInt32, false),
        Field::new("end", DataType::UInt32, false),
        Field::new("word", DataType::Utf8, false),
    ])
}

fn entity_item() -> Field {
    Field::new("item", DataType::Struct(entity_fields()), false)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use arrow::array::{Array, AsArray};
    use proptest::prelude::*;

    use super::*;
    use crate::text::TokenSpan;

    /// A head of the golden checkpoint's labels: O, B-PER, I-PER, B-LOC, I-LOC.
    fn head() -> TokenClassification {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/checkpoints/tagger-bio");
        let checkpoint = Checkpoint::open(dir.to_str().unwrap()).unwrap();
        let tokenizer = TextTokenizer::open(&dir, usize::MAX).unwrap();
        let options = TagOptions { aggregation: Aggregation::Simple, ignore_labels: vec!["O".into()] };
        TokenClassification::load(&checkpoint, options, tokenizer, &Device::Cpu).unwrap()
    }

    /// A token whose scores say `label`, the more surely the later its window.
    fn token(index: u32, label: usize, window: usize) -> TaggedToken {
        let mut scores = vec![0.0; 5];
        scores[label] = 0.5 + window as f32 / 1000.0;
        let span = TokenSpan {
            token_id: 270,
            index,
            position: 1 + index,
            start: index,
            end: index + 1,
            continues_word: false,
            unknown_text: None,
        };
        TaggedToken { span, scores }
    }

    proptest! {
        #[test]
        fn windows_join_to_each_token_once_from_its_first_window(
            labels in prop::collection::vec(0usize..5, 1..60),
            width in 2usize..20,
            overlap in 0usize..19,
        ) {
            let step = width - overlap.min(width - 1);
            let mut windows = Vec::new();
            let mut first_window = vec![None; labels.len()];
            let mut start = 0;
            loop {
                let end = labels.len().min(start + width);
                let window = windows.len();
                first_window[start..end].iter_mut().for_each(|first| { first.get_or_insert(window); });
                windows.push(HeadOutput::Tags(
                    (start..end).map(|index| token(index as u32, labels[index], window)).collect(),
                ));
                if end == labels.len() {
                    break;
                }
                start += step;
            }
            let expected: Vec<_> = labels
                .iter()
                .enumerate()
                .map(|(index, &label)| token(index as u32, label, first_window[index].unwrap()))
                .collect();
            let merged = head().merge(windows);
            prop_assert_eq!(merged, HeadOutput::Tags(expected));
        }
    }

    #[test]
    fn a_text_without_entities_has_an_empty_list_and_a_null_none() {
        let head = head();
        let rows = [Some(HeadOutput::Tags(vec![token(0, 0, 0)])), None, Some(HeadOutput::Tags(vec![token(0, 3, 0)]))];
        let columns = head.columns(&rows).unwrap();
        assert_eq!(columns[0].data_type(), head.fields()[0].data_type());
        let lists = columns[0].as_list::<i32>();
        assert_eq!((lists.value_length(0), lists.is_null(1), lists.value_length(2)), (0, true, 1));
        assert_eq!(lists.value(2).as_struct().column(0).as_string::<i32>().value(0), "LOC");
    }
}
