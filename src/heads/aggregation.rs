//! Tokens with label scores become entities, as transformers' token-classification pipeline groups them.
//!
//! Follows `TokenClassificationPipeline` step by step (`pipelines/token_classification.py`, 5.23).

use serde::{Deserialize, Serialize};

use super::{TaggedToken, best_label};

/// How tokens are fused into entities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Aggregation {
    /// Every token is an entity of its own.
    None,
    /// Neighbouring tokens of one label are an entity; a B- label begins a new one.
    Simple,
    /// As simple, with a word labelled as its first token is.
    First,
    /// As simple, with a word labelled by the mean of its tokens' scores.
    Average,
    /// As simple, with a word labelled as its surest token is.
    Max,
}

/// A labelled stretch of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Entity {
    pub label: String,
    pub score: f32,
    /// Its first character in the text, counted in Unicode characters.
    pub start: u32,
    /// The character after its last.
    pub end: u32,
    /// What its tokens read.
    pub word: String,
}

/// What tokens read: alone, and joined.
pub(super) trait Reader {
    /// A token as it stands in the vocabulary.
    fn token(&self, token: &TaggedToken) -> String;

    /// What tokens read together.
    fn join(&self, tokens: Vec<String>) -> String;
}

/// Groups the tokens of one text, in its order; labels are not yet ignored.
pub(super) fn aggregate(
    tokens: &[TaggedToken],
    labels: &[String],
    aggregation: Aggregation,
    reader: &impl Reader,
) -> Vec<Entity> {
    let words: Vec<Entity> = match aggregation {
        Aggregation::None | Aggregation::Simple => tokens
            .iter()
            .map(|token| labelled(&token.scores, std::slice::from_ref(token), labels, reader.token(token)))
            .collect(),
        Aggregation::First | Aggregation::Average | Aggregation::Max => {
            // A first token that goes on with a word has none to go on with.
            tokens
                .chunk_by(|_, next| next.span.continues_word)
                .map(|word| label_word(word, labels, aggregation, reader))
                .collect()
        }
    };
    if aggregation == Aggregation::None {
        return words;
    }
    let same_entity = |last: &Entity, next: &Entity| {
        let (begins, tag) = tag(&next.label);
        !begins && tag == self::tag(&last.label).1
    };
    words.chunk_by(same_entity).map(|group| join_group(group, reader)).collect()
}

/// One label for all tokens of a word.
fn label_word(word: &[TaggedToken], labels: &[String], aggregation: Aggregation, reader: &impl Reader) -> Entity {
    let text = reader.join(word.iter().map(|token| reader.token(token)).collect());
    let highest = |token: &TaggedToken| token.scores[best_label(&token.scores)];
    match aggregation {
        Aggregation::Average => {
            let mean = |label: usize| word.iter().map(|token| token.scores[label]).sum::<f32>() / word.len() as f32;
            labelled(&(0..labels.len()).map(mean).collect::<Vec<_>>(), word, labels, text)
        }
        Aggregation::Max => {
            // The first of equally sure tokens.
            let surest =
                word.iter().fold(&word[0], |best, token| if highest(token) > highest(best) { token } else { best });
            labelled(&surest.scores, word, labels, text)
        }
        _ => labelled(&word[0].scores, word, labels, text),
    }
}

/// The stretch from the first to the last of `tokens`, with the best of the labels.
fn labelled(scores: &[f32], tokens: &[TaggedToken], labels: &[String], word: String) -> Entity {
    let best = best_label(scores);
    Entity {
        label: labels[best].clone(),
        score: scores[best],
        start: tokens[0].span.start,
        end: tokens[tokens.len() - 1].span.end,
        word,
    }
}

/// Whether a label begins an entity, and which kind of entity it names. Labels that are not BIO go on.
fn tag(label: &str) -> (bool, &str) {
    match label.strip_prefix("B-") {
        Some(tag) => (true, tag),
        None => (false, label.strip_prefix("I-").unwrap_or(label)),
    }
}

fn join_group(group: &[Entity], reader: &impl Reader) -> Entity {
    let first = &group[0];
    Entity {
        // What the pipeline shows follows the first dash of any label, be it BIO or not.
        label: first.label.split_once('-').map_or(&first.label[..], |(_, tag)| tag).to_owned(),
        score: group.iter().map(|entity| entity.score).sum::<f32>() / group.len() as f32,
        start: first.start,
        end: group[group.len() - 1].end,
        word: reader.join(group.iter().map(|entity| entity.word.clone()).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::TokenSpan;

    /// A token is three letters; tokens are joined as they are.
    struct Letters;

    impl Reader for Letters {
        fn token(&self, token: &TaggedToken) -> String {
            char::from(b'a' + token.span.index as u8).to_string()
        }

        fn join(&self, tokens: Vec<String>) -> String {
            tokens.concat()
        }
    }

    /// Tokens "a", "b", … of which those in `goes_on` continue a word.
    fn tokens(scores: &[[f32; 3]], goes_on: &[u32]) -> Vec<TaggedToken> {
        let token = |(index, scores): (u32, &[f32; 3])| TaggedToken {
            span: TokenSpan {
                token_id: 0,
                index,
                position: index + 1,
                start: index,
                end: index + 1,
                continues_word: goes_on.contains(&index),
                unknown_text: None,
            },
            scores: scores.to_vec(),
        };
        (0..).zip(scores).map(token).collect()
    }

    fn entities(aggregation: Aggregation, tokens: &[TaggedToken]) -> Vec<(String, String, f32)> {
        let labels = ["O", "B-X", "I-X"].map(str::to_owned);
        aggregate(tokens, &labels, aggregation, &Letters).into_iter().map(|e| (e.label, e.word, e.score)).collect()
    }

    fn entity(label: &str, word: &str, score: f32) -> (String, String, f32) {
        (label.to_owned(), word.to_owned(), score)
    }

    const O: [f32; 3] = [1.0, 0.0, 0.0];
    const B: [f32; 3] = [0.0, 1.0, 0.0];
    const I: [f32; 3] = [0.0, 0.0, 1.0];

    #[test]
    fn a_b_label_begins_an_entity_and_an_i_label_goes_on() {
        let tokens = tokens(&[B, I, B, O, I, I], &[]);
        let expected = [entity("X", "ab", 1.0), entity("X", "c", 1.0), entity("O", "d", 1.0), entity("X", "ef", 1.0)];
        assert_eq!(entities(Aggregation::Simple, &tokens), expected);
        let labels: Vec<_> = entities(Aggregation::None, &tokens).into_iter().map(|(label, ..)| label).collect();
        assert_eq!(labels, ["B-X", "I-X", "B-X", "O", "I-X", "I-X"]);
    }

    #[test]
    fn a_word_has_one_label() {
        // The word "ab": its first token is O, its surest is B, its mean is O.
        let tokens = tokens(&[[0.6, 0.4, 0.0], [0.2, 0.7, 0.1], O], &[1]);
        let word = |aggregation| entities(aggregation, &tokens)[0].clone();
        assert_eq!(word(Aggregation::First).0, "O");
        assert_eq!(word(Aggregation::Max), entity("X", "ab", 0.7));
        let (label, text, score) = word(Aggregation::Average);
        assert_eq!((label.as_str(), text.as_str()), ("X", "ab"));
        assert!((score - 0.55).abs() < 1e-6);
    }

    #[test]
    fn no_tokens_are_no_entities() {
        for aggregation in [Aggregation::None, Aggregation::Simple, Aggregation::First] {
            assert!(entities(aggregation, &[]).is_empty());
        }
    }
}
