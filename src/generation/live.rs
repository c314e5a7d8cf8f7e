//! What is asked for, and a completion on its way there.

use std::ops::Range;
use std::sync::Arc;

use super::sampler::{self, DrawKey, Sampled};
use super::stop::{self, Decode, FinishReason};
use super::{Constraint, ConstraintState, SamplingParams};

/// Completions that are wanted of one prompt.
#[derive(Debug, Clone)]
pub struct Request {
    /// Where the completions belong; comes back with each.
    pub row: usize,
    /// The numbers of the row's completions that are wanted, `0..1` for a single one.
    pub samples: Range<u32>,
    /// What tells the row's random draws from others': its number in the whole input.
    pub random_key: u64,
    /// The prompt with its special tokens; not empty.
    pub prompt_ids: Vec<u32>,
    pub params: Arc<SamplingParams>,
}

/// The end of one of a request's completions.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// [`Request::row`].
    pub row: usize,
    /// Which of [`Request::samples`].
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

impl Request {
    /// Tokens of prompt and completion at most, each of which has a slot in the cache.
    pub fn max_len(&self) -> usize {
        self.prompt_ids.len().saturating_add(self.params.max_tokens)
    }
}

/// Why a completion ends whose logits are no numbers.
const NOT_FINITE: &str = "the model's output holds NaN or infinity";

/// One completion that has begun.
pub(super) struct Live {
    pub request: Arc<Request>,
    sample: u32,
    completion: Vec<u32>,
    logprobs: Vec<f32>,
    /// Where in its grammar the completion is, if it has one.
    constraint: Option<ConstraintState>,
    end: Option<Result<FinishReason, String>>,
}

impl Live {
    pub fn new(request: Arc<Request>, sample: u32) -> Self {
        Self {
            sample,
            completion: Vec::new(),
            logprobs: Vec::new(),
            constraint: request.params.constraint.as_ref().map(Constraint::begin),
            end: None,
            request,
        }
    }

    /// What is still to come of its request, to begin anew: itself, and with a prompt that was not computed all its samples.
    pub fn request_again(&self) -> Request {
        let samples = if self.is_new() { self.request.samples.clone() } else { self.sample..self.sample + 1 };
        Request { samples, ..Request::clone(&self.request) }
    }

    /// The same completion from its beginning.
    pub fn again(&self) -> Self {
        Self::new(Arc::clone(&self.request), self.sample)
    }

    /// The tokens that the model has not computed yet: the prompt, or the last token of the completion.
    pub fn new_tokens(&self) -> &[u32] {
        match self.completion.last() {
            None => &self.request.prompt_ids,
            Some(last) => std::slice::from_ref(last),
        }
    }

    /// Whether no token was chosen yet.
    pub fn is_new(&self) -> bool {
        self.completion.is_empty()
    }

    /// Whether the last token was the last one.
    pub fn has_ended(&self) -> bool {
        self.end.is_some()
    }

    /// Chooses the next token from its `logits` `[vocab]` and sees whether it is the last.
    pub fn take_token(&mut self, logits: &mut [f32], decoder: &impl Decode) {
        self.end = self.next_token(logits, decoder).transpose();
    }

    /// As [`Live::take_token`] with the token that the device chose, which suits [`SamplingParams::is_plain_greedy`] only.
    pub fn take_chosen(&mut self, chosen: Sampled, decoder: &impl Decode) {
        let end = if chosen.is_finite() { self.add(chosen, decoder) } else { Err(NOT_FINITE.into()) };
        self.end = end.transpose();
    }

    /// Chooses the next token; why the completion ends with it, if it does.
    fn next_token(&mut self, logits: &mut [f32], decoder: &impl Decode) -> Result<Option<FinishReason>, String> {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(NOT_FINITE.into());
        }
        let Request { random_key, params, prompt_ids, .. } = &*self.request;
        let step = self.completion.len() as u32;
        let key = DrawKey { seed: params.seed, row: *random_key, sample: self.sample, step };
        let allowed = match &mut self.constraint {
            Some(state) => Some(state.allowed(&params.stop_token_ids)?),
            None => None,
        };
        let sampled = sampler::sample(logits, params, allowed.as_ref(), prompt_ids, &self.completion, key);
        self.add(sampled.ok_or("no token is left to choose: the settings forbid all that could follow")?, decoder)
    }

    /// Adds the next token; why the completion ends with it, if it does.
    fn add(&mut self, sampled: Sampled, decoder: &impl Decode) -> Result<Option<FinishReason>, String> {
        let params = &self.request.params;
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

    /// The completion of a row that cannot be computed.
    pub fn fail(self, message: String) -> Completion {
        Completion { row: self.request.row, sample: self.sample, result: Err(message) }
    }

    /// The completion, if it has ended.
    pub fn finish(self, decoder: &impl Decode) -> Option<Completion> {
        let Request { row, params, prompt_ids, .. } = &*self.request;
        let result = self.end?.and_then(|finish_reason| {
            let text = stop::text(&self.completion, params, decoder)?;
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
        Some(Completion { row: *row, sample: self.sample, result })
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
