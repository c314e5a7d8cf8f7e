//! Completions that keep to a grammar: one of some choices, JSON of a schema, or a regular expression.
//!
//! llguidance tells for each state of a grammar which tokens may come next. A completion ends where the grammar can end:
//! by a stop token, which is allowed there only, or of itself where nothing else could follow.

use std::fmt;
use std::sync::{Arc, Mutex};

use llguidance::api::{ParserLimits, StopReason, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::{Matcher, ParserFactory, regex_to_lark};
use serde::Serialize;
use serde_json::Value;
use toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie};

use crate::error::one_line;
use crate::text::TokenBytes;

/// Whitespace that may stand between the parts of a JSON text, once: without a bound models lose themselves in it.
const JSON_WHITESPACE: &str = r"\x20";

/// What a completion has to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Grammar {
    /// One of these texts.
    Choices(Vec<String>),
    /// JSON that is valid against this schema, itself JSON.
    JsonSchema(String),
    /// A text that matches as a whole.
    Regex(String),
}

impl Grammar {
    /// The flag that asks for it.
    pub fn flag(&self) -> &'static str {
        match self {
            Self::Choices(_) => "--choices",
            Self::JsonSchema(_) => "--json-schema",
            Self::Regex(_) => "--regex",
        }
    }

    /// Looks for what can be told without a tokenizer.
    ///
    /// # Errors
    /// A message that says where the grammar is wrong, or what of it is not supported.
    pub fn check(&self) -> Result<(), String> {
        matcher(self, &factory(ApproximateTokEnv::single_byte_env())?, false).map(|_| ())
    }

    /// As llguidance reads it; after a space where that begins the tokens of a text and is dropped from it.
    fn lark(&self, after_space: bool) -> Result<TopLevelGrammar, String> {
        let space = if after_space { "\" \" " } else { "" };
        // Names in capitals are one lexeme each, so that a choice may be another's beginning.
        let lark = match self {
            Self::Choices(choices) => {
                let choices = choices.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>();
                let choices = choices.map_err(|error| error.to_string())?.join(" | ");
                format!("start: TEXT\nTEXT: {space}CHOICE\nCHOICE: {choices}")
            }
            Self::Regex(pattern) => {
                format!("start: TEXT\nTEXT: {space}PATTERN\nPATTERN: /{}/", regex_to_lark(pattern, ""))
            }
            Self::JsonSchema(schema) => {
                let mut schema: Value = serde_json::from_str(schema).map_err(|error| error.to_string())?;
                if let Value::Bool(true) = schema {
                    schema = Value::Object(serde_json::Map::new());
                }
                if let Some(schema) = schema.as_object_mut() {
                    let options = serde_json::json!({ "whitespace_pattern": JSON_WHITESPACE });
                    schema.entry("x-guidance").or_insert(options);
                }
                format!("start: {space}json\njson: %json {schema}")
            }
        };
        Ok(TopLevelGrammar::from_lark(lark))
    }
}

/// A grammar compiled for a tokenizer.
#[derive(Clone)]
pub struct Constraint(Arc<Compiled>);

struct Compiled {
    grammar: Grammar,
    beginnings: Vec<Beginning>,
    /// Over bytes instead of tokens, for whole texts.
    bytes: Mutex<Matcher>,
    /// By token id.
    has_text: Vec<bool>,
    drops_first_space: bool,
}

/// A state in which completions begin: the grammar's own, or the one after a space that is dropped.
struct Beginning {
    matcher: Mutex<Matcher>,
    allowed: SimpleVob,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Constraint").field(&self.0.grammar).finish()
    }
}

impl PartialEq for Constraint {
    fn eq(&self, other: &Self) -> bool {
        self.0.grammar == other.0.grammar
    }
}

impl Constraint {
    /// Compiles a grammar for the tokens of a vocabulary.
    ///
    /// # Errors
    /// A message that says where the grammar is wrong, or what of it is not supported.
    pub fn compile(grammar: Grammar, tokens: &TokenBytes) -> Result<Self, String> {
        let bytes = matcher(&grammar, &factory(ApproximateTokEnv::single_byte_env())?, false)?;
        let factory = factory(token_env(tokens))?;
        let starts_with_space =
            |id: u32| tokens.tokens[id as usize].as_ref().is_some_and(|bytes| bytes.first() == Some(&b' '));
        let mut beginnings = Vec::new();
        for after_space in [false, true] {
            if after_space && !tokens.drops_first_space {
                continue;
            }
            let mut matcher = matcher(&grammar, &factory, after_space)?;
            let mut allowed = matcher.compute_mask().map_err(plain)?;
            if tokens.drops_first_space && !after_space {
                // Their space would be dropped, and with it the text's own.
                (0..tokens.tokens.len() as u32)
                    .filter(|&id| starts_with_space(id))
                    .for_each(|id| allowed.disallow_token(id));
            }
            beginnings.push(Beginning { matcher: Mutex::new(matcher), allowed });
        }
        let has_text = tokens.tokens.iter().map(Option::is_some).collect();
        let drops_first_space = tokens.drops_first_space;
        let bytes = Mutex::new(bytes);
        Ok(Self(Arc::new(Compiled { grammar, beginnings, bytes, has_text, drops_first_space })))
    }

    /// What completions have to be.
    pub fn grammar(&self) -> &Grammar {
        &self.0.grammar
    }

    /// Tokens after which every completion is whole, however it is cut into tokens; `None` where there is no such number.
    pub fn max_tokens(&self) -> Option<usize> {
        match &self.0.grammar {
            Grammar::Choices(choices) => {
                let longest = choices.iter().map(String::len).max()?;
                Some(longest + usize::from(self.0.drops_first_space))
            }
            Grammar::JsonSchema(_) | Grammar::Regex(_) => None,
        }
    }

    /// Whether a whole text keeps to the grammar.
    pub fn accepts(&self, text: &str) -> bool {
        let Ok(mut matcher) = lock(&self.0.bytes).map(|matcher| matcher.deep_clone()) else { return false };
        let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
        matcher.try_consume_tokens(&bytes).is_ok_and(|taken| taken == bytes.len())
            && matcher.is_accepting().unwrap_or(false)
    }

    /// The state before a completion's first token.
    pub fn begin(&self) -> ConstraintState {
        ConstraintState { compiled: Arc::clone(&self.0), matcher: None }
    }
}

/// Where in its grammar a completion is.
pub struct ConstraintState {
    compiled: Arc<Compiled>,
    /// `None` before the first token.
    matcher: Option<Matcher>,
}

/// The tokens that may come next.
pub struct TokenMask(SimpleVob);

impl TokenMask {
    /// Makes every other token impossible in `logits` `[vocab]`.
    pub fn apply(&self, logits: &mut [f32]) {
        self.0.iter_unset_entries(|id| {
            if let Some(logit) = logits.get_mut(id) {
                *logit = f32::NEG_INFINITY;
            }
        });
    }
}

impl ConstraintState {
    /// The tokens that may come next, those of `stop_token_ids` that have no text among them where the text is whole.
    ///
    /// # Errors
    /// A message for the row's `error` column: the grammar is beyond llguidance's limits here.
    pub fn allowed(&mut self, stop_token_ids: &[u32]) -> Result<TokenMask, String> {
        let (mut allowed, whole) = match &mut self.matcher {
            Some(matcher) => (matcher.compute_mask().map_err(plain)?, matcher.is_accepting().map_err(plain)?),
            None => {
                let mut allowed = SimpleVob::alloc(self.compiled.has_text.len());
                let mut whole = false;
                for beginning in &self.compiled.beginnings {
                    allowed.or(&beginning.allowed);
                    whole |= lock(&beginning.matcher)?.is_accepting().map_err(plain)?;
                }
                (allowed, whole)
            }
        };
        for &id in stop_token_ids {
            if self.compiled.has_text.get(id as usize) == Some(&false) {
                allowed.set(id as usize, whole);
            }
        }
        Ok(TokenMask(allowed))
    }

    /// Goes on by a token that was allowed.
    ///
    /// # Errors
    /// As [`ConstraintState::allowed`].
    pub fn advance(&mut self, token_id: u32) -> Result<(), String> {
        if self.compiled.has_text.get(token_id as usize) != Some(&true) {
            return Ok(()); // a stop token
        }
        let mut matcher = match self.matcher.take() {
            Some(matcher) => matcher,
            None => {
                let beginning =
                    self.compiled.beginnings.iter().find(|beginning| beginning.allowed.is_allowed(token_id));
                // A copy of its own: what other rows did leaves no trace in it.
                lock(&beginning.ok_or("a token that the grammar does not allow")?.matcher)?.deep_clone()
            }
        };
        matcher.consume_token(token_id).map_err(plain)?;
        self.matcher = Some(matcher);
        Ok(())
    }

    /// Whether the text is whole and nothing could follow.
    pub fn is_finished(&self) -> bool {
        let reason = self.matcher.as_ref().map(Matcher::stop_reason);
        matches!(reason, Some(StopReason::NoExtension | StopReason::NoExtensionBias))
    }
}

fn matcher(grammar: &Grammar, factory: &ParserFactory, after_space: bool) -> Result<Matcher, String> {
    if let Grammar::Choices(choices) = grammar
        && (choices.is_empty() || choices.iter().any(String::is_empty))
    {
        return Err("a choice is empty".into());
    }
    let matcher = Matcher::new(factory.create_parser(grammar.lark(after_space)?));
    matcher.get_error().map_or(Ok(matcher), |error| Err(plain(&error)))
}

fn lock(matcher: &Mutex<Matcher>) -> Result<std::sync::MutexGuard<'_, Matcher>, String> {
    matcher.lock().map_err(|_| "another row's grammar panicked".to_owned())
}

fn factory(env: TokEnv) -> Result<ParserFactory, String> {
    let slices = SlicedBiasComputer::general_slices();
    let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices).map_err(plain)?;
    factory.quiet();
    *factory.limits_mut() = ParserLimits { verbose_errors: false, ..ParserLimits::default() };
    Ok(factory)
}

/// The vocabulary as llguidance walks it; stop tokens are not its business.
fn token_env(tokens: &TokenBytes) -> TokEnv {
    let words: Vec<Vec<u8>> = tokens.tokens.iter().map(|bytes| bytes.clone().unwrap_or_default()).collect();
    let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, INVALID_TOKEN), &words);
    Arc::new(ApproximateTokEnv::new(trie))
}

/// A library's message in one line, without the excerpt of a grammar that the user did not write.
fn plain(error: impl ToString) -> String {
    let error = error.to_string();
    // regex-syntax draws the pattern, a caret under the place, and then says what is wrong.
    if let Some(reason) = error.lines().find_map(|line| line.strip_prefix("error: ")) {
        return reason.to_owned();
    }
    let line = one_line(&error);
    let without_place = line.strip_prefix("at ").and_then(|rest| rest.split_once("): "));
    without_place.map_or(line.clone(), |(_, message)| message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocabulary(tokens: &[&str], drops_first_space: bool) -> TokenBytes {
        let bytes = (0..=255u8).map(|byte| Some(vec![byte]));
        let tokens = tokens.iter().map(|token| Some(token.as_bytes().to_vec()));
        TokenBytes { tokens: [None, None].into_iter().chain(bytes).chain(tokens).collect(), drops_first_space }
    }

    /// Every text that a grammar of few texts allows, with each way to cut it into tokens.
    fn all_texts(constraint: &Constraint, tokens: &TokenBytes) -> Vec<String> {
        let mut texts = Vec::new();
        let mut open = vec![Vec::<u32>::new()];
        while let Some(ids) = open.pop() {
            let mut state = constraint.begin();
            ids.iter().for_each(|&id| state.advance(id).unwrap());
            let finished = state.is_finished();
            let mask = if finished { None } else { Some(state.allowed(&[1]).unwrap()) };
            let allowed = |id: u32| mask.as_ref().is_some_and(|mask| mask.0.is_allowed(id));
            if finished || allowed(1) {
                let bytes = ids.iter().flat_map(|&id| tokens.tokens[id as usize].clone().unwrap()).collect();
                let text = String::from_utf8(bytes).unwrap();
                let dropped = text.strip_prefix(' ').filter(|_| tokens.drops_first_space);
                texts.push(dropped.unwrap_or(&text).to_owned());
            }
            assert!(!allowed(0), "a special token that is no stop token");
            open.extend((2..tokens.tokens.len() as u32).filter(|&id| allowed(id)).map(|id| {
                let mut next = ids.clone();
                next.push(id);
                next
            }));
        }
        assert!(texts.iter().all(|text| constraint.accepts(text)), "{texts:?}");
        texts
    }

    #[test]
    fn a_choice_may_begin_another_and_spaces_are_dropped_once() {
        let choices = ["a", "ab", " ab", "b c", "é"].map(str::to_owned).to_vec();
        for drops_first_space in [false, true] {
            let tokens = vocabulary(&["ab", " a", " ab", "b ", "  a", "a", " b"], drops_first_space);
            let constraint = Constraint::compile(Grammar::Choices(choices.clone()), &tokens).unwrap();
            let texts = all_texts(&constraint, &tokens);
            let mut unique = texts.clone();
            unique.sort();
            unique.dedup();
            let mut expected = choices.clone();
            expected.sort();
            assert_eq!(unique, expected);
            // "a": the byte and the token; with the space dropped also " a", " " + "a" twice.
            let ways = texts.iter().filter(|text| *text == "a").count();
            assert_eq!(ways, if drops_first_space { 5 } else { 2 });
            assert_eq!(constraint.max_tokens(), Some(3 + usize::from(drops_first_space)));
        }
    }

    #[test]
    fn patterns_match_as_a_whole() {
        let tokens = vocabulary(&["12", "2/", "/1", " 1"], true);
        for pattern in ["[12]{1,2}/[12]", "^[12]{1,2}/[12]$"] {
            let constraint = Constraint::compile(Grammar::Regex(pattern.into()), &tokens).unwrap();
            let mut texts = all_texts(&constraint, &tokens);
            texts.sort();
            texts.dedup();
            assert_eq!(
                texts,
                ["1/1", "1/2", "11/1", "11/2", "12/1", "12/2", "2/1", "2/2", "21/1", "21/2", "22/1", "22/2"]
            );
            assert!(!constraint.accepts("1/") && !constraint.accepts("x1/1") && !constraint.accepts(""));
        }
        let optional = Constraint::compile(Grammar::Regex("(1|)".into()), &tokens).unwrap();
        let mut texts = all_texts(&optional, &tokens);
        texts.sort();
        texts.dedup();
        assert_eq!(texts, ["", "1"]);
    }

    #[test]
    fn what_is_wrong_is_told_in_a_line() {
        let wrong = |grammar: Grammar| {
            let message = grammar.check().unwrap_err();
            assert_eq!(message.lines().count(), 1, "{message}");
            message
        };
        assert!(wrong(Grammar::Choices(vec![String::new()])).contains("empty"));
        let unclosed = wrong(Grammar::Regex("a(b".into()));
        assert!(unclosed.contains("unclosed group"), "{unclosed}");
        let lookahead = wrong(Grammar::Regex("a(?=b)c".into()));
        assert!(lookahead.contains("look-around"), "{lookahead}");
        let kind = wrong(Grammar::JsonSchema(r#"{"type": "strin"}"#.into()));
        assert!(kind.contains("strin"), "{kind}");
        let keyword = wrong(Grammar::JsonSchema(r#"{"type": "array", "uniqueItems": true}"#.into()));
        assert!(keyword.contains("uniqueItems"), "{keyword}");
    }
}
