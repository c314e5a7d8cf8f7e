//! What a token goes through alone, from one layer's attention to the next one's, block of rows by block of rows.
//!
//! A core takes a block of tokens through the output projection, the feed-forward block, both norms and the next layer's query, key
//! and value projections before it takes another one, so that what a step leaves is still in the core's cache when the next
//! step reads it. Step by step over a whole batch, all of it would go to memory and back.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, StorageRef, Tensor, bail};
use rayon::prelude::*;

use super::linear::{LockedMatrix, PackedMatrix, RowProduct};
use super::norm::norm_rows;
use super::output::SharedOutput;
use super::{contiguous, contiguous_mut, rotary};
use crate::kernels::HeadLayout;

/// What a block's activations may take: with the weights that pass by, a core's second cache.
const BLOCK_BYTES: usize = 1536 * 1024;
/// Fewer rows for each thread are computed together: every thread would read all weights for them.
const MIN_BLOCK_ROWS: usize = 48;

/// A part of what tokens go through alone, for those who time it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowStep {
    /// The attention's output projection.
    OutputProjection,
    /// A norm, with the sum before it.
    Norm,
    /// The gate and up projections and the activation.
    GateUpProjection,
    /// The projection back to the stream.
    DownProjection,
    /// The query, key and value projections.
    QkvProjection,
    /// The rotation of queries and keys.
    Rotary,
}

/// The rest of a layer after its attention.
#[derive(Clone, Copy)]
pub struct AfterAttention<'a> {
    /// What attention gave `[N, H·D]`.
    pub context: &'a Tensor,
    /// `[hidden, H·D]`
    pub o_proj: PackedMatrix<'a>,
    /// `[hidden]`
    pub norm: &'a Tensor,
    /// `[2·intermediate, hidden]`
    pub gate_up_proj: PackedMatrix<'a>,
    /// `[hidden, intermediate]`
    pub down_proj: PackedMatrix<'a>,
}

/// The beginning of a layer before its attention.
#[derive(Clone, Copy)]
pub struct BeforeAttention<'a> {
    /// `[(H + 2K)·D, hidden]`
    pub qkv_proj: PackedMatrix<'a>,
    /// Where the rotated queries and keys, and the values, go: `[N, (H + 2K)·D]`.
    pub qkv: &'a Tensor,
    /// `[N, D/2]`
    pub cos: &'a Tensor,
    /// `[N, D/2]`
    pub sin: &'a Tensor,
    /// How `qkv` is divided.
    pub heads: HeadLayout,
}

/// The way of tokens from one attention to the next, from the embeddings to the first, or from the last to the final norm.
#[derive(Clone, Copy)]
pub struct BetweenAttentions<'a> {
    /// Nothing before the first layer.
    pub after: Option<AfterAttention<'a>>,
    /// `[hidden]`: the next layer's first norm, or the final one.
    pub norm: &'a Tensor,
    /// Added to the mean square before its root.
    pub eps: f64,
    /// Nothing after the last layer.
    pub before: Option<BeforeAttention<'a>>,
}

impl BetweenAttentions<'_> {
    /// Takes the tokens of `stream [2, N, hidden]`, whose first half is the residual stream, as far as the next attention's inputs.
    ///
    /// The second half is scratch, and in the end the norm of the first. `spent` is told what each step took: of threads that work
    /// side by side, each one's share. Rows are alone as in [`super::packed_linear`].
    ///
    /// # Errors
    /// When shapes do not go together or a tensor is not f32 on the CPU.
    pub fn run(&self, stream: &Tensor, spent: &(dyn Fn(RowStep, Duration) + Sync)) -> Result<()> {
        let &[2, tokens, hidden] = stream.dims() else { bail!("row blocks: expected [2, N, D], got {stream:?}") };
        if tokens == 0 {
            return Ok(());
        }
        let after = self.after.as_ref().map(AfterAttention::lock);
        let after = after.as_ref().map(|after| after.steps(tokens, hidden)).transpose()?;
        let norm = self.norm.storage_and_layout();
        let norm = values(&norm, &[hidden])?;
        let before = self.before.as_ref().map(BeforeAttention::lock);
        let before = before.as_ref().map(|before| before.steps(tokens, hidden)).transpose()?;
        with_values_mut(stream, |stream| {
            let (x, block) = stream.split_at_mut(stream.len() / 2);
            let rows = Rows { tokens, x: SharedOutput::new(x), block: SharedOutput::new(block) };
            let run = |qkv| {
                rows.run(after.as_ref(), (norm, self.eps as f32), before.as_ref().zip(qkv), spent);
                Ok(())
            };
            match &self.before {
                None => run(None),
                Some(before) => with_values_mut(before.qkv, |qkv| run(Some(SharedOutput::new(qkv)))),
            }
        })
    }
}

/// A tensor that nobody writes to.
type Locked<'a> = (StorageRef<'a>, &'a Layout);

impl<'a> AfterAttention<'a> {
    fn lock(&self) -> LockedAfter<'a> {
        LockedAfter {
            context: self.context.storage_and_layout(),
            norm: self.norm.storage_and_layout(),
            matrices: [self.o_proj, self.gate_up_proj, self.down_proj].map(|matrix| matrix.lock()),
        }
    }
}

struct LockedAfter<'a> {
    context: Locked<'a>,
    norm: Locked<'a>,
    matrices: [LockedMatrix<'a>; 3],
}

impl LockedAfter<'_> {
    fn steps(&self, tokens: usize, hidden: usize) -> Result<After<'_>> {
        let [o_proj, gate_up_proj, down_proj] = &self.matrices;
        let (gate_up_proj, context_width) = (gate_up_proj.product(hidden)?, self.context.1.dims().last().copied());
        let context_width = context_width.unwrap_or(0);
        let (o_proj, down_proj) = (o_proj.product(context_width)?, down_proj.product(gate_up_proj.outputs())?);
        if o_proj.outputs() != hidden || down_proj.outputs() != hidden {
            bail!(
                "row blocks: {} and {} outputs do not go to a stream of {hidden}",
                o_proj.outputs(),
                down_proj.outputs()
            );
        }
        let context = values(&self.context, &[tokens, context_width])?;
        Ok(After { context, context_width, o_proj, norm: values(&self.norm, &[hidden])?, gate_up_proj, down_proj })
    }
}

impl<'a> BeforeAttention<'a> {
    fn lock(&self) -> LockedBefore<'a> {
        LockedBefore {
            qkv_proj: self.qkv_proj.lock(),
            qkv: self.qkv.dims(),
            cos: self.cos.storage_and_layout(),
            sin: self.sin.storage_and_layout(),
            heads: self.heads,
        }
    }
}

struct LockedBefore<'a> {
    qkv_proj: LockedMatrix<'a>,
    qkv: &'a [usize],
    cos: Locked<'a>,
    sin: Locked<'a>,
    heads: HeadLayout,
}

impl LockedBefore<'_> {
    fn steps(&self, tokens: usize, hidden: usize) -> Result<Before<'_>> {
        let (heads, half) = (self.heads, self.heads.head_dim / 2);
        rotary::check(self.qkv, self.cos.1.dims(), self.sin.1.dims(), heads)?;
        let qkv_proj = self.qkv_proj.product(hidden)?;
        if qkv_proj.outputs() != heads.qkv_width() {
            bail!("row blocks: {} outputs do not go to {heads:?}", qkv_proj.outputs());
        }
        let (cos, sin) = (values(&self.cos, &[tokens, half])?, values(&self.sin, &[tokens, half])?);
        Ok(Before { qkv_proj, cos, sin, heads })
    }
}

/// As [`AfterAttention`], to run on rows.
struct After<'a> {
    context: &'a [f32],
    context_width: usize,
    o_proj: RowProduct<'a>,
    norm: &'a [f32],
    gate_up_proj: RowProduct<'a>,
    down_proj: RowProduct<'a>,
}

/// As [`BeforeAttention`], to run on rows.
struct Before<'a> {
    qkv_proj: RowProduct<'a>,
    cos: &'a [f32],
    sin: &'a [f32],
    heads: HeadLayout,
}

/// The rows that blocks are made of.
struct Rows {
    tokens: usize,
    /// `[N, hidden]`
    x: SharedOutput,
    /// `[N, hidden]`
    block: SharedOutput,
}

impl Rows {
    fn run(
        &self,
        after: Option<&After>,
        (norm, eps): (&[f32], f32),
        before: Option<(&Before, SharedOutput)>,
        spent: &(dyn Fn(RowStep, Duration) + Sync),
    ) {
        let (tokens, hidden) = (self.tokens, norm.len());
        let gated_width = after.map_or(0, |after| after.gate_up_proj.outputs());
        let blocks = blocks(tokens, (2 * hidden + gated_width) * size_of::<f32>());
        // Threads work side by side on blocks of their own; on a single one together.
        let at_once = blocks.min(rayon::current_num_threads()) as u32;
        let timed = |step, work: &mut dyn FnMut()| {
            let started = Instant::now();
            work();
            spent(step, started.elapsed() / at_once);
        };
        (0..blocks).into_par_iter().for_each(|index| {
            let rows = tokens * index / blocks..tokens * (index + 1) / blocks;
            // SAFETY: blocks have rows of their own, and their buffers outlive this loop.
            let part = |of: SharedOutput, width| unsafe { of.part(rows.start * width, rows.len() * width) };
            let (x, block) = (part(self.x, hidden), part(self.block, hidden));
            if let Some(after) = after {
                let mut buffer = GATED.take();
                if buffer.len() < rows.len() * gated_width {
                    buffer.resize(rows.len() * gated_width, 0.0);
                }
                let gated = &mut buffer[..rows.len() * gated_width];
                let context = &after.context[rows.start * after.context_width..rows.end * after.context_width];
                timed(RowStep::OutputProjection, &mut || after.o_proj.run(context, block));
                timed(RowStep::Norm, &mut || norm_rows(x, block, after.norm, eps, true));
                timed(RowStep::GateUpProjection, &mut || after.gate_up_proj.run(block, gated));
                timed(RowStep::DownProjection, &mut || after.down_proj.run(gated, block));
                GATED.set(buffer);
            }
            timed(RowStep::Norm, &mut || norm_rows(x, block, norm, eps, after.is_some()));
            if let Some((Before { qkv_proj, cos, sin, heads }, qkv)) = before {
                let (qkv, half) = (part(qkv, heads.qkv_width()), heads.head_dim / 2);
                timed(RowStep::QkvProjection, &mut || qkv_proj.run(block, qkv));
                let (cos, sin) = (&cos[rows.start * half..rows.end * half], &sin[rows.start * half..rows.end * half]);
                timed(RowStep::Rotary, &mut || rotary::rotate_rows(qkv, cos, sin, *heads));
            }
        });
    }
}

thread_local! {
    /// What passed the gate, of one block. Taken, not borrowed: while it waits for others, a thread may begin another block.
    static GATED: RefCell<Vec<f32>> = RefCell::default();
}

/// How many blocks of like size `tokens` are shared out in.
fn blocks(tokens: usize, row_bytes: usize) -> usize {
    let blocks = tokens.div_ceil((BLOCK_BYTES / row_bytes).max(MIN_BLOCK_ROWS));
    let blocks = blocks.next_multiple_of(rayon::current_num_threads());
    if tokens / blocks.max(1) < MIN_BLOCK_ROWS { 1 } else { blocks }
}

fn values<'a>((storage, layout): &'a Locked<'_>, shape: &[usize]) -> Result<&'a [f32]> {
    let Storage::Cpu(storage) = &**storage else { bail!("row blocks: a tensor is not on the CPU") };
    if layout.dims() != shape {
        bail!("row blocks: expected {shape:?}, got {:?}", layout.dims());
    }
    contiguous(storage, layout, "row blocks")
}

/// Lends the values of a tensor out to be changed.
fn with_values_mut(tensor: &Tensor, work: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    tensor.inplace_op1(&WithValues(Cell::new(Some(work))))
}

struct WithValues<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for WithValues<F> {
    fn name(&self) -> &'static str {
        "row-blocks"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some(work) = self.0.take() else { bail!("row blocks: run twice") };
        work(contiguous_mut(storage, layout, "row blocks")?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use candle_core::{DType, Device};

    use super::*;
    use crate::kernels::cpu::linear::tests::random;
    use crate::kernels::cpu::{
        Arithmetic, add_rms_norm, pack_gate_up, pack_linear, packed_linear, packed_swiglu_into, rms_norm,
        rotary_embedding,
    };

    const HEADS: HeadLayout = HeadLayout { num_heads: 4, num_kv_heads: 2, head_dim: 8 };
    const HIDDEN: usize = 40;
    const INTERMEDIATE: usize = 70;
    const EPS: f64 = 1e-5;

    struct Weights {
        arithmetic: Arithmetic,
        o_proj: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        qkv_proj: Tensor,
        norms: [Tensor; 2],
    }

    impl Weights {
        fn new(arithmetic: Arithmetic) -> Self {
            let dtype = if arithmetic == Arithmetic::F16 { DType::F16 } else { DType::F32 };
            let weight = |rows, columns, seed| random(rows, columns, seed).to_dtype(dtype).unwrap();
            Self {
                arithmetic,
                o_proj: pack_linear(&weight(HIDDEN, HEADS.query_width(), 1)).unwrap(),
                gate_up_proj: pack_gate_up(&weight(2 * INTERMEDIATE, HIDDEN, 2)).unwrap(),
                down_proj: pack_linear(&weight(HIDDEN, INTERMEDIATE, 3)).unwrap(),
                qkv_proj: pack_linear(&weight(HEADS.qkv_width(), HIDDEN, 4)).unwrap(),
                norms: [5, 6].map(|seed| random(1, HIDDEN, seed).squeeze(0).unwrap()),
            }
        }

        fn matrix<'a>(&self, panels: &'a Tensor, outputs: usize, is_gate_up: bool) -> PackedMatrix<'a> {
            PackedMatrix { panels, outputs, is_gate_up, arithmetic: self.arithmetic }
        }

        /// One step over all tokens after another: `x` behind the layer, its norm, and rotated queries, keys and values.
        fn step_by_step(&self, x: &Tensor, context: &Tensor, angles: &Tensor) -> Vec<Vec<f32>> {
            let tokens = x.dim(0).unwrap();
            let product = |x: &Tensor, weight, outputs| packed_linear(x, weight, outputs, self.arithmetic).unwrap();
            let stream = Tensor::stack(&[x, &product(context, &self.o_proj, HIDDEN)], 0).unwrap();
            add_rms_norm(&stream, &self.norms[0], EPS).unwrap();
            let gated = Tensor::zeros((tokens, INTERMEDIATE), DType::F32, &Device::Cpu).unwrap();
            packed_swiglu_into(&stream.get(1).unwrap(), &self.gate_up_proj, &gated, self.arithmetic).unwrap();
            let down = product(&gated, &self.down_proj, HIDDEN);
            let stream = Tensor::stack(&[&stream.get(0).unwrap(), &down], 0).unwrap();
            add_rms_norm(&stream, &self.norms[1], EPS).unwrap();
            let qkv = product(&stream.get(1).unwrap(), &self.qkv_proj, HEADS.qkv_width());
            rotary_embedding(&qkv, angles, angles, HEADS).unwrap();
            [stream, qkv].map(|x| x.flatten_all().unwrap().to_vec1().unwrap()).into()
        }

        fn in_blocks(
            &self,
            x: &Tensor,
            context: &Tensor,
            angles: &Tensor,
            steps: &Mutex<Vec<RowStep>>,
        ) -> Vec<Vec<f32>> {
            let stream = Tensor::stack(&[x, x], 0).unwrap();
            let qkv = Tensor::zeros((x.dim(0).unwrap(), HEADS.qkv_width()), DType::F32, &Device::Cpu).unwrap();
            let between = BetweenAttentions {
                after: Some(AfterAttention {
                    context,
                    o_proj: self.matrix(&self.o_proj, HIDDEN, false),
                    norm: &self.norms[0],
                    gate_up_proj: self.matrix(&self.gate_up_proj, INTERMEDIATE, true),
                    down_proj: self.matrix(&self.down_proj, HIDDEN, false),
                }),
                norm: &self.norms[1],
                eps: EPS,
                before: Some(BeforeAttention {
                    qkv_proj: self.matrix(&self.qkv_proj, HEADS.qkv_width(), false),
                    qkv: &qkv,
                    cos: angles,
                    sin: angles,
                    heads: HEADS,
                }),
            };
            between.run(&stream, &|step, _| steps.lock().unwrap().push(step)).unwrap();
            [stream, qkv].map(|x| x.flatten_all().unwrap().to_vec1().unwrap()).into()
        }
    }

    #[test]
    fn blocks_of_rows_equal_steps_over_all_rows_to_the_bit() {
        for arithmetic in [Arithmetic::F32, Arithmetic::F16] {
            let weights = Weights::new(arithmetic);
            for (tokens, threads, blocks) in [(1, 1, 1), (95, 2, 1), (200, 2, 2), (333, 3, 3), (9000, 2, 4)] {
                let (x, context) = (random(tokens, HIDDEN, 7), random(tokens, HEADS.query_width(), 8));
                let angles = random(tokens, HEADS.head_dim / 2, 9);
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let steps = Mutex::new(Vec::new());
                let ours = pool.install(|| weights.in_blocks(&x, &context, &angles, &steps));
                assert!(ours == weights.step_by_step(&x, &context, &angles), "{arithmetic:?}, {tokens} tokens");
                let steps = steps.into_inner().unwrap();
                let count = |step| steps.iter().filter(|&&other| other == step).count();
                assert_eq!(count(RowStep::DownProjection), blocks, "{tokens} tokens on {threads} threads");
                assert_eq!(count(RowStep::Norm), 2 * blocks);
            }
        }
    }

    #[test]
    fn no_tokens_are_no_work() {
        let weights = Weights::new(Arithmetic::F32);
        let none = |width| Tensor::zeros((0, width), DType::F32, &Device::Cpu).unwrap();
        let steps = Mutex::new(Vec::new());
        let ours = weights.in_blocks(&none(HIDDEN), &none(HEADS.query_width()), &none(HEADS.head_dim / 2), &steps);
        assert!(ours.iter().all(Vec::is_empty) && steps.into_inner().unwrap().is_empty());
    }

    #[test]
    fn the_first_and_the_last_norm_stand_alone() {
        let (x, weight) = (random(130, HIDDEN, 1), random(1, HIDDEN, 2).squeeze(0).unwrap());
        let (ours, expected) = (Tensor::stack(&[&x, &x], 0).unwrap(), Tensor::stack(&[&x, &x], 0).unwrap());
        BetweenAttentions { after: None, norm: &weight, eps: EPS, before: None }.run(&ours, &|_, _| {}).unwrap();
        rms_norm(&expected, &weight, EPS).unwrap();
        assert_eq!(ours.to_vec3::<f32>().unwrap(), expected.to_vec3::<f32>().unwrap());
    }

    #[test]
    fn shapes_that_do_not_go_together_are_refused() {
        let weights = Weights::new(Arithmetic::F32);
        let stream = Tensor::zeros((2, 5, HIDDEN), DType::F32, &Device::Cpu).unwrap();
        let run = |context: &Tensor, norm: &Tensor, down_proj: &Tensor| {
            let after = AfterAttention {
                context,
                o_proj: weights.matrix(&weights.o_proj, HIDDEN, false),
                norm: &weights.norms[0],
                gate_up_proj: weights.matrix(&weights.gate_up_proj, INTERMEDIATE, true),
                down_proj: weights.matrix(down_proj, HIDDEN, false),
            };
            BetweenAttentions { after: Some(after), norm, eps: EPS, before: None }.run(&stream, &|_, _| {})
        };
        let (context, norm) = (random(5, HEADS.query_width(), 1), &weights.norms[1]);
        assert!(run(&context, norm, &weights.down_proj).is_ok());
        assert!(run(&random(4, HEADS.query_width(), 1), norm, &weights.down_proj).is_err(), "a row is missing");
        assert!(run(&context, &random(1, 3, 1).squeeze(0).unwrap(), &weights.down_proj).is_err(), "a short norm");
        assert!(run(&context, norm, &weights.o_proj).is_err(), "another weight");
    }
}
