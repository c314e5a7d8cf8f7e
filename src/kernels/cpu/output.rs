//! One output that many tasks fill, each its own part.

use std::ops::Range;

use super::panels::{GATED, PANEL};
use super::simd::{LINE_BYTES, Simd, exp};

/// The values of an output, shared by tasks that write disjoint parts of it.
#[derive(Clone, Copy)]
pub(super) struct SharedOutput {
    values: *mut f32,
    len: usize,
}

// SAFETY: tasks touch disjoint parts only, as `part` demands.
unsafe impl Send for SharedOutput {}
// SAFETY: as above.
unsafe impl Sync for SharedOutput {}

impl SharedOutput {
    /// Shares `values`, which has to outlive all parts and not to be touched while there are any.
    pub(super) fn new(values: &mut [f32]) -> Self {
        Self { values: values.as_mut_ptr(), len: values.len() }
    }

    /// `len` values from `start` on.
    ///
    /// # Safety
    /// The slice given to [`SharedOutput::new`] is still there, and no other part that is in use overlaps this one.
    #[inline(always)]
    pub(super) unsafe fn part<'a>(&self, start: usize, len: usize) -> &'a mut [f32] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: within the values, by the assertion; the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(start), len) }
    }

    /// The address of a value, which may lie beyond the last one: for prefetching.
    #[inline(always)]
    pub(super) fn address(&self, index: usize) -> *const f32 {
        self.values.wrapping_add(index)
    }
}

/// What becomes of a panel's sums.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Epilogue {
    /// They are the output.
    Store,
    /// `silu` of the first half times the second half is the output.
    SwiGlu,
}

impl Epilogue {
    /// Outputs of a panel.
    pub(super) fn width(self) -> usize {
        match self {
            Self::Store => PANEL,
            Self::SwiGlu => GATED,
        }
    }
}

/// Which rows of the input, and which part of the output, a task works on.
pub(super) struct Place {
    pub(super) depth: usize,
    pub(super) rows: Range<usize>,
    /// The panel's columns of the output; the last panel may have fewer than others.
    pub(super) columns: Range<usize>,
    pub(super) epilogue: Epilogue,
    /// `[N, outputs]`
    pub(super) output: SharedOutput,
    pub(super) outputs: usize,
}

impl Place {
    /// Asks for the lines of the output that [`Place::finish`] will write for `rows` rows from `row` on: they lie in as many pages, and
    /// come while the products are computed.
    #[inline(always)]
    pub(super) fn prefetch_output<S: Simd>(&self, simd: S, row: usize, rows: usize) {
        for row in row..row + rows {
            let first = self.output.address(row * self.outputs + self.columns.start).cast::<u8>();
            for line in (0..self.columns.len() * size_of::<f32>()).step_by(LINE_BYTES) {
                simd.prefetch_for_write(first.wrapping_add(line));
            }
        }
    }

    /// Brings the sums of the rows from `row` on to the output.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(&self, simd: S, row: usize, sums: &[f32]) {
        let width = self.columns.len();
        let (sums, _) = sums.as_chunks::<PANEL>();
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: no other task has these columns of these rows, and no two of these parts are alive at a time.
            let output = unsafe { self.output.part((row + i) * self.outputs + self.columns.start, width) };
            match self.epilogue {
                Epilogue::Store => store(output, sums),
                Epilogue::SwiGlu => {
                    let (gate, up) = sums.split_at(GATED);
                    let mut gated = [0f32; GATED];
                    for ((gated, &gate), &up) in gated.iter_mut().zip(gate).zip(up) {
                        *gated = gate / (1.0 + exp(simd, -gate)) * up;
                    }
                    store(output, &gated);
                }
            }
        }
    }
}

/// Writes as many of `values` as `output` has; all of them, as a rule, in whole vectors.
#[inline(always)]
fn store<const N: usize>(output: &mut [f32], values: &[f32; N]) {
    match output.first_chunk_mut::<N>() {
        Some(output) => *output = *values,
        None => output.copy_from_slice(&values[..output.len()]),
    }
}
