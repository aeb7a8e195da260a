//! What the fast paths of the CPU backends share: access to a tensor's values, small matrix products, threads.
//!
//! Operations work on plain `f32` slices (each in its own `cpu` module); the glue in [`glue`] reads tensors into slices
//! and builds tensors from the results, for any backend whose tensors live in this process's memory.

mod glue;
pub(crate) mod host;
pub(crate) mod math;
pub(crate) mod product;
pub(crate) mod threads;

/// Name of these paths in reports.
pub(crate) const NAME: &str = "cpu (threads + SIMD)";

/// Document boundaries and padding as the loops need them.
#[derive(Clone, Copy)]
pub(crate) struct Documents<'a> {
    /// Tokens of a row.
    pub l: usize,
    /// Ids, ids before each row, and real tokens of each row; absent when every row is one document.
    pub rows: Option<(&'a [i32], &'a [i32], &'a [usize])>,
}

impl Documents<'_> {
    /// Real tokens of a row; padding follows them.
    pub(crate) fn len(&self, row: usize) -> usize {
        self.rows.map_or(self.l, |(_, _, lengths)| lengths[row])
    }

    /// Id at a position, or of the incoming state before position 0.
    pub(crate) fn id(&self, row: usize, position: isize) -> i32 {
        match (self.rows, usize::try_from(position)) {
            (None, _) => 0,
            (Some((ids, _, _)), Ok(position)) => ids[row * self.l + position],
            (Some((_, prev, _)), Err(_)) => prev[row],
        }
    }

    /// True where a document begins that the state before it does not belong to.
    pub(crate) fn begins(&self, row: usize, position: usize) -> bool {
        self.rows.is_some() && self.id(row, position as isize) != self.id(row, position as isize - 1)
    }
}
