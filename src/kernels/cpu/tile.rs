//! Products in f32: register tiles of six rows and a panel's columns.

use half::{bf16, f16};

use super::output::Place;
use super::panels::PANEL;
use super::simd::{Kernel, LINE_BYTES, Simd};

/// Rows of a register tile.
const TILE_ROWS: usize = 6;
/// Inputs of a panel that are used at a time, by all rows of a task: 128 KiB of f32, which stays in the core's cache.
const DEPTH_BLOCK: usize = 512;
/// From this many rows on a panel in half precision is widened once, and not for each register tile.
const WIDEN_ROWS: usize = 3 * TILE_ROWS;
/// Inputs that share one turn of a register tile's loop.
const UNROLL: usize = 4;

/// One thread's buffers.
#[derive(Default)]
pub(super) struct Scratch {
    /// A block of a panel as f32 `[DEPTH_BLOCK, PANEL]`.
    pub(super) widened: Vec<f32>,
    /// Sums over the blocks so far, of all rows of a task or, where there is one block only, of a register tile: `[_, PANEL]`.
    pub(super) sums: Vec<f32>,
}

/// A stored weight that is computed on as f32.
pub(super) trait Weight: Copy + Send + Sync {
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
pub(super) struct Task<'a, W> {
    pub(super) place: Place,
    /// `[N, depth]`
    pub(super) x: &'a [f32],
    /// `[depth, PANEL]`
    pub(super) panel: &'a [W],
    pub(super) scratch: &'a mut Scratch,
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
                add_products(&place, simd, x, first, &widened[..block.len()], Next::after(block), sums);
            } else {
                add_products(&place, simd, x, first, block, Next::after(block), sums);
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

/// Adds the products with one block of the panel's depth, from input `first` on. The first block starts the sums, the
/// last brings them to the output.
#[inline(always)]
fn add_products<S: Simd, W: Weight>(
    place: &Place,
    simd: S,
    x: &[f32],
    first: usize,
    block: &[W],
    next: Next,
    sums: &mut [f32],
) {
    let is_last = first + block.len() / PANEL == place.depth;
    let is_only = is_last && first == 0;
    let tiles = place.rows.len().div_ceil(TILE_ROWS);
    let mut row = place.rows.start;
    for tile in 0..tiles {
        // Tiles of like size: the last rows alone would wait for each other's sums.
        let tile_rows = (place.rows.end - row).div_ceil(tiles - tile);
        let row_of_sums = if is_only { 0 } else { row - place.rows.start };
        let sums = &mut sums[row_of_sums * PANEL..][..tile_rows * PANEL];
        if first == 0 {
            sums.fill(0.0);
        }
        if is_last {
            place.prefetch_output(simd, row, tile_rows);
        }
        let x = &x[row * place.depth + first..];
        let ahead = next.share(block.len() / PANEL, tile, tiles);
        match tile_rows {
            1 => tile_product::<S, W, 1>(simd, x, place.depth, block, ahead, sums),
            2 => tile_product::<S, W, 2>(simd, x, place.depth, block, ahead, sums),
            3 => tile_product::<S, W, 3>(simd, x, place.depth, block, ahead, sums),
            4 => tile_product::<S, W, 4>(simd, x, place.depth, block, ahead, sums),
            5 => tile_product::<S, W, 5>(simd, x, place.depth, block, ahead, sums),
            _ => tile_product::<S, W, 6>(simd, x, place.depth, block, ahead, sums),
        }
        if is_last {
            place.finish(simd, row, sums);
        }
        row += tile_rows;
    }
}

/// The weights that follow a block in memory, to bring into the core's cache while that block is computed with.
///
/// The first register tile reads a block from memory, the others from the cache, and memory would be idle meanwhile. So they ask
/// for the block that follows, which as a rule is this thread's next.
#[derive(Clone, Copy)]
struct Next {
    from: *const u8,
    bytes: usize,
}

impl Next {
    fn after<W>(block: &[W]) -> Self {
        Self { from: block.as_ptr_range().end.cast(), bytes: size_of_val(block) }
    }

    /// The part that tile number `tile` of `tiles` asks for in its loop over `depth` inputs.
    fn share(self, depth: usize, tile: usize, tiles: usize) -> Ahead {
        let Some(number) = tile.checked_sub(1) else { return Ahead::NOTHING };
        let turns = (depth / UNROLL).max(1);
        let lines = self.bytes.div_ceil(LINE_BYTES * (tiles - 1) * turns);
        let first = number * turns * lines * LINE_BYTES;
        // Beyond the weight's end nothing is read: an address is all that this is.
        if first < self.bytes { Ahead { from: self.from.wrapping_add(first), lines } } else { Ahead::NOTHING }
    }
}

/// Cache lines that a register tile asks for.
#[derive(Clone, Copy)]
struct Ahead {
    from: *const u8,
    /// Cache lines for each turn of the loop over inputs.
    lines: usize,
}

impl Ahead {
    const NOTHING: Self = Self { from: std::ptr::null(), lines: 0 };
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
                line = line.wrapping_add(LINE_BYTES);
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
