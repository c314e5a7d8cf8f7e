//! Computes windows of texts, one after the other, away from the threads that run queries.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use arrow::array::{Array, ArrayRef, RecordBatch};
use arrow::datatypes::Schema;
use datafusion::common::runtime::SpawnedTask;
use datafusion::error::{DataFusionError, Result};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;

use super::call::ModelCall;
use super::exec::InferMetrics;
use super::models::LoadedEngine;
use super::settings::OnError;
use crate::batch::Padding;
use crate::data::text_column::as_text;
use crate::engine::{BatchObserver, Inferred, PreparedRows};
use crate::error::Error;
use crate::text::Prompt;

/// Windows that a completing worker takes in beyond the one it works on.
const QUEUED_WINDOWS: usize = 4;

/// What one partition of a query shares with what computes for it.
pub struct Work {
    call: Arc<ModelCall>,
    metrics: InferMetrics,
    on_error: OnError,
    /// Set when nobody waits for results any more.
    cancelled: AtomicBool,
    /// What ended the thread that completes.
    failure: OnceLock<Arc<DataFusionError>>,
}

/// Takes windows and gives their results.
pub enum Worker {
    /// Every window is a task of its own.
    Batches(Arc<Work>),
    /// One thread completes all of them, so that a window's last completions share steps with the next one's first.
    Completions { work: Arc<Work>, windows: mpsc::Sender<QueuedWindow>, _thread: SpawnedTask<()> },
}

/// A window for the thread that completes.
pub struct QueuedWindow {
    arguments: Vec<ArrayRef>,
    reply: oneshot::Sender<Result<ArrayRef>>,
}

/// A window's result that is under way.
pub type PendingResult = SpawnedTask<Result<ArrayRef>>;

impl Worker {
    /// A worker for one partition of a query.
    pub fn start(work: Arc<Work>) -> Self {
        if !work.call.function.generates() {
            return Self::Batches(work);
        }
        let (windows, receiver) = mpsc::channel(QUEUED_WINDOWS);
        let thread = {
            let work = work.clone();
            SpawnedTask::spawn_blocking(move || work.complete(receiver))
        };
        Self::Completions { work, windows, _thread: thread }
    }

    /// Begins to compute a window: the results of all rows of `arguments` in one array.
    pub fn submit(&self, arguments: Vec<ArrayRef>) -> PendingResult {
        match self {
            Self::Batches(work) => SpawnedTask::spawn(work.clone().infer(arguments)),
            Self::Completions { work, windows, .. } => {
                let (work, windows) = (work.clone(), windows.clone());
                SpawnedTask::spawn(async move {
                    let (reply, result) = oneshot::channel();
                    if windows.send(QueuedWindow { arguments, reply }).await.is_err() {
                        return Err(work.failure());
                    }
                    result.await.unwrap_or_else(|_| Err(work.failure()))
                })
            }
        }
    }
}

impl Work {
    pub fn new(call: Arc<ModelCall>, metrics: InferMetrics, on_error: OnError) -> Self {
        Self { call, metrics, on_error, cancelled: AtomicBool::new(false), failure: OnceLock::new() }
    }

    /// Nobody waits for results any more: the batch that is being computed is the last.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Tokenizes while another window may be computing, then waits for the device.
    async fn infer(self: Arc<Self>, arguments: Vec<ArrayRef>) -> Result<ArrayRef> {
        let work = self.clone();
        let (loaded, prepared) = blocking(move || {
            let loaded = work.call.model.engine(&work.call).map_err(external)?;
            let (prepared, _) = work.prepare(&loaded, &arguments)?;
            Ok((loaded, prepared))
        })
        .await?;
        let device = loaded.device.clone().lock_owned().await;
        blocking(move || {
            let _device = device; // until the computation has ended, even if nobody waits for it
            let observer = Observer { work: &self, loaded: &loaded };
            match loaded.engine.infer(prepared, &observer).map_err(external)? {
                Some(inferred) => self.finish(&loaded, inferred),
                None => Err(cancelled()),
            }
        })
        .await
    }

    /// Completes windows until there are no more; replies that are dropped say that it failed.
    fn complete(&self, mut receiver: mpsc::Receiver<QueuedWindow>) {
        let loaded = self.call.model.engine(&self.call).map_err(external);
        if let Err(error) = loaded.and_then(|loaded| self.complete_with(&loaded, &mut receiver)) {
            // The first failure is the one that counts, and there is no other.
            let _ = self.failure.set(Arc::new(error));
        }
    }

    /// Why there is no result.
    fn failure(&self) -> DataFusionError {
        match self.failure.get() {
            Some(error) => DataFusionError::Shared(error.clone()),
            None => internal("the thread that completes prompts ended early"),
        }
    }

    fn complete_with(&self, loaded: &LoadedEngine, receiver: &mut mpsc::Receiver<QueuedWindow>) -> Result<()> {
        let Some(mut generation) = loaded.engine.start_generation::<oneshot::Sender<Result<ArrayRef>>>() else {
            return Err(internal("an engine without completions was asked for some"));
        };
        let observer = Observer { work: self, loaded };
        let mut input_ended = false;
        loop {
            while !input_ended && generation.wants_more() {
                let next = match generation.is_empty() {
                    true => receiver.blocking_recv(),
                    false => match receiver.try_recv() {
                        Ok(window) => Some(window),
                        Err(TryRecvError::Empty) => break,
                        Err(TryRecvError::Disconnected) => None,
                    },
                };
                match next {
                    None => input_ended = true,
                    Some(QueuedWindow { arguments, reply }) => match self.prepare(loaded, &arguments) {
                        Ok((prepared, keys)) => drop(generation.push(reply, prepared, keys.into_iter())),
                        Err(error) => drop(reply.send(Err(error))),
                    },
                }
            }
            while let Some((reply, inferred)) = generation.pop().map_err(external)? {
                drop(reply.send(self.finish(loaded, inferred)));
            }
            if generation.is_empty() {
                if input_ended {
                    return Ok(());
                }
                continue;
            }
            let _device = loaded.device.blocking_lock();
            if !generation.step(&observer).map_err(external)? {
                return Err(cancelled());
            }
        }
    }

    /// Tokenizes a window; each row's key for random draws is made of its prompt.
    fn prepare(&self, loaded: &LoadedEngine, arguments: &[ArrayRef]) -> Result<(PreparedRows, Vec<u64>)> {
        let mut prompts: Vec<Prompt> = Vec::new();
        for argument in arguments {
            match (as_text(argument), &loaded.chat) {
                (Some(texts), _) => prompts.extend(texts.iter().map(Prompt::from)),
                (None, Some(template)) => prompts.extend(template.prompts(argument, None).map_err(external)?),
                (None, None) => {
                    let message = "has no chat template, which a prompt that is a list of messages needs";
                    return Err(external(Error::config(&self.call.model.checkpoint().dir, message)));
                }
            }
        }
        let keys = match self.call.function.generates() {
            true => prompts.iter().map(random_key).collect(),
            false => Vec::new(),
        };
        Ok((loaded.engine.prepare(&prompts), keys))
    }

    /// Counts a window and makes the function's column of it.
    fn finish(&self, loaded: &LoadedEngine, inferred: Inferred) -> Result<ArrayRef> {
        let Inferred { columns, stats, first_error, .. } = inferred;
        let rows = columns.first().map_or(0, |column| column.len());
        self.metrics.rows_inferred.add(rows - stats.null_rows as usize);
        self.metrics.rows_null.add(stats.null_rows as usize);
        self.metrics.rows_failed.add(stats.failed_rows as usize);
        self.metrics.batches.add(stats.batches as usize);
        self.metrics.device_time.add_duration(stats.busy);
        if let (OnError::Fail, Some((_, message))) = (self.on_error, first_error) {
            return Err(external(Error::RowFailed { function: self.call.function.name(), message }));
        }
        let columns = RecordBatch::try_new(Arc::new(Schema::new(loaded.engine.fields())), columns)?;
        self.call.function.result(&columns).map_err(external)
    }
}

/// Counts what is computed, and says when nobody waits for it any more.
struct Observer<'a> {
    work: &'a Work,
    loaded: &'a LoadedEngine,
}

impl BatchObserver for Observer<'_> {
    fn after_batch(&self, rows: u64, padding: Padding) -> bool {
        let metrics = &self.work.metrics;
        metrics.tokens.add(padding.real_tokens as usize);
        metrics.padding.add_part((padding.padded_tokens - padding.real_tokens) as usize);
        metrics.padding.add_total(padding.padded_tokens as usize);
        self.loaded.progress.rows.fetch_add(rows, Ordering::Relaxed);
        self.loaded.progress.tokens.fetch_add(padding.real_tokens, Ordering::Relaxed);
        !self.work.cancelled.load(Ordering::Relaxed)
    }
}

/// The same prompt draws the same, wherever it stands: rows of SQL have no number.
fn random_key(prompt: &Prompt) -> u64 {
    let Prompt::Text { text, .. } = prompt else { return 0 };
    let hash = Sha256::digest(text.as_bytes());
    hash.iter().take(8).fold(0, |key, byte| key << 8 | u64::from(*byte))
}

/// Runs `work` on a thread that may block; a panic there is an error here.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(external(Error::Internal(format!("a worker thread failed: {error}")))))
}

fn external(error: Error) -> DataFusionError {
    DataFusionError::External(Box::new(error))
}

fn internal(message: &str) -> DataFusionError {
    external(Error::Internal(message.to_owned()))
}

fn cancelled() -> DataFusionError {
    DataFusionError::Execution("the query was cancelled".to_owned())
}
