//! Layers on the CPU: attention over all tokens, and between two of them block by block of rows.

use std::time::Duration;

use candle_core::{Result, Tensor};

use super::MistralModel;
use super::mistral::Pass;
use super::profile::Phase;
use crate::kernels::{self, AfterAttention, BeforeAttention, BetweenAttentions, RowStep};

impl MistralModel {
    /// All layers and the final norm over `stream [2, N, hidden]`, whose first half holds embeddings: `[N, hidden]`, or the
    /// rows at `positions`; `attend` makes `[N, H·D]` of a layer's index and rotated queries and keys.
    pub(super) fn run_row_blocks(
        &self,
        mut stream: Tensor,
        pass: &Pass,
        positions: Option<&Tensor>,
        mut attend: impl FnMut(usize, &Pass) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let spent = |step, time: Duration| self.profile.add(phase(step), time);
        for index in 0..=self.layers.len() {
            let (previous, next) = (index.checked_sub(1), self.layers.get(index));
            let mut context = previous.map(|previous| attend(previous, pass)).transpose()?;
            if let (None, Some(positions)) = (next, positions) {
                // Attention was the last step that mixes tokens: from here on each is computed alone.
                context = context.map(|context| kernels::select_rows(&context, positions)).transpose()?;
                stream = kernels::begin_stream(&stream.get(0)?, positions)?;
            }
            let after = previous.and_then(|previous| self.layers.get(previous)).zip(context.as_ref());
            let between = BetweenAttentions {
                after: after.map(|(layer, context)| AfterAttention {
                    context,
                    o_proj: layer.o_proj.packed(),
                    norm: &layer.post_attention_layernorm,
                    gate_up_proj: layer.gate_up_proj.packed(),
                    down_proj: layer.down_proj.packed(),
                }),
                norm: next.map_or(&self.norm, |next| &next.input_layernorm),
                eps: self.config.rms_norm_eps,
                before: next.map(|layer| BeforeAttention {
                    qkv_proj: layer.qkv_proj.packed(),
                    qkv: &pass.qkv,
                    cos: &pass.rotary.cos,
                    sin: &pass.rotary.sin,
                    heads: self.config.heads(),
                }),
            };
            between.run(&stream, &spent)?;
        }
        stream.get(1)
    }
}

fn phase(step: RowStep) -> Phase {
    match step {
        RowStep::OutputProjection => Phase::OutputProjection,
        RowStep::Norm => Phase::Norm,
        RowStep::GateUpProjection => Phase::GateUpProjection,
        RowStep::DownProjection => Phase::DownProjection,
        RowStep::QkvProjection => Phase::QkvProjection,
        RowStep::Rotary => Phase::Rotary,
    }
}
