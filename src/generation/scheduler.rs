//! In-flight batching: schedule → run → postprocess, one token of every live sequence a step.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::sampler::{self, DrawKey};
use super::stop::{self, Decode, FinishReason};
use super::{Constraint, ConstraintState, SamplingParams};
use crate::batch::PackedBatch;
use crate::error::Result;

/// A model that can go on with sequences token by token.
pub trait StepModel: Sync {
    /// What a sequence's tokens so far leave behind.
    type Cache: Send + Sync;

    /// Tokens that have a logit.
    fn vocab_size(&self) -> usize;

    /// The memory of a cache for `max_len` tokens, in bytes.
    fn cache_bytes(&self, max_len: usize) -> usize;

    /// An empty cache for `max_len` tokens.
    fn new_cache(&self, max_len: usize) -> Self::Cache;

    /// Adds the batch's new tokens to their sequences' `caches` `[B]`: the logits of each next token, `[B, vocab]`.
    ///
    /// # Errors
    /// When the computation fails; the caches are then of no use.
    fn step(&self, batch: &PackedBatch, caches: &mut [&mut Self::Cache]) -> Result<Vec<f32>>;
}

/// One completion that is wanted.
#[derive(Debug, Clone)]
pub struct Request {
    /// Where the completion belongs; comes back with it.
    pub row: usize,
    /// Which of the row's completions, from 0 on.
    pub sample: u32,
    /// What tells the row's random draws from others': its number in the whole input.
    pub random_key: u64,
    /// The prompt with its special tokens; not empty.
    pub prompt_ids: Vec<u32>,
    pub params: Arc<SamplingParams>,
}

/// A request's end.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// [`Request::row`].
    pub row: usize,
    /// [`Request::sample`].
    pub sample: u32,
    /// What was generated, or a message for the row's `error` column.
    pub result: Result<Generated, String>,
}

/// A completion that went well.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    pub text: String,
    pub finish_reason: FinishReason,
    pub prompt_tokens: usize,
    /// The completion's tokens, a stop token included.
    pub token_ids: Vec<u32>,
    /// Their log-probabilities where [`SamplingParams::logprobs`] asks for them, else empty.
    pub logprobs: Vec<f32>,
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

/// Keeps the device busy with completions: whoever ends makes room for the next in the very next step.
///
/// The queue is sorted by length, longest first, so that no long completion is left alone at the end; what does not
/// fit is passed over for what does. A completion depends on its own request only. Requests may be added between
/// steps, as later units are read: those that are queued go by length, whenever they came.
pub struct Scheduler<'a, M: StepModel, D> {
    model: &'a M,
    decoder: &'a D,
    limits: SchedulerLimits,
    /// By longest possible length, then by arrival.
    queue: BTreeMap<(Reverse<usize>, u64), Request>,
    arrivals: u64,
    live: Vec<Live<M::Cache>>,
    kv_cache_bytes: usize,
    stats: StepStats,
}

/// A sequence that has begun.
struct Live<C> {
    request: Request,
    cache: C,
    cache_bytes: usize,
    /// Tokens in the cache.
    past: usize,
    completion: Vec<u32>,
    logprobs: Vec<f32>,
    /// Where in its grammar the completion is, if it has one.
    constraint: Option<ConstraintState>,
    end: Option<Result<FinishReason, String>>,
}

impl Request {
    /// Tokens of prompt and completion at most, each of which has a slot in the cache.
    fn max_len(&self) -> usize {
        self.prompt_ids.len().saturating_add(self.params.max_tokens)
    }
}

impl<'a, M: StepModel, D: Decode + Sync> Scheduler<'a, M, D> {
    /// A scheduler without requests.
    pub fn new(model: &'a M, decoder: &'a D, limits: SchedulerLimits) -> Self {
        Self {
            model,
            decoder,
            limits,
            queue: BTreeMap::new(),
            arrivals: 0,
            live: Vec::new(),
            kv_cache_bytes: 0,
            stats: StepStats::default(),
        }
    }

    /// Queues a request.
    ///
    /// # Errors
    /// A message for the row's `error` column: the prompt is empty, the settings mean nothing, or the cache alone is
    /// beyond the memory limit.
    pub fn push(&mut self, request: Request) -> Result<(), String> {
        if request.prompt_ids.is_empty() {
            return Err("the prompt has no tokens".into());
        }
        request.params.check().map_err(|bad| bad.to_string())?;
        let (needed, allowed) = (self.model.cache_bytes(request.max_len()), self.limits.kv_cache_bytes);
        if needed > allowed {
            return Err(format!(
                "{} prompt and {} new tokens need {needed} bytes of key/value cache, but only {allowed} are allowed",
                request.prompt_ids.len(),
                request.params.max_tokens
            ));
        }
        self.queue.insert((Reverse(request.max_len()), self.arrivals), request);
        self.arrivals += 1;
        Ok(())
    }

    /// Requests that have not begun.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Sequences that have begun and not ended.
    pub fn live(&self) -> usize {
        self.live.len()
    }

    /// Whether all requests have ended.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.live.is_empty()
    }

    /// What was computed so far.
    pub fn stats(&self) -> StepStats {
        self.stats
    }

    /// Computes one more token of every sequence, new ones included, and returns the completions that it ended.
    ///
    /// # Errors
    /// When the model fails; the scheduler is then of no use.
    pub fn step(&mut self) -> Result<Vec<Completion>> {
        self.admit();
        if self.live.is_empty() {
            return Ok(Vec::new());
        }
        let batch = self.batch();
        let mut caches: Vec<_> = self.live.iter_mut().map(|live| &mut live.cache).collect();
        let mut logits = self.model.step(&batch, &mut caches)?;
        self.stats.steps += 1;
        self.stats.completion_tokens += self.live.len() as u64;
        let decoder = self.decoder;
        self.live
            .par_iter_mut()
            .zip(logits.par_chunks_mut(self.model.vocab_size()))
            .for_each(|(live, logits)| live.take_token(logits, decoder));
        let ended: Vec<_> = self.live.extract_if(.., |live| live.end.is_some()).collect();
        self.kv_cache_bytes -= ended.iter().map(|live| live.cache_bytes).sum::<usize>();
        Ok(ended.into_iter().filter_map(|live| live.finish(decoder)).collect())
    }

    /// Begins queued requests as far as the limits go.
    fn admit(&mut self) {
        let mut prefill_tokens = 0;
        let mut begun = Vec::new();
        let free_rows = self.limits.max_rows.max(1).saturating_sub(self.live.len());
        // The last is the shortest: where not even that fits, nothing does.
        let least = self.queue.last_key_value().map_or(0, |((Reverse(len), _), _)| self.model.cache_bytes(*len));
        for (key, request) in &self.queue {
            if begun.len() == free_rows || least > self.limits.kv_cache_bytes - self.kv_cache_bytes {
                break;
            }
            let prompt = request.prompt_ids.len();
            let cache_bytes = self.model.cache_bytes(request.max_len());
            let fits = self.kv_cache_bytes + cache_bytes <= self.limits.kv_cache_bytes
                && (prefill_tokens == 0 || prefill_tokens + prompt <= self.limits.prefill_tokens);
            if fits {
                prefill_tokens += prompt;
                self.kv_cache_bytes += cache_bytes;
                begun.push((*key, cache_bytes));
            }
        }
        self.stats.prompt_tokens += prefill_tokens as u64;
        self.stats.peak_kv_cache_bytes = self.stats.peak_kv_cache_bytes.max(self.kv_cache_bytes);
        for (key, cache_bytes) in begun {
            let Some(request) = self.queue.remove(&key) else { continue };
            self.live.push(Live {
                cache: self.model.new_cache(request.max_len()),
                cache_bytes,
                past: 0,
                completion: Vec::new(),
                logprobs: Vec::new(),
                constraint: request.params.constraint.as_ref().map(Constraint::begin),
                end: None,
                request,
            });
        }
    }

    /// The tokens that live sequences have not computed yet: a prompt, or the last token of a completion.
    fn batch(&mut self) -> PackedBatch {
        let mut batch = PackedBatch { input_ids: Vec::new(), position_ids: Vec::new(), cu_seq_lens: vec![0] };
        for live in &mut self.live {
            let new = match live.completion.last() {
                None => &live.request.prompt_ids[..],
                Some(last) => std::slice::from_ref(last),
            };
            batch.input_ids.extend_from_slice(new);
            batch.position_ids.extend((live.past..live.past + new.len()).map(|position| position as u32));
            batch.cu_seq_lens.push(batch.input_ids.len() as u32);
            live.past += new.len();
        }
        batch
    }
}

impl<C> Live<C> {
    /// Chooses the next token and sees whether it is the last.
    fn take_token(&mut self, logits: &mut [f32], decoder: &impl Decode) {
        self.end = self.next_token(logits, decoder).transpose();
    }

    /// Chooses the next token; why the completion ends with it, if it does.
    fn next_token(&mut self, logits: &mut [f32], decoder: &impl Decode) -> Result<Option<FinishReason>, String> {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err("the model's output holds NaN or infinity".into());
        }
        let Request { sample, random_key, params, prompt_ids, .. } = &self.request;
        let key = DrawKey { seed: params.seed, row: *random_key, sample: *sample, step: self.completion.len() as u32 };
        let allowed = match &mut self.constraint {
            Some(state) => Some(state.allowed(&params.stop_token_ids)?),
            None => None,
        };
        let sampled = sampler::sample(logits, params, allowed.as_ref(), prompt_ids, &self.completion, key);
        let sampled = sampled.ok_or("no token is left to choose: the settings forbid all that could follow")?;
        self.completion.push(sampled.token_id);
        if params.logprobs {
            self.logprobs.push(sampled.logprob);
        }
        if let Some(state) = &mut self.constraint {
            state.advance(sampled.token_id)?;
        }
        match stop::finish_reason(&self.completion, params, decoder)? {
            None | Some(FinishReason::Length) if self.constraint.as_ref().is_some_and(ConstraintState::is_finished) => {
                Ok(Some(FinishReason::Stop))
            }
            end => Ok(end),
        }
    }

    fn finish(self, decoder: &impl Decode) -> Option<Completion> {
        let Request { row, sample, params, prompt_ids, .. } = self.request;
        let result = self.end?.and_then(|finish_reason| {
            let text = stop::text(&self.completion, &params, decoder)?;
            if let Some(constraint) = params.constraint.as_ref().filter(|constraint| !constraint.accepts(&text)) {
                return Err(unfinished(constraint, finish_reason, self.completion.len()));
            }
            Ok(Generated {
                text,
                finish_reason,
                prompt_tokens: prompt_ids.len(),
                token_ids: self.completion,
                logprobs: self.logprobs,
            })
        });
        Some(Completion { row, sample, result })
    }
}

/// Why a completion that ended is not what it has to be.
fn unfinished(constraint: &Constraint, reason: FinishReason, tokens: usize) -> String {
    let flag = constraint.grammar().flag();
    match reason {
        FinishReason::Length => {
            format!("cut at max_tokens ({tokens}) before the text was complete under {flag}; raise --max-tokens")
        }
        FinishReason::Stop => format!("a stop string or token ended the text before it was complete under {flag}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    const VOCAB: usize = 50;

    /// Its next token is a function of all tokens so far, which it keeps in its caches and checks against positions.
    struct Fake {
        /// The most cache bytes that were live at a time, and the most prompt tokens of a step with their prompts.
        seen: Mutex<(usize, Vec<(usize, usize)>)>,
    }

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

        fn new_cache(&self, max_len: usize) -> FakeCache {
            FakeCache { tokens: Vec::new(), max_len }
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
    }

    struct Letters;

    impl Decode for Letters {
        fn decode(&self, token_ids: &[u32]) -> Result<String, String> {
            Ok(token_ids.iter().map(|&id| char::from(b'A' + id as u8)).collect())
        }
    }

    fn fake() -> Fake {
        Fake { seen: Mutex::default() }
    }

    fn request(row: usize, prompt_len: usize, max_tokens: usize, stop_token_ids: Vec<u32>) -> Request {
        let params = SamplingParams { max_tokens, stop_token_ids, ..SamplingParams::default() };
        let prompt_ids = (0..prompt_len).map(|i| ((row * 31 + i * 7) % VOCAB) as u32).collect();
        Request { row, sample: 0, random_key: row as u64, prompt_ids, params: Arc::new(params) }
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
            requests in prop::collection::vec((1usize..30, 1usize..40, prop::collection::vec(0u32..50, 0..6)), 0..60),
            kv_cache_tokens in 70usize..400,
            max_rows in 1usize..20,
            prefill_tokens in 1usize..80,
            at_once in 1usize..60,
        ) {
            let model = fake();
            let limits = SchedulerLimits { kv_cache_bytes: kv_cache_tokens * 10, max_rows, prefill_tokens };
            let mut scheduler = Scheduler::new(&model, &Letters, limits);
            let requests: Vec<_> =
                requests.into_iter().enumerate().map(|(row, (p, m, stop))| request(row, p, m, stop)).collect();
            let mut waiting = requests.iter();
            let mut ended = vec![0; requests.len()];
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
                    ended[completion.row] += 1;
                }
            }
            prop_assert!(ended.iter().all(|&times| times == 1));
            let (bytes, prefills) = &*model.seen.lock().unwrap();
            prop_assert!(*bytes <= limits.kv_cache_bytes);
            prop_assert_eq!(*bytes, scheduler.stats().peak_kv_cache_bytes);
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
            fn new_cache(&self, max_len: usize) -> FakeCache {
                self.0.new_cache(max_len)
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
}
