//! `mistral-batch inspect`.

use clap::Args;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::heads::{ClassifyOptions, SequenceClassification};
use crate::job::CPU_BATCH_TOKENS;
use crate::model::{Architecture, Checkpoint};
use crate::text::TextTokenizer;

/// Show what a checkpoint is, without loading its weights.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Checkpoint folder, or a hub id in the local Hugging Face cache
    model: String,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl InspectArgs {
    pub fn run(self) -> Result<()> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let tokenizer = TextTokenizer::open(&checkpoint.dir, checkpoint.config.vocab_size)?;
        let facts = facts(&checkpoint, &tokenizer);
        let text = if self.json {
            let object: serde_json::Map<String, Value> =
                facts.into_iter().map(|fact| (fact.key.to_owned(), fact.value)).collect();
            serde_json::to_string_pretty(&object).map_err(|error| Error::Internal(error.to_string()))? + "\n"
        } else {
            let width = facts.iter().map(|fact| fact.key.len()).max().unwrap_or(0);
            facts.iter().map(|fact| format!("{:width$}  {}\n", fact.key.replace('_', " "), fact.text)).collect()
        };
        super::print(&text)
    }
}

/// One thing to know about a checkpoint, for a program and for a person.
struct Fact {
    key: &'static str,
    value: Value,
    text: String,
}

fn fact(key: &'static str, value: Value) -> Fact {
    let text = match &value {
        Value::Null => "none".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let items: Vec<String> =
                items.iter().map(|item| item.as_str().map_or(item.to_string(), str::to_owned)).collect();
            items.join(", ")
        }
        other => other.to_string(),
    };
    Fact { key, value, text }
}

/// A fact that reads better in other words.
fn worded(key: &'static str, value: Value, text: String) -> Fact {
    Fact { key, value, text }
}

fn facts(checkpoint: &Checkpoint, tokenizer: &TextTokenizer) -> Vec<Fact> {
    let config = &checkpoint.config;
    let parameters = checkpoint.weights.num_parameters();
    let dtypes = checkpoint.weights.dtypes();
    let files: Vec<Value> = checkpoint
        .weights
        .files()
        .map(|(path, bytes)| {
            json!(format!("{} ({})", path.file_name().unwrap_or_default().display(), bytes_text(bytes)))
        })
        .collect();
    let activations = config.activation_bytes(CPU_BATCH_TOKENS) as u64;
    let weights = 4 * parameters;

    let mut facts = vec![
        fact("folder", json!(checkpoint.dir.display().to_string())),
        fact("architecture", json!(config.architecture.class_name())),
    ];
    if config.architecture == Architecture::SequenceClassification
        && let Ok((task, function)) = SequenceClassification::plan(checkpoint, &ClassifyOptions::default())
    {
        let head = format!("{task:?} with {function:?} scores");
        facts.push(worded("head", json!({"task": format!("{task:?}"), "function": function}), head));
    }
    if matches!(config.architecture, Architecture::SequenceClassification | Architecture::TokenClassification) {
        facts.push(fact("labels", json!(config.labels)));
    }
    facts.extend([
        worded(
            "parameters",
            json!(parameters),
            format!("{} ({})", grouped(parameters), dtypes.iter().map(|(dtype, _)| dtype.as_str()).collect::<Vec<_>>().join(", ")),
        ),
        worded(
            "layers",
            json!(config.num_hidden_layers),
            format!(
                "{} of hidden size {}, intermediate {}, {} query and {} key/value heads of {}",
                config.num_hidden_layers,
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim
            ),
        ),
        worded(
            "sliding_window",
            json!(config.sliding_window),
            config.sliding_window.map_or("none: full causal attention".into(), |window| format!("{window} positions")),
        ),
        fact("max_position_embeddings", json!(config.max_position_embeddings)),
        fact("vocabulary", json!(config.vocab_size)),
        fact("pad_token_id", json!(config.pad_token_id)),
        fact("eos_token_ids", json!(config.eos_token_ids)),
        fact("stored_dtype", json!(dtypes.first().map(|(dtype, _)| dtype))),
        fact("compute_dtype", json!("f32")),
        fact("weight_files", json!(files)),
        worded(
            "tokenizer",
            json!({"class": tokenizer.class_name(), "vocabulary": tokenizer.vocab_size(), "sha256": tokenizer.sha256()}),
            format!("{}, {} tokens", tokenizer.class_name().unwrap_or("unnamed class"), tokenizer.vocab_size()),
        ),
        worded(
            "special_tokens_per_text",
            json!(tokenizer.special_tokens_per_text()),
            tokenizer.special_tokens_per_text().to_string(),
        ),
        fact("tokenizer_limit", json!(tokenizer.model_max_length())),
        fact("chat_template", json!(tokenizer.has_chat_template())),
        worded(
            "memory_bytes",
            json!({"weights": weights, "activations": activations}),
            format!(
                "{} for the weights and about {} for a batch of {CPU_BATCH_TOKENS} tokens, in f32",
                bytes_text(weights),
                bytes_text(activations)
            ),
        ),
        fact("transformers_version", json!(config.transformers_version)),
    ]);
    facts
}

fn bytes_text(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

fn grouped(number: u64) -> String {
    indicatif::HumanCount(number).to_string()
}
