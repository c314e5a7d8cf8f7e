//! Greedy steps on a CUDA device that follow each other without the host: the likeliest token of one step is what the
//! next reads, and the host learns of it a step late.

use std::sync::PoisonError;

use candle_core::{DType, Tensor};

use super::sampler::Sampled;
use super::{CausalLm, GreedyRun, StepModel};
use crate::error::{Error, Result};
use crate::kernels;
use crate::kernels::cuda::{self, Download, Graph};
use crate::model::{DecodeLanes, KvCache};

/// A row's token where its logits were not all finite.
const NOT_FINITE: u32 = u32::MAX;
/// Lanes serve sequences up to a multiple of this, so that most runs find some that fit.
const MAX_LEN_STEP: usize = 1024;

/// The buffers of a step, and the step as it was recorded.
pub struct GreedyLanes {
    lanes: DecodeLanes,
    /// `[lanes, vocab_size]`
    logits: Tensor,
    /// `[lanes]`
    logprobs: Tensor,
    graph: Option<Graph>,
    /// Whether a step ran, so that whatever is set up at first use is.
    is_warm: bool,
}

impl GreedyLanes {
    /// Buffers for `lanes` sequences of up to `max_len` tokens.
    pub(super) fn new(lm: &CausalLm, lanes: usize, max_len: usize) -> Result<Self> {
        let device = lm.model.device();
        Ok(Self {
            lanes: DecodeLanes::new(&lm.model, lanes, max_len.next_multiple_of(MAX_LEN_STEP))?,
            logits: kernels::buffer((lanes, lm.vocab_size()), DType::F32, device)?,
            logprobs: kernels::buffer(lanes, DType::F32, device)?,
            graph: None,
            is_warm: false,
        })
    }

    /// Whether they serve sequences of up to `max_len` tokens.
    pub(super) fn fit(&self, lm: &CausalLm, max_len: usize) -> Result<bool> {
        self.lanes.fit(&lm.model, max_len)
    }

    /// The likeliest token of each row of `logits [B, vocab_size]`.
    pub(super) fn likeliest(logits: &Tensor) -> Result<Vec<Sampled>> {
        let rows = logits.dim(0)?;
        let ids = kernels::buffer(rows, DType::U32, logits.device())?;
        let logprobs = kernels::buffer(rows, DType::F32, logits.device())?;
        cuda::argmax_logprob(logits, &ids, &logprobs)?;
        sampled(Download::begin(&ids)?, Download::begin(&logprobs)?)
    }

    /// Launches a step: recorded, from the second on.
    fn launch(&mut self, lm: &CausalLm) -> Result<()> {
        if let Some(graph) = &mut self.graph {
            return Ok(graph.launch()?);
        }
        let step = || {
            let hidden_states = self.lanes.step(&lm.model)?; // [lanes, hidden]
            lm.lm_head.forward_into(&hidden_states, &self.logits)?;
            cuda::argmax_logprob(&self.logits, self.lanes.ids(), &self.logprobs)
        };
        if !self.is_warm {
            step()?;
            self.is_warm = true;
            return Ok(());
        }
        let graph = Graph::record(lm.model.device(), step)?;
        Ok(self.graph.insert(graph).launch()?)
    }
}

fn sampled(ids: Download, logprobs: Download) -> Result<Vec<Sampled>> {
    let (ids, logprobs) = (ids.u32()?, logprobs.f32()?);
    Ok(ids.into_iter().zip(logprobs).map(|(token_id, logprob)| Sampled { token_id, logprob }).collect())
}

impl Sampled {
    /// Whether it was chosen among numbers.
    pub(super) fn is_finite(&self) -> bool {
        self.token_id != NOT_FINITE
    }
}

/// Sequences that go on together until one of them has to wait for the host.
pub(super) struct LaneRun<'a> {
    lm: &'a CausalLm,
    /// There until the run is dropped.
    lanes: Option<GreedyLanes>,
    /// The lanes of sequences that have not ended, in order.
    open: Vec<usize>,
    /// What the last step that was launched chooses.
    pending: Option<(Download, Download)>,
}

impl<'a> LaneRun<'a> {
    /// A run of sequences that go on with `ids`.
    pub fn begin(lm: &'a CausalLm, lanes: GreedyLanes, ids: &[u32], caches: &[&KvCache]) -> Result<Self> {
        lanes.lanes.set(ids, caches)?;
        Ok(Self { lm, lanes: Some(lanes), open: (0..ids.len()).collect(), pending: None })
    }

    fn launch(&mut self) -> Result<()> {
        let Some(lanes) = &mut self.lanes else { return Err(Error::Internal("the run is over".into())) };
        lanes.launch(self.lm)?;
        self.pending = Some((Download::begin(lanes.lanes.ids())?, Download::begin(&lanes.logprobs)?));
        Ok(())
    }

    /// Waits for a step's tokens, those of open lanes, whose caches hold one more token now.
    fn read(&self, step: (Download, Download), caches: &mut [&mut KvCache]) -> Result<Vec<Sampled>> {
        if caches.len() != self.open.len() {
            return Err(Error::Internal(format!("{} caches for {} lanes", caches.len(), self.open.len())));
        }
        caches.iter_mut().for_each(|cache| cache.advance(1));
        let tokens = sampled(step.0, step.1)?;
        Ok(self.open.iter().map(|&lane| tokens[lane]).collect())
    }
}

impl GreedyRun<KvCache> for LaneRun<'_> {
    fn next(&mut self, caches: &mut [&mut KvCache]) -> Result<Vec<Sampled>> {
        if self.pending.is_none() {
            self.launch()?;
        }
        let Some(step) = self.pending.take() else { return Err(Error::Internal("no step was launched".into())) };
        self.launch()?;
        self.read(step, caches)
    }

    fn end(&mut self, ended: &[usize]) -> Result<()> {
        for &index in ended.iter().rev() {
            let lane = self.open.remove(index);
            if let Some(lanes) = &self.lanes {
                lanes.lanes.close(lane)?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, caches: &mut [&mut KvCache]) -> Result<Vec<Sampled>> {
        match self.pending.take() {
            Some(step) => self.read(step, caches),
            None => Ok(Vec::new()),
        }
    }

    fn lanes(&self) -> usize {
        self.lanes.as_ref().map_or(0, |lanes| lanes.lanes.len())
    }
}

impl Drop for LaneRun<'_> {
    fn drop(&mut self) {
        if let Some(lanes) = self.lanes.take() {
            let mut idle = self.lm.idle_lanes.lock().unwrap_or_else(PoisonError::into_inner);
            idle.insert(lanes.lanes.len(), lanes);
        }
    }
}
