//! Completions for windows of prompts, in flight across windows and units.
//!
//! A window's rows wait in the scheduler's queue beside the next window's, so that a long answer at the end of one
//! never leaves slots empty. Windows come out in the order in which they went in.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use arrow::array::{ArrayRef, ListBuilder, StringArray, StringBuilder, StructBuilder, UInt32Array, UInt32Builder};
use arrow::datatypes::{DataType, Field, Fields};

use super::{BatchObserver, InferStats, Inferred, PreparedRows, Row, common_columns};
use crate::batch::{Padding, Sequence};
use crate::error::{Error, Result};
use crate::generation::{
    Batching, CausalLm, Completion, Generated, Request, SamplingParams, Scheduler, SchedulerLimits, StaticBatches,
    StepStats,
};
use crate::heads::TokenLogprob;
use crate::model::MistralModel;
use crate::text::TextTokenizer;

/// Rows that are under way or wait for rows before them: bounds what one very long completion makes others pile up.
const MAX_ROWS_IN_FLIGHT: usize = 16_384;

/// A causal language model with what every row's completion is asked for.
pub struct Generator {
    model: Arc<CausalLm>,
    /// The same on further devices, with what their steps may hold.
    replicas: Vec<(Arc<CausalLm>, SchedulerLimits)>,
    params: Arc<SamplingParams>,
    /// Completions of each row.
    samples: u32,
    limits: SchedulerLimits,
    batching: Batching,
}

/// Completions under way, batched one way or the other.
enum Batches<'a> {
    /// One scheduler a device, all with one queue.
    InFlight(Vec<Scheduler<'a, CausalLm, TextTokenizer>>),
    Static(StaticBatches<'a, TextTokenizer>),
}

impl Batches<'_> {
    fn push(&mut self, request: Request) -> Result<(), String> {
        match self {
            Self::InFlight(schedulers) => match schedulers.first_mut() {
                Some(first) => first.push(request),
                None => Err("there is no device to generate on".into()),
            },
            Self::Static(batches) => batches.push(request),
        }
    }

    fn step(&mut self) -> Result<Vec<Completion>> {
        match self {
            Self::InFlight(schedulers) => step_all(schedulers),
            Self::Static(batches) => batches.step(),
        }
    }

    fn queued(&self) -> usize {
        match self {
            Self::InFlight(schedulers) => schedulers.first().map_or(0, Scheduler::queued),
            Self::Static(batches) => batches.queued(),
        }
    }

    fn live(&self) -> usize {
        match self {
            Self::InFlight(schedulers) => schedulers.iter().map(Scheduler::live).sum(),
            Self::Static(batches) => batches.live(),
        }
    }

    fn stats(&self) -> StepStats {
        match self {
            Self::InFlight(schedulers) => schedulers.iter().map(Scheduler::stats).sum(),
            Self::Static(batches) => batches.stats(),
        }
    }

    /// Tokens that were computed for nobody.
    fn wasted_tokens(&self) -> u64 {
        match self {
            Self::InFlight(_) => 0,
            Self::Static(batches) => batches.padding().padded_tokens - batches.padding().real_tokens,
        }
    }
}

/// At least one step of every scheduler: none waits for another that is at a long prompt, but goes on meanwhile.
fn step_all(schedulers: &mut [Scheduler<'_, CausalLm, TextTokenizer>]) -> Result<Vec<Completion>> {
    if let [scheduler] = schedulers {
        return scheduler.step();
    }
    let missing = AtomicUsize::new(schedulers.len());
    let results: Vec<Result<Vec<Completion>>> = std::thread::scope(|scope| {
        let steps = schedulers.iter_mut().map(|scheduler| {
            let missing = &missing;
            scope.spawn(move || {
                let mut completions = scheduler.step();
                missing.fetch_sub(1, Ordering::Relaxed);
                while missing.load(Ordering::Relaxed) > 0 && scheduler.live() > 0 {
                    let Ok(held) = &mut completions else { break };
                    match scheduler.step() {
                        Ok(more) => held.extend(more),
                        Err(error) => completions = Err(error),
                    }
                }
                completions
            })
        });
        let steps: Vec<_> = steps.collect();
        let failed = |_| Err(Error::Internal("a generating thread failed".into()));
        steps.into_iter().map(|step| step.join().unwrap_or_else(failed)).collect()
    });
    Ok(results.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// The result columns of a job that generates, in order.
pub fn generate_fields(samples: u32, logprobs: bool) -> Vec<Field> {
    let mut fields = vec![
        Field::new("completion", DataType::Utf8, true),
        Field::new("finish_reason", DataType::Utf8, true),
        Field::new("prompt_tokens", DataType::UInt32, true),
        Field::new("completion_tokens", DataType::UInt32, true),
    ];
    if samples > 1 {
        fields.push(Field::new("completions", DataType::List(completion_item().into()), true));
    }
    if logprobs {
        fields.push(TokenLogprob::field());
    }
    fields
}

impl Generator {
    /// A generator of `samples` completions a row.
    ///
    /// The model may be shared with other generators.
    pub fn new(model: impl Into<Arc<CausalLm>>, params: SamplingParams, samples: u32, limits: SchedulerLimits) -> Self {
        let params = Arc::new(params);
        Self { model: model.into(), replicas: Vec::new(), params, samples, limits, batching: Batching::default() }
    }

    /// The same with one more replica of the model, on a device of its own.
    pub fn with_replica(mut self, model: impl Into<Arc<CausalLm>>, limits: SchedulerLimits) -> Self {
        self.replicas.push((model.into(), limits));
        self
    }

    /// The model without its output layer.
    pub(super) fn model(&self) -> &MistralModel {
        self.model.model()
    }

    /// The same, batched in another way.
    pub fn with_batching(self, batching: Batching) -> Self {
        Self { batching, ..self }
    }

    /// The columns of its completions, in order.
    pub fn fields(&self) -> Vec<Field> {
        generate_fields(self.samples, self.params.logprobs)
    }

    /// Begins to generate; `T` is what a caller wants back with each window's results.
    pub fn start<'a, T>(&'a self, tokenizer: &'a TextTokenizer) -> Generation<'a, T> {
        Generation {
            generator: self,
            tokenizer,
            scheduler: match self.batching {
                Batching::InFlight => {
                    let first = Scheduler::new(&*self.model, tokenizer, self.limits);
                    let beside = |(model, limits): &'a (Arc<CausalLm>, _)| Scheduler::beside(&first, &**model, *limits);
                    let others: Vec<_> = self.replicas.iter().map(beside).collect();
                    Batches::InFlight(std::iter::once(first).chain(others).collect())
                }
                Batching::Static => Batches::Static(StaticBatches::new(&self.model, tokenizer, self.limits)),
            },
            windows: VecDeque::new(),
            first_row: 0,
            stats: InferStats::default(),
        }
    }
}

/// Windows of rows whose completions are under way.
pub struct Generation<'a, T> {
    generator: &'a Generator,
    tokenizer: &'a TextTokenizer,
    scheduler: Batches<'a>,
    windows: VecDeque<Window<T>>,
    /// The scheduler's number of the first row of the first window.
    first_row: usize,
    /// Steps and time since a window came out.
    stats: InferStats,
}

struct Window<T> {
    tag: T,
    rows: Vec<Row>,
    /// Each row's completions so far, by sample.
    completions: Vec<Vec<Option<Generated>>>,
    /// Completions that are still to come.
    missing: usize,
    padding: Padding,
}

impl<T> Generation<'_, T> {
    /// Whether the queue is so short that slots could run empty before the next window is added.
    pub fn wants_more(&self) -> bool {
        let rows: usize = self.windows.iter().map(|window| window.rows.len()).sum();
        self.scheduler.queued() <= self.scheduler.live() && rows < MAX_ROWS_IN_FLIGHT
    }

    /// Whether nothing is under way or waiting to be taken.
    pub fn is_empty(&self) -> bool {
        self.windows.is_empty()
    }

    /// Adds a window; `random_keys` has each row's number in the whole input. Returns how many rows need no completion.
    pub fn push(&mut self, tag: T, prepared: PreparedRows, random_keys: impl Iterator<Item = u64>) -> u64 {
        let params = self.generator.params.clone();
        self.push_with(tag, prepared, random_keys.map(|key| (key, Ok(params.clone()))))
    }

    /// As [`Generation::push`], with each row's own settings, or why there are none, beside its number.
    pub fn push_with(
        &mut self,
        tag: T,
        prepared: PreparedRows,
        settings: impl Iterator<Item = (u64, Result<Arc<SamplingParams>, String>)>,
    ) -> u64 {
        let PreparedRows { rows, sequences, .. } = prepared;
        let base = self.first_row + self.windows.iter().map(|window| window.rows.len()).sum::<usize>();
        let samples = self.generator.samples;
        let mut window = Window {
            tag,
            completions: vec![vec![None; samples as usize]; rows.len()],
            rows,
            missing: 0,
            padding: Padding::default(),
        };
        let mut sequences: Vec<Option<Sequence>> = sequences.into_iter().map(Some).collect();
        for ((index, row), (random_key, params)) in window.rows.iter_mut().enumerate().zip(settings) {
            let Some(sequence) = row.sequences.clone().next().and_then(|first| sequences[first].take()) else {
                continue;
            };
            let params = match params {
                Ok(params) => params,
                Err(message) => {
                    row.error = Some(message);
                    continue;
                }
            };
            let request =
                Request { row: base + index, samples: 0..samples, random_key, prompt_ids: sequence.input_ids, params };
            match self.scheduler.push(request) {
                Ok(()) => window.missing += samples as usize,
                Err(message) => row.error = Some(message),
            }
        }
        let without_work = window.rows.iter().filter(|row| row.sequences.is_empty() || row.error.is_some()).count();
        self.windows.push_back(window);
        without_work as u64
    }

    /// Computes one token of every live completion; false when `observer` asked to stop.
    ///
    /// # Errors
    /// When the model fails.
    pub fn step(&mut self, observer: &dyn BatchObserver) -> Result<bool> {
        let (before, wasted) = (self.scheduler.stats(), self.scheduler.wasted_tokens());
        let started = Instant::now();
        let completions = self.scheduler.step()?;
        let after = self.scheduler.stats();
        self.stats.busy += started.elapsed();
        self.stats.batches += after.steps - before.steps;
        let tokens = after.prompt_tokens - before.prompt_tokens + after.completion_tokens - before.completion_tokens;

        let wasted = self.scheduler.wasted_tokens() - wasted;
        self.stats.padding += Padding { real_tokens: 0, padded_tokens: wasted };

        let mut rows_done = 0;
        for completion in completions {
            let mut index = completion.row - self.first_row;
            for window in &mut self.windows {
                if index >= window.rows.len() {
                    index -= window.rows.len();
                    continue;
                }
                window.missing -= 1;
                match completion.result {
                    Ok(generated) => {
                        // A row's completions share its prompt.
                        let prompt = if completion.sample == 0 { generated.prompt_tokens } else { 0 };
                        let tokens = (prompt + generated.token_ids.len()) as u64;
                        window.padding += Padding { real_tokens: tokens, padded_tokens: tokens };
                        window.completions[index][completion.sample as usize] = Some(generated);
                    }
                    Err(message) => {
                        window.rows[index].error.get_or_insert(message);
                    }
                }
                let row_is_done =
                    window.completions[index].iter().all(Option::is_some) || window.rows[index].error.is_some();
                rows_done += u64::from(row_is_done);
                break;
            }
        }
        Ok(observer.after_batch(rows_done, Padding { real_tokens: tokens, padded_tokens: tokens + wasted }))
    }

    /// Takes the first window once all its completions are there.
    ///
    /// # Errors
    /// When a column cannot be built.
    pub fn pop(&mut self) -> Result<Option<(T, Inferred)>> {
        if self.windows.front().is_none_or(|window| window.missing > 0) {
            return Ok(None);
        }
        let Some(window) = self.windows.pop_front() else { return Ok(None) };
        self.first_row += window.rows.len();
        let mut stats = std::mem::take(&mut self.stats);
        stats.padding += window.padding;
        let mut first_error = None;
        for (index, row) in window.rows.iter().enumerate() {
            stats.count(row);
            if let (None, Some(error)) = (&first_error, &row.error) {
                first_error = Some((index, error.clone()));
            }
        }
        let completions: Vec<Option<Vec<Generated>>> = window
            .completions
            .into_iter()
            .zip(&window.rows)
            .map(|(samples, row)| samples.into_iter().collect::<Option<Vec<_>>>().filter(|_| row.error.is_none()))
            .collect();
        let mut columns = self.columns(&completions);
        columns.extend(common_columns(&window.rows));
        Ok(Some((window.tag, Inferred { columns, stats, first_error, kept: Vec::new() })))
    }

    /// The columns of [`generate_fields`]; rows without completions are null.
    fn columns(&self, rows: &[Option<Vec<Generated>>]) -> Vec<ArrayRef> {
        let first = || rows.iter().map(|row| row.as_ref().and_then(|samples| samples.first()));
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(first().map(|completion| completion.map(|c| c.text.as_str())).collect::<StringArray>()),
            Arc::new(first().map(|completion| completion.map(|c| c.finish_reason.as_str())).collect::<StringArray>()),
            Arc::new(first().map(|completion| completion.map(|c| c.prompt_tokens as u32)).collect::<UInt32Array>()),
            Arc::new(first().map(|completion| completion.map(|c| c.token_ids.len() as u32)).collect::<UInt32Array>()),
        ];
        if self.generator.samples > 1 {
            columns.push(completions_column(rows));
        }
        if self.generator.params.logprobs {
            let tokens: Vec<Option<Vec<TokenLogprob>>> =
                first().map(|completion| completion.map(token_logprobs)).collect();
            columns.push(TokenLogprob::column(tokens.iter().map(Option::as_deref), self.tokenizer));
        }
        columns
    }
}

fn token_logprobs(completion: &Generated) -> Vec<TokenLogprob> {
    let tokens = completion.token_ids.iter().zip(&completion.logprobs);
    tokens.map(|(&token_id, &logprob)| TokenLogprob { token_id, logprob }).collect()
}

/// List<Struct{text, finish_reason, tokens}>, every completion of each row.
fn completions_column(rows: &[Option<Vec<Generated>>]) -> ArrayRef {
    let entries = StructBuilder::new(
        completion_fields(),
        vec![Box::new(StringBuilder::new()) as Box<_>, Box::new(StringBuilder::new()), Box::new(UInt32Builder::new())],
    );
    let mut list = ListBuilder::new(entries).with_field(completion_item());
    for row in rows {
        for completion in row.iter().flatten() {
            let entry = list.values();
            if let Some(texts) = entry.field_builder::<StringBuilder>(0) {
                texts.append_value(&completion.text);
            }
            if let Some(reasons) = entry.field_builder::<StringBuilder>(1) {
                reasons.append_value(completion.finish_reason.as_str());
            }
            if let Some(tokens) = entry.field_builder::<UInt32Builder>(2) {
                tokens.append_value(completion.token_ids.len() as u32);
            }
            entry.append(true);
        }
        list.append(row.is_some());
    }
    Arc::new(list.finish())
}

fn completion_fields() -> Fields {
    Fields::from(vec![
        Field::new("text", DataType::Utf8, false),
        Field::new("finish_reason", DataType::Utf8, false),
        Field::new("tokens", DataType::UInt32, false),
    ])
}

fn completion_item() -> Field {
    Field::new("item", DataType::Struct(completion_fields()), false)
}
