//! Entities: a prediction counts when its borders and its type are those of a true one.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::Deserialize;

use super::Hits;

/// An entity: first position, the one after the last, type. Positions count tags or characters.
pub type Span = (usize, usize, String);

/// What an `I-` tag means that does not go on with an entity of its type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum BioMode {
    /// It is no entity: seqeval's `mode="strict", scheme=IOB2`.
    #[default]
    Strict,
    /// It begins one: conlleval's reading, seqeval's default.
    Conll,
}

/// The entities of a row's BIO tags.
///
/// # Errors
/// Names a tag that is neither `O` nor begins with `B-` or `I-`.
pub fn spans_of_tags<'a>(tags: impl IntoIterator<Item = &'a str>, mode: BioMode) -> Result<Vec<Span>, String> {
    let mut spans: Vec<Span> = Vec::new();
    // Whether the last span may go on at the next tag.
    let mut open = false;
    for (position, tag) in tags.into_iter().enumerate() {
        let (begins, label) = match tag.split_once('-') {
            Some(("B", label)) => (true, label),
            Some(("I", label)) => (false, label),
            _ if tag == "O" => {
                open = false;
                continue;
            }
            _ => return Err(format!("'{tag}' is no BIO tag: expected O, B-TYPE or I-TYPE")),
        };
        match spans.last_mut() {
            Some(span) if !begins && open && span.2 == label => span.1 = position + 1,
            _ if begins || mode == BioMode::Conll => {
                spans.push((position, position + 1, label.to_owned()));
                open = true;
            }
            _ => open = false,
        }
    }
    Ok(spans)
}

/// The hits of each entity type over rows of (true spans, predicted spans), by type.
pub fn hits<'a>(rows: impl IntoIterator<Item = (&'a BTreeSet<Span>, &'a BTreeSet<Span>)>) -> BTreeMap<String, Hits> {
    let mut hits: BTreeMap<String, Hits> = BTreeMap::new();
    let mut count = |label: &String, add: fn(&mut Hits)| match hits.get_mut(label) {
        Some(hits) => add(hits),
        None => add(hits.entry(label.clone()).or_default()),
    };
    for (truth, predicted) in rows {
        truth.iter().for_each(|span| count(&span.2, |hits| hits.expected += 1));
        predicted.iter().for_each(|span| count(&span.2, |hits| hits.predicted += 1));
        truth.intersection(predicted).for_each(|span| count(&span.2, |hits| hits.correct += 1));
    }
    hits
}
