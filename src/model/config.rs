//! `config.json`: what the checkpoint says about itself, in the dialects of transformers 4 and 5.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::kernels::HeadLayout;

/// The shape of a Mistral model.
///
/// Defaults for missing keys are those of transformers' `MistralConfig`
/// (`models/mistral/configuration_mistral.py`, 5.23).
#[derive(Debug, Clone, PartialEq)]
pub struct MistralConfig {
    /// Which head the checkpoint was saved with.
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    /// Width of one attention head; not always `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    /// W: a query sees W positions, its own included. `None` is full causal attention.
    pub sliding_window: Option<usize>,
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    /// One or several ids that end a generated text.
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
    /// What a sequence-classification head was trained for, if stored.
    pub problem_type: Option<ProblemType>,
    /// Label names by index; the length is the number of labels.
    pub labels: Vec<String>,
    /// The dtype that the checkpoint says it is stored in.
    pub torch_dtype: Option<String>,
    /// The version of transformers that wrote the file.
    pub transformers_version: Option<String>,
}

/// The classes of transformers that save a Mistral model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `MistralModel`: no head.
    Base,
    /// `MistralForCausalLM`.
    CausalLm,
    /// `MistralForSequenceClassification`.
    SequenceClassification,
    /// `MistralForTokenClassification`.
    TokenClassification,
}

/// What transformers calls `problem_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemType {
    Regression,
    SingleLabelClassification,
    MultiLabelClassification,
}

impl Architecture {
    const ALL: [Architecture; 4] =
        [Self::Base, Self::CausalLm, Self::SequenceClassification, Self::TokenClassification];

    /// The class name in transformers.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Base => "MistralModel",
            Self::CausalLm => "MistralForCausalLM",
            Self::SequenceClassification => "MistralForSequenceClassification",
            Self::TokenClassification => "MistralForTokenClassification",
        }
    }
}

/// `config.json` as it is written; every key may be missing.
#[derive(Deserialize)]
struct RawConfig {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    /// Null means as many as attention heads; a missing key means 8.
    #[serde(default, deserialize_with = "present")]
    num_key_value_heads: Option<Option<usize>>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_parameters: Option<RawRope>,
    rope_scaling: Option<RawRope>,
    /// Null means no window; a missing key means 4096.
    #[serde(default, deserialize_with = "present")]
    sliding_window: Option<Option<usize>>,
    tie_word_embeddings: Option<bool>,
    #[serde(default, deserialize_with = "present")]
    bos_token_id: Option<Option<u32>>,
    #[serde(default, deserialize_with = "present")]
    eos_token_id: Option<Option<OneOrMany>>,
    pad_token_id: Option<i64>,
    problem_type: Option<ProblemType>,
    id2label: Option<BTreeMap<String, String>>,
    num_labels: Option<usize>,
    torch_dtype: Option<String>,
    dtype: Option<String>,
    transformers_version: Option<String>,
    quantization_config: Option<Value>,
    layer_types: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct RawRope {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    /// The name of `rope_type` in older files.
    r#type: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// Tells a key that is null from one that is missing.
fn present<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}

impl MistralConfig {
    /// Reads and checks `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] when the file cannot be read, is not a Mistral checkpoint, or asks for something that this
    /// program does not compute (another activation, scaled rotary embeddings, quantized weights).
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::config(path, format!("cannot read it ({error}); --model wants a checkpoint folder"))
        })?;
        Self::parse(&text).map_err(|message| Error::config(path, message))
    }

    /// Parses the text of a `config.json`; the error is a message without the path.
    pub fn parse(text: &str) -> Result<Self, String> {
        let raw: RawConfig =
            serde_json::from_str(text).map_err(|error| format!("not a checkpoint's config: {error}"))?;
        raw.check()
    }

    /// How many query, key and value heads there are, and how wide.
    pub fn heads(&self) -> HeadLayout {
        HeadLayout {
            num_heads: self.num_attention_heads,
            num_kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
        }
    }

    /// What the widest moment of a layer holds, in bytes of f32: residual, its norm, and the larger of the attention's and
    /// the feed-forward's intermediates.
    pub fn activation_bytes(&self, tokens: usize) -> usize {
        let attention = 2 * self.heads().qkv_width() + self.num_attention_heads * self.head_dim;
        let feed_forward = 3 * self.intermediate_size;
        4 * tokens * (2 * self.hidden_size + attention.max(feed_forward))
    }

    /// The number of labels of a classification head.
    pub fn num_labels(&self) -> usize {
        self.labels.len()
    }
}

impl RawConfig {
    fn check(self) -> Result<MistralConfig, String> {
        let architecture = self.architecture()?;
        if let Some(quantization) = &self.quantization_config {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown method");
            return Err(format!("the weights are quantized ({method}); use the unquantized checkpoint"));
        }
        match self.hidden_act.as_deref() {
            None | Some("silu" | "swish") => {}
            Some(other) => return Err(format!("hidden_act is '{other}'; Mistral models use 'silu'")),
        }
        for rope in [&self.rope_parameters, &self.rope_scaling].into_iter().flatten() {
            match rope.rope_type.as_deref().or(rope.r#type.as_deref()) {
                None | Some("default") => {}
                Some(other) => return Err(format!("rotary embeddings of type '{other}' are not supported")),
            }
        }
        if let Some(kind) =
            self.layer_types.iter().flatten().find(|kind| *kind != "sliding_attention" && *kind != "full_attention")
        {
            return Err(format!("layer type '{kind}' is not supported"));
        }
        if let Some(types) = &self.layer_types
            && types.iter().any(|kind| *kind != types[0])
        {
            return Err("its layers alternate between sliding and full attention, which is not a Mistral model".into());
        }

        let hidden_size = self.hidden_size.unwrap_or(4096);
        let num_attention_heads = self.num_attention_heads.unwrap_or(32);
        let num_key_value_heads = self.num_key_value_heads.unwrap_or(Some(8)).unwrap_or(num_attention_heads);
        let config = MistralConfig {
            architecture,
            vocab_size: self.vocab_size.unwrap_or(32_000),
            hidden_size,
            intermediate_size: self.intermediate_size.unwrap_or(14_336),
            num_hidden_layers: self.num_hidden_layers.unwrap_or(32),
            num_attention_heads,
            num_key_value_heads,
            head_dim: self.head_dim.unwrap_or(hidden_size.checked_div(num_attention_heads).unwrap_or(0)),
            max_position_embeddings: self.max_position_embeddings.unwrap_or(4096 * 32),
            rms_norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            rope_theta: self
                .rope_parameters
                .as_ref()
                .and_then(|rope| rope.rope_theta)
                .or(self.rope_theta)
                .unwrap_or(10_000.0),
            sliding_window: self.sliding_window.unwrap_or(Some(4096)),
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
            bos_token_id: self.bos_token_id.unwrap_or(Some(1)),
            eos_token_ids: match self.eos_token_id.unwrap_or(Some(OneOrMany::One(2))) {
                None => Vec::new(),
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
            },
            // Some checkpoints write −1 for "none".
            pad_token_id: self.pad_token_id.and_then(|id| u32::try_from(id).ok()),
            problem_type: self.problem_type,
            labels: labels(self.id2label, self.num_labels)?,
            torch_dtype: self.dtype.or(self.torch_dtype),
            transformers_version: self.transformers_version,
        };
        config.check_sizes()?;
        Ok(config)
    }

    fn architecture(&self) -> Result<Architecture, String> {
        let class = self.architectures.as_deref().and_then(<[String]>::first);
        let model_type = self.model_type.as_deref();
        if model_type.is_some_and(|kind| kind != "mistral") || (class.is_none() && model_type.is_none()) {
            return Err(format!(
                "not a Mistral checkpoint: model_type is {}",
                model_type.map_or("missing".into(), |kind| format!("'{kind}'"))
            ));
        }
        match class {
            None => Ok(Architecture::Base),
            Some(class) => {
                Architecture::ALL.into_iter().find(|architecture| architecture.class_name() == class).ok_or_else(|| {
                    format!(
                        "architecture '{class}' is not one of {}",
                        Architecture::ALL.map(Architecture::class_name).join(", ")
                    )
                })
            }
        }
    }
}

impl MistralConfig {
    /// Refuses sizes that no tensor could have, before anything is allocated from them.
    fn check_sizes(&self) -> Result<(), String> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (key, size) in sizes {
            if size == 0 || size > 1 << 24 {
                return Err(format!("{key} is {size}, which is not possible"));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(format!(
                "num_attention_heads ({}) is not a multiple of num_key_value_heads ({})",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("head_dim is {}, but rotary embeddings need an even one", self.head_dim));
        }
        if self.sliding_window == Some(0) {
            return Err("sliding_window is 0; null means no window".into());
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0 && self.rms_norm_eps.is_finite()) {
            return Err("rope_theta or rms_norm_eps is not a usable number".into());
        }
        Ok(())
    }
}

/// Label names by index, as transformers' `PreTrainedConfig` makes them: `LABEL_0`, … where none are stored.
fn labels(id2label: Option<BTreeMap<String, String>>, num_labels: Option<usize>) -> Result<Vec<String>, String> {
    let Some(id2label) = id2label else {
        return Ok((0..num_labels.unwrap_or(2)).map(|id| format!("LABEL_{id}")).collect());
    };
    let mut by_index = BTreeMap::new();
    for (id, label) in id2label {
        let index: usize = id.parse().map_err(|_| format!("id2label has the key '{id}', which is not a number"))?;
        by_index.insert(index, label);
    }
    if let Some((expected, _)) = by_index.keys().enumerate().find(|(i, index)| i != *index) {
        return Err(format!("id2label has no label {expected}"));
    }
    Ok(by_index.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: &str = r#"{"architectures": ["MistralForSequenceClassification"], "model_type": "mistral", "hidden_size": 64,
        "num_attention_heads": 8, "rope_theta": 1e6, "torch_dtype": "bfloat16", "sliding_window": null,
        "id2label": {"10": "k", "0": "a", "1": "b", "2": "c", "3": "d", "4": "e", "5": "f", "6": "g", "7": "h", "8": "i", "9": "j"}}"#;
    const V5: &str = r#"{"architectures": ["MistralModel"], "model_type": "mistral", "hidden_size": 64, "dtype": "float16",
        "num_attention_heads": 8, "head_dim": 16, "num_key_value_heads": null, "eos_token_id": [2, 7], "pad_token_id": -1,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}"#;

    #[test]
    fn reads_the_dialect_of_transformers_4() {
        let config = MistralConfig::parse(V4).unwrap();
        assert_eq!(config.architecture, Architecture::SequenceClassification);
        assert_eq!((config.rope_theta, config.head_dim, config.num_key_value_heads), (1e6, 8, 8));
        assert_eq!(config.sliding_window, None);
        assert_eq!(config.labels.join(""), "abcdefghijk", "in order of the number, not of the text");
        assert_eq!(config.torch_dtype.as_deref(), Some("bfloat16"));
    }

    #[test]
    fn reads_the_dialect_of_transformers_5() {
        let config = MistralConfig::parse(V5).unwrap();
        assert_eq!((config.rope_theta, config.head_dim, config.num_key_value_heads), (5e5, 16, 8));
        assert_eq!(config.sliding_window, Some(4096), "a missing key is not null");
        assert_eq!((config.rms_norm_eps, config.max_position_embeddings), (1e-6, 131_072));
        assert_eq!((config.eos_token_ids, config.pad_token_id), (vec![2, 7], None));
        assert_eq!(config.labels, ["LABEL_0", "LABEL_1"]);
    }

    #[test]
    fn refuses_what_it_does_not_compute() {
        let refuse = |json: &str| MistralConfig::parse(json).unwrap_err();
        assert!(refuse(r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}"#).contains("'llama'"));
        assert!(refuse("{}").contains("missing"));
        assert!(refuse("[]").contains("not a checkpoint's config"));
        assert!(refuse(r#"{"model_type": "mistral", "hidden_act": "gelu"}"#).contains("gelu"));
        assert!(refuse(r#"{"model_type": "mistral", "rope_scaling": {"type": "yarn"}}"#).contains("yarn"));
        assert!(refuse(r#"{"model_type": "mistral", "quantization_config": {"quant_method": "awq"}}"#).contains("awq"));
        assert!(
            refuse(r#"{"model_type": "mistral", "num_attention_heads": 6, "num_key_value_heads": 4}"#)
                .contains("multiple")
        );
        assert!(refuse(r#"{"model_type": "mistral", "hidden_size": 0}"#).contains("hidden_size is 0"));
        assert!(refuse(r#"{"model_type": "mistral", "id2label": {"0": "a", "2": "c"}}"#).contains("no label 1"));
    }
}
