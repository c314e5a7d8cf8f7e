//! Products of token rows with a weight, each output summed in one order whatever the number of rows.
//!
//! The weight is packed once into panels of 64 outputs, so that one row streams through memory once and many rows
//! reuse a panel from the core's cache. Every output is one chain of multiply-adds over ascending inputs: the number of
//! rows, their place in the batch and the number of threads cannot change a bit of it. Products in half precision, which
//! share the tasks and what becomes of the sums, are in [`super::half_product`].

use std::cell::RefCell;
use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, InplaceOp3, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::half_product::{HalfTask, HalfUnit, for_each_half_rows};
use super::output::SharedOutput;
use super::panels::{GATED, PANEL};
use super::simd::{Kernel, Level, Simd, dispatch_at, exp};
use super::{contiguous, contiguous_mut};

/// Rows of a register tile.
const TILE_ROWS: usize = 6;
/// Inputs of a panel that are used at a time, by all rows of a task: 128 KiB of f32, which stays in the core's cache.
const DEPTH_BLOCK: usize = 512;
/// Rows of a task: enough to pay for bringing a panel into the cache.
const TASK_ROWS: usize = 192;
/// From this many rows on a panel in half precision is widened once, and not for each register tile.
const WIDEN_ROWS: usize = 3 * TILE_ROWS;
/// With more register tiles than this a block is computed on for much longer than it takes to come from memory.
const MAX_PREFETCHING_TILES: usize = 12;
/// Inputs that share one turn of a register tile's loop.
const UNROLL: usize = 4;

/// What a product multiplies and adds in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arithmetic {
    /// In f32, with the weights' stored values: the precision of every result that is not said to be another.
    #[default]
    F32,
    /// Inputs are rounded to f16, and products added in f16 over 64 inputs at a time, these sums then in f32.
    ///
    /// A row's inputs are scaled by a power of two before, so that neither they nor their sums leave the range of f16. A CPU
    /// without AVX512-FP16 computes the same sums to the bit, slowly.
    F16,
}

/// `x [N, in]` times a transposed weight of `outputs` rows, packed by [`super::pack_linear`], to `[N, outputs]`.
///
/// Row n of the result depends on row n of `x` only, to the last bit.
pub fn packed_linear(x: &Tensor, packed: &Tensor, outputs: usize, arithmetic: Arithmetic) -> Result<Tensor> {
    x.apply_op2_no_bwd(packed, &Product::new(outputs, Epilogue::Store, arithmetic))
}

/// As [`packed_linear`], to `output [N, outputs]`.
pub fn packed_linear_into(x: &Tensor, packed: &Tensor, output: &Tensor, arithmetic: Arithmetic) -> Result<()> {
    output.inplace_op3(x, packed, &Product::new(output.dim(1)?, Epilogue::Store, arithmetic))
}

/// `silu(x·gateᵀ) · (x·upᵀ)` of `x [N, in]` and projections packed by [`super::pack_gate_up`], to `gated [N, I]`.
///
/// The activation is computed where the products still are in the core's cache. Rows are alone as in [`packed_linear`].
pub fn packed_swiglu_into(x: &Tensor, packed: &Tensor, gated: &Tensor, arithmetic: Arithmetic) -> Result<()> {
    gated.inplace_op3(x, packed, &Product::new(gated.dim(1)?, Epilogue::SwiGlu, arithmetic))
}

/// What becomes of a panel's sums.
#[derive(Clone, Copy, PartialEq)]
enum Epilogue {
    /// They are the output.
    Store,
    /// `silu` of the first half times the second half is the output.
    SwiGlu,
}

impl Epilogue {
    /// Outputs of a panel.
    fn width(self) -> usize {
        match self {
            Self::Store => PANEL,
            Self::SwiGlu => GATED,
        }
    }
}

struct Product {
    outputs: usize,
    epilogue: Epilogue,
    arithmetic: Arithmetic,
    level: Level,
    half_unit: HalfUnit,
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "packed-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        packed: &CpuStorage,
        packed_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, _) = self.check(x_layout, packed_layout)?;
        let mut output = vec![0f32; rows * self.outputs];
        self.run((x, x_layout), (packed, packed_layout), &mut output)?;
        Ok((CpuStorage::F32(output), Shape::from((rows, self.outputs))))
    }
}

impl InplaceOp3 for Product {
    fn name(&self) -> &'static str {
        "packed-linear"
    }

    fn cpu_fwd(
        &self,
        output: &mut CpuStorage,
        layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
        packed: &CpuStorage,
        packed_layout: &Layout,
    ) -> Result<()> {
        let (x, packed) = ((x, x_layout), (packed, packed_layout));
        let (rows, _) = self.check(x.1, packed.1)?;
        if layout.dims() != [rows, self.outputs] {
            bail!("packed linear: {rows} rows do not go to {:?}", layout.dims());
        }
        self.run(x, packed, contiguous_mut(output, layout, "packed linear's output")?)
    }
}

impl Product {
    fn new(outputs: usize, epilogue: Epilogue, arithmetic: Arithmetic) -> Self {
        Self { outputs, epilogue, arithmetic, level: Level::best(), half_unit: HalfUnit::best() }
    }

    /// Rows and depth, if the shapes go together.
    fn check(&self, x: &Layout, packed: &Layout) -> Result<(usize, usize)> {
        let panels = self.outputs.div_ceil(self.epilogue.width());
        match (x.dims(), packed.dims()) {
            (&[rows, depth], packed) if packed == [panels, depth, PANEL] && depth > 0 => Ok((rows, depth)),
            (x, packed) => bail!("packed linear: {x:?} does not go with {packed:?} of {} outputs", self.outputs),
        }
    }

    fn run(&self, x: (&CpuStorage, &Layout), packed: (&CpuStorage, &Layout), output: &mut [f32]) -> Result<()> {
        let (_, depth) = self.check(x.1, packed.1)?;
        let x = contiguous(x.0, x.1, "packed linear")?;
        let Some((begin, end)) = packed.1.contiguous_offsets() else {
            bail!("packed linear: expected a contiguous weight, got {:?}", packed.1)
        };
        match (packed.0, self.arithmetic) {
            (CpuStorage::F32(packed), Arithmetic::F32) => self.run_on(x, depth, &packed[begin..end], output),
            (CpuStorage::BF16(packed), Arithmetic::F32) => self.run_on(x, depth, &packed[begin..end], output),
            (CpuStorage::F16(packed), Arithmetic::F32) => self.run_on(x, depth, &packed[begin..end], output),
            (CpuStorage::F16(packed), Arithmetic::F16) => self.run_in_f16(x, depth, &packed[begin..end], output),
            (_, Arithmetic::F32) => bail!("packed linear: weights are f32, bf16 or f16"),
            (_, Arithmetic::F16) => bail!("packed linear: weights of a product in f16 are f16"),
        }
        Ok(())
    }

    fn run_on<W: Weight>(&self, x: &[f32], depth: usize, packed: &[W], output: &mut [f32]) {
        let output = SharedOutput::new(output);
        self.for_each_task(0..x.len() / depth, depth, packed, output, |place, panel, scratch| {
            dispatch_at(self.level, Task { place, x, panel, scratch });
        });
    }

    fn run_in_f16(&self, x: &[f32], depth: usize, packed: &[f16], output: &mut [f32]) {
        let output = SharedOutput::new(output);
        for_each_half_rows(self.level, x, depth, |x| {
            self.for_each_task(x.rows(), depth, packed, output, |place, panel, Scratch { widened, sums }| {
                let unit = self.half_unit;
                dispatch_at(self.level, HalfTask { place, x, panel, unit, widened, sums });
            });
        });
    }

    /// Runs `compute` for some rows and one panel at a time, on all threads.
    fn for_each_task<W: Sync>(
        &self,
        rows: Range<usize>,
        depth: usize,
        packed: &[W],
        output: SharedOutput,
        compute: impl Fn(Place, &[W], &mut Scratch) + Sync,
    ) {
        let width = self.epilogue.width();
        let panels = self.outputs.div_ceil(width);
        // Panel after panel for the same rows, which stay in the core's cache.
        (0..panels * rows.len().div_ceil(TASK_ROWS)).into_par_iter().for_each(|task| {
            let (panel, first_row) = (task % panels, rows.start + task / panels * TASK_ROWS);
            let place = Place {
                depth,
                rows: first_row..(first_row + TASK_ROWS).min(rows.end),
                columns: panel * width..((panel + 1) * width).min(self.outputs),
                epilogue: self.epilogue,
                output,
                outputs: self.outputs,
            };
            let panel = &packed[panel * depth * PANEL..][..depth * PANEL];
            SCRATCH.with_borrow_mut(|scratch| compute(place, panel, scratch));
        });
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// One thread's buffers.
#[derive(Default)]
struct Scratch {
    /// A block of a panel as f32 `[DEPTH_BLOCK, PANEL]`.
    widened: Vec<f32>,
    /// Sums over the blocks so far, of all rows of a task or, where there is one block only, of a register tile: `[_, PANEL]`.
    sums: Vec<f32>,
}

/// A stored weight that is computed on as f32.
trait Weight: Copy + Send + Sync {
    /// Whether loading costs more than loading f32.
    const NARROW: bool;

    /// # Safety
    /// `S::LANES` values from `src` on can be read.
    unsafe fn load<S: Simd>(simd: S, src: *const Self) -> S::Vector;
}

impl Weight for f32 {
    const NARROW: bool = false;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, src: *const Self) -> S::Vector {
        // SAFETY: the caller vouches for the values.
        unsafe { simd.load(src) }
    }
}

impl Weight for bf16 {
    const NARROW: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, src: *const Self) -> S::Vector {
        // SAFETY: the caller vouches for the values.
        unsafe { simd.load_bf16(src) }
    }
}

impl Weight for f16 {
    const NARROW: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, src: *const Self) -> S::Vector {
        // SAFETY: the caller vouches for the values.
        unsafe { simd.load_f16(src) }
    }
}

/// Some rows times one panel.
struct Task<'a, W> {
    place: Place,
    /// `[N, depth]`
    x: &'a [f32],
    /// `[depth, PANEL]`
    panel: &'a [W],
    scratch: &'a mut Scratch,
}

/// Which rows of the input, and which part of the output, a task works on.
pub(super) struct Place {
    pub(super) depth: usize,
    pub(super) rows: Range<usize>,
    /// The panel's columns of the output; the last panel may have fewer than others.
    columns: Range<usize>,
    epilogue: Epilogue,
    /// `[N, outputs]`
    output: SharedOutput,
    outputs: usize,
}

impl<W: Weight> Kernel for Task<'_, W> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Task { place, x, panel, scratch: Scratch { widened, sums } } = self;
        // Blocks of like size: a short last one would be all loads and stores of sums.
        let block_depth = place.depth.div_ceil(place.depth.div_ceil(DEPTH_BLOCK));
        let rows_of_sums = if block_depth < place.depth { place.rows.len() } else { TILE_ROWS };
        if sums.len() < rows_of_sums * PANEL {
            sums.resize(rows_of_sums * PANEL, 0.0);
        }
        for first in (0..place.depth).step_by(block_depth) {
            let end = (first + block_depth).min(place.depth);
            let block = &panel[first * PANEL..end * PANEL];
            if W::NARROW && place.rows.len() >= WIDEN_ROWS {
                widened.resize(DEPTH_BLOCK * PANEL, 0.0);
                widen(simd, block, widened);
                place.add_products(simd, x, first, &widened[..block.len()], sums);
            } else {
                place.add_products(simd, x, first, block, sums);
            }
        }
    }
}

/// Copies whole rows of a panel as f32.
#[inline(always)]
fn widen<S: Simd, W: Weight>(simd: S, block: &[W], widened: &mut [f32]) {
    for (wide, narrow) in widened.chunks_exact_mut(PANEL).zip(block.chunks_exact(PANEL)) {
        for column in (0..PANEL).step_by(S::LANES) {
            // SAFETY: both rows have PANEL values, which is a multiple of every vector's length.
            unsafe { simd.store(wide.as_mut_ptr().add(column), W::load(simd, narrow.as_ptr().add(column))) };
        }
    }
}

impl Place {
    /// Adds the products with one block of the panel's depth, from input `first` on. The first block starts the sums, the
    /// last brings them to the output.
    #[inline(always)]
    fn add_products<S: Simd, W: Weight>(&self, simd: S, x: &[f32], first: usize, block: &[W], sums: &mut [f32]) {
        let is_last = first + block.len() / PANEL == self.depth;
        let is_only = is_last && first == 0;
        let tiles = self.rows.len().div_ceil(TILE_ROWS);
        let mut row = self.rows.start;
        for tile in 0..tiles {
            // Tiles of like size: the last rows alone would wait for each other's sums.
            let tile_rows = (self.rows.end - row).div_ceil(tiles - tile);
            let place = if is_only { 0 } else { row - self.rows.start };
            let sums = &mut sums[place * PANEL..][..tile_rows * PANEL];
            if first == 0 {
                sums.fill(0.0);
            }
            if is_last {
                self.prefetch_output(simd, row, tile_rows);
            }
            let x = &x[row * self.depth + first..];
            let ahead = if tiles <= MAX_PREFETCHING_TILES { Ahead::share(block, tile, tiles) } else { Ahead::NOTHING };
            match tile_rows {
                1 => tile_product::<S, W, 1>(simd, x, self.depth, block, ahead, sums),
                2 => tile_product::<S, W, 2>(simd, x, self.depth, block, ahead, sums),
                3 => tile_product::<S, W, 3>(simd, x, self.depth, block, ahead, sums),
                4 => tile_product::<S, W, 4>(simd, x, self.depth, block, ahead, sums),
                5 => tile_product::<S, W, 5>(simd, x, self.depth, block, ahead, sums),
                _ => tile_product::<S, W, 6>(simd, x, self.depth, block, ahead, sums),
            }
            if is_last {
                self.finish(simd, row, sums);
            }
            row += tile_rows;
        }
    }

    /// Asks for the lines of the output that [`Place::finish`] will write for `rows` rows from `row` on: they lie in as many pages, and
    /// come while the products are computed.
    #[inline(always)]
    pub(super) fn prefetch_output<S: Simd>(&self, simd: S, row: usize, rows: usize) {
        for row in row..row + rows {
            let first = self.output.address(row * self.outputs + self.columns.start).cast::<u8>();
            for line in (0..self.columns.len() * size_of::<f32>()).step_by(Ahead::LINE_BYTES) {
                simd.prefetch_for_write(first.wrapping_add(line));
            }
        }
    }

    /// Brings the sums of the rows from `row` on to the output.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(&self, simd: S, row: usize, sums: &[f32]) {
        let width = self.columns.len();
        for (i, sums) in sums.chunks_exact(PANEL).enumerate() {
            // SAFETY: no other task has these columns of these rows, and no two of these parts are alive at a time.
            let output = unsafe { self.output.part((row + i) * self.outputs + self.columns.start, width) };
            match self.epilogue {
                Epilogue::Store => output.copy_from_slice(&sums[..width]),
                Epilogue::SwiGlu => {
                    let (gate, up) = sums.split_at(GATED);
                    let mut gated = [0f32; GATED];
                    for ((gated, &gate), &up) in gated.iter_mut().zip(gate).zip(up) {
                        *gated = gate / (1.0 + exp(simd, -gate)) * up;
                    }
                    output.copy_from_slice(&gated[..width]);
                }
            }
        }
    }
}

/// Weights to bring into the core's cache while a register tile is computed.
///
/// With few rows, as in generation, a product waits for memory: the first tile reads a block from there, the others from the
/// cache, and memory would be idle meanwhile. So they ask for the block that follows, which as a rule is this thread's next.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    from: *const u8,
    /// Cache lines for each turn of the loop over inputs.
    lines: usize,
}

impl Ahead {
    const NOTHING: Self = Self { from: std::ptr::null(), lines: 0 };
    pub(super) const LINE_BYTES: usize = 64;

    /// The part of what follows `block` that tile number `tile` of `tiles` has to ask for.
    fn share<W>(block: &[W], tile: usize, tiles: usize) -> Self {
        let Some(number) = tile.checked_sub(1) else { return Self::NOTHING };
        let turns = (block.len() / PANEL / UNROLL).max(1);
        let lines = size_of_val(block).div_ceil(Self::LINE_BYTES * (tiles - 1) * turns);
        // Beyond the weight's end nothing is read: an address is all that this is.
        let from = block.as_ptr_range().end.cast::<u8>().wrapping_add(number * turns * lines * Self::LINE_BYTES);
        Self { from, lines }
    }
}

/// `sums = sums + x·block` for R rows of `x`, `block [depth, PANEL]` and `sums [R, PANEL]`.
#[inline(always)]
fn tile_product<S: Simd, W: Weight, const R: usize>(
    simd: S,
    x: &[f32],
    x_stride: usize,
    block: &[W],
    ahead: Ahead,
    sums: &mut [f32],
) {
    let depth = block.len() / PANEL;
    assert!(block.len().is_multiple_of(PANEL) && x.len() >= (R - 1) * x_stride + depth && sums.len() >= R * PANEL);
    let mut column = 0;
    while column < PANEL {
        // SAFETY: R rows of `depth` values are in `x`, `depth` rows of PANEL values in `block` and R in `sums`, by the
        // assertion; panels are a multiple of both widths below.
        unsafe {
            let (block, sums) = (block.as_ptr().add(column), sums.as_mut_ptr().add(column));
            let ahead = if column == 0 { ahead } else { Ahead::NOTHING };
            if S::TILE_VECTORS >= 4 {
                panel::<S, W, R, 4>(simd, x.as_ptr(), x_stride, depth, block, ahead, sums);
                column += 4 * S::LANES;
            } else {
                panel::<S, W, R, 2>(simd, x.as_ptr(), x_stride, depth, block, ahead, sums);
                column += 2 * S::LANES;
            }
        }
    }
}

/// One register tile: R rows, V vectors of columns.
///
/// # Safety
/// `x` has R rows of `depth` values, `block` `depth` rows and `sums` R rows of V vectors, both `PANEL` apart.
#[inline(always)]
unsafe fn panel<S: Simd, W: Weight, const R: usize, const V: usize>(
    simd: S,
    x: *const f32,
    x_stride: usize,
    depth: usize,
    block: *const W,
    ahead: Ahead,
    sums: *mut f32,
) {
    // SAFETY: the caller vouches for all three.
    unsafe {
        let mut tile = [[simd.splat(0.0); V]; R];
        for (i, row) in tile.iter_mut().enumerate() {
            for (j, sum) in row.iter_mut().enumerate() {
                *sum = simd.load(sums.add(i * PANEL + j * S::LANES));
            }
        }
        let mut k = 0;
        let mut line = ahead.from;
        while k + UNROLL <= depth {
            for _ in 0..ahead.lines {
                simd.prefetch(line);
                line = line.wrapping_add(Ahead::LINE_BYTES);
            }
            for step in 0..UNROLL {
                multiply_add::<S, W, R, V>(simd, x.add(k + step), x_stride, block.add((k + step) * PANEL), &mut tile);
            }
            k += UNROLL;
        }
        while k < depth {
            multiply_add::<S, W, R, V>(simd, x.add(k), x_stride, block.add(k * PANEL), &mut tile);
            k += 1;
        }
        for (i, row) in tile.iter().enumerate() {
            for (j, &sum) in row.iter().enumerate() {
                simd.store(sums.add(i * PANEL + j * S::LANES), sum);
            }
        }
    }
}

/// One input's part of a register tile's sums.
///
/// # Safety
/// `x` has R values `x_stride` apart, `block` V vectors.
#[inline(always)]
unsafe fn multiply_add<S: Simd, W: Weight, const R: usize, const V: usize>(
    simd: S,
    x: *const f32,
    x_stride: usize,
    block: *const W,
    tile: &mut [[S::Vector; V]; R],
) {
    // SAFETY: the caller vouches for both.
    unsafe {
        let mut weights = [simd.splat(0.0); V];
        for (j, weight) in weights.iter_mut().enumerate() {
            *weight = W::load(simd, block.add(j * S::LANES));
        }
        for (i, row) in tile.iter_mut().enumerate() {
            let factor = simd.splat(*x.add(i * x_stride));
            for (sum, weight) in row.iter_mut().zip(weights) {
                *sum = simd.mul_add(factor, weight, *sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::kernels::{pack_gate_up, pack_linear};

    /// Uniform values in [-1, 1) that depend on the seed only.
    fn random(rows: usize, columns: usize, seed: u64) -> Tensor {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let values: Vec<f32> = (0..rows * columns).map(|_| next()).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    fn rows(x: &Tensor) -> Vec<Vec<f32>> {
        x.to_vec2().unwrap()
    }

    #[test]
    fn products_equal_f64_products_at_every_level() {
        for (n, depth, outputs) in [(1, 1, 1), (5, 7, 63), (6, 512, 64), (20, 513, 65), (200, 1300, 130), (0, 8, 8)] {
            let x = random(n, depth, 1);
            let exact = random(outputs, depth, 2);
            let brief = exact.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
            let half = exact.to_dtype(DType::F16).unwrap().to_dtype(DType::F32).unwrap();
            for (weight, dtype) in [(exact, DType::F32), (brief, DType::BF16), (half, DType::F16)] {
                let packed = pack_linear(&weight).unwrap();
                assert_eq!(packed.dtype(), dtype);
                let expected = x.to_dtype(DType::F64).unwrap();
                let expected = expected.matmul(&weight.to_dtype(DType::F64).unwrap().t().unwrap()).unwrap();
                let expected = expected.to_vec2::<f64>().unwrap();
                for level in Level::available() {
                    let ours = rows(
                        &x.apply_op2_no_bwd(
                            &packed,
                            &Product { level, ..Product::new(outputs, Epilogue::Store, Arithmetic::F32) },
                        )
                        .unwrap(),
                    );
                    for (ours, expected) in ours.iter().flatten().zip(expected.iter().flatten()) {
                        let tolerance = 1e-6 * (depth as f64).sqrt() * 3.0;
                        assert!((f64::from(*ours) - expected).abs() < tolerance, "{level:?}: {ours} {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_to_the_bit_in_any_company() {
        let f32_from = |dtype| random(150, 700, 4).to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
        let weights = [DType::F32, DType::BF16, DType::F16].map(|dtype| (f32_from(dtype), Arithmetic::F32));
        let half = (random(150, 700, 4).to_dtype(DType::F16).unwrap(), Arithmetic::F16);
        for (weight, arithmetic) in weights.into_iter().chain([half]) {
            let x = random(400, 700, 3);
            let packed = pack_linear(&weight).unwrap();
            let all = rows(&packed_linear(&x, &packed, 150, arithmetic).unwrap());
            for (first, count) in [(0, 1), (17, 1), (100, 2), (3, 7), (50, 17), (51, 18), (190, 64), (10, 380)] {
                let some = x.narrow(0, first, count).unwrap();
                let some = rows(&packed_linear(&some, &packed, 150, arithmetic).unwrap());
                assert_eq!(some, all[first..first + count], "rows {first} and {count} on");
            }
        }
    }

    #[test]
    fn gated_rows_are_the_same_in_any_company_and_alike_at_every_level() {
        let x = random(250, 1100, 3);
        let packed = pack_gate_up(&random(2 * 70, 1100, 4)).unwrap();
        let at = |level, first: usize, count: usize| {
            let gated = Tensor::zeros((count, 70), DType::F32, &Device::Cpu).unwrap();
            let product = Product { level, ..Product::new(70, Epilogue::SwiGlu, Arithmetic::F32) };
            gated.inplace_op3(&x.narrow(0, first, count).unwrap(), &packed, &product).unwrap();
            rows(&gated)
        };
        let portable = at(Level::Portable, 0, 250);
        for level in Level::available() {
            let all = at(level, 0, 250);
            for (first, count) in [(0, 1), (17, 5), (100, 18), (40, 200)] {
                assert_eq!(at(level, first, count), all[first..first + count], "{level:?}");
            }
            for (ours, portable) in all.iter().flatten().zip(portable.iter().flatten()) {
                assert!((ours - portable).abs() < 2e-4 * portable.abs().max(1.0), "{level:?}: {ours} {portable}");
            }
        }
    }

    #[test]
    fn a_weight_of_another_shape_is_refused() {
        let packed = pack_linear(&random(100, 30, 1)).unwrap();
        assert!(packed_linear(&random(3, 31, 1), &packed, 100, Arithmetic::F32).is_err());
        assert!(packed_linear(&random(3, 30, 1), &packed, 200, Arithmetic::F32).is_err());
        assert!(packed_linear(&random(3, 30, 1), &packed, 100, Arithmetic::F16).is_err(), "an f32 weight in f16");
    }

    #[test]
    fn products_in_f16_are_near_those_in_f32_and_the_same_on_every_cpu() {
        let (n, depth, outputs) = (30, 1000, 100);
        // Rows of any size: what leaves f16's range is scaled into it.
        let scales =
            Tensor::from_vec((0..n).map(|row| 10f32.powi(row - 15)).collect::<Vec<_>>(), (30, 1), &Device::Cpu);
        let x = random(30, depth, 5).broadcast_mul(&scales.unwrap()).unwrap();
        let weight = random(outputs, depth, 6).to_dtype(DType::F16).unwrap();
        let exact =
            packed_linear(&x, &pack_linear(&weight.to_dtype(DType::F32).unwrap()).unwrap(), outputs, Arithmetic::F32);
        let exact = rows(&exact.unwrap());
        let packed = pack_linear(&weight).unwrap();
        let at = |level, half_unit| {
            let product = Product { level, half_unit, ..Product::new(outputs, Epilogue::Store, Arithmetic::F16) };
            rows(&x.apply_op2_no_bwd(&packed, &product).unwrap())
        };
        let emulated = at(Level::Portable, HalfUnit::Emulated);
        for level in Level::available() {
            assert_eq!(at(level, HalfUnit::Emulated), emulated, "{level:?}");
        }
        for unit in HalfUnit::available() {
            assert_eq!(at(Level::best(), unit), emulated, "{unit:?}");
        }
        for (ours, exact) in emulated.iter().zip(&exact) {
            let size = (exact.iter().map(|x| x * x).sum::<f32>() / outputs as f32).sqrt();
            let error = ours.iter().zip(exact).map(|(x, y)| (x - y) * (x - y)).sum::<f32>() / outputs as f32;
            assert!(error.sqrt() < 2e-3 * size, "{} of {size}", error.sqrt());
        }
    }

    #[test]
    fn what_f16_cannot_hold_is_refused_or_not_a_number() {
        let weight = (random(64, 10, 1) * 20.0).unwrap().to_dtype(DType::F16).unwrap();
        assert!(pack_linear(&weight).unwrap_err().to_string().contains("beyond 16"));
        let packed = pack_linear(&random(64, 10, 1).to_dtype(DType::F16).unwrap()).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let x = Tensor::from_vec([vec![1f32; 10], vec![bad; 10]].concat(), (2, 10), &Device::Cpu).unwrap();
            let y = rows(&packed_linear(&x, &packed, 64, Arithmetic::F16).unwrap());
            assert!(y[0].iter().all(|y| y.is_finite()) && y[1].iter().all(|y| y.is_nan()));
        }
    }
}
