//! What the attention kernels share: sizes, strides, which tiles a tile has to look at.

use cubecl::prelude::*;

/// Score of a slot that a query must not see.
pub(crate) const HIDDEN: f32 = -1e30;
/// Log-sum-exp of a query that sees nothing: makes every weight of it zero.
pub(crate) const NOTHING: f32 = 1e30;
/// Rows of a block in the plan of documents (see `plan.rs`).
pub(crate) const BLOCK: usize = 64;

/// Distances of a `[batch, heads, rows, p]` tensor, in what its array holds (scalars or vectors).
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Strides {
    pub batch: u32,
    pub head: u32,
    pub row: u32,
}

/// Sizes of a call.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Sizes {
    pub batch: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub groups: u32,
    /// Queries.
    pub l: u32,
    /// Slots.
    pub s: u32,
    /// Queries, rounded up: rows of the log-sum-exps and of the gradients' row sums.
    pub lp: u32,
}

#[cube]
impl Strides {
    /// Where the rows of a head begin.
    pub fn origin(&self, batch: usize, head: usize) -> usize {
        batch * self.batch as usize + head * self.head as usize
    }
}

/// Position of the first query among the slots.
#[cube]
pub(crate) fn shift(z: &Sizes) -> usize {
    (z.s - z.l) as usize
}

/// Document of query `row`, clamped to the last; -1 for padding.
#[cube]
pub(crate) fn query_id(ids: &Array<i32>, z: &Sizes, batch: usize, row: usize) -> i32 {
    ids[batch * z.l as usize + min(row, z.l as usize - 1)]
}

/// Document of a slot, clamped to the last; -1 for padding.
#[cube]
pub(crate) fn slot_id(ids: &Array<i32>, z: &Sizes, batch: usize, slot: usize) -> i32 {
    ids[(z.batch * z.l) as usize + batch * z.s as usize + min(slot, z.s as usize - 1)]
}

/// First entry of the plan for query block `block`: first block of slots, the end of them, the block's only document or less than 0.
#[cube]
pub(crate) fn query_plan(z: &Sizes, batch: usize, block: usize) -> usize {
    let blocks = (z.l as usize).div_ceil(BLOCK);
    (z.batch * (z.l + z.s)) as usize + (batch * blocks + min(block, blocks - 1)) * 3
}

/// As [`query_plan`], for a block of slots.
#[cube]
pub(crate) fn slot_plan(z: &Sizes, batch: usize, block: usize) -> usize {
    let queries = (z.l as usize).div_ceil(BLOCK);
    let blocks = (z.s as usize).div_ceil(BLOCK);
    (z.batch * (z.l + z.s)) as usize + (z.batch as usize * queries + batch * blocks + min(block, blocks - 1)) * 3
}

/// First slot and end of the slots that queries `row0 .. row0 + rows` may see.
#[cube]
pub(crate) fn slot_range(
    ids: &Array<i32>,
    z: &Sizes,
    batch: usize,
    row0: usize,
    #[comptime] rows: usize,
    #[comptime] has_ids: bool,
) -> (usize, usize) {
    let mut first = 0usize.runtime();
    let mut end = min(row0 + rows, z.l as usize) + shift(z);
    if comptime!(has_ids) {
        let block = row0 / BLOCK;
        let at = query_plan(z, batch, block);
        let mut low = ids[at] as usize;
        let mut high = ids[at + 1] as usize;
        #[unroll]
        for i in 1..comptime!(rows.div_ceil(BLOCK)) {
            let at = query_plan(z, batch, block + i);
            low = min(low, ids[at] as usize);
            high = max(high, ids[at + 1] as usize);
        }
        first = low * BLOCK;
        end = min(end, high * BLOCK);
    }
    (first, end)
}

/// First query and end of the queries that may see slots `row0 .. row0 + rows`.
#[cube]
pub(crate) fn query_range(
    ids: &Array<i32>,
    z: &Sizes,
    batch: usize,
    row0: usize,
    #[comptime] rows: usize,
    #[comptime] has_ids: bool,
) -> (usize, usize) {
    let offset = shift(z);
    let mut first = max(row0, offset) - offset;
    let mut end = z.l as usize;
    if comptime!(has_ids) {
        let block = row0 / BLOCK;
        let at = slot_plan(z, batch, block);
        let mut low = ids[at] as usize;
        let mut high = ids[at + 1] as usize;
        #[unroll]
        for i in 1..comptime!(rows.div_ceil(BLOCK)) {
            let at = slot_plan(z, batch, block + i);
            low = min(low, ids[at] as usize);
            high = max(high, ids[at + 1] as usize);
        }
        first = max(first, low * BLOCK);
        end = min(end, high * BLOCK);
    }
    (first, end)
}
