//! One output that many tasks fill, each its own part.

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
