//! Where a model's time goes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A part of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Embedding,
    Norm,
    QkvProjection,
    Rotary,
    Attention,
    OutputProjection,
    GateUpProjection,
    DownProjection,
}

/// The names of the phases, in the order of [`Phase`].
const NAMES: [&str; 8] =
    ["embedding", "norm", "qkv_proj", "rotary", "attention", "o_proj", "gate_up_proj", "down_proj"];

/// Time of each part of the forward pass, summed over all passes of a model: where threads work side by side, of each its share.
#[derive(Debug, Default)]
pub struct Profile {
    nanoseconds: [AtomicU64; NAMES.len()],
    /// A device that works on its own takes orders, which says nothing of the time that they take.
    is_off: bool,
}

impl Profile {
    /// A profile that times nothing.
    pub(super) fn none() -> Self {
        Self { is_off: true, ..Self::default() }
    }

    /// Runs `work` as part of `phase`.
    pub(super) fn time<T>(&self, phase: Phase, work: impl FnOnce() -> T) -> T {
        if self.is_off {
            return work();
        }
        let started = Instant::now();
        let result = work();
        self.add(phase, started.elapsed());
        result
    }

    /// Adds time that was spent in `phase`; of work that all threads share, each thread's part of it.
    pub(super) fn add(&self, phase: Phase, time: Duration) {
        self.nanoseconds[phase as usize].fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// The name of each part and the seconds spent in it; nothing on a CUDA device.
    pub fn seconds(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let parts = if self.is_off { &NAMES[..0] } else { &NAMES[..] };
        parts.iter().zip(&self.nanoseconds).map(|(name, spent)| (*name, spent.load(Ordering::Relaxed) as f64 / 1e9))
    }
}
