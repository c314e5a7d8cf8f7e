//! Read → tokenize → compute → write, each on its own thread.
//!
//! Channels of depth one join the stages, so that each works on its own window while memory holds a handful of windows,
//! however large the dataset. A stage that fails or stops closes its ends; its neighbours then run dry.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, BooleanArray, RecordBatch};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::spawn_blocking;

use super::audit::{AuditReport, AuditRow, AuditSample, RowResults};
use super::control::{Counters, RunControl};
use super::plan::JobPlan;
use super::prompts::RowTexts;
use super::report::UnitCounts;
use super::runner::join;
use super::spec::{JobSpec, PromptSpec};
use super::truth::Agreement;
use crate::batch::Padding;
use crate::data::part::PartWriter;
use crate::data::sink::Sink;
use crate::data::source::{Window, WindowReader};
use crate::data::units::Unit;
use crate::engine::{BatchObserver, Engine, Generation, Inferred, PreparedRows};
use crate::error::{Error, Result};
use crate::generation::SamplingParams;

/// Windows that wait between two stages.
const CHANNEL_DEPTH: usize = 1;

/// What one run of the pipeline did.
#[derive(Debug, Clone, Default)]
pub struct PipelineTotals {
    pub counts: UnitCounts,
    /// Time in model and head.
    pub busy: Duration,
    /// From the first row read to the last part committed.
    pub elapsed: Duration,
    pub audit_elapsed: Duration,
    /// What the audit found, where one was asked for.
    pub audit: Option<AuditReport>,
    /// As [`Engine::profile`].
    pub profile: Vec<(&'static str, f64)>,
}

/// Rows of a window on their way through the device.
struct WindowRows {
    unit: usize,
    first_row: u64,
    last: bool,
    /// Rows that passed the filter, with the columns that were read.
    batch: RecordBatch,
    /// Which rows of the window passed.
    passing: Option<BooleanArray>,
}

/// A window in generation, with those of its rows that may be audited: index, number, tokens and own settings.
type GeneratingWindow = (WindowRows, Vec<(usize, u64, PreparedRows, Option<Arc<SamplingParams>>)>);

/// A window whose texts are tokenized.
type PreparedWindow = (WindowRows, PreparedRows);

/// A window whose results are computed, in the output's columns.
struct FinishedWindow {
    unit: usize,
    last: bool,
    batch: RecordBatch,
    counts: UnitCounts,
    busy: Duration,
}

/// What the stages share.
#[derive(Clone)]
struct Stage {
    spec: Arc<JobSpec>,
    plan: Arc<JobPlan>,
    engine: Arc<Engine>,
    control: Arc<RunControl>,
}

/// Computes the `pending` units and commits each as a part.
///
/// `failed_rows` is what earlier runs of the job recorded; it counts towards the limit.
///
/// # Errors
/// The first failure of any stage, or [`Error::Stopped`].
pub async fn run(
    spec: &Arc<JobSpec>,
    plan: &Arc<JobPlan>,
    engine: Engine,
    sink: Sink,
    pending: Vec<Unit>,
    failed_rows: u64,
    control: &Arc<RunControl>,
) -> Result<(Sink, PipelineTotals)> {
    let started = Instant::now();
    let windows = plan.windows(pending)?;
    let engine = Arc::new(engine);
    let stage = Stage { spec: spec.clone(), plan: plan.clone(), engine: engine.clone(), control: control.clone() };
    let (to_prepare, windows_read) = channel(CHANNEL_DEPTH);
    let (to_compute, windows_prepared) = channel(CHANNEL_DEPTH);
    let (to_write, windows_finished) = channel(CHANNEL_DEPTH);

    let (reader, preparer, computer, writer) = (stage.clone(), stage.clone(), stage.clone(), stage);
    let (reading, preparing, computing, writing) = tokio::join!(
        join(spawn_blocking(move || reader.read(windows, to_prepare))),
        join(spawn_blocking(move || preparer.prepare(windows_read, to_compute))),
        join(spawn_blocking(move || computer.compute(windows_prepared, to_write, failed_rows))),
        join(spawn_blocking(move || writer.write(sink, windows_finished))),
    );
    // A neighbour's failure only makes a stage run dry, so the order of these does not hide a cause.
    reading?;
    preparing?;
    let sample = computing?;
    let (sink, counts, busy) = writing?;
    control.check()?;
    let elapsed = started.elapsed();
    let profile = engine.profile(); // before the audit adds to it
    let audit = match sample {
        Some(sample) => {
            let control = control.clone();
            Some(join(spawn_blocking(move || sample.settle(&engine, &control))).await?)
        }
        None => None,
    };
    let audit_elapsed = started.elapsed() - elapsed;
    Ok((sink, PipelineTotals { counts, busy, elapsed, audit_elapsed, audit, profile }))
}

impl Stage {
    fn read(&self, windows: WindowReader, sender: Sender<Window>) -> Result<()> {
        for window in windows {
            self.control.check()?;
            if sender.blocking_send(window?).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn prepare(&self, mut receiver: Receiver<Window>, sender: Sender<PreparedWindow>) -> Result<()> {
        while let Some(Window { unit, first_row, batch, last }) = receiver.blocking_recv() {
            let (batch, passing) = match &self.plan.filter {
                Some(filter) => {
                    let (kept, passing) = filter.apply(&batch)?;
                    Counters::add(&self.control.counters.rows_filtered, (batch.num_rows() - kept.num_rows()) as u64);
                    (kept, Some(passing))
                }
                None => (batch, None),
            };
            let rows = match self.plan.prompts.rows(&batch)? {
                RowTexts::Prompts(prompts) => self.engine.prepare(&prompts),
                RowTexts::Continuations { contexts, continuations } => {
                    self.engine.prepare_continuations(&contexts, &continuations)
                }
            };
            let window = WindowRows { unit, first_row, last, batch, passing };
            if sender.blocking_send((window, rows)).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn compute(
        &self,
        receiver: Receiver<PreparedWindow>,
        sender: Sender<FinishedWindow>,
        failed_rows: u64,
    ) -> Result<Option<AuditSample>> {
        let mut sample =
            self.spec.audit.map(|rows| AuditSample::new(rows, &self.plan.file.fingerprint, &self.spec.command));
        match self.engine.start_generation() {
            Some(generation) => self.generate(generation, receiver, sender, failed_rows, &mut sample)?,
            None => self.infer(receiver, sender, failed_rows, &mut sample)?,
        }
        Ok(sample)
    }

    /// One window after the other.
    fn infer(
        &self,
        mut receiver: Receiver<PreparedWindow>,
        sender: Sender<FinishedWindow>,
        mut failed_rows: u64,
        sample: &mut Option<AuditSample>,
    ) -> Result<()> {
        while let Some((window, rows)) = receiver.blocking_recv() {
            let mut picked: Vec<(usize, u64, PreparedRows)> = Vec::new();
            if let Some(sample) = sample {
                let numbers = self.row_numbers(&window);
                let indices = sample.pick(&numbers, &rows);
                picked = indices.into_iter().map(|index| (index, numbers[index], rows.row(index))).collect();
            }
            let keep: Vec<usize> = picked.iter().map(|(index, ..)| *index).collect();
            let Some(mut inferred) = self.engine.infer_keeping(rows, &keep, &*self.control)? else {
                return self.control.check();
            };
            if let Some(sample) = sample {
                for ((index, number, prepared), outputs) in picked.into_iter().zip(std::mem::take(&mut inferred.kept)) {
                    let results = RowResults::of_row(outputs, &inferred.columns, index)?;
                    sample.add(AuditRow { number, prepared, params: None, results });
                }
            }
            if sender.blocking_send(self.finish(window, inferred, &mut failed_rows)?).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Windows overlap: the next one's prompts fill the slots that the one before leaves.
    fn generate(
        &self,
        mut generation: Generation<'_, GeneratingWindow>,
        mut receiver: Receiver<PreparedWindow>,
        sender: Sender<FinishedWindow>,
        mut failed_rows: u64,
        sample: &mut Option<AuditSample>,
    ) -> Result<()> {
        let mut input_ended = false;
        loop {
            while !input_ended && generation.wants_more() {
                let next = if generation.is_empty() {
                    receiver.blocking_recv()
                } else {
                    match receiver.try_recv() {
                        Ok(window) => Some(window),
                        Err(TryRecvError::Empty) => break,
                        Err(TryRecvError::Disconnected) => None,
                    }
                };
                match next {
                    None => input_ended = true,
                    Some((window, rows)) => {
                        let numbers = self.row_numbers(&window);
                        let params =
                            self.plan.row_params.as_ref().map(|params| params.rows(&window.batch)).transpose()?;
                        let mut picked = Vec::new();
                        for index in sample.as_ref().map_or_else(Vec::new, |sample| sample.pick(&numbers, &rows)) {
                            let own = params.as_ref().map(|params| &params[index]);
                            match own {
                                // Such a row has no result, and nothing to audit.
                                Some(Err(_)) => {}
                                Some(Ok(own)) => {
                                    picked.push((index, numbers[index], rows.row(index), Some(own.clone())))
                                }
                                None => picked.push((index, numbers[index], rows.row(index), None)),
                            }
                        }
                        let numbers = numbers.into_iter();
                        let without_work = match params {
                            None => generation.push((window, picked), rows, numbers),
                            Some(params) => generation.push_with((window, picked), rows, numbers.zip(params)),
                        };
                        self.control.after_batch(without_work, Padding::default());
                    }
                }
            }
            while let Some(((window, picked), inferred)) = generation.pop()? {
                if let Some(sample) = sample {
                    for (index, number, prepared, params) in picked {
                        let results = RowResults::of_row(Vec::new(), &inferred.columns, index)?;
                        sample.add(AuditRow { number, prepared, params, results });
                    }
                }
                if sender.blocking_send(self.finish(window, inferred, &mut failed_rows)?).is_err() {
                    return Ok(());
                }
            }
            if generation.is_empty() {
                if input_ended {
                    return Ok(());
                }
            } else if !generation.step(&*self.control)? {
                return self.control.check();
            }
        }
    }

    /// Each row's number in the whole input, whatever was filtered.
    fn row_numbers(&self, window: &WindowRows) -> Vec<u64> {
        let file = self.plan.units[window.unit].file;
        let before: u64 = self.plan.dataset.files[..file].iter().map(|file| file.rows).sum();
        let first = before + window.first_row;
        match &window.passing {
            Some(passing) => passing.values().set_indices().map(|index| first + index as u64).collect(),
            None => (first..first + window.batch.num_rows() as u64).collect(),
        }
    }

    /// Puts a window's results beside its input columns, and counts.
    fn finish(&self, window: WindowRows, inferred: Inferred, failed_rows: &mut u64) -> Result<FinishedWindow> {
        let WindowRows { unit, first_row, last, batch, passing } = window;
        *failed_rows += inferred.stats.failed_rows;
        Counters::add(&self.control.counters.rows_failed, inferred.stats.failed_rows);
        if let (Some(allowed), Some((index, message))) = (self.spec.max_errors, inferred.first_error)
            && *failed_rows > allowed
        {
            let index = passing.map_or(Some(index), |passing| passing.values().set_indices().nth(index));
            return Err(Error::TooManyRowErrors {
                errors: *failed_rows,
                allowed,
                path: self.plan.dataset.files[self.plan.units[unit].file].path.clone(),
                row: first_row + index.unwrap_or(0) as u64,
                message,
            });
        }
        let agreement = match (self.plan.truth, &self.spec.truth_column) {
            (Some(truth), Some(column)) => {
                let texts = match &self.spec.prompt {
                    PromptSpec::Column(name) => self.column(&batch, name).ok(),
                    PromptSpec::Template(_) | PromptSpec::Chat { .. } => None,
                };
                truth.compare(&inferred.columns, &self.column(&batch, column)?, texts.as_ref())?
            }
            _ => Agreement::default(),
        };
        let counts = UnitCounts::new(batch.num_rows() as u64, &inferred.stats, agreement);
        let mut columns: Vec<ArrayRef> =
            self.plan.kept.iter().map(|name| self.column(&batch, name)).collect::<Result<_>>()?;
        columns.extend(inferred.columns);
        let batch = RecordBatch::try_new(self.plan.output_schema.clone(), columns)?;
        Ok(FinishedWindow { unit, last, batch, counts, busy: inferred.stats.busy })
    }

    /// Writes each unit's windows to its part and commits it after its last; an unfinished part is dropped.
    fn write(&self, sink: Sink, mut receiver: Receiver<FinishedWindow>) -> Result<(Sink, UnitCounts, Duration)> {
        let mut total = UnitCounts::default();
        let mut busy = Duration::ZERO;
        let mut open: Option<(PartWriter, UnitCounts)> = None;
        while let Some(window) = receiver.blocking_recv() {
            let (mut part, mut counts) = match open.take() {
                Some(open) => open,
                None => (sink.part(window.unit)?, UnitCounts::default()),
            };
            part.write(&window.batch)?;
            counts += window.counts;
            busy += window.busy;
            if !window.last {
                open = Some((part, counts));
                continue;
            }
            for (key, value) in &self.plan.footer {
                part.set_extra(key, value);
            }
            counts.to_footer(&mut part)?;
            part.finish()?;
            total += counts;
            Counters::add(&self.control.counters.parts, 1);
        }
        Ok((sink, total, busy))
    }

    fn column(&self, batch: &RecordBatch, name: &str) -> Result<ArrayRef> {
        batch.column_by_name(name).cloned().ok_or_else(|| Error::Internal(format!("column '{name}' was not read")))
    }
}
