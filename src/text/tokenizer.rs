//! The checkpoint's tokenizer, with its special tokens and the length limit.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedToken, Encoding, PostProcessor, Tokenizer, TruncationDirection, TruncationParams, TruncationStrategy,
};

use super::TokenSpan;
use super::chat::ChatTemplate;
use super::prompt::Prompt;
use crate::error::{Error, Result};

const TOKENIZER_FILE: &str = "tokenizer.json";
const CONFIG_FILE: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";
const CHAT_TEMPLATE_FILE: &str = "chat_template.jinja";

/// What happens to a text of more than `max_length` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overflow {
    /// Keep the end of the text.
    TruncateLeft,
    /// Keep the beginning of the text.
    TruncateRight,
    /// Cut it into overlapping chunks and average their results.
    Chunk,
    /// Fail the row.
    Error,
}

/// One text's token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenized {
    /// One sequence; with [`Overflow::Chunk`] as many as the text needs. Never empty, nor is any of them.
    pub chunks: Vec<Vec<u32>>,
    /// Whether text was dropped to keep the limit.
    pub truncated: bool,
    /// One for each of `chunks`, or none where there is nothing to say.
    pub details: Vec<TokenDetail>,
}

/// What some heads want to know of a sequence's tokens beside their ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenDetail {
    /// Tokens in front that are given, a continuation's context.
    pub context_len: usize,
    /// The text's own tokens in the sequence; none unless the tokenizer was asked for them.
    pub spans: Vec<TokenSpan>,
}

impl Tokenized {
    /// Tokens that the model computes for this text, special tokens included.
    pub fn num_tokens(&self) -> usize {
        self.chunks.iter().map(Vec::len).sum()
    }
}

/// A tokenizer with its length limit set.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    pub(super) tokenizer: Tokenizer,
    max_length: usize,
    overflow: Overflow,
    /// Closes every text or chunk, beside what the tokenizer adds.
    appended: Option<u32>,
    /// Whether sequences come with the spans of their tokens.
    pub(super) spans: bool,
    /// The model's, whatever the tokenizer's own is.
    pub(super) vocab_size: usize,
    sha256: String,
    pub(super) config: TokenizerConfig,
    pub(super) path: PathBuf,
}

/// What this program reads of `tokenizer_config.json`.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct TokenizerConfig {
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    pad_token: Option<SpecialToken>,
    pub(super) unk_token: Option<SpecialToken>,
    /// transformers writes 1e30 for "no limit".
    model_max_length: Option<f64>,
    tokenizer_class: Option<String>,
    #[serde(default)]
    split_special_tokens: bool,
    chat_template: Option<Value>,
}

/// A token as a string, or as transformers' AddedToken object.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum SpecialToken {
    Text(String),
    Object { content: String },
}

impl SpecialToken {
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

impl TextTokenizer {
    /// Reads the tokenizer of a checkpoint folder; texts are not limited yet.
    ///
    /// `vocab_size` is the model's: an id beyond it fails its row and not the run.
    ///
    /// # Errors
    /// [`Error::Config`] when there is no `tokenizer.json`, or it or `tokenizer_config.json` cannot be used.
    pub fn open(dir: &Path, vocab_size: usize) -> Result<Self> {
        let path = dir.join(TOKENIZER_FILE);
        let bytes = std::fs::read(&path).map_err(|error| Error::config(&path, no_tokenizer_message(dir, &error)))?;
        let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(|error| Error::config(&path, error))?;
        let mut hash = Sha256::new_with_prefix(&bytes);
        let mut config: TokenizerConfig = read_json(&dir.join(CONFIG_FILE), &mut hash)?.unwrap_or_default();
        if let Some(map) = read_json::<TokenizerConfig>(&dir.join(SPECIAL_TOKENS_FILE), &mut hash)? {
            config.bos_token = config.bos_token.or(map.bos_token);
            config.eos_token = config.eos_token.or(map.eos_token);
            config.pad_token = config.pad_token.or(map.pad_token);
            config.unk_token = config.unk_token.or(map.unk_token);
        }

        // Limits stored in tokenizer.json are replaced by ours; padding is ours, too.
        tokenizer.with_truncation(None).map_err(|error| Error::config(&path, error))?;
        tokenizer.with_padding(None);
        tokenizer.set_encode_special_tokens(config.split_special_tokens);
        if config.add_bos_token.is_some() || config.add_eos_token.is_some() {
            // As transformers' TokenizersBackend (tokenization_utils_tokenizers.py, 5.23): the flags, where they are
            // given, replace the post-processor of tokenizer.json.
            let processor = config.post_processor(&mut tokenizer).map_err(|message| Error::config(&path, message))?;
            tokenizer.with_post_processor(Some(processor));
        }
        Ok(Self {
            tokenizer,
            max_length: usize::MAX,
            overflow: Overflow::Error,
            appended: None,
            spans: false,
            vocab_size,
            sha256: format!("{:x}", hash.finalize()),
            config,
            path,
        })
    }

    /// Limits texts to `max_length` tokens, special tokens included; chunks overlap by `stride` tokens.
    ///
    /// # Errors
    /// [`Error::Usage`] when special tokens and overlap leave no room for text.
    pub fn with_limit(mut self, max_length: usize, overflow: Overflow, stride: usize) -> Result<Self> {
        let special_tokens = self.special_tokens_per_text() + usize::from(self.appended.is_some());
        let overlap = if overflow == Overflow::Chunk { stride } else { 0 };
        if max_length <= special_tokens + overlap {
            let message = format!(
                "--max-length {max_length} leaves no room for text: {special_tokens} special token(s) are added to each{}",
                if overlap > 0 { format!(" and chunks overlap by {overlap} (--stride)") } else { String::new() }
            );
            return Err(Error::Usage(message));
        }
        let direction = match overflow {
            Overflow::TruncateLeft => Some(TruncationDirection::Left),
            Overflow::TruncateRight | Overflow::Chunk => Some(TruncationDirection::Right),
            Overflow::Error => None,
        };
        let truncation = direction.map(|direction| TruncationParams {
            direction,
            max_length: max_length - usize::from(self.appended.is_some()),
            stride: overlap,
            strategy: TruncationStrategy::LongestFirst,
        });
        self.tokenizer.with_truncation(truncation).map_err(|error| Error::Usage(format!("--max-length: {error}")))?;
        self.max_length = max_length;
        self.overflow = overflow;
        Ok(self)
    }

    /// Ends every text, or chunk of one, with the end-of-sequence token, as e5-mistral was trained with.
    ///
    /// It is the tokenizer's, else `model_eos`. A tokenizer that ends texts so itself stays as it is.
    ///
    /// # Errors
    /// [`Error::Config`] when neither names one.
    pub fn with_appended_eos(mut self, model_eos: Option<u32>) -> Result<Self> {
        let own = self.config.eos_token.as_ref().and_then(|token| self.tokenizer.token_to_id(token.text()));
        let Some(eos) = own.or(model_eos) else {
            return Err(Error::config(&self.path, "has no end-of-sequence token for --append-eos to append"));
        };
        let empty = self.tokenizer.encode_fast("", true).map_err(|error| Error::config(&self.path, error))?;
        self.appended = (empty.get_ids().last() != Some(&eos)).then_some(eos);
        Ok(self)
    }

    /// The tokenizer's own limit in tokens, if it has one.
    pub fn model_max_length(&self) -> Option<usize> {
        self.config.model_max_length.filter(|&limit| (1.0..1e15).contains(&limit)).map(|limit| limit as usize)
    }

    /// SHA-256 over the tokenizer's files.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Tokens that are added to every text, BOS in most checkpoints.
    pub fn special_tokens_per_text(&self) -> usize {
        self.tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(false))
    }

    /// Number of tokens in the tokenizer's vocabulary, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// A token as it stands in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The class that transformers loads it with, if stored.
    pub fn class_name(&self) -> Option<&str> {
        self.config.tokenizer_class.as_deref()
    }

    /// Whether `tokenizer_config.json` or a `chat_template.jinja` beside it holds a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.config.chat_template.is_some() || self.path.with_file_name(CHAT_TEMPLATE_FILE).is_file()
    }

    /// The checkpoint's chat template: `chat_template.jinja`, else the one in `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] when there is none, or it is no template.
    pub fn chat_template(&self) -> Result<ChatTemplate> {
        let file = self.path.with_file_name(CHAT_TEMPLATE_FILE);
        let (path, source) = match std::fs::read_to_string(&file) {
            Ok(source) => (file, source),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let path = self.path.with_file_name(CONFIG_FILE);
                let source = self.config.chat_template().map_err(|message| Error::config(&path, message))?;
                (path, source)
            }
            Err(error) => return Err(Error::config(&file, error)),
        };
        let special_tokens = [
            ("bos_token", &self.config.bos_token),
            ("eos_token", &self.config.eos_token),
            ("pad_token", &self.config.pad_token),
            ("unk_token", &self.config.unk_token),
        ];
        let special_tokens = special_tokens.into_iter().filter_map(|(name, token)| {
            let token = token.as_ref()?;
            Some((name, token.text().to_owned()))
        });
        ChatTemplate::new(&source, special_tokens.collect())
            .map_err(|message| Error::config(&path, format!("the chat template is not one: {message}")))
    }

    /// Tokenizes each prompt on all cores; nulls stay null, a row's failure is its message.
    pub fn tokenize(&self, prompts: &[Prompt]) -> Vec<Option<Result<Tokenized, String>>> {
        let tokenize = |prompt: &Prompt| match prompt {
            Prompt::Null => None,
            Prompt::Text { text, add_special_tokens } => Some(self.tokenize_with(text, *add_special_tokens)),
            Prompt::Failed(message) => Some(Err(message.clone())),
        };
        prompts.par_iter().map(tokenize).collect()
    }

    /// Tokenizes one text, with BOS as the tokenizer adds it.
    ///
    /// # Errors
    /// As [`TextTokenizer::tokenize_with`].
    pub fn tokenize_one(&self, text: &str) -> Result<Tokenized, String> {
        self.tokenize_with(text, true)
    }

    /// Tokenizes one text, which without `add_special_tokens` brings its own, as a rendered chat does.
    ///
    /// # Errors
    /// A message for the row's `error` column: the text is too long under [`Overflow::Error`], has no tokens, or has
    /// one that the model does not know.
    pub fn tokenize_with(&self, text: &str, add_special_tokens: bool) -> Result<Tokenized, String> {
        let encoding = self.encode(text, add_special_tokens)?;
        let mut tokenized = self.check(&encoding)?;
        if self.spans {
            tokenized.details = self.spans(text, &encoding, tokenized.chunks.len());
        }
        Ok(tokenized)
    }

    /// What the tokenizer makes of a text.
    pub(super) fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Encoding, String> {
        // A panic in the tokenizer is this row's failure, not the run's.
        let encode = || match self.spans {
            true => self.tokenizer.encode_char_offsets(text, add_special_tokens),
            false => self.tokenizer.encode_fast(text, add_special_tokens),
        };
        catch_unwind(AssertUnwindSafe(encode))
            .map_err(|_| "the tokenizer panicked on this text".to_owned())?
            .map_err(|error| format!("the tokenizer failed: {error}"))
    }

    /// The ids of an encoding, which must be ones that the model can compute.
    pub(super) fn check(&self, encoding: &Encoding) -> Result<Tokenized, String> {
        let overflowing = encoding.get_overflowing();
        let truncated = !overflowing.is_empty() && self.overflow != Overflow::Chunk;
        let mut chunks: Vec<Vec<u32>> = if truncated {
            vec![encoding.get_ids().to_vec()]
        } else {
            std::iter::once(encoding).chain(overflowing).map(|chunk| chunk.get_ids().to_vec()).collect()
        };
        chunks.iter_mut().for_each(|chunk| chunk.extend(self.appended));
        let longest = chunks.iter().map(Vec::len).max().unwrap_or(0);
        if longest == 0 {
            return Err("the text has no tokens, and the tokenizer adds none".into());
        }
        if longest > self.max_length {
            return Err(format!("the text has {longest} tokens, over the limit of {}", self.max_length));
        }
        if let Some(id) = chunks.iter().flatten().find(|&&id| id as usize >= self.vocab_size) {
            return Err(format!("token {id} is outside the checkpoint's vocabulary of {}", self.vocab_size));
        }
        Ok(Tokenized { chunks, truncated, details: Vec::new() })
    }

    /// The text of `token_ids`, special tokens left out; ids beyond the tokenizer's vocabulary have none.
    ///
    /// # Errors
    /// A message for the row's `error` column.
    pub fn decode(&self, token_ids: &[u32]) -> Result<String, String> {
        catch_unwind(AssertUnwindSafe(|| self.tokenizer.decode(token_ids, true)))
            .map_err(|_| "the tokenizer panicked on these tokens".to_owned())?
            .map_err(|error| format!("the tokenizer failed: {error}"))
    }
}

impl TokenizerConfig {
    /// The chat template: a text, or the one named `default` of a list.
    fn chat_template(&self) -> Result<String, String> {
        let default = match &self.chat_template {
            None => {
                return Err("holds no chat_template, nor is there a chat_template.jinja beside it, and --chat-column \
                    needs one; choose a checkpoint for chats, or write the prompt with --prompt-template"
                    .into());
            }
            Some(Value::Array(named)) => {
                let default = named.iter().find(|named| named["name"] == "default");
                default.map(|named| &named["template"])
            }
            template => template.as_ref(),
        };
        let source = default.and_then(Value::as_str);
        source.map(str::to_owned).ok_or_else(|| "chat_template is neither a text nor a list with a default".into())
    }

    /// BOS and EOS around each text as the flags say.
    fn post_processor(&self, tokenizer: &mut Tokenizer) -> Result<TemplateProcessing, String> {
        let mut special_tokens = Vec::new();
        let mut piece = |wanted: Option<bool>, token: &Option<SpecialToken>| -> Option<String> {
            let text = token.as_ref().filter(|_| wanted == Some(true))?.text().to_owned();
            let id = tokenizer.token_to_id(&text).or_else(|| {
                tokenizer.add_special_tokens([AddedToken::from(text.clone(), true)]).ok()?;
                tokenizer.token_to_id(&text)
            })?;
            special_tokens.push((text.clone(), id));
            Some(text)
        };
        let bos = piece(self.add_bos_token, &self.bos_token);
        let eos = piece(self.add_eos_token, &self.eos_token);
        let template: Vec<String> = bos.into_iter().chain(["$A".to_owned()]).chain(eos).collect();
        TemplateProcessing::builder()
            .try_single(template)
            .map_err(|error| error.to_string())?
            .special_tokens(special_tokens)
            .build()
            .map_err(|error| error.to_string())
    }
}

/// Reads an optional JSON file and adds its bytes to `hash`.
fn read_json<T: for<'de> Deserialize<'de>>(path: &Path, hash: &mut Sha256) -> Result<Option<T>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::config(path, error)),
    };
    hash.update(&bytes);
    serde_json::from_slice(&bytes).map(Some).map_err(|error| Error::config(path, error))
}

fn no_tokenizer_message(dir: &Path, error: &std::io::Error) -> String {
    let other = ["tokenizer.model", "tekken.json"].into_iter().find(|name| dir.join(name).is_file());
    match other {
        Some(name) => format!(
            "cannot read it ({error}); {name} alone is not enough: load the tokenizer in transformers and save_pretrained it here"
        ),
        None => format!("cannot read it ({error}); the checkpoint folder needs its tokenizer beside the weights"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(checkpoint: &str) -> TextTokenizer {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/checkpoints").join(checkpoint);
        TextTokenizer::open(&dir, usize::MAX).unwrap()
    }

    /// Ids of transformers for texts with emoji, byte fallback, literal special tokens, doubled spaces and so on.
    fn golden_rows(tokenizer: &str) -> Vec<Value> {
        let name = format!("tests/goldens/goldens/tokenizer-{tokenizer}.json");
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["rows"].as_array().unwrap().clone()
    }

    fn ids(value: &Value) -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    }

    #[test]
    fn ids_equal_those_of_transformers() {
        for (tokenizer, checkpoint) in
            [("tok1k", "cls-window-sharded"), ("tok1k-nopad", "cls-nopad"), ("tok4k", "cls-pad-is-eos")]
        {
            let whole = golden(checkpoint);
            let short = golden(checkpoint).with_limit(8, Overflow::TruncateRight, 0).unwrap();
            for row in golden_rows(tokenizer) {
                let text = row["text"].as_str().unwrap();
                assert_eq!(whole.tokenize_one(text).unwrap().chunks, [ids(&row["input_ids"])], "{text:?}");
                let truncated = short.tokenize_one(text).unwrap();
                assert_eq!(truncated.chunks, [ids(&row["truncated_to_8"])], "{text:?}");
                assert_eq!(truncated.truncated, ids(&row["input_ids"]).len() > 8, "{text:?}");
            }
        }
    }

    #[test]
    fn each_overflow_keeps_what_it_promises() {
        let text = "one two three four five six seven eight nine ten";
        let whole = golden("cls-window-sharded").tokenize_one(text).unwrap().chunks.remove(0);
        let limited = |overflow, stride| {
            golden("cls-window-sharded").with_limit(10, overflow, stride).unwrap().tokenize_one(text)
        };
        let bos = whole[0];
        assert_eq!(limited(Overflow::TruncateRight, 0).unwrap().chunks, [whole[..10].to_vec()]);
        let left = limited(Overflow::TruncateLeft, 0).unwrap();
        assert_eq!(left.chunks[0], [&[bos], &whole[whole.len() - 9..]].concat());
        assert!(left.truncated);
        let message = limited(Overflow::Error, 0).unwrap_err();
        assert_eq!(message, format!("the text has {} tokens, over the limit of 10", whole.len()));

        let chunked = limited(Overflow::Chunk, 3).unwrap();
        assert!(!chunked.truncated && chunked.chunks.len() > 2);
        let mut joined = chunked.chunks[0].clone();
        for pair in chunked.chunks.windows(2) {
            assert!(pair[1].len() <= 10 && pair[1][0] == bos);
            assert_eq!(pair[0][pair[0].len() - 3..], pair[1][1..4], "chunks overlap by the stride");
            joined.extend(&pair[1][4..]);
        }
        assert_eq!(joined, whole, "and together they are the whole text");
    }

    #[test]
    fn nulls_stay_null_and_the_empty_text_is_one_bos() {
        let tokenizer = golden("cls-window-sharded");
        let rows = tokenizer.tokenize(&[Prompt::Null, Some("").into()]);
        assert_eq!(rows[0], None);
        assert_eq!(rows[1].as_ref().unwrap().as_ref().unwrap().chunks, [[1]]);
        assert_eq!(tokenizer.special_tokens_per_text(), 1);
        assert_eq!(tokenizer.model_max_length(), None);
    }

    #[test]
    fn a_limit_without_room_for_text_is_a_usage_error() {
        let error = golden("cls-window-sharded").with_limit(1, Overflow::TruncateRight, 0).unwrap_err();
        assert_eq!(error.exit_code(), crate::ExitCode::Usage);
        assert!(golden("cls-window-sharded").with_limit(8, Overflow::Chunk, 7).is_err());
    }

    #[test]
    fn an_id_beyond_the_embeddings_fails_its_row() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/checkpoints/cls-window-sharded");
        let tokenizer = TextTokenizer::open(&dir, 300).unwrap();
        assert!(
            tokenizer
                .tokenize_one("The cat sat on the mat.")
                .unwrap_err()
                .contains("outside the checkpoint's vocabulary")
        );
    }
}
