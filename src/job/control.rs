//! How a running job is watched and stopped from outside.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use crate::batch::Padding;
use crate::engine::BatchObserver;
use crate::error::{Error, Result};

/// Shared between a running job and whoever shows its progress or handles signals.
#[derive(Debug, Default)]
pub struct RunControl {
    pub counters: Counters,
    stop_signal: AtomicI32,
}

/// What a job has done so far; only ever growing.
#[derive(Debug, Default)]
pub struct Counters {
    /// Rows of the input that this run will read, before any filter; 0 until planned.
    pub rows_total: AtomicU64,
    /// Rows that an earlier run of this job committed.
    pub rows_resumed: AtomicU64,
    /// Rows read and dropped by the filter.
    pub rows_filtered: AtomicU64,
    /// Rows whose result is computed.
    pub rows_done: AtomicU64,
    pub rows_failed: AtomicU64,
    pub real_tokens: AtomicU64,
    pub padded_tokens: AtomicU64,
    /// Parts committed by this run.
    pub parts: AtomicU64,
}

impl RunControl {
    /// Notes what was planned or done, for a person who wants to know.
    pub fn notice(&self, message: String) {
        tracing::debug!("{message}");
    }

    /// Asks the job to stop as soon as it can leave a resumable output.
    pub fn stop(&self, signal: i32) {
        self.stop_signal.store(signal, Ordering::Relaxed);
    }

    /// Fails once a stop was asked for.
    ///
    /// # Errors
    /// [`Error::Stopped`] with the signal.
    pub fn check(&self) -> Result<()> {
        match self.stop_signal.load(Ordering::Relaxed) {
            0 => Ok(()),
            signal => Err(Error::Stopped { signal }),
        }
    }
}

impl Counters {
    /// Adds to one of the counters.
    pub fn add(counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Ordering::Relaxed);
    }

    /// Reads one of the counters.
    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}

impl BatchObserver for RunControl {
    fn after_batch(&self, rows: u64, padding: Padding) -> bool {
        Counters::add(&self.counters.rows_done, rows);
        Counters::add(&self.counters.real_tokens, padding.real_tokens);
        Counters::add(&self.counters.padded_tokens, padding.padded_tokens);
        self.check().is_ok()
    }
}
