//! Checkpoints by name: opened when they are added, loaded when they are first used, shared by all queries.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::Device;
use tokio::sync::Mutex as AsyncMutex;

use super::call::ModelCall;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::generation::CausalLm;
use crate::model::{Architecture, Checkpoint, MistralModel};
use crate::text::{ChatTemplate, Overflow, TextTokenizer};

/// Tokens that neighbouring chunks of a long text share; a quarter of the limit where that is less. As the commands do.
const CHUNK_OVERLAP_TOKENS: usize = 64;

/// How models compute; it changes no result beyond rounding.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// Where models compute, as [`crate::kernels::cuda::open`] or [`Device::Cpu`] gives it.
    pub device: Device,
    /// Padded tokens of a batch.
    pub max_batch_tokens: usize,
    /// Memory for the keys and values of one query's live completions, in bytes.
    pub kv_cache_bytes: usize,
}

impl Default for RegistryOptions {
    /// As the commands' defaults.
    fn default() -> Self {
        Self { device: Device::Cpu, max_batch_tokens: 4096, kv_cache_bytes: 2 << 30 }
    }
}

/// What all queries over a registry have computed so far; only ever growing.
#[derive(Debug, Default)]
pub struct SqlProgress {
    /// Rows whose result is computed.
    pub rows: AtomicU64,
    /// Tokens of them.
    pub tokens: AtomicU64,
}

/// The models that queries can name.
///
/// All of them compute on one device, one batch at a time: queries and partitions wait for each other there.
#[derive(Debug, Default)]
pub struct ModelRegistry {
    models: Mutex<BTreeMap<String, Arc<SqlModel>>>,
    options: RegistryOptions,
    device: Arc<AsyncMutex<()>>,
    progress: Arc<SqlProgress>,
}

impl ModelRegistry {
    /// A registry without models.
    pub fn new(options: RegistryOptions) -> Self {
        Self { options, ..Self::default() }
    }

    /// Adds a model, or replaces the one of that name: a checkpoint folder, or a hub id in the local cache.
    ///
    /// Its configuration and tokenizer are read, its weights at the first use.
    ///
    /// # Errors
    /// [`Error::Usage`] for an empty name, [`Error::Config`] when the checkpoint is not there or cannot be used.
    pub fn add(&self, name: &str, path: &str) -> Result<()> {
        if name.is_empty() {
            return Err(Error::Usage(format!("the model at {path} needs a name: NAME=DIR")));
        }
        let checkpoint = Checkpoint::open(path)?;
        let tokenizer = TextTokenizer::open(&checkpoint.dir, checkpoint.config.vocab_size)?;
        let model = SqlModel {
            name: name.to_owned(),
            checkpoint,
            tokenizer,
            options: self.options.clone(),
            device: self.device.clone(),
            progress: self.progress.clone(),
            base: Mutex::default(),
            causal: Mutex::default(),
            engines: Mutex::default(),
            loaded: AtomicBool::new(false),
        };
        lock(&self.models).insert(name.to_owned(), Arc::new(model));
        Ok(())
    }

    /// The model of that name.
    pub fn get(&self, name: &str) -> Option<Arc<SqlModel>> {
        lock(&self.models).get(name).cloned()
    }

    /// All models by name.
    pub fn list(&self) -> Vec<Arc<SqlModel>> {
        lock(&self.models).values().cloned().collect()
    }

    /// What was computed so far.
    pub fn progress(&self) -> &Arc<SqlProgress> {
        &self.progress
    }
}

/// A named checkpoint with what of it is loaded.
pub struct SqlModel {
    name: String,
    checkpoint: Checkpoint,
    tokenizer: TextTokenizer,
    options: RegistryOptions,
    device: Arc<AsyncMutex<()>>,
    progress: Arc<SqlProgress>,
    /// Shared by all heads.
    base: Mutex<Option<Arc<MistralModel>>>,
    /// Shared by all ways to generate; its weights are laid out for few rows.
    causal: Mutex<Option<Arc<CausalLm>>>,
    engines: Mutex<HashMap<String, Arc<LoadedEngine>>>,
    loaded: AtomicBool,
}

/// An engine that is ready to compute a call.
pub struct LoadedEngine {
    pub engine: Engine,
    /// Renders chats where the call's argument is one.
    pub chat: Option<ChatTemplate>,
    /// Held while a batch is computed.
    pub device: Arc<AsyncMutex<()>>,
    pub progress: Arc<SqlProgress>,
}

impl SqlModel {
    /// The name that queries use.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path or hub id that it was added with.
    pub fn path(&self) -> &str {
        &self.checkpoint.name
    }

    /// The labels of its head; none where the head has no labels.
    pub fn labels(&self) -> &[String] {
        match self.checkpoint.config.architecture {
            Architecture::SequenceClassification | Architecture::TokenClassification => &self.checkpoint.config.labels,
            Architecture::CausalLm | Architecture::Base => &[],
        }
    }

    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The tokenizer, without a limit.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }

    pub fn options(&self) -> &RegistryOptions {
        &self.options
    }

    /// Whether weights are in memory.
    pub fn is_loaded(&self) -> bool {
        self.loaded.load(Ordering::Relaxed)
    }

    /// The tokenizer with the checkpoint's length limit.
    ///
    /// # Errors
    /// As [`TextTokenizer::with_limit`].
    pub fn limited_tokenizer(&self, tokenizer: TextTokenizer, overflow: Overflow) -> Result<TextTokenizer> {
        let positions = self.checkpoint.config.max_position_embeddings;
        let max_length = tokenizer.model_max_length().unwrap_or(usize::MAX).min(positions);
        tokenizer.with_limit(max_length, overflow, CHUNK_OVERLAP_TOKENS.min(max_length / 4))
    }

    /// The base model, loaded at the first call.
    ///
    /// # Errors
    /// [`Error::Config`] when weights are unusable.
    pub fn base(&self) -> Result<Arc<MistralModel>> {
        once(&self.base, || MistralModel::load(&self.checkpoint, &self.options.device))
    }

    /// The model for generating, loaded at the first call.
    ///
    /// # Errors
    /// [`Error::Config`] when weights are unusable.
    pub fn causal(&self) -> Result<Arc<CausalLm>> {
        once(&self.causal, || CausalLm::load(&self.checkpoint, &self.options.device))
    }

    /// The engine of a call, loaded at the first one; this can take long.
    ///
    /// # Errors
    /// [`Error::Config`] when weights are unusable, [`Error::Usage`] when options do not fit the checkpoint.
    pub fn engine(&self, call: &ModelCall) -> Result<Arc<LoadedEngine>> {
        let mut engines = lock(&self.engines);
        if let Some(engine) = engines.get(&call.engine_key()) {
            return Ok(engine.clone());
        }
        let engine = Arc::new(LoadedEngine {
            engine: call.function.engine(self, &call.options)?,
            chat: if self.tokenizer.has_chat_template() { self.tokenizer.chat_template().ok() } else { None },
            device: self.device.clone(),
            progress: self.progress.clone(),
        });
        engines.insert(call.engine_key(), engine.clone());
        self.loaded.store(true, Ordering::Relaxed);
        Ok(engine)
    }
}

impl fmt::Debug for SqlModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqlModel").field("name", &self.name).field("path", &self.path()).finish_non_exhaustive()
    }
}

/// A thread that panicked here left nothing half done: values are set whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn once<T>(slot: &Mutex<Option<Arc<T>>>, load: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
    let mut slot = lock(slot);
    if let Some(value) = &*slot {
        return Ok(value.clone());
    }
    let value = Arc::new(load()?);
    *slot = Some(value.clone());
    Ok(value)
}
