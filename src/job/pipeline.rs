//! Read → tokenize → compute → write, each on its own thread.
//!
//! Channels of depth one join the stages, so that each works on its own window while memory holds a handful of windows,
//! however large the dataset. A stage that fails or stops closes its ends; its neighbours then run dry.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, BooleanArray, RecordBatch};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::spawn_blocking;

use super::control::{Counters, RunControl};
use super::plan::JobPlan;
use super::report::UnitCounts;
use super::runner::join;
use super::spec::JobSpec;
use super::truth::Agreement;
use crate::data::part::PartWriter;
use crate::data::sink::Sink;
use crate::data::source::{Window, WindowReader};
use crate::data::text_column::as_text;
use crate::data::units::Unit;
use crate::engine::{Engine, PreparedRows};
use crate::error::{Error, Result};

/// Windows that wait between two stages.
const CHANNEL_DEPTH: usize = 1;

/// What one run of the pipeline did.
#[derive(Debug, Clone, Copy, Default)]
pub struct PipelineTotals {
    pub counts: UnitCounts,
    /// Time in model and head.
    pub busy: Duration,
    /// From the first row read to the last part committed.
    pub elapsed: Duration,
}

/// A window whose texts are tokenized.
struct PreparedWindow {
    unit: usize,
    first_row: u64,
    last: bool,
    /// Rows that passed the filter, with the columns that were read.
    batch: RecordBatch,
    /// Which rows of the window passed, for messages that name a row.
    passing: Option<BooleanArray>,
    rows: PreparedRows,
}

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
    let stage = Stage { spec: spec.clone(), plan: plan.clone(), engine: Arc::new(engine), control: control.clone() };
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
    computing?;
    let (sink, counts, busy) = writing?;
    control.check()?;
    Ok((sink, PipelineTotals { counts, busy, elapsed: started.elapsed() }))
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
            let rows = self.tokenize(&batch)?;
            let prepared = PreparedWindow { unit, first_row, last, batch, passing, rows };
            if sender.blocking_send(prepared).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn tokenize(&self, batch: &RecordBatch) -> Result<PreparedRows> {
        let names = self.spec.text_columns();
        let columns: Vec<ArrayRef> = names.iter().map(|(name, _)| self.column(batch, name)).collect::<Result<_>>()?;
        let mut texts = Vec::with_capacity(columns.len());
        for column in &columns {
            let text = as_text(column).ok_or_else(|| Error::Internal("the text column is not text".into()))?;
            texts.push(text.iter().collect::<Vec<_>>());
        }
        Ok(match &texts[..] {
            [contexts, continuations] => self.engine.prepare_continuations(contexts, continuations),
            texts => self.engine.prepare(&texts.concat()),
        })
    }

    fn compute(
        &self,
        mut receiver: Receiver<PreparedWindow>,
        sender: Sender<FinishedWindow>,
        mut failed_rows: u64,
    ) -> Result<()> {
        while let Some(PreparedWindow { unit, first_row, last, batch, passing, rows }) = receiver.blocking_recv() {
            let Some(inferred) = self.engine.infer(rows, &*self.control)? else {
                return self.control.check();
            };
            failed_rows += inferred.stats.failed_rows;
            Counters::add(&self.control.counters.rows_failed, inferred.stats.failed_rows);
            if let (Some(allowed), Some((index, message))) = (self.spec.max_errors, inferred.first_error)
                && failed_rows > allowed
            {
                let index = passing.map_or(Some(index), |passing| passing.values().set_indices().nth(index));
                return Err(Error::TooManyRowErrors {
                    errors: failed_rows,
                    allowed,
                    path: self.plan.dataset.files[self.plan.units[unit].file].path.clone(),
                    row: first_row + index.unwrap_or(0) as u64,
                    message,
                });
            }
            let agreement = match (self.plan.truth, &self.spec.truth_column) {
                (Some(truth), Some(column)) => {
                    let texts = self.column(&batch, self.spec.text_columns()[0].0)?;
                    truth.compare(&inferred.columns, &self.column(&batch, column)?, &texts)?
                }
                _ => Agreement::default(),
            };
            let counts = UnitCounts::new(batch.num_rows() as u64, &inferred.stats, agreement);
            let mut columns: Vec<ArrayRef> =
                self.plan.kept.iter().map(|name| self.column(&batch, name)).collect::<Result<_>>()?;
            columns.extend(inferred.columns);
            let batch = RecordBatch::try_new(self.plan.output_schema.clone(), columns)?;
            let finished = FinishedWindow { unit, last, batch, counts, busy: inferred.stats.busy };
            if sender.blocking_send(finished).is_err() {
                break;
            }
        }
        Ok(())
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
