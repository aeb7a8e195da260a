//! Documents on the device: ids, and for each block of rows the range of the other side's blocks that it can meet.

use std::ops::Range;

use super::shared::BLOCK;
use crate::attention::SlotIds;

/// What a block of queries and a block of slots have in common is decided from their smallest and largest document.
struct Block {
    /// Documents in the block; empty when all is padding.
    range: Range<i32>,
    /// No padding in it.
    whole: bool,
}

fn blocks(ids: &[i32]) -> Vec<Block> {
    let block = |ids: &[i32]| {
        let real = || ids.iter().copied().filter(|&id| id >= 0);
        let range = real().min().unwrap_or(0)..real().max().map_or(0, |id| id + 1);
        Block { range, whole: real().count() == ids.len() }
    };
    ids.chunks(BLOCK).map(block).collect()
}

/// First block of `others` with a document of `own`, the end of them, and the document if `own` has only one, else -2.
fn entry(own: &Block, others: &[Block]) -> [i32; 3] {
    let meets = |other: &Block| own.range.start.max(other.range.start) < own.range.end.min(other.range.end);
    let first = others.iter().position(meets).unwrap_or(0);
    let end = others.iter().rposition(meets).map_or(0, |i| i + 1);
    let only = if own.whole && own.range.len() == 1 { own.range.start } else { -2 };
    [first as i32, end as i32, only]
}

/// Ids of queries `[b, l]`, of slots `[b, s]`, then the entries of the blocks of queries and of slots.
pub(crate) fn plan(ids: &SlotIds, l: usize, s: usize) -> Vec<i32> {
    let mut plan = [ids.queries.as_slice(), ids.slots.as_slice()].concat();
    let rows: Vec<_> = ids.queries.chunks(l).zip(ids.slots.chunks(s)).map(|(q, s)| (blocks(q), blocks(s))).collect();
    for (queries, slots) in &rows {
        plan.extend(queries.iter().flat_map(|own| entry(own, slots)));
    }
    for (queries, slots) in &rows {
        plan.extend(slots.iter().flat_map(|own| entry(own, queries)));
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_meet_where_documents_do() {
        // Two documents that change inside the second block, and padding at the end of the third.
        let ids: Vec<i32> = (0..150).map(|t| if t >= 140 { -1 } else { i32::from(t >= 100) }).collect();
        let plan = plan(&SlotIds { batch: 1, queries: ids[100..].to_vec(), slots: ids }, 50, 150);
        assert_eq!(plan[200..], [1, 3, -2, 0, 0, 0, 0, 1, -2, 0, 1, -2]);
    }
}
