//! Products of token rows with a weight, each output summed in one order whatever the number of rows.
//!
//! The weight is packed once into panels of 64 outputs, so that one row streams through memory once and many rows
//! reuse a panel from the core's cache. Every output is one chain of multiply-adds over ascending inputs: the number of
//! rows, their place in the batch and the number of threads cannot change a bit of it. Products in half precision, which
//! share the tasks and what becomes of the sums, are in [`super::half_product`].

use std::cell::RefCell;
use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, InplaceOp3, Layout, Result, Shape, Storage, StorageRef, Tensor, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::half_product::{GROUP_INPUTS, HalfTask, HalfUnit, for_each_half_rows};
use super::output::{Epilogue, Place, SharedOutput};
use super::panels::PANEL;
use super::simd::{Level, dispatch_at};
use super::tile::{Scratch, Task, Weight};
use super::{contiguous, contiguous_mut};

/// Rows of a task: enough to pay for bringing a panel into the cache.
const TASK_ROWS: usize = 192;

/// What a product multiplies and adds in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arithmetic {
    /// In f32, with the weights' stored values: the precision of every result that is not said to be another.
    #[default]
    F32,
    /// Inputs are rounded to f16, and products added in f16 over 128 at a time, these sums then in f32.
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

/// A packed weight, and what becomes of products with it.
#[derive(Clone, Copy)]
pub struct PackedMatrix<'a> {
    /// As [`super::pack_linear`] or, for a gate, [`super::pack_gate_up`] packs a weight.
    pub panels: &'a Tensor,
    /// Outputs of a row; of a gate, after the activation.
    pub outputs: usize,
    /// Whether products are a gate and what passes it.
    pub is_gate_up: bool,
    /// What products are computed in.
    pub arithmetic: Arithmetic,
}

impl<'a> PackedMatrix<'a> {
    /// The weight's values for as long as they are in use.
    pub(super) fn lock(&self) -> LockedMatrix<'a> {
        let (storage, layout) = self.panels.storage_and_layout();
        let epilogue = if self.is_gate_up { Epilogue::SwiGlu } else { Epilogue::Store };
        LockedMatrix { storage, layout, product: Product::new(self.outputs, epilogue, self.arithmetic) }
    }
}

/// A packed weight that nobody writes to.
pub(super) struct LockedMatrix<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
    product: Product,
}

impl LockedMatrix<'_> {
    /// The product with it, for rows of `inputs` values.
    pub(super) fn product(&self, inputs: usize) -> Result<RowProduct<'_>> {
        let Storage::Cpu(storage) = &*self.storage else { bail!("packed linear: the weight is not on the CPU") };
        self.product.with((storage, self.layout), inputs)
    }
}

/// A product of any rows with one weight.
pub(super) struct RowProduct<'a> {
    product: &'a Product,
    depth: usize,
    packed: PackedValues<'a>,
}

enum PackedValues<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    /// Multiplied in f16, too.
    InF16(&'a [f16]),
}

impl RowProduct<'_> {
    /// Outputs of a row.
    pub(super) fn outputs(&self) -> usize {
        self.product.outputs
    }

    /// The product with `x [N, depth]`, to `output [N, outputs]`.
    pub(super) fn run(&self, x: &[f32], output: &mut [f32]) {
        assert_eq!(x.len() / self.depth * self.product.outputs, output.len(), "as many rows on both sides");
        let output = SharedOutput::new(output);
        match self.packed {
            PackedValues::F32(packed) => self.product.run_on(x, self.depth, packed, output),
            PackedValues::Bf16(packed) => self.product.run_on(x, self.depth, packed, output),
            PackedValues::F16(packed) => self.product.run_on(x, self.depth, packed, output),
            PackedValues::InF16(packed) => self.product.run_in_f16(x, self.depth, packed, output),
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
        let (rows, _) = x_layout.shape().dims2()?;
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
        let (rows, _) = x.1.shape().dims2()?;
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

    fn run(&self, x: (&CpuStorage, &Layout), packed: (&CpuStorage, &Layout), output: &mut [f32]) -> Result<()> {
        let product = self.with(packed, x.1.shape().dims2()?.1)?;
        product.run(contiguous(x.0, x.1, "packed linear")?, output);
        Ok(())
    }

    /// Inputs of a packed weight for rows of `depth` inputs.
    fn packed_inputs(&self, depth: usize) -> usize {
        match self.arithmetic {
            Arithmetic::F32 => depth,
            Arithmetic::F16 => depth.next_multiple_of(GROUP_INPUTS),
        }
    }

    /// This product with a weight of `depth` inputs.
    fn with<'a>(&'a self, packed: (&'a CpuStorage, &Layout), depth: usize) -> Result<RowProduct<'a>> {
        let panels = self.outputs.div_ceil(self.epilogue.width());
        if packed.1.dims() != [panels, self.packed_inputs(depth), PANEL] || depth == 0 {
            bail!("packed linear: {depth} inputs do not go with {:?} of {} outputs", packed.1.dims(), self.outputs);
        }
        let Some((begin, end)) = packed.1.contiguous_offsets() else {
            bail!("packed linear: expected a contiguous weight, got {:?}", packed.1)
        };
        let packed = match (packed.0, self.arithmetic) {
            (CpuStorage::F32(packed), Arithmetic::F32) => PackedValues::F32(&packed[begin..end]),
            (CpuStorage::BF16(packed), Arithmetic::F32) => PackedValues::Bf16(&packed[begin..end]),
            (CpuStorage::F16(packed), Arithmetic::F32) => PackedValues::F16(&packed[begin..end]),
            (CpuStorage::F16(packed), Arithmetic::F16) => PackedValues::InF16(&packed[begin..end]),
            (_, Arithmetic::F32) => bail!("packed linear: weights are f32, bf16 or f16"),
            (_, Arithmetic::F16) => bail!("packed linear: weights of a product in f16 are f16"),
        };
        Ok(RowProduct { product: self, depth, packed })
    }

    fn run_on<W: Weight>(&self, x: &[f32], depth: usize, packed: &[W], output: SharedOutput) {
        let rows = x.len() / depth;
        let rows_of = |task: usize| task * TASK_ROWS..((task + 1) * TASK_ROWS).min(rows);
        self.for_each_task(rows.div_ceil(TASK_ROWS), rows_of, depth, packed, output, |_, place, panel, scratch| {
            dispatch_at(self.level, Task { place, x, panel, scratch });
        });
    }

    fn run_in_f16(&self, x: &[f32], depth: usize, packed: &[f16], output: SharedOutput) {
        for_each_half_rows(self.level, x, depth, |x| {
            let (unit, tiles) = (self.half_unit, x.tiles());
            let tasks = x.rows(0..tiles).len().div_ceil(TASK_ROWS);
            let tiles = |task: usize| tiles * task / tasks..tiles * (task + 1) / tasks;
            let rows = |task| x.rows(tiles(task));
            self.for_each_task(tasks, rows, depth, packed, output, |task, place, panel, Scratch { widened, sums }| {
                dispatch_at(self.level, HalfTask { place, x, tiles: tiles(task), panel, unit, widened, sums });
            });
        });
    }

    /// Runs `compute` for the rows of one of `tasks` and one panel at a time, on all threads.
    fn for_each_task<W: Sync>(
        &self,
        tasks: usize,
        rows: impl Fn(usize) -> Range<usize> + Sync,
        depth: usize,
        packed: &[W],
        output: SharedOutput,
        compute: impl Fn(usize, Place, &[W], &mut Scratch) + Sync,
    ) {
        let width = self.epilogue.width();
        let panels = self.outputs.div_ceil(width);
        let panel_len = self.packed_inputs(depth) * PANEL;
        // Panel after panel for the same rows, which stay in the core's cache.
        (0..panels * tasks).into_par_iter().for_each(|index| {
            let (panel, task) = (index % panels, index / panels);
            let place = Place {
                depth,
                rows: rows(task),
                columns: panel * width..((panel + 1) * width).min(self.outputs),
                epilogue: self.epilogue,
                output,
                outputs: self.outputs,
            };
            let panel = &packed[panel * panel_len..][..panel_len];
            SCRATCH.with_borrow_mut(|scratch| compute(task, place, panel, scratch));
        });
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[cfg(test)]
pub(super) mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::kernels::{pack_gate_up, pack_linear};

    /// Uniform values in [-1, 1) that depend on the seed only.
    pub(in crate::kernels::cpu) fn random(rows: usize, columns: usize, seed: u64) -> Tensor {
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
