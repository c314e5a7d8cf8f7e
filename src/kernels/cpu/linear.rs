//! Products of token rows with a weight, each output summed in one order whatever the number of rows.
//!
//! The weight is packed once into panels of 64 outputs, so that one row streams through memory once and many rows
//! reuse a panel from the core's cache. Every output is one chain of multiply-adds over ascending inputs: the number of
//! rows, their place in the batch and the number of threads cannot change a bit of it.

use std::cell::RefCell;
use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType, bail};
use half::bf16;
use rayon::prelude::*;

use super::contiguous;
use super::output::SharedOutput;
use super::simd::{Kernel, Level, Simd, dispatch_at};

/// Outputs of a panel.
const PANEL: usize = 64;
/// Rows of a register tile.
const TILE_ROWS: usize = 6;
/// Inputs of a panel that are used at a time, by all rows of a task: 128 KiB of f32, which stays in the core's cache.
const DEPTH_BLOCK: usize = 512;
/// Rows of a task: enough to pay for bringing a panel into the cache.
const TASK_ROWS: usize = 192;
/// From this many rows on a bf16 panel is widened once, and not for each register tile.
const WIDEN_ROWS: usize = 3 * TILE_ROWS;

/// Packs `weight [out, in]` for [`packed_linear`]: `[⌈out/64⌉, in, 64]`, the last panel filled up with zeros.
///
/// A weight whose every value is a bf16 number is kept as bf16, which halves what a product reads and changes no result.
pub fn pack_linear(weight: &Tensor) -> Result<Tensor> {
    let (outputs, depth) = weight.dims2()?;
    let values = weight.flatten_all()?.to_vec1::<f32>()?;
    if values.par_iter().all(|value| value.to_bits() & 0xffff == 0) {
        pack(&values, outputs, depth, weight, bf16::from_f32)
    } else {
        pack(&values, outputs, depth, weight, |value| value)
    }
}

fn pack<W: WithDType + Send>(
    values: &[f32],
    outputs: usize,
    depth: usize,
    weight: &Tensor,
    convert: fn(f32) -> W,
) -> Result<Tensor> {
    let panels = outputs.div_ceil(PANEL);
    let mut packed = vec![convert(0.0); panels * depth * PANEL];
    packed.par_chunks_mut((depth * PANEL).max(1)).zip(values.par_chunks((PANEL * depth).max(1))).for_each(
        |(panel, rows)| {
            for (column, row) in rows.chunks_exact(depth).enumerate() {
                for (inputs, &value) in panel.chunks_exact_mut(PANEL).zip(row) {
                    inputs[column] = convert(value);
                }
            }
        },
    );
    Tensor::from_vec(packed, (panels, depth, PANEL), weight.device())
}

/// `x [N, in]` times a transposed weight of `outputs` rows, packed by [`pack_linear`], to `[N, outputs]`.
///
/// Row n of the result depends on row n of `x` only, to the last bit.
pub fn packed_linear(x: &Tensor, packed: &Tensor, outputs: usize) -> Result<Tensor> {
    x.apply_op2_no_bwd(packed, &PackedLinear { outputs, level: Level::best() })
}

struct PackedLinear {
    outputs: usize,
    level: Level,
}

impl CustomOp2 for PackedLinear {
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
        let panels = self.outputs.div_ceil(PANEL);
        let (rows, depth) = match (x_layout.dims(), packed_layout.dims()) {
            (&[rows, depth], packed) if packed == [panels, depth, PANEL] && depth > 0 => (rows, depth),
            (x, packed) => bail!("packed linear: {x:?} does not go with {packed:?} of {} outputs", self.outputs),
        };
        let x = contiguous(x, x_layout, "packed linear")?;
        let Some((begin, end)) = packed_layout.contiguous_offsets() else {
            bail!("packed linear: expected a contiguous weight, got {packed_layout:?}")
        };
        let mut output = vec![0f32; rows * self.outputs];
        match packed {
            CpuStorage::F32(packed) => self.run(x, rows, depth, &packed[begin..end], &mut output),
            CpuStorage::BF16(packed) => self.run(x, rows, depth, &packed[begin..end], &mut output),
            _ => bail!("packed linear: weights are f32 or bf16"),
        }
        Ok((CpuStorage::F32(output), Shape::from((rows, self.outputs))))
    }
}

impl PackedLinear {
    fn run<W: Weight>(&self, x: &[f32], rows: usize, depth: usize, packed: &[W], output: &mut [f32]) {
        let output = SharedOutput::new(output);
        let panels = self.outputs.div_ceil(PANEL);
        let chunks = rows.div_ceil(TASK_ROWS);
        (0..panels * chunks).into_par_iter().for_each(|task| {
            let (panel, first_row) = (task / chunks, task % chunks * TASK_ROWS);
            SCRATCH.with_borrow_mut(|widened| {
                let place = Place {
                    x,
                    depth,
                    rows: first_row..(first_row + TASK_ROWS).min(rows),
                    columns: panel * PANEL..((panel + 1) * PANEL).min(self.outputs),
                    output,
                    outputs: self.outputs,
                };
                let panel = &packed[panel * depth * PANEL..][..depth * PANEL];
                dispatch_at(self.level, Task { place, panel, widened });
            });
        });
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = RefCell::default();
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

/// Some rows times one panel.
struct Task<'a, W> {
    place: Place<'a>,
    /// `[depth, PANEL]`
    panel: &'a [W],
    widened: &'a mut Vec<f32>,
}

/// Which rows of the input, and which part of the output, a task works on.
struct Place<'a> {
    /// `[N, depth]`
    x: &'a [f32],
    depth: usize,
    rows: Range<usize>,
    /// The panel's columns of the output; the last panel has fewer than `PANEL`.
    columns: Range<usize>,
    /// `[N, outputs]`
    output: SharedOutput,
    outputs: usize,
}

impl<W: Weight> Kernel for Task<'_, W> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Task { place, panel, widened } = self;
        for first in (0..place.depth).step_by(DEPTH_BLOCK) {
            let end = (first + DEPTH_BLOCK).min(place.depth);
            let block = &panel[first * PANEL..end * PANEL];
            if W::NARROW && place.rows.len() >= WIDEN_ROWS {
                widened.resize(DEPTH_BLOCK * PANEL, 0.0);
                widen(simd, block, widened);
                place.add_products(simd, first, &widened[..block.len()]);
            } else {
                place.add_products(simd, first, block);
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

impl Place<'_> {
    /// Adds the products with one block of the panel's depth, from input `first` on; the first block starts the sums.
    #[inline(always)]
    fn add_products<S: Simd, W: Weight>(&self, simd: S, first: usize, block: &[W]) {
        let width = self.columns.len();
        for row in self.rows.clone().step_by(TILE_ROWS) {
            let tile_rows = TILE_ROWS.min(self.rows.end - row);
            // SAFETY: no other task has these columns of these rows, and no two of these parts are alive at a time.
            let output = |i: usize| unsafe { self.output.part((row + i) * self.outputs + self.columns.start, width) };
            let mut tile = [[0f32; PANEL]; TILE_ROWS];
            if first > 0 {
                for (i, tile) in tile.iter_mut().enumerate().take(tile_rows) {
                    tile[..width].copy_from_slice(output(i));
                }
            }
            let x = &self.x[row * self.depth + first..];
            match tile_rows {
                1 => tile_product::<S, W, 1>(simd, x, self.depth, block, &mut tile),
                2 => tile_product::<S, W, 2>(simd, x, self.depth, block, &mut tile),
                3 => tile_product::<S, W, 3>(simd, x, self.depth, block, &mut tile),
                4 => tile_product::<S, W, 4>(simd, x, self.depth, block, &mut tile),
                5 => tile_product::<S, W, 5>(simd, x, self.depth, block, &mut tile),
                _ => tile_product::<S, W, 6>(simd, x, self.depth, block, &mut tile),
            }
            for (i, tile) in tile.iter().enumerate().take(tile_rows) {
                output(i).copy_from_slice(&tile[..width]);
            }
        }
    }
}

/// `tile = tile + x·block` for R rows of `x` and `block [depth, PANEL]`.
#[inline(always)]
fn tile_product<S: Simd, W: Weight, const R: usize>(
    simd: S,
    x: &[f32],
    x_stride: usize,
    block: &[W],
    tile: &mut [[f32; PANEL]; TILE_ROWS],
) {
    let depth = block.len() / PANEL;
    assert!(R <= TILE_ROWS && block.len().is_multiple_of(PANEL) && x.len() >= (R - 1) * x_stride + depth);
    let mut column = 0;
    while column < PANEL {
        // SAFETY: R rows of `depth` values are in `x`, `depth` rows of PANEL values in `block`, by the assertion; panels are
        // a multiple of both widths below.
        unsafe {
            if S::TILE_VECTORS >= 4 {
                panel::<S, W, R, 4>(simd, x.as_ptr(), x_stride, depth, block.as_ptr().add(column), tile, column);
                column += 4 * S::LANES;
            } else {
                panel::<S, W, R, 2>(simd, x.as_ptr(), x_stride, depth, block.as_ptr().add(column), tile, column);
                column += 2 * S::LANES;
            }
        }
    }
}

/// One register tile: R rows, V vectors of columns from `column` on.
///
/// # Safety
/// `x` has R rows of `depth` values, `block` `depth` rows of V vectors `PANEL` apart; `column` and V vectors end in the panel.
#[inline(always)]
unsafe fn panel<S: Simd, W: Weight, const R: usize, const V: usize>(
    simd: S,
    x: *const f32,
    x_stride: usize,
    depth: usize,
    block: *const W,
    tile: &mut [[f32; PANEL]; TILE_ROWS],
    column: usize,
) {
    // SAFETY: the caller vouches for all three.
    unsafe {
        let mut sums = [[simd.splat(0.0); V]; R];
        for (i, row) in sums.iter_mut().enumerate() {
            for (j, sum) in row.iter_mut().enumerate() {
                *sum = simd.load(tile[i].as_ptr().add(column + j * S::LANES));
            }
        }
        for k in 0..depth {
            let mut weights = [simd.splat(0.0); V];
            for (j, weight) in weights.iter_mut().enumerate() {
                *weight = W::load(simd, block.add(k * PANEL + j * S::LANES));
            }
            for (i, row) in sums.iter_mut().enumerate() {
                let factor = simd.splat(*x.add(i * x_stride + k));
                for (sum, weight) in row.iter_mut().zip(weights) {
                    *sum = simd.mul_add(factor, weight, *sum);
                }
            }
        }
        for (i, row) in sums.iter().enumerate() {
            for (j, &sum) in row.iter().enumerate() {
                simd.store(tile[i].as_mut_ptr().add(column + j * S::LANES), sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

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
            for (weight, dtype) in [(exact, DType::F32), (brief, DType::BF16)] {
                let packed = pack_linear(&weight).unwrap();
                assert_eq!(packed.dtype(), dtype);
                let expected = x.to_dtype(DType::F64).unwrap();
                let expected = expected.matmul(&weight.to_dtype(DType::F64).unwrap().t().unwrap()).unwrap();
                let expected = expected.to_vec2::<f64>().unwrap();
                for level in Level::available() {
                    let ours = rows(&x.apply_op2_no_bwd(&packed, &PackedLinear { outputs, level }).unwrap());
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
        for narrow in [false, true] {
            let x = random(400, 700, 3);
            let mut weight = random(150, 700, 4);
            if narrow {
                weight = weight.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
            }
            let packed = pack_linear(&weight).unwrap();
            let all = rows(&packed_linear(&x, &packed, 150).unwrap());
            for (first, count) in [(0, 1), (17, 1), (100, 2), (3, 7), (50, 17), (51, 18), (190, 64), (10, 380)] {
                let some = rows(&packed_linear(&x.narrow(0, first, count).unwrap(), &packed, 150).unwrap());
                assert_eq!(some, all[first..first + count], "rows {first} and {count} on");
            }
        }
    }

    #[test]
    fn a_weight_of_another_shape_is_refused() {
        let packed = pack_linear(&random(100, 30, 1)).unwrap();
        assert!(packed_linear(&random(3, 31, 1), &packed, 100).is_err());
        assert!(packed_linear(&random(3, 30, 1), &packed, 200).is_err());
    }
}
