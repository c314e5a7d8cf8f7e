//! Prompts in, result columns out, on one device or on several with a replica of the model each.
//!
//! [`Engine::prepare`] tokenizes on all cores; [`Engine::infer`] packs, computes and scatters results back to their
//! rows. They are apart so that the next window is tokenized while this one is computed.

mod generate;
mod replicas;

pub use generate::{Generation, Generator, generate_fields};
pub use replicas::BATCHES_PER_DEVICE;
use replicas::{Replica, Replicas};

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, BooleanArray, StringArray, UInt32Array};
use arrow::datatypes::{DataType, Field};

use crate::batch::{Packer, Padding, Sequence};
use crate::error::{Error, Result};
use crate::heads::{Head, HeadOutput};
use crate::model::MistralModel;
use crate::text::{Prompt, TextTokenizer, TokenDetail, Tokenized};

/// The columns that every command that runs a model appends after its head's.
pub fn common_fields() -> Vec<Field> {
    vec![
        Field::new("num_tokens", DataType::UInt32, true),
        Field::new("truncated", DataType::Boolean, false),
        Field::new("error", DataType::Utf8, true),
    ]
}

/// What is done with tokenized rows, and the tokenizer.
pub struct Engine {
    tokenizer: TextTokenizer,
    work: Work,
    /// Nanoseconds spent in tokenizing.
    tokenizing: AtomicU64,
}

/// The two ways to work: a batch at a time, or a token at a time.
enum Work {
    Head { replicas: Replicas, packer: Packer },
    Generate(Generator),
}

/// Tokenized rows, ready for the device.
#[derive(Debug, Clone, Default)]
pub struct PreparedRows {
    rows: Vec<Row>,
    sequences: Vec<Sequence>,
    /// By number of the sequence.
    details: Vec<TokenDetail>,
}

impl PreparedRows {
    fn new(tokenized: Vec<Option<Result<Tokenized, String>>>) -> Self {
        let mut sequences = Vec::with_capacity(tokenized.len());
        let mut details = Vec::with_capacity(tokenized.len());
        let rows = tokenized.into_iter().map(|tokenized| match tokenized {
            None => Row { is_null: true, ..Row::default() },
            Some(Err(error)) => Row { error: Some(error), ..Row::default() },
            Some(Ok(tokenized)) => {
                let first = sequences.len();
                let num_tokens = Some(tokenized.num_tokens() as u32);
                sequences.extend((first..).zip(tokenized.chunks).map(|(row, input_ids)| Sequence { row, input_ids }));
                details.extend(tokenized.details);
                details.resize_with(sequences.len(), TokenDetail::default);
                Row { num_tokens, truncated: tokenized.truncated, sequences: first..sequences.len(), ..Row::default() }
            }
        });
        Self { rows: rows.collect(), sequences, details }
    }

    /// Whether a row has tokens to compute.
    pub fn has_work(&self, index: usize) -> bool {
        self.rows.get(index).is_some_and(|row| !row.sequences.is_empty())
    }

    /// One of the rows by itself.
    pub fn row(&self, index: usize) -> Self {
        let Some(row) = self.rows.get(index) else { return Self::default() };
        let sequences = self.sequences[row.sequences.clone()].iter().enumerate();
        Self {
            sequences: sequences.map(|(row, s)| Sequence { row, input_ids: s.input_ids.clone() }).collect(),
            details: self.details[row.sequences.clone()].to_vec(),
            rows: vec![Row { sequences: 0..row.sequences.len(), ..row.clone() }],
        }
    }
}

/// What is known of a row beside its results.
#[derive(Debug, Clone, Default)]
struct Row {
    is_null: bool,
    num_tokens: Option<u32>,
    truncated: bool,
    error: Option<String>,
    /// The sequences of this row's text: one, several with chunks, none without a result.
    sequences: Range<usize>,
}

/// The result columns of some rows, and what they took.
pub struct Inferred {
    /// The head's columns, then [`common_fields`], one entry a row.
    pub columns: Vec<ArrayRef>,
    pub stats: InferStats,
    /// The first row that failed, and why.
    pub first_error: Option<(usize, String)>,
    /// What the head gave for each sequence of the rows that were to be kept, before it became columns.
    pub kept: Vec<Vec<HeadOutput>>,
}

/// What a window of rows took.
#[derive(Debug, Clone, Copy, Default)]
pub struct InferStats {
    pub null_rows: u64,
    pub failed_rows: u64,
    pub truncated_rows: u64,
    pub batches: u64,
    pub padding: Padding,
    /// Time in model and head; the mean over devices where there are several.
    pub busy: Duration,
}

/// Told after each batch; lets a caller show progress and stop early.
pub trait BatchObserver {
    /// A batch that completed `rows` rows was computed; false stops the window.
    fn after_batch(&self, rows: u64, padding: Padding) -> bool;
}

impl Engine {
    /// An engine that packs batches of at most `max_batch_tokens` padded tokens.
    ///
    /// The model may be shared with other engines.
    pub fn new(
        model: impl Into<Arc<MistralModel>>,
        head: Box<dyn Head>,
        tokenizer: TextTokenizer,
        max_batch_tokens: usize,
    ) -> Self {
        let model = model.into();
        let pad_token_id = model.config().pad_token_id.unwrap_or(0);
        let packer = Packer::new(max_batch_tokens, pad_token_id);
        let replicas = Replicas::new(Replica { model, head });
        Self { tokenizer, work: Work::Head { replicas, packer }, tokenizing: AtomicU64::default() }
    }

    /// The same with one more replica of the model and its head, on a device of its own, that takes its share of the batches.
    ///
    /// # Errors
    /// [`Error::Internal`] for an engine that generates.
    pub fn with_replica(mut self, model: impl Into<Arc<MistralModel>>, head: Box<dyn Head>) -> Result<Self> {
        let Work::Head { replicas, .. } = &mut self.work else {
            return Err(Error::Internal("a generator's replicas have no head".into()));
        };
        replicas.add(Replica { model: model.into(), head });
        Ok(self)
    }

    /// An engine that generates.
    pub fn generating(generator: Generator, tokenizer: TextTokenizer) -> Self {
        Self { tokenizer, work: Work::Generate(generator), tokenizing: AtomicU64::default() }
    }

    /// The columns of [`Inferred`], in order.
    pub fn fields(&self) -> Vec<Field> {
        let mut fields = match &self.work {
            Work::Head { replicas, .. } => replicas.head().fields(),
            Work::Generate(generator) => generator.fields(),
        };
        fields.extend(common_fields());
        fields
    }

    /// Begins to generate, if that is what this engine does.
    pub fn start_generation<T>(&self) -> Option<Generation<'_, T>> {
        match &self.work {
            Work::Generate(generator) => Some(generator.start(&self.tokenizer)),
            Work::Head { .. } => None,
        }
    }

    /// Tokenizes `prompts` on all cores.
    pub fn prepare(&self, prompts: &[Prompt]) -> PreparedRows {
        self.time_tokenizing(|| PreparedRows::new(self.tokenizer.tokenize(prompts)))
    }

    /// Tokenizes each context with its continuation on all cores; a head that scores answers for the latter alone.
    pub fn prepare_continuations(&self, contexts: &[Option<&str>], continuations: &[Option<&str>]) -> PreparedRows {
        self.time_tokenizing(|| PreparedRows::new(self.tokenizer.tokenize_continuations(contexts, continuations)))
    }

    fn time_tokenizing<T>(&self, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = work();
        self.tokenizing.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    /// The wall time in seconds of tokenizing, which overlaps with computing, and of each part of the model.
    pub fn profile(&self) -> Vec<(&'static str, f64)> {
        let model = match &self.work {
            Work::Head { replicas, .. } => replicas.model(),
            Work::Generate(generator) => generator.model(),
        };
        let tokenizing = self.tokenizing.load(Ordering::Relaxed) as f64 / 1e9;
        std::iter::once(("tokenizing", tokenizing)).chain(model.profile().seconds()).collect()
    }

    /// Computes prepared rows; `None` when `observer` asked to stop.
    ///
    /// A row whose results are not finite fails, and one that the device has no memory for even alone; the others go on.
    ///
    /// # Errors
    /// When a tensor operation fails or a column cannot be built.
    pub fn infer(&self, prepared: PreparedRows, observer: &dyn BatchObserver) -> Result<Option<Inferred>> {
        self.infer_keeping(prepared, &[], observer)
    }

    /// As [`Engine::infer`]; also returns what the head gave for the rows of these indices.
    ///
    /// # Errors
    /// As [`Engine::infer`].
    pub fn infer_keeping(
        &self,
        prepared: PreparedRows,
        keep: &[usize],
        observer: &dyn BatchObserver,
    ) -> Result<Option<Inferred>> {
        let PreparedRows { mut rows, sequences, details } = prepared;
        let Work::Head { replicas, packer } = &self.work else {
            return Err(Error::Internal("rows to complete were given to be inferred".into()));
        };
        let mut stats = InferStats::default();
        let mut outputs: Vec<Option<HeadOutput>> = vec![None; sequences.len()];

        let without_work = rows.iter().filter(|row| row.sequences.is_empty()).count();
        if !observer.after_batch(without_work as u64, Padding::default()) {
            return Ok(None);
        }
        // The row that a sequence completes when it is the last of its text; chunks may be computed in any order.
        let mut missing: Vec<usize> = rows.iter().map(|row| row.sequences.len()).collect();
        let mut owners = vec![0; sequences.len()];
        for (index, row) in rows.iter().enumerate() {
            owners[row.sequences.clone()].fill(index);
        }
        let (busy, went_on) = replicas.compute(packer.pack(sequences), &details, |batch, batch_outputs| {
            let mut completed = 0;
            for (&sequence, output) in batch.rows().iter().zip(batch_outputs) {
                match output {
                    Ok(output) => outputs[sequence] = Some(output),
                    Err(message) => rows[owners[sequence]].error = Some(message),
                }
                missing[owners[sequence]] -= 1;
                completed += u64::from(missing[owners[sequence]] == 0);
            }
            let padding =
                Padding { real_tokens: batch.real_tokens() as u64, padded_tokens: batch.padded_tokens() as u64 };
            stats.batches += 1;
            stats.padding += padding;
            observer.after_batch(completed, padding)
        })?;
        if !went_on {
            return Ok(None);
        }
        stats.busy = busy;

        let of_row = |index: &usize| outputs[rows[*index].sequences.clone()].iter().flatten().cloned().collect();
        let kept = keep.iter().map(of_row).collect();
        let mut results: Vec<Option<HeadOutput>> = Vec::with_capacity(rows.len());
        let mut first_error = None;
        for (index, row) in rows.iter_mut().enumerate() {
            let chunks: Vec<HeadOutput> = outputs[row.sequences.clone()].iter_mut().filter_map(Option::take).collect();
            let output = (!chunks.is_empty()).then(|| replicas.head().merge(chunks));
            if output.as_ref().is_some_and(|output| !output.is_finite()) {
                row.error = Some("the model gave NaN or infinity for this text".into());
            }
            stats.count(row);
            if first_error.is_none()
                && let Some(error) = &row.error
            {
                first_error = Some((index, error.clone()));
            }
            results.push(output.filter(|_| row.error.is_none()));
        }

        let mut columns = replicas.head().columns(&results)?;
        columns.extend(common_columns(&rows));
        Ok(Some(Inferred { columns, stats, first_error, kept }))
    }
}

impl InferStats {
    fn count(&mut self, row: &Row) {
        self.null_rows += u64::from(row.is_null);
        self.truncated_rows += u64::from(row.truncated);
        self.failed_rows += u64::from(row.error.is_some());
    }
}

/// The columns of [`common_fields`].
fn common_columns(rows: &[Row]) -> [ArrayRef; 3] {
    [
        Arc::new(rows.iter().map(|row| row.num_tokens).collect::<UInt32Array>()),
        Arc::new(rows.iter().map(|row| Some(row.truncated)).collect::<BooleanArray>()),
        Arc::new(rows.iter().map(|row| row.error.as_deref()).collect::<StringArray>()),
    ]
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use arrow::array::{Array, AsArray};
    use arrow::datatypes::Float32Type;
    use candle_core::Device;

    use super::*;
    use crate::batch::PackedBatch;
    use crate::heads::{ClassifyOptions, SequenceClassification};
    use crate::model::Checkpoint;
    use crate::text::Overflow;

    /// A head on a device with memory for so many tokens, which fails as CUDA does.
    struct Scarce {
        head: SequenceClassification,
        tokens: usize,
    }

    impl Head for Scarce {
        fn fields(&self) -> Vec<Field> {
            self.head.fields()
        }

        fn forward(
            &self,
            model: &MistralModel,
            batch: &PackedBatch,
            details: &[&TokenDetail],
        ) -> Result<Vec<HeadOutput>> {
            if batch.num_tokens() > self.tokens {
                let cuda = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
                return Err(candle_core::Error::Cuda(cuda.into()).bt().into());
            }
            self.head.forward(model, batch, details)
        }

        fn merge(&self, chunks: Vec<HeadOutput>) -> HeadOutput {
            self.head.merge(chunks)
        }

        fn columns(&self, rows: &[Option<HeadOutput>]) -> Result<Vec<ArrayRef>> {
            self.head.columns(rows)
        }
    }

    struct Nobody;

    impl BatchObserver for Nobody {
        fn after_batch(&self, _: u64, _: Padding) -> bool {
            true
        }
    }

    #[test]
    fn a_full_device_halves_the_batch_and_then_fails_the_row_alone() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/checkpoints/cls-nopad");
        let checkpoint = Checkpoint::open(folder.to_str().unwrap()).unwrap();
        let engine = |tokens| {
            let tokenizer = TextTokenizer::open(&checkpoint.dir, checkpoint.config.vocab_size).unwrap();
            let tokenizer = tokenizer.with_limit(200, Overflow::TruncateRight, 0).unwrap();
            let options = ClassifyOptions::default();
            let head = SequenceClassification::load(&checkpoint, options, &Device::Cpu).unwrap();
            let model = MistralModel::load(&checkpoint, &Device::Cpu).unwrap();
            Engine::new(model, Box::new(Scarce { head, tokens }), tokenizer, 4096)
        };
        let texts: Vec<String> = (0..40).map(|row| "some words ".repeat(1 + row % 5)).collect();
        let long = "a long text ".repeat(20);
        let prompt = |text| Prompt::Text { text, add_special_tokens: true };
        let mut prompts: Vec<Prompt> = texts.iter().map(|text| prompt(text.into())).collect();
        prompts.insert(17, prompt((&long).into()));
        let infer = |tokens| {
            let engine = engine(tokens);
            engine.infer(engine.prepare(&prompts), &Nobody).unwrap().unwrap()
        };
        let (plenty, scarce) = (infer(usize::MAX), infer(50));
        assert_eq!((plenty.stats.failed_rows, scarce.stats.failed_rows), (0, 1));
        let (row, message) = scarce.first_error.clone().unwrap();
        assert!(row == 17 && message.contains("out of memory for this text alone"), "{message}");
        let scores = |inferred: &Inferred| inferred.columns[1].as_primitive::<Float32Type>().clone();
        let (plenty, scarce) = (scores(&plenty), scores(&scarce));
        for row in (0..41).filter(|&row| row != 17) {
            assert!((plenty.value(row) - scarce.value(row)).abs() < 1e-5, "row {row}");
        }
        assert!(scarce.is_null(17));
    }
}
