//! In-flight batching: schedule → run → postprocess, one token of every live sequence a step.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use super::live::{Completion, Live, Request};
use super::sampler::Sampled;
use super::stop::Decode;
use crate::batch::PackedBatch;
use crate::error::{Error, Result};

/// A model that can go on with sequences token by token.
pub trait StepModel: Sync {
    /// What a sequence's tokens so far leave behind.
    type Cache: Send + Sync;

    /// Tokens that have a logit.
    fn vocab_size(&self) -> usize;

    /// The memory of a cache for `max_len` tokens, in bytes.
    fn cache_bytes(&self, max_len: usize) -> usize;

    /// An empty cache for `max_len` tokens.
    ///
    /// # Errors
    /// When there is no memory for it.
    fn new_cache(&self, max_len: usize) -> Result<Self::Cache>;

    /// A second cache with the same content.
    ///
    /// # Errors
    /// As [`StepModel::new_cache`].
    fn fork_cache(&self, cache: &Self::Cache) -> Result<Self::Cache>;

    /// Adds the batch's new tokens to their sequences' `caches` `[B]`: the logits of each next token, `[B, vocab]`.
    ///
    /// # Errors
    /// When the computation fails; the caches are then of no use.
    fn step(&self, batch: &PackedBatch, caches: &mut [&mut Self::Cache]) -> Result<Vec<f32>>;

    /// As [`StepModel::step`], with the likeliest token of each sequence instead of logits; `None`, and nothing computed, where
    /// the device leaves that to the host.
    ///
    /// # Errors
    /// As [`StepModel::step`].
    fn step_greedy(&self, _batch: &PackedBatch, _caches: &mut [&mut Self::Cache]) -> Result<Option<Vec<Sampled>>> {
        Ok(None)
    }

    /// Begins a run of sequences that each go on with one of `ids` and never have more than `max_len` tokens; `None` where
    /// every step needs the host.
    ///
    /// # Errors
    /// When there is no memory for it.
    fn greedy_run<'a>(
        &'a self,
        _ids: &[u32],
        _caches: &[&Self::Cache],
        _max_len: usize,
    ) -> Result<Option<Box<dyn GreedyRun<Self::Cache> + 'a>>> {
        Ok(None)
    }

    /// New sequences begin when one part in so many of all slots and of the caches' memory is free; `None`: as soon as one fits.
    fn refill_share(&self) -> Option<usize> {
        None
    }
}

/// Sequences that go on with their likeliest token step by step. A step is under way while the host looks at the one before,
/// so the last tokens of a sequence that has ended may be computed for nobody.
pub trait GreedyRun<C>: Send {
    /// The next token of each sequence that has not ended; `caches` are theirs, in order.
    ///
    /// # Errors
    /// When the computation fails; the run and the caches are then of no use.
    fn next(&mut self, caches: &mut [&mut C]) -> Result<Vec<Sampled>>;

    /// Takes out the sequences of these indices, rising, among those that have not ended; their caches may be dropped then.
    ///
    /// # Errors
    /// As [`GreedyRun::next`].
    fn end(&mut self, ended: &[usize]) -> Result<()>;

    /// The tokens of the step that is still under way, nothing if none is; then the run may be dropped.
    ///
    /// # Errors
    /// As [`GreedyRun::next`].
    fn finish(&mut self, caches: &mut [&mut C]) -> Result<Vec<Sampled>>;

    /// Sequences that each step computes, ended ones included.
    fn lanes(&self) -> usize;
}

/// What a step may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerLimits {
    /// Memory for all live sequences' caches, each counted for its longest possible length.
    pub kv_cache_bytes: usize,
    /// Sequences that are live at a time.
    pub max_rows: usize,
    /// Prompt tokens that start in one step; a longer prompt starts alone.
    pub prefill_tokens: usize,
}

/// What was computed so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepStats {
    pub steps: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens of completions.
    pub completion_tokens: u64,
    /// The most that live caches took at a time.
    pub peak_kv_cache_bytes: usize,
}

impl std::iter::Sum for StepStats {
    /// Of schedulers that work side by side.
    fn sum<I: Iterator<Item = Self>>(stats: I) -> Self {
        stats.fold(Self::default(), |sum, each| Self {
            steps: sum.steps + each.steps,
            prompt_tokens: sum.prompt_tokens + each.prompt_tokens,
            completion_tokens: sum.completion_tokens + each.completion_tokens,
            peak_kv_cache_bytes: sum.peak_kv_cache_bytes + each.peak_kv_cache_bytes,
        })
    }
}

/// Keeps the device busy with completions: whoever ends makes room for the next in the very next step.
///
/// The queue is sorted by length, longest first, so that no long completion is left alone at the end; what does not
/// fit is passed over for what does. A completion depends on its own request only. Requests may be added between
/// steps, as later units are read: those that are queued go by length, whenever they came.
pub struct Scheduler<'a, M: StepModel, D> {
    model: &'a M,
    decoder: &'a D,
    limits: SchedulerLimits,
    queue: Arc<Mutex<Queue>>,
    live: Vec<Slot<M::Cache>>,
    trunks: Vec<Trunk<M::Cache>>,
    /// The live sequences in the same order, where they go on without the host.
    run: Option<Box<dyn GreedyRun<M::Cache> + 'a>>,
    kv_cache_bytes: usize,
    stats: StepStats,
}

/// Requests that have not begun.
#[derive(Debug, Default)]
struct Queue {
    /// By longest possible length, then by arrival.
    requests: BTreeMap<(Reverse<usize>, u64), Request>,
    arrivals: u64,
}

/// A sequence that has begun, with its cache.
struct Slot<C> {
    live: Live,
    cache: C,
    cache_bytes: usize,
    /// Tokens in the cache.
    past: usize,
}

/// A prompt that was computed, and from which samples are still to begin.
struct Trunk<C> {
    request: Arc<Request>,
    /// Of the samples that have not begun.
    samples: Range<u32>,
    cache: C,
    cache_bytes: usize,
    /// Of the first token, `[vocab]`.
    logits: Vec<f32>,
}

impl Request {
    /// Refuses what could never run.
    pub(super) fn check(&self, needed: usize, allowed: usize) -> Result<(), String> {
        if self.prompt_ids.is_empty() {
            return Err("the prompt has no tokens".into());
        }
        self.params.check().map_err(|bad| bad.to_string())?;
        if needed > allowed {
            return Err(format!(
                "{} prompt and {} new tokens need {needed} bytes of key/value cache, but only {allowed} are allowed",
                self.prompt_ids.len(),
                self.params.max_tokens
            ));
        }
        Ok(())
    }
}

impl<'a, M: StepModel, D: Decode + Sync> Scheduler<'a, M, D> {
    /// A scheduler without requests.
    pub fn new(model: &'a M, decoder: &'a D, limits: SchedulerLimits) -> Self {
        Self {
            model,
            decoder,
            limits,
            queue: Arc::default(),
            live: Vec::new(),
            trunks: Vec::new(),
            run: None,
            kv_cache_bytes: 0,
            stats: StepStats::default(),
        }
    }

    /// A scheduler on another device that takes its requests from the same queue.
    pub fn beside(other: &Self, model: &'a M, limits: SchedulerLimits) -> Self {
        Self { queue: Arc::clone(&other.queue), ..Self::new(model, other.decoder, limits) }
    }

    fn lock_queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a request.
    ///
    /// # Errors
    /// A message for the row's `error` column: the prompt is empty, the settings mean nothing, or the cache alone is
    /// beyond the memory limit.
    pub fn push(&mut self, request: Request) -> Result<(), String> {
        let needed = self.model.cache_bytes(request.max_len());
        request.check(needed, self.limits.kv_cache_bytes)?;
        if request.samples.len() > 1 && needed.saturating_mul(2) > self.limits.kv_cache_bytes {
            // No room to keep the prompt's cache beside a sample's: each computes the prompt for itself.
            for sample in request.samples.clone() {
                self.enqueue(Request { samples: sample..sample + 1, ..request.clone() });
            }
        } else if !request.samples.is_empty() {
            self.enqueue(request);
        }
        Ok(())
    }

    fn enqueue(&mut self, request: Request) {
        let mut queue = self.lock_queue();
        let key = (Reverse(request.max_len()), queue.arrivals);
        queue.requests.insert(key, request);
        queue.arrivals += 1;
    }

    /// Requests that have not begun.
    pub fn queued(&self) -> usize {
        self.lock_queue().requests.len()
    }

    /// Sequences that have begun and not ended.
    pub fn live(&self) -> usize {
        self.live.len()
    }

    /// Whether all requests have ended.
    pub fn is_idle(&self) -> bool {
        self.queued() == 0 && self.live.is_empty() && self.trunks.is_empty()
    }

    /// What was computed so far.
    pub fn stats(&self) -> StepStats {
        self.stats
    }

    /// Computes one more token of every sequence, new ones included, and returns the completions that it ended.
    ///
    /// Where the device has no memory for that, all begin anew, fewer at a time.
    ///
    /// # Errors
    /// When the model fails; the scheduler is then of no use.
    pub fn step(&mut self) -> Result<Vec<Completion>> {
        match self.try_step() {
            Err(Error::OutOfMemory { message }) if !self.live.is_empty() || !self.trunks.is_empty() => {
                Ok(self.begin_anew(&message))
            }
            result => result,
        }
    }

    fn try_step(&mut self) -> Result<Vec<Completion>> {
        if self.run.is_none() {
            self.admit()?;
            self.begin_run()?;
        }
        if self.run.is_some() {
            return self.step_of_run();
        }
        if self.live.is_empty() {
            return Ok(Vec::new());
        }
        let batch = self.batch();
        let is_greedy = |request: &Request| request.params.is_plain_greedy() && request.samples.len() == 1;
        let greedy = self.live.iter().all(|slot| is_greedy(&slot.live.request));
        let mut caches: Vec<_> = self.live.iter_mut().map(|slot| &mut slot.cache).collect();
        let decoder = self.decoder;
        let chosen = if greedy { self.model.step_greedy(&batch, &mut caches)? } else { None };
        match chosen {
            Some(chosen) => self.take_chosen(chosen),
            None => {
                let mut logits = self.model.step(&batch, &mut caches)?;
                self.keep_trunks(&logits)?;
                self.live
                    .par_iter_mut()
                    .zip(logits.par_chunks_mut(self.model.vocab_size()))
                    .for_each(|(slot, logits)| slot.live.take_token(logits, decoder));
            }
        }
        self.stats.steps += 1;
        self.stats.completion_tokens += self.live.len() as u64;
        let mut completions = self.take_ended();
        self.branch(&mut completions)?;
        Ok(completions)
    }

    /// Gives each live sequence the token that the device chose for it.
    fn take_chosen(&mut self, chosen: Vec<Sampled>) {
        let decoder = self.decoder;
        self.live.par_iter_mut().zip(chosen).for_each(|(slot, chosen)| slot.live.take_chosen(chosen, decoder));
    }

    /// Takes the sequences out that have ended.
    fn take_ended(&mut self) -> Vec<Completion> {
        let ended: Vec<_> = self.live.extract_if(.., |slot| slot.live.has_ended()).collect();
        self.kv_cache_bytes -= ended.iter().map(|slot| slot.cache_bytes).sum::<usize>();
        ended.into_iter().filter_map(|slot| slot.live.finish(self.decoder)).collect()
    }

    /// Lets the live sequences go on by themselves, if all of them are past their prompts and the model can.
    fn begin_run(&mut self) -> Result<()> {
        let goes_on = |slot: &Slot<M::Cache>| !slot.live.is_new() && slot.live.request.params.is_plain_greedy();
        if self.live.is_empty() || !self.trunks.is_empty() || !self.live.iter().all(goes_on) {
            return Ok(());
        }
        let ids: Vec<u32> = self.live.iter().filter_map(|slot| slot.live.new_tokens().first().copied()).collect();
        let caches: Vec<_> = self.live.iter().map(|slot| &slot.cache).collect();
        let max_len = self.live.iter().map(|slot| slot.live.request.max_len()).max().unwrap_or(0);
        self.run = self.model.greedy_run(&ids, &caches, max_len)?;
        Ok(())
    }

    /// One more token of every sequence of the run, which ends where new requests can begin or most of its lanes are idle.
    fn step_of_run(&mut self) -> Result<Vec<Completion>> {
        let mut run = self.run.take();
        let Some(current) = run.as_mut() else { return Ok(Vec::new()) };
        let mut ends = self.can_begin() || self.live.len() * 2 <= current.lanes();
        let mut caches: Vec<_> = self.live.iter_mut().map(|slot| &mut slot.cache).collect();
        let mut chosen = if ends { current.finish(&mut caches)? } else { Vec::new() };
        if chosen.is_empty() {
            // It goes on, or has not begun: every call computes a token.
            ends = false;
            chosen = current.next(&mut caches)?;
        }
        self.live.iter_mut().for_each(|slot| slot.past += 1);
        self.stats.steps += 1;
        self.stats.completion_tokens += self.live.len() as u64;
        self.take_chosen(chosen);
        let ended: Vec<usize> = (0..self.live.len()).filter(|&index| self.live[index].live.has_ended()).collect();
        current.end(&ended)?;
        let completions = self.take_ended();
        self.run = run.filter(|_| !ends && !self.live.is_empty());
        Ok(completions)
    }

    /// After a step that the device had no memory for, which leaves its caches of no use: what was live begins anew with half as
    /// many rows at a time from now on. A completion is a function of its request, so it comes out the same. One that was
    /// alone fails.
    fn begin_anew(&mut self, message: &str) -> Vec<Completion> {
        self.run = None;
        let live = std::mem::take(&mut self.live);
        let trunks = std::mem::take(&mut self.trunks);
        self.kv_cache_bytes = 0;
        if let ([slot], []) = (&live[..], &trunks[..]) {
            let request = slot.live.request_again();
            let message = format!("out of memory for this completion alone: {message}");
            let failed = |sample| Completion { row: request.row, sample, result: Err(message.clone()) };
            return request.samples.clone().map(failed).collect();
        }
        self.limits.max_rows = (live.len() / 2).max(1);
        tracing::debug!("out of memory for {} completions: {} at a time from now on", live.len(), self.limits.max_rows);
        for slot in live {
            self.enqueue(slot.live.request_again());
        }
        for trunk in trunks {
            self.enqueue(Request { samples: trunk.samples, ..Request::clone(&trunk.request) });
        }
        Vec::new()
    }

    /// Keeps the cache and the logits of prompts that were computed just now and have further samples.
    fn keep_trunks(&mut self, logits: &[f32]) -> Result<()> {
        for (slot, logits) in self.live.iter().zip(logits.chunks(self.model.vocab_size())) {
            let Range { start, end } = slot.live.request.samples;
            if slot.live.is_new() && end - start > 1 {
                self.trunks.push(Trunk {
                    request: Arc::clone(&slot.live.request),
                    samples: start + 1..end,
                    cache: self.model.fork_cache(&slot.cache)?,
                    cache_bytes: slot.cache_bytes,
                    logits: logits.to_vec(),
                });
            }
        }
        Ok(())
    }

    /// Begins further samples of computed prompts as far as the limits go: each with a copy of the prompt's cache, the
    /// last with the cache itself.
    fn branch(&mut self, completions: &mut Vec<Completion>) -> Result<()> {
        let decoder = self.decoder;
        loop {
            let mut begun: Vec<(Slot<M::Cache>, Vec<f32>)> = Vec::new();
            let mut index = 0;
            while index < self.trunks.len() && self.live.len() + begun.len() < self.limits.max_rows.max(1) {
                let trunk = &mut self.trunks[index];
                let slot = |sample: u32, cache: M::Cache| Slot {
                    live: Live::new(Arc::clone(&trunk.request), sample),
                    cache,
                    cache_bytes: trunk.cache_bytes,
                    past: trunk.request.prompt_ids.len(),
                };
                if trunk.samples.len() == 1 {
                    let sample = trunk.samples.start;
                    let Trunk { request, cache, cache_bytes, logits, .. } = self.trunks.remove(index);
                    let past = request.prompt_ids.len();
                    begun.push((Slot { live: Live::new(request, sample), cache, cache_bytes, past }, logits));
                } else if self.kv_cache_bytes + trunk.cache_bytes <= self.limits.kv_cache_bytes {
                    self.kv_cache_bytes += trunk.cache_bytes;
                    let cache = self.model.fork_cache(&trunk.cache)?;
                    begun.push((slot(trunk.samples.start, cache), trunk.logits.clone()));
                    trunk.samples.start += 1;
                } else {
                    index += 1;
                }
            }
            if begun.is_empty() {
                return Ok(());
            }
            self.stats.peak_kv_cache_bytes = self.stats.peak_kv_cache_bytes.max(self.kv_cache_bytes);
            self.stats.completion_tokens += begun.len() as u64;
            begun.par_iter_mut().for_each(|(slot, logits)| slot.live.take_token(logits, decoder));
            for (slot, _) in begun {
                if slot.live.has_ended() {
                    self.kv_cache_bytes -= slot.cache_bytes;
                    completions.extend(slot.live.finish(decoder));
                } else {
                    self.live.push(slot);
                }
            }
        }
    }

    /// Whether [`Scheduler::admit`] would begin a request, or a sample of a prompt can begin.
    fn can_begin(&self) -> bool {
        let free_bytes = self.limits.kv_cache_bytes - self.kv_cache_bytes;
        let least =
            self.lock_queue().requests.last_key_value().map(|((Reverse(len), _), _)| self.model.cache_bytes(*len));
        self.has_room() && least.is_some_and(|least| least <= free_bytes)
    }

    /// Whether enough is free to interrupt the live sequences for new ones.
    fn has_room(&self) -> bool {
        let max_rows = self.limits.max_rows.max(1);
        let free_rows = max_rows.saturating_sub(self.live.len());
        let free_bytes = self.limits.kv_cache_bytes - self.kv_cache_bytes;
        let enough = |share: usize| {
            free_rows.saturating_mul(share) >= max_rows
                && free_bytes.saturating_mul(share) >= self.limits.kv_cache_bytes
        };
        free_rows > 0 && (self.live.is_empty() || self.model.refill_share().is_none_or(enough))
    }

    /// Begins queued requests as far as the limits go.
    fn admit(&mut self) -> Result<()> {
        if !self.has_room() {
            return Ok(());
        }
        let mut prefill_tokens = 0;
        let mut begun = Vec::new();
        let free_rows = self.limits.max_rows.max(1).saturating_sub(self.live.len());
        // The last is the shortest: where not even that fits, nothing does.
        let queue = Arc::clone(&self.queue);
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        let least = queue.requests.last_key_value().map_or(0, |((Reverse(len), _), _)| self.model.cache_bytes(*len));
        for (key, request) in &queue.requests {
            if begun.len() == free_rows || least > self.limits.kv_cache_bytes - self.kv_cache_bytes {
                break;
            }
            let prompt = request.prompt_ids.len();
            let cache_bytes = self.model.cache_bytes(request.max_len());
            // With further samples the prompt's cache stays beside the first one's.
            let reserved = if request.samples.len() > 1 { 2 * cache_bytes } else { cache_bytes };
            let fits = self.kv_cache_bytes + reserved <= self.limits.kv_cache_bytes
                && (prefill_tokens == 0 || prefill_tokens + prompt <= self.limits.prefill_tokens);
            if fits {
                prefill_tokens += prompt;
                self.kv_cache_bytes += reserved;
                begun.push((*key, cache_bytes));
            }
        }
        self.stats.prompt_tokens += prefill_tokens as u64;
        self.stats.peak_kv_cache_bytes = self.stats.peak_kv_cache_bytes.max(self.kv_cache_bytes);
        for (key, cache_bytes) in begun {
            let Some(request) = queue.requests.remove(&key) else { continue };
            let cache = match self.model.new_cache(request.max_len()) {
                Ok(cache) => cache,
                Err(error) => {
                    queue.requests.insert(key, request);
                    return Err(error);
                }
            };
            let live = Live::new(Arc::new(request.clone()), request.samples.start);
            self.live.push(Slot { live, cache, cache_bytes, past: 0 });
        }
        Ok(())
    }

    /// The tokens that live sequences have not computed yet: a prompt, or the last token of a completion.
    fn batch(&mut self) -> PackedBatch {
        let mut batch = PackedBatch { input_ids: Vec::new(), position_ids: Vec::new(), cu_seq_lens: vec![0] };
        for slot in &mut self.live {
            let new = slot.live.new_tokens();
            batch.input_ids.extend_from_slice(new);
            batch.position_ids.extend((slot.past..slot.past + new.len()).map(|position| position as u32));
            batch.cu_seq_lens.push(batch.input_ids.len() as u32);
            slot.past += new.len();
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::generation::{FinishReason, SamplingParams};

    const VOCAB: usize = 50;

    /// Its next token is a function of all tokens so far, which it keeps in its caches and checks against positions.
    struct Fake {
        /// Whether sequences go on without the host, and how much has to be free for new ones then.
        runs: Option<usize>,
        /// The most cache bytes that were live at a time, and the most prompt tokens of a step with their prompts.
        seen: Mutex<(usize, Vec<(usize, usize)>)>,
    }

    #[derive(Clone)]
    struct FakeCache {
        tokens: Vec<u32>,
        max_len: usize,
    }

    fn next_token(tokens: &[u32]) -> u32 {
        let hash = tokens
            .iter()
            .fold(17u64, |hash, &id| (hash ^ u64::from(id)).wrapping_mul(6_364_136_223_846_793_005).rotate_left(29));
        (hash % VOCAB as u64) as u32
    }

    impl StepModel for Fake {
        type Cache = FakeCache;

        fn vocab_size(&self) -> usize {
            VOCAB
        }

        fn cache_bytes(&self, max_len: usize) -> usize {
            max_len * 10
        }

        fn new_cache(&self, max_len: usize) -> Result<FakeCache> {
            Ok(FakeCache { tokens: Vec::new(), max_len })
        }

        fn fork_cache(&self, cache: &FakeCache) -> Result<FakeCache> {
            Ok(cache.clone())
        }

        fn step(&self, batch: &PackedBatch, caches: &mut [&mut FakeCache]) -> Result<Vec<f32>> {
            let mut seen = self.seen.lock().unwrap();
            seen.0 = seen.0.max(caches.iter().map(|cache| cache.max_len * 10).sum());
            let prompts: Vec<_> =
                (0..caches.len()).filter(|&b| caches[b].tokens.is_empty()).map(|b| batch.range(b).len()).collect();
            seen.1.push((prompts.len(), prompts.iter().sum()));
            let mut logits = vec![0.0; caches.len() * VOCAB];
            for (b, cache) in caches.iter_mut().enumerate() {
                let range = batch.range(b);
                assert_eq!(batch.position_ids[range.start] as usize, cache.tokens.len());
                assert!(range.len() == 1 || cache.tokens.is_empty());
                cache.tokens.extend(&batch.input_ids[range]);
                assert!(cache.tokens.len() <= cache.max_len);
                logits[b * VOCAB + next_token(&cache.tokens) as usize] = 1.0;
            }
            Ok(logits)
        }

        fn step_greedy(&self, batch: &PackedBatch, caches: &mut [&mut FakeCache]) -> Result<Option<Vec<Sampled>>> {
            if self.runs.is_none() {
                return Ok(None);
            }
            self.step(batch, caches)?;
            Ok(Some(caches.iter().map(|cache| sampled(next_token(&cache.tokens))).collect()))
        }

        fn greedy_run<'a>(
            &'a self,
            ids: &[u32],
            caches: &[&FakeCache],
            max_len: usize,
        ) -> Result<Option<Box<dyn GreedyRun<FakeCache> + 'a>>> {
            assert!(caches.iter().all(|cache| cache.max_len <= max_len));
            let lanes = ids.len().next_power_of_two();
            let rows = caches.iter().zip(ids).map(|(cache, &id)| Some((cache.tokens.clone(), id))).collect();
            Ok(self.runs.map(|_| Box::new(FakeRun { rows, lanes, pending: None }) as Box<_>))
        }

        fn refill_share(&self) -> Option<usize> {
            self.runs
        }
    }

    fn sampled(token_id: u32) -> Sampled {
        Sampled { token_id, logprob: -1.0 }
    }

    /// A device that is a step ahead of the host.
    struct FakeRun {
        /// Tokens in the device's cache and the one to go on with, of each lane; `None` once it is closed.
        rows: Vec<Option<(Vec<u32>, u32)>>,
        lanes: usize,
        pending: Option<Vec<Option<u32>>>,
    }

    impl FakeRun {
        fn launch(&mut self) {
            assert!(self.pending.is_none());
            let step = |row: &mut Option<(Vec<u32>, u32)>| {
                let (tokens, id) = row.as_mut()?;
                tokens.push(*id);
                *id = next_token(tokens);
                Some(*id)
            };
            self.pending = Some(self.rows.iter_mut().map(step).collect());
        }

        /// The host's caches get the tokens that the device's have had.
        fn read(&self, step: Vec<Option<u32>>, caches: &mut [&mut FakeCache]) -> Vec<Sampled> {
            let open: Vec<_> = (self.rows.iter().zip(step)).filter_map(|(row, id)| row.as_ref().zip(id)).collect();
            assert_eq!(open.len(), caches.len());
            for ((tokens, _), cache) in open.iter().map(|(row, _)| row).zip(caches) {
                let len = cache.tokens.len() + 1;
                assert!(len <= cache.max_len, "a token beyond the cache is read by nobody");
                cache.tokens = tokens[..len].to_vec();
            }
            open.into_iter().map(|(_, id)| sampled(id)).collect()
        }
    }

    impl GreedyRun<FakeCache> for FakeRun {
        fn next(&mut self, caches: &mut [&mut FakeCache]) -> Result<Vec<Sampled>> {
            if self.pending.is_none() {
                self.launch();
            }
            let step = self.pending.take().unwrap();
            self.launch();
            Ok(self.read(step, caches))
        }

        fn end(&mut self, ended: &[usize]) -> Result<()> {
            let open: Vec<usize> = (0..self.rows.len()).filter(|&lane| self.rows[lane].is_some()).collect();
            ended.iter().for_each(|&index| self.rows[open[index]] = None);
            Ok(())
        }

        fn finish(&mut self, caches: &mut [&mut FakeCache]) -> Result<Vec<Sampled>> {
            let step = self.pending.take();
            Ok(step.map_or_else(Vec::new, |step| self.read(step, caches)))
        }

        fn lanes(&self) -> usize {
            self.lanes
        }
    }

    struct Letters;

    impl Decode for Letters {
        fn decode(&self, token_ids: &[u32]) -> Result<String, String> {
            Ok(token_ids.iter().map(|&id| char::from(b'A' + id as u8)).collect())
        }
    }

    fn fake() -> Fake {
        Fake { runs: None, seen: Mutex::default() }
    }

    fn request(row: usize, prompt_len: usize, max_tokens: usize, stop_token_ids: Vec<u32>) -> Request {
        let params = SamplingParams { max_tokens, stop_token_ids, ..SamplingParams::default() };
        let prompt_ids = (0..prompt_len).map(|i| ((row * 31 + i * 7) % VOCAB) as u32).collect();
        Request { row, samples: 0..1, random_key: row as u64, prompt_ids, params: Arc::new(params) }
    }

    /// What a request has to give, computed alone.
    fn expected(request: &Request) -> (Vec<u32>, FinishReason) {
        let (mut tokens, mut completion) = (request.prompt_ids.clone(), Vec::new());
        loop {
            let next = next_token(&tokens);
            tokens.push(next);
            completion.push(next);
            if request.params.stop_token_ids.contains(&next) {
                return (completion, FinishReason::Stop);
            }
            if completion.len() == request.params.max_tokens {
                return (completion, FinishReason::Length);
            }
        }
    }

    proptest! {
        #[test]
        fn every_request_ends_once_with_its_own_tokens_and_no_limit_is_passed(
            requests in prop::collection::vec(
                (1usize..30, 1usize..40, prop::collection::vec(0u32..50, 0..6), 1u32..6),
                0..60,
            ),
            kv_cache_tokens in 70usize..400,
            max_rows in 1usize..20,
            prefill_tokens in 1usize..80,
            at_once in 1usize..60,
            runs in prop::option::of(1usize..9),
        ) {
            let model = Fake { runs, ..fake() };
            let limits = SchedulerLimits { kv_cache_bytes: kv_cache_tokens * 10, max_rows, prefill_tokens };
            let mut scheduler = Scheduler::new(&model, &Letters, limits);
            let requests: Vec<_> = (requests.into_iter().enumerate())
                .map(|(row, (p, m, stop, samples))| Request { samples: 0..samples, ..request(row, p, m, stop) })
                .collect();
            let mut waiting = requests.iter();
            let mut ended: Vec<Vec<u32>> = vec![Vec::new(); requests.len()];
            // Requests keep coming while others run.
            while waiting.len() > 0 || !scheduler.is_idle() {
                for request in waiting.by_ref().take(at_once) {
                    scheduler.push(request.clone()).unwrap();
                }
                let completions = scheduler.step().unwrap();
                prop_assert!(scheduler.live() <= max_rows);
                for completion in completions {
                    let request = &requests[completion.row];
                    let generated = completion.result.unwrap();
                    let (tokens, reason) = expected(request);
                    prop_assert_eq!(&generated.token_ids, &tokens);
                    prop_assert_eq!(generated.finish_reason, reason);
                    prop_assert_eq!(generated.prompt_tokens, request.prompt_ids.len());
                    ended[completion.row].push(completion.sample);
                }
            }
            for (request, mut samples) in requests.iter().zip(ended) {
                samples.sort_unstable();
                prop_assert_eq!(samples, request.samples.clone().collect::<Vec<_>>());
            }
            // A prompt is computed once, unless its cache cannot be kept beside another.
            let computed = |request: &Request| {
                let alone = 2 * request.max_len() > kv_cache_tokens;
                request.prompt_ids.len() * if alone { request.samples.len() } else { 1 }
            };
            prop_assert_eq!(scheduler.stats().prompt_tokens as usize, requests.iter().map(computed).sum::<usize>());
            let (bytes, prefills) = &*model.seen.lock().unwrap();
            prop_assert!(*bytes <= limits.kv_cache_bytes);
            prop_assert!(*bytes <= scheduler.stats().peak_kv_cache_bytes);
            prop_assert!(scheduler.stats().peak_kv_cache_bytes <= limits.kv_cache_bytes);
            prop_assert!(prefills.iter().all(|&(prompts, tokens)| tokens <= prefill_tokens || prompts == 1));
            prop_assert_eq!(scheduler.kv_cache_bytes, 0);
        }
    }

    #[test]
    fn a_finished_slot_is_refilled_in_the_next_step() {
        let model = fake();
        let limits = SchedulerLimits { kv_cache_bytes: 1_000_000, max_rows: 2, prefill_tokens: 1000 };
        let mut scheduler = Scheduler::new(&model, &Letters, limits);
        for (row, max_tokens) in [(0, 20), (1, 3), (2, 3), (3, 3)] {
            scheduler.push(request(row, 5, max_tokens, vec![])).unwrap();
        }
        let mut ends = Vec::new();
        while !scheduler.is_idle() {
            let completions = scheduler.step().unwrap();
            ends.extend(completions.into_iter().map(|completion| (completion.row, scheduler.stats().steps)));
        }
        assert_eq!(ends, [(1, 3), (2, 6), (3, 9), (0, 20)]);
        let stats = scheduler.stats();
        assert_eq!((stats.steps, stats.prompt_tokens, stats.completion_tokens), (20, 20, 29));
    }

    #[test]
    fn what_can_never_run_is_refused_at_the_door() {
        let model = fake();
        let limits = SchedulerLimits { kv_cache_bytes: 100, max_rows: 4, prefill_tokens: 8 };
        let mut scheduler = Scheduler::new(&model, &Letters, limits);
        assert!(scheduler.push(request(0, 5, 6, vec![])).unwrap_err().contains("110 bytes"));
        assert!(scheduler.push(request(0, 0, 6, vec![])).unwrap_err().contains("no tokens"));
        assert!(scheduler.push(request(0, 5, 0, vec![])).unwrap_err().contains("max_tokens"));
        assert!(scheduler.push(request(0, 5, 5, vec![])).is_ok());
        assert_eq!((scheduler.queued(), scheduler.live(), scheduler.is_idle()), (1, 0, false));
    }

    #[test]
    fn a_row_whose_logits_are_no_numbers_fails_alone() {
        struct Broken(Fake);
        impl StepModel for Broken {
            type Cache = FakeCache;
            fn vocab_size(&self) -> usize {
                VOCAB
            }
            fn cache_bytes(&self, max_len: usize) -> usize {
                max_len
            }
            fn new_cache(&self, max_len: usize) -> Result<FakeCache> {
                self.0.new_cache(max_len)
            }
            fn fork_cache(&self, cache: &FakeCache) -> Result<FakeCache> {
                self.0.fork_cache(cache)
            }
            fn step(&self, batch: &PackedBatch, caches: &mut [&mut FakeCache]) -> Result<Vec<f32>> {
                let mut logits = self.0.step(batch, caches)?;
                for (b, cache) in caches.iter().enumerate() {
                    if cache.tokens.len() == 7 {
                        logits[b * VOCAB + 3] = f32::NAN;
                    }
                }
                Ok(logits)
            }
        }
        let model = Broken(fake());
        let limits = SchedulerLimits { kv_cache_bytes: 1000, max_rows: 4, prefill_tokens: 100 };
        let mut scheduler = Scheduler::new(&model, &Letters, limits);
        scheduler.push(request(0, 5, 6, vec![])).unwrap();
        scheduler.push(request(1, 8, 6, vec![])).unwrap();
        let mut completions = Vec::new();
        while !scheduler.is_idle() {
            completions.extend(scheduler.step().unwrap());
        }
        assert_eq!(completions.len(), 2);
        assert!(completions.iter().all(|completion| completion.result.is_err() == (completion.row == 0)));
    }

    #[test]
    fn a_full_device_begins_anew_with_fewer_and_then_fails_the_row_alone() {
        /// Memory for so many tokens in all caches.
        struct Scarce(Fake, usize);
        impl StepModel for Scarce {
            type Cache = FakeCache;
            fn vocab_size(&self) -> usize {
                VOCAB
            }
            fn cache_bytes(&self, max_len: usize) -> usize {
                self.0.cache_bytes(max_len)
            }
            fn new_cache(&self, max_len: usize) -> Result<FakeCache> {
                self.0.new_cache(max_len)
            }
            fn fork_cache(&self, cache: &FakeCache) -> Result<FakeCache> {
                self.0.fork_cache(cache)
            }
            fn step(&self, batch: &PackedBatch, caches: &mut [&mut FakeCache]) -> Result<Vec<f32>> {
                if caches.iter().map(|cache| cache.tokens.len()).sum::<usize>() + batch.num_tokens() > self.1 {
                    // Half done, as a real one would leave them.
                    caches.iter_mut().for_each(|cache| cache.tokens.clear());
                    return Err(Error::OutOfMemory { message: "CUDA_ERROR_OUT_OF_MEMORY".into() });
                }
                self.0.step(batch, caches)
            }
        }
        let limits = SchedulerLimits { kv_cache_bytes: 1_000_000, max_rows: 16, prefill_tokens: 1000 };
        for samples in [1, 3] {
            let model = Scarce(fake(), 60);
            let mut scheduler = Scheduler::new(&model, &Letters, limits);
            let mut requests: Vec<_> = (0..12).map(|row| request(row, 3 + row, 10 + row, vec![])).collect();
            requests.push(request(12, 50, 20, vec![]));
            requests.push(request(13, 61, 1, vec![]));
            for request in &mut requests {
                request.samples = 0..samples;
                scheduler.push(request.clone()).unwrap();
            }
            let mut ended = vec![Vec::new(); requests.len()];
            while !scheduler.is_idle() {
                for completion in scheduler.step().unwrap() {
                    ended[completion.row].push(completion.sample);
                    match completion.result {
                        Ok(generated) => {
                            assert_eq!(generated.token_ids, expected(&requests[completion.row]).0);
                            assert!(completion.row < 12);
                        }
                        Err(message) => assert!(completion.row >= 12 && message.contains("out of memory"), "{message}"),
                    }
                }
            }
            for samples_of_row in &mut ended {
                samples_of_row.sort_unstable();
                assert_eq!(*samples_of_row, (0..samples).collect::<Vec<_>>());
            }
            assert_eq!(scheduler.kv_cache_bytes, 0);
        }
    }
}
