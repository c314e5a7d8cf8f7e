//! Static batching: a left-padded rectangle of prompts, completed together, and nobody new until all have ended.
//!
//! It shares weights and sampling with [`super::Scheduler`] and nothing else: no packing, no rolling cache, no kernel of
//! ours for attention. It is the oracle of in-flight batching, and what that is compared with.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::live::{Completion, Live, Request};
use super::stop::Decode;
use super::{CausalLm, SchedulerLimits, StepModel, StepStats};
use crate::batch::{LeftPaddedBatch, Padding, Sequence};
use crate::error::{Error, Result};
use crate::model::reference::PaddedCache;

/// Completes prompts rectangle by rectangle, those of the longest first.
pub struct StaticBatches<'a, D> {
    model: &'a CausalLm,
    decoder: &'a D,
    limits: SchedulerLimits,
    /// By longest possible length, then by arrival.
    queue: BTreeMap<(Reverse<usize>, u64), Live>,
    arrivals: u64,
    running: Option<Rectangle>,
    stats: StepStats,
    padding: Padding,
}

/// The rows that are completed together.
struct Rectangle {
    /// `None` where a row has ended; its place is computed all the same.
    rows: Vec<Option<Live>>,
    /// Tokens of each row so far, `[B]`.
    seq_lens: Vec<usize>,
    cache: PaddedCache,
}

impl<'a, D: Decode + Sync> StaticBatches<'a, D> {
    /// Batching without requests.
    pub fn new(model: &'a CausalLm, decoder: &'a D, limits: SchedulerLimits) -> Self {
        Self {
            model,
            decoder,
            limits,
            queue: BTreeMap::new(),
            arrivals: 0,
            running: None,
            stats: StepStats::default(),
            padding: Padding::default(),
        }
    }

    /// Queues a request; each of its samples is a row of its own.
    ///
    /// # Errors
    /// As [`super::Scheduler::push`].
    pub fn push(&mut self, request: Request) -> Result<(), String> {
        request.check(self.bytes(1, request.max_len()), self.limits.kv_cache_bytes)?;
        let (request, max_len) = (Arc::new(request.clone()), request.max_len());
        for sample in request.samples.clone() {
            self.queue.insert((Reverse(max_len), self.arrivals), Live::new(Arc::clone(&request), sample));
            self.arrivals += 1;
        }
        Ok(())
    }

    /// Completions that have not begun.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Completions that have begun and not ended.
    pub fn live(&self) -> usize {
        self.running.as_ref().map_or(0, |running| running.rows.iter().flatten().count())
    }

    /// Whether all requests have ended.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running.is_none()
    }

    /// What was computed so far.
    pub fn stats(&self) -> StepStats {
        self.stats
    }

    /// Tokens that were computed, those of padding and of rows that had ended included.
    pub fn padding(&self) -> Padding {
        self.padding
    }

    /// Computes one more token of every row, and returns the completions that it ended.
    ///
    /// # Errors
    /// When the model fails.
    pub fn step(&mut self) -> Result<Vec<Completion>> {
        let Some(mut running) = self.running.take().or_else(|| self.begin()) else { return Ok(Vec::new()) };
        let sequences: Vec<Sequence> = (running.rows.iter().enumerate())
            // A row that has ended goes on with the first token of the vocabulary, which nobody reads.
            .map(|(row, live)| Sequence {
                row,
                input_ids: live.as_ref().map_or(vec![0], |live| live.new_tokens().to_vec()),
            })
            .collect();
        let batch = LeftPaddedBatch::new(&sequences, 0);
        for (len, sequence) in running.seq_lens.iter_mut().zip(&sequences) {
            *len += sequence.input_ids.len();
        }
        let mut logits = match self.model.padded_step(&batch, &running.seq_lens, &mut running.cache) {
            Err(Error::OutOfMemory { message }) => return Ok(self.begin_anew(running, &message)),
            result => result?,
        };
        let live = running.rows.iter().flatten();
        let real: usize = live.clone().map(|live| live.new_tokens().len()).sum();
        self.padding += Padding { real_tokens: real as u64, padded_tokens: batch.padded_tokens() as u64 };
        let prompts = live.clone().filter(|live| live.is_new());
        self.stats.prompt_tokens += prompts.map(|live| live.request.prompt_ids.len() as u64).sum::<u64>();
        self.stats.completion_tokens += live.count() as u64;
        self.stats.steps += 1;

        let decoder = self.decoder;
        let with_logits = running.rows.par_iter_mut().zip(logits.par_chunks_mut(self.model.vocab_size()));
        with_logits.for_each(|(live, logits)| {
            if let Some(live) = live {
                live.take_token(logits, decoder);
            }
        });
        let ended: Vec<Live> =
            running.rows.iter_mut().filter_map(|live| live.take_if(|live| live.has_ended())).collect();
        self.running = running.rows.iter().any(Option::is_some).then_some(running);
        Ok(ended.into_iter().filter_map(|live| live.finish(decoder)).collect())
    }

    /// As the scheduler's: what was live begins anew, half as many rows at a time; one that was alone fails.
    fn begin_anew(&mut self, running: Rectangle, message: &str) -> Vec<Completion> {
        let alone = running.rows.len() == 1;
        self.limits.max_rows = (running.rows.len() / 2).max(1);
        let mut failed = Vec::new();
        for live in running.rows.into_iter().flatten() {
            if alone {
                failed.push(live.fail(format!("out of memory for this completion alone: {message}")));
            } else {
                self.queue.insert((Reverse(live.request.max_len()), self.arrivals), live.again());
                self.arrivals += 1;
            }
        }
        failed
    }

    /// The next rectangle: as many rows of about one length as the limits allow.
    fn begin(&mut self) -> Option<Rectangle> {
        let (mut prompt, mut new, mut rows) = (0, 0, Vec::new());
        while let Some((_, next)) = self.queue.first_key_value() {
            let widest = prompt.max(next.request.prompt_ids.len());
            let longest = new.max(next.request.params.max_tokens);
            let count = rows.len() + 1;
            let fits = count <= self.limits.max_rows.max(1)
                && count * widest <= self.limits.prefill_tokens
                && self.bytes(count, widest.saturating_add(longest)) <= self.limits.kv_cache_bytes;
            if count > 1 && !fits {
                break;
            }
            (prompt, new) = (widest, longest);
            rows.extend(self.queue.pop_first().map(|(_, live)| Some(live)));
        }
        let bytes = self.bytes(rows.len(), prompt.saturating_add(new));
        self.stats.peak_kv_cache_bytes = self.stats.peak_kv_cache_bytes.max(bytes);
        (!rows.is_empty()).then(|| Rectangle { seq_lens: vec![0; rows.len()], rows, cache: PaddedCache::default() })
    }

    /// The memory of a padded cache, which holds every column, in bytes.
    fn bytes(&self, rows: usize, width: usize) -> usize {
        PaddedCache::bytes(self.model.model().config(), rows, width)
    }
}
