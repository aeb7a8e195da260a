//! Work on several threads, and output buffers that several threads fill.

use std::marker::PhantomData;

use rayon::prelude::*;

/// Runs `f(scratch, 0..tasks)`, on rayon's threads if `work` (in multiply-adds, say) pays for waking them.
///
/// What a task computes must not depend on which thread runs it.
pub(crate) fn for_each<T>(tasks: usize, work: usize, scratch: impl Fn() -> T + Sync + Send, f: impl Fn(&mut T, usize) + Sync + Send) {
    const WORTHWHILE: usize = 1 << 18;
    if tasks < 2 || work < WORTHWHILE || rayon::current_num_threads() == 1 {
        let mut scratch = scratch();
        (0..tasks).for_each(|task| f(&mut scratch, task));
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each_init(scratch, f);
    }
}

/// A buffer that tasks fill in disjoint parts, where the parts are not slices that could be split off beforehand.
pub(crate) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: access goes through `Shared::part`, whose contract keeps the parts disjoint.
unsafe impl Sync for Shared<'_> {}
// SAFETY: as above.
unsafe impl Send for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(values: &'a mut [f32]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), owner: PhantomData }
    }

    /// `len` values from `from` on.
    ///
    /// # Safety
    /// No other live part may overlap this one.
    #[allow(clippy::mut_from_ref, reason = "the caller keeps parts disjoint")]
    pub(crate) unsafe fn part(&self, from: usize, len: usize) -> &mut [f32] {
        assert!(from <= self.len && len <= self.len - from, "part {from}+{len} of {}", self.len);
        // SAFETY: inside the buffer by the assertion; disjoint by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }
}
