//! Batches over the replicas of a model, one a device.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use crate::batch::LeftPaddedBatch;
use crate::error::{Error, Result};
use crate::heads::{Head, HeadOutput};
use crate::model::MistralModel;
use crate::text::TokenDetail;

/// Batches that are under way on a device that works on its own: while it computes one, the other's results are taken and
/// the next is sent.
pub const BATCHES_PER_DEVICE: usize = 2;

/// What the head gives for a row, or a message for its `error` column.
pub(super) type RowOutput = Result<HeadOutput, String>;

/// A model and the head that reads it, on one device.
pub(super) struct Replica {
    pub model: Arc<MistralModel>,
    pub head: Box<dyn Head>,
}

/// At least one replica; all give the same results.
pub(super) struct Replicas {
    first: Replica,
    others: Vec<Replica>,
}

impl Replica {
    /// The head's output for each row of a batch. Where the device has no memory for it, its halves are computed one after the
    /// other, down to single rows, whose error is then a message for the row.
    fn forward(&self, batch: &LeftPaddedBatch, details: &[TokenDetail]) -> Result<Vec<RowOutput>> {
        let of_rows: Vec<&TokenDetail> = batch.rows().iter().map(|&sequence| &details[sequence]).collect();
        let message = match self.head.forward(&self.model, &batch.unpad(), &of_rows) {
            Ok(outputs) => return Ok(outputs.into_iter().map(Ok).collect()),
            Err(Error::OutOfMemory { message }) => message,
            Err(error) => return Err(error),
        };
        let Some(halves) = batch.halves() else {
            return Ok(vec![Err(format!("out of memory for this text alone, of {} tokens: {message}", batch.width()))]);
        };
        tracing::debug!("out of memory for {} rows of {} tokens: half of them next", batch.num_rows(), batch.width());
        let mut outputs = Vec::with_capacity(batch.num_rows());
        for half in halves {
            outputs.extend(self.forward(&half, details)?);
        }
        Ok(outputs)
    }
}

impl Replicas {
    pub fn new(first: Replica) -> Self {
        Self { first, others: Vec::new() }
    }

    pub fn add(&mut self, replica: Replica) {
        self.others.push(replica);
    }

    pub fn head(&self) -> &dyn Head {
        &*self.first.head
    }

    pub fn model(&self) -> &MistralModel {
        &self.first.model
    }

    /// Computes `batches` and gives each with its outputs to `take`, on this thread and in any order; `details` has what is
    /// known of each sequence. Returns the time in model and head, the mean over devices, and false where `take` stopped it.
    ///
    /// # Errors
    /// The first failure of a replica; what the others have begun is finished and dropped.
    pub fn compute(
        &self,
        batches: Vec<LeftPaddedBatch>,
        details: &[TokenDetail],
        mut take: impl FnMut(LeftPaddedBatch, Vec<RowOutput>) -> bool,
    ) -> Result<(Duration, bool)> {
        if self.others.is_empty() && !self.first.model.device().is_cuda() {
            let mut busy = Duration::ZERO;
            for batch in batches {
                let started = Instant::now();
                let outputs = self.first.forward(&batch, details)?;
                busy += started.elapsed();
                if !take(batch, outputs) {
                    return Ok((busy, false));
                }
            }
            return Ok((busy, true));
        }
        let queue = Mutex::new(VecDeque::from(batches));
        let stopping = AtomicBool::new(false);
        let clocks: Vec<BusyClock> = (0..=self.others.len()).map(|_| BusyClock::default()).collect();
        let went_on = std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            for (replica, clock) in std::iter::once(&self.first).chain(&self.others).zip(&clocks) {
                let workers = if replica.model.device().is_cuda() { BATCHES_PER_DEVICE } else { 1 };
                for _ in 0..workers {
                    let (sender, queue, stopping) = (sender.clone(), &queue, &stopping);
                    scope.spawn(move || {
                        while !stopping.load(Ordering::Relaxed) {
                            let Some(batch) = lock(queue).pop_front() else { break };
                            let outputs = clock.time(|| replica.forward(&batch, details));
                            if sender.send((batch, outputs)).is_err() {
                                break;
                            }
                        }
                    });
                }
            }
            drop(sender); // the loop ends when the last worker has
            let mut result = Ok(true);
            for (batch, outputs) in receiver {
                if !matches!(result, Ok(true)) {
                    continue; // begun before the others were told to stop
                }
                result = outputs.map(|outputs| take(batch, outputs));
                if !matches!(result, Ok(true)) {
                    stopping.store(true, Ordering::Relaxed);
                }
            }
            result
        })?;
        if went_on && !lock(&queue).is_empty() {
            return Err(Error::Internal("a worker of the engine failed".into()));
        }
        let busy = clocks.iter().map(BusyClock::total).sum::<Duration>() / clocks.len() as u32;
        Ok((busy, went_on))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The time in which at least one batch was under way.
#[derive(Default)]
struct BusyClock(Mutex<Busy>);

#[derive(Default)]
struct Busy {
    /// Batches under way, and since when there are any.
    under_way: Option<(usize, Instant)>,
    total: Duration,
}

impl BusyClock {
    fn time<T>(&self, work: impl FnOnce() -> T) -> T {
        {
            let mut busy = lock(&self.0);
            let (count, since) = busy.under_way.unwrap_or_else(|| (0, Instant::now()));
            busy.under_way = Some((count + 1, since));
        }
        let result = work();
        let mut busy = lock(&self.0);
        match busy.under_way.take() {
            Some((count, since)) if count > 1 => busy.under_way = Some((count - 1, since)),
            Some((_, since)) => busy.total += since.elapsed(),
            None => {}
        }
        result
    }

    fn total(&self) -> Duration {
        lock(&self.0).total
    }
}
