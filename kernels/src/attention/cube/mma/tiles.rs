//! Tiles in shared memory and fragments in registers, for `mma.sync` m16n8k16.
//!
//! A tile holds rows of `p` 16-bit values as vectors of 8, padded by one vector: the 8 rows that one step of ldmatrix
//! reads then lie in different banks. Fragment layouts are those of the PTX manual: a lane holds rows `lane / 4` and
//! `lane / 4 + 8`, columns `2 (lane % 4)` and the next.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::barrier::{Barrier, copy_async};
use cubecl::prelude::*;

use crate::attention::cube::shared::{HIDDEN, Sizes, query_id, shift, slot_id};

/// Planes of a cube.
pub(crate) const PLANES: usize = 4;
/// Units of a cube.
pub(crate) const UNITS: usize = PLANES * 32;
/// Rows of a tile that streams through shared memory.
pub(crate) const STREAM: usize = 64;

pub(crate) type Mma<F> = MmaDefinition<F, F, f32>;

/// Accumulators of 16 x 8 blocks: rows `lane / 4` and `lane / 4 + 8` of each.
pub(crate) type Sums<N2> = Sequence<Array<Vector<f32, N2>>>;
/// Operand fragments.
pub(crate) type Fragments<F, N2> = Sequence<Array<Vector<F, N2>>>;

/// Vectors from one row of a tile to the next.
pub(crate) const fn stride(p: usize) -> usize {
    p / 8 + 1
}

/// This unit's lane offsets into a tile, in vectors.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Lane {
    /// Row of an accumulator.
    pub row: usize,
    /// First of two columns of an accumulator, halved.
    pub pair: usize,
    /// Left operand, stored by rows.
    pub left: usize,
    /// Right operand, stored by columns: tile rows are the product's columns.
    pub right: usize,
    /// Right operand, stored by rows.
    pub turned: usize,
}

#[cube]
pub(crate) fn lane(#[comptime] p: usize) -> Lane {
    let stride = comptime!(stride(p));
    // The mask tells the compiler how small it is: constant offsets then fold into the instructions.
    let lane = (UNIT_POS_X % 32) as usize;
    let eighth = lane % 8;
    let quarter = lane / 8;
    Lane {
        row: lane / 4,
        pair: lane % 4,
        left: (lane % 16) * stride + lane / 16,
        right: ((quarter / 2) * 8 + eighth) * stride + quarter % 2,
        turned: ((quarter % 2) * 8 + eighth) * stride + quarter / 2,
    }
}

/// A 16 x 16 block for the left operand, or two 16 x 8 blocks for the right one.
#[cube]
pub(crate) fn fragment<F: Float, N8: Size, N2: Size>(
    mma: Mma<F>,
    tile: &SharedMemory<Vector<F, N8>>,
    at: usize,
    #[comptime] turned: bool,
) -> Array<Vector<F, N2>> {
    mma.load_matrix::<Vector<F, N8>, N2>(&tile.slice(at, at + 1), MatrixIdent::A, 4usize, turned)
}

/// Adds the product of a left block and both right blocks of a fragment.
#[cube]
pub(crate) fn multiply<F: Float, N2: Size>(
    mma: Mma<F>,
    left: &Array<Vector<F, N2>>,
    right: &Array<Vector<F, N2>>,
    sums: &mut Sums<N2>,
    #[comptime] at: usize,
) {
    #[unroll]
    for i in 0..2usize {
        let mut half = Array::<Vector<F, N2>>::new(2usize);
        half[0] = right[comptime!(2 * i)];
        half[1] = right[comptime!(2 * i + 1)];
        mma.execute_inplace(left, &half, sums.index_mut(comptime!(at + i)));
    }
}

#[cube]
pub(crate) fn zeros<N2: Size>(#[comptime] count: usize) -> Sums<N2> {
    let mut sums = Sequence::<Array<Vector<f32, N2>>>::new();
    #[unroll]
    for _ in 0..count {
        let mut block = Array::<Vector<f32, N2>>::new(2usize);
        block[0] = Vector::new(0.0f32);
        block[1] = Vector::new(0.0f32);
        sums.push(block);
    }
    sums
}

/// Two neighbouring accumulators as a left operand.
#[cube]
pub(crate) fn left<F: Float, N2: Size>(sums: &Sums<N2>, #[comptime] at: usize) -> Array<Vector<F, N2>> {
    let mut block = Array::<Vector<F, N2>>::new(4usize);
    #[unroll]
    for i in 0..2usize {
        let sum = sums.index(comptime!(at + i));
        block[comptime!(2 * i)] = Vector::<F, N2>::cast_from(sum[0]);
        block[comptime!(2 * i + 1)] = Vector::<F, N2>::cast_from(sum[1]);
    }
    block
}

/// Starts copying `rows` rows into a tile at `base`. Rows past the end repeat the last one; they are masked later.
#[cube]
pub(crate) fn copy<F: Float, N8: Size>(
    from: &Array<Vector<F, N8>>,
    to: &mut SharedMemory<Vector<F, N8>>,
    origin: usize,
    row_stride: u32,
    row0: usize,
    limit: u32,
    base: usize,
    #[comptime] rows: usize,
    #[comptime] p: usize,
) {
    let vectors = comptime!(p / 8);
    let stride = comptime!(stride(p));
    let unit = (UNIT_POS as usize) % UNITS;
    let last = limit as usize - 1;
    if comptime!(UNITS.is_multiple_of(p / 8)) {
        let row = unit / vectors;
        let column = unit % vectors;
        let at = base + row * stride + column;
        #[unroll]
        for i in 0..comptime!(rows * (p / 8) / UNITS) {
            let step = comptime!(i * (UNITS / (p / 8)));
            let source = origin + min(row0 + row + step, last) * row_stride as usize + column;
            let target = at + comptime!(i * (UNITS / (p / 8)) * stride);
            copy_async(&from.slice(source, source + 1), &mut to.slice_mut(target, target + 1), 8u32);
        }
    } else {
        #[unroll]
        for i in 0..comptime!(rows * (p / 8) / UNITS) {
            let index = unit + comptime!(i * UNITS);
            let row = index / vectors;
            let column = index % vectors;
            let source = origin + min(row0 + row, last) * row_stride as usize + column;
            let target = base + row * stride + column;
            copy_async(&from.slice(source, source + 1), &mut to.slice_mut(target, target + 1), 8u32);
        }
    }
}

/// Says that this unit's copies so far belong to the barrier's phase.
#[cube]
pub(crate) fn commit(barrier: &Barrier) {
    barrier.commit_copy_async();
    let _token = barrier.arrive();
}

/// Moves accumulators through the plane's own rows of a tile to memory, times `factors` by row, rows below `limit` only.
#[cube]
pub(crate) fn store<F: Float, N8: Size, N2: Size>(
    sums: &Sums<N2>,
    factors: &Array<f32>,
    tile: &mut SharedMemory<Vector<F, N8>>,
    to: &mut Array<Vector<F, N8>>,
    origin: usize,
    row_stride: u32,
    row0: usize,
    limit: u32,
    lane: &Lane,
    #[comptime] blocks: usize,
    #[comptime] p: usize,
) {
    let stride = comptime!(stride(p));
    let vectors = comptime!(p / 8);
    let plane = (UNIT_POS_Y as usize) % PLANES;
    let own = plane * comptime!(blocks * 16);
    sync_plane();
    #[unroll]
    for m in 0..blocks {
        #[unroll]
        for j in 0..vectors {
            let block = sums.index(comptime!(m * vectors + j));
            #[unroll]
            for r in 0..2usize {
                let at = (own + lane.row + comptime!(m * 16 + r * 8)) * stride + j;
                let value = block[r] * Vector::new(factors[comptime!(m * 2 + r)]);
                tile.slice_mut(at, at + 1).with_vector_size::<N2>()[lane.pair] = Vector::<F, N2>::cast_from(value);
            }
        }
    }
    sync_plane();
    let lane = (UNIT_POS_X % 32) as usize;
    #[unroll]
    for i in 0..comptime!(blocks * 16 * vectors / 32) {
        let index = lane + comptime!(i * 32);
        let row = own + index / vectors;
        let column = index % vectors;
        if row0 + row < limit as usize {
            to[origin + (row0 + row) * row_stride as usize + column] = tile[row * stride + column];
        }
    }
}

/// Hides what a query must not see in blocks of scores; rows are queries, or slots if `keys`. `row0` and `column0` are
/// where the blocks begin, `own` the documents of the rows.
#[cube]
pub(crate) fn hide<N2: Size>(
    scores: &mut Sums<N2>,
    ids: &Array<i32>,
    own: &Array<i32>,
    z: &Sizes,
    batch: usize,
    row0: usize,
    column0: usize,
    lane: &Lane,
    #[comptime] blocks: usize,
    #[comptime] columns: usize,
    #[comptime] keys: bool,
    #[comptime] has_ids: bool,
) {
    let shift = shift(z);
    #[unroll]
    for j in 0..columns {
        #[unroll]
        for e in 0..2usize {
            let column = column0 + lane.pair * 2 + comptime!(j * 8 + e);
            let mut other = 0i32.runtime();
            if comptime!(has_ids) {
                if comptime!(keys) {
                    other = query_id(ids, z, batch, column);
                } else {
                    other = slot_id(ids, z, batch, column);
                }
            }
            #[unroll]
            for m in 0..blocks {
                #[unroll]
                for r in 0..2usize {
                    let row = row0 + lane.row + comptime!(m * 16 + r * 8);
                    let mut seen = column <= row + shift;
                    if comptime!(keys) {
                        seen = row <= column + shift;
                    }
                    if comptime!(has_ids) {
                        let id = own[comptime!(m * 2 + r)];
                        seen = seen && id >= 0 && id == other;
                    }
                    let block = scores.index_mut(comptime!(m * columns + j));
                    let mut pair = block[r];
                    pair[e] = select(seen, pair[e], HIDDEN);
                    block[r] = pair;
                }
            }
        }
    }
}
