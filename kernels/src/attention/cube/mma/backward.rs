//! Backward with tensor cores: two kernels, each like the forward, so that no sum crosses cubes and none goes through
//! shared memory. The scores are made twice: 7 products instead of 5 with atomics, and deterministic.

use cubecl::prelude::barrier::{Barrier, copy_async};
use cubecl::prelude::*;

use super::tiles::*;
use crate::attention::cube::shared::*;

/// Adds left rows times the `columns` blocks of a streamed tile from row `at` on.
#[cube]
fn scores<F: Float, N8: Size, N2: Size>(
    mma: Mma<F>,
    held: &Fragments<F, N2>,
    own: &SharedMemory<Vector<F, N8>>,
    own_at: usize,
    tile: &SharedMemory<Vector<F, N8>>,
    at: usize,
    #[comptime] blocks: usize,
    #[comptime] columns: usize,
    #[comptime] hold: bool,
    #[comptime] p: usize,
) -> Sums<N2> {
    let stride = comptime!(stride(p));
    let steps = comptime!(p / 16);
    let mut sums = zeros::<N2>(comptime!(blocks * columns));
    #[unroll]
    for d in 0..steps {
        let mut now = Sequence::<Array<Vector<F, N2>>>::new();
        if comptime!(!hold) {
            #[unroll]
            for m in 0..blocks {
                now.push(fragment::<F, N8, N2>(mma, own, own_at + comptime!(m * 16 * stride + d * 2), false));
            }
        }
        #[unroll]
        for j in 0..comptime!(columns / 2) {
            let other = fragment::<F, N8, N2>(mma, tile, at + comptime!(j * 16 * stride + d * 2), false);
            #[unroll]
            for m in 0..blocks {
                if comptime!(hold) {
                    multiply::<F, N2>(mma, held.index(comptime!(m * steps + d)), &other, &mut sums, comptime!(m * columns + 2 * j));
                } else {
                    multiply::<F, N2>(mma, now.index(m), &other, &mut sums, comptime!(m * columns + 2 * j));
                }
            }
        }
    }
    sums
}

/// Adds weights times the rows of a streamed tile.
#[cube]
fn gather<F: Float, N8: Size, N2: Size>(
    mma: Mma<F>,
    weights: &Sums<N2>,
    tile: &SharedMemory<Vector<F, N8>>,
    at: usize,
    sums: &mut Sums<N2>,
    #[comptime] blocks: usize,
    #[comptime] columns: usize,
    #[comptime] p: usize,
) {
    let stride = comptime!(stride(p));
    #[unroll]
    for i in 0..comptime!(columns / 2) {
        let mut lefts = Sequence::<Array<Vector<F, N2>>>::new();
        #[unroll]
        for m in 0..blocks {
            lefts.push(left::<F, N2>(weights, comptime!(m * columns + 2 * i)));
        }
        #[unroll]
        for j in 0..comptime!(p / 16) {
            let right = fragment::<F, N8, N2>(mma, tile, at + comptime!(i * 16 * stride + j * 2), true);
            #[unroll]
            for m in 0..blocks {
                multiply::<F, N2>(mma, lefts.index(m), &right, sums, comptime!(m * (p / 8) + 2 * j));
            }
        }
    }
}

#[cube]
fn hold_rows<F: Float, N8: Size, N2: Size>(
    mma: Mma<F>,
    tile: &SharedMemory<Vector<F, N8>>,
    at: usize,
    #[comptime] blocks: usize,
    #[comptime] hold: bool,
    #[comptime] p: usize,
) -> Fragments<F, N2> {
    let mut held = Sequence::<Array<Vector<F, N2>>>::new();
    if comptime!(hold) {
        #[unroll]
        for m in 0..blocks {
            #[unroll]
            for d in 0..comptime!(p / 16) {
                held.push(fragment::<F, N8, N2>(mma, tile, at + comptime!(m * 16 * stride(p) + d * 2), false));
            }
        }
    }
    held
}

/// Gradient of the queries. One cube per `PLANES * 16 * blocks` queries of a head; `part` slots at a time in registers.
#[cube(launch_unchecked, fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
pub(crate) fn query_grad_mma<F: Float, N8: Size, N2: Size>(
    q: &Array<Vector<F, N8>>,
    k: &Array<Vector<F, N8>>,
    v: &Array<Vector<F, N8>>,
    dout: &Array<Vector<F, N8>>,
    ids: &Array<i32>,
    lse: &Array<f32>,
    delta: &Array<f32>,
    dq: &mut Array<Vector<F, N8>>,
    qs: Strides,
    ks: Strides,
    vs: Strides,
    ds: Strides,
    os: Strides,
    z: Sizes,
    scale: f32,
    #[comptime] p: usize,
    #[comptime] blocks: usize,
    #[comptime] part: usize,
    #[comptime] hold: bool,
    #[comptime] has_ids: bool,
    #[define(F)] _dtype: StorageType,
) {
    let rows = comptime!(PLANES * 16 * blocks);
    let stride = comptime!(stride(p));
    let size = comptime!(STREAM * stride);
    let width = comptime!(p / 8);
    let columns = comptime!(part / 8);
    let mma = Mma::<F>::new(16usize, 8usize, 16usize);
    let mut tile_q = SharedMemory::<Vector<F, N8>>::new_aligned(comptime!(rows * stride), 128usize);
    let mut tile_d = SharedMemory::<Vector<F, N8>>::new_aligned(comptime!(rows * stride), 128usize);
    let mut tile_k = SharedMemory::<Vector<F, N8>>::new_aligned(comptime!(2 * size), 128usize);
    let mut tile_v = SharedMemory::<Vector<F, N8>>::new_aligned(comptime!(2 * size), 128usize);
    let even = Barrier::shared(CUBE_DIM, UNIT_POS == 0);
    let odd = Barrier::shared(CUBE_DIM, UNIT_POS == 0);

    let tiles = (z.l as usize).div_ceil(rows);
    let heads = z.heads as usize;
    let place = CUBE_POS;
    let row0 = (tiles - 1 - place % tiles) * rows;
    let batch = place / tiles / heads;
    let head = place / tiles % heads;
    let group = head / (heads / z.groups as usize);
    let shift = shift(&z);
    let lane = lane(p);
    let plane = (UNIT_POS_Y as usize) % PLANES;
    let first_row = row0 + plane * comptime!(16 * blocks);
    let key0 = ks.origin(batch, group);
    let value0 = vs.origin(batch, group);
    sync_cube();

    let (first, end) = slot_range(ids, &z, batch, row0, rows, has_ids);
    let mut slot0 = first / STREAM * STREAM;
    copy::<F, N8>(q, &mut tile_q, qs.origin(batch, head), qs.row, row0, z.l, 0usize, rows, p);
    copy::<F, N8>(dout, &mut tile_d, ds.origin(batch, head), ds.row, row0, z.l, 0usize, rows, p);
    if slot0 < end {
        copy::<F, N8>(k, &mut tile_k, key0, ks.row, slot0, z.s, 0usize, STREAM, p);
        copy::<F, N8>(v, &mut tile_v, value0, vs.row, slot0, z.s, 0usize, STREAM, p);
    }
    commit(&even);

    let mut own = Array::<i32>::new(comptime!(2 * blocks));
    let mut sums_of = Array::<f32>::new(comptime!(2 * blocks));
    let mut deltas = Array::<f32>::new(comptime!(2 * blocks));
    let stats = (batch * heads + head) * z.lp as usize;
    #[unroll]
    for i in 0..comptime!(2 * blocks) {
        let row = first_row + lane.row + comptime!(i * 8);
        // Rows past the end repeat the last one; they are not stored.
        let at = stats + min(row, z.l as usize - 1);
        sums_of[i] = lse[at];
        deltas[i] = delta[at];
        own[i] = 0i32;
        if comptime!(has_ids) {
            own[i] = query_id(ids, &z, batch, row);
        }
    }
    let mut sums = zeros::<N2>(comptime!(blocks * width));
    even.wait_parity(0u32);
    let own_at = plane * comptime!(16 * blocks * stride) + lane.left;
    let queries = hold_rows::<F, N8, N2>(mma, &tile_q, own_at, blocks, hold, p);
    let slopes = hold_rows::<F, N8, N2>(mma, &tile_d, own_at, blocks, hold, p);

    let mut turn = 0u32.runtime();
    while slot0 < end {
        let next = slot0 + STREAM;
        let odd_turn = turn % 2;
        if turn > 0 {
            if odd_turn == 0 {
                even.wait_parity((turn / 2) % 2);
            } else {
                odd.wait_parity((turn / 2) % 2);
            }
            sync_cube();
        }
        if next < end {
            let base = (1 - odd_turn) as usize * size;
            copy::<F, N8>(k, &mut tile_k, key0, ks.row, next, z.s, base, STREAM, p);
            copy::<F, N8>(v, &mut tile_v, value0, vs.row, next, z.s, base, STREAM, p);
            if odd_turn == 0 {
                commit(&odd);
            } else {
                commit(&even);
            }
        }
        let base = odd_turn as usize * size;
        let mut all = next <= first_row + shift + 1;
        if comptime!(has_ids) {
            let mine = ids[query_plan(&z, batch, first_row / BLOCK) + 2];
            all = all && mine >= 0 && mine == ids[slot_plan(&z, batch, slot0 / BLOCK) + 2];
        }
        #[unroll]
        for c in 0..comptime!(STREAM / part) {
            let from = slot0 + comptime!(c * part);
            if from <= first_row + comptime!(16 * blocks - 1) + shift {
                let right = base + lane.right + comptime!(c * part * stride);
                let mut weights = scores::<F, N8, N2>(mma, &queries, &tile_q, own_at, &tile_k, right, blocks, columns, hold, p);
                if !all {
                    hide::<N2>(&mut weights, ids, &own, &z, batch, first_row, from, &lane, blocks, columns, false, has_ids);
                }
                let dots = scores::<F, N8, N2>(mma, &slopes, &tile_d, own_at, &tile_v, right, blocks, columns, hold, p);
                #[unroll]
                for m in 0..blocks {
                    #[unroll]
                    for j in 0..columns {
                        let dot = dots.index(comptime!(m * columns + j));
                        let block = weights.index_mut(comptime!(m * columns + j));
                        #[unroll]
                        for r in 0..2usize {
                            let base = Vector::<f32, N2>::new(sums_of[comptime!(m * 2 + r)]);
                            let weight = Vector::exp(block[r] * Vector::new(scale) - base);
                            block[r] = weight * (dot[r] - Vector::new(deltas[comptime!(m * 2 + r)]));
                        }
                    }
                }
                let turned = base + lane.turned + comptime!(c * part * stride);
                gather::<F, N8, N2>(mma, &weights, &tile_k, turned, &mut sums, blocks, columns, p);
            }
        }
        slot0 = next;
        turn += 1;
    }
    let mut factors = Array::<f32>::new(comptime!(2 * blocks));
    #[unroll]
    for i in 0..comptime!(2 * blocks) {
        factors[i] = scale;
    }
    store::<F, N8, N2>(&sums, &factors, &mut tile_q, dq, os.origin(batch, head), os.row, row0, z.l, &lane, blocks, p);
}

/// Starts copying the log-sum-exps and deltas of `STREAM` queries, as pairs.
#[cube]
fn copy_stats<N2: Size>(
    lse: &Array<Vector<f32, N2>>,
    delta: &Array<Vector<f32, N2>>,
    to_lse: &mut SharedMemory<Vector<f32, N2>>,
    to_delta: &mut SharedMemory<Vector<f32, N2>>,
    from: usize,
    base: usize,
) {
    let unit = UNIT_POS as usize;
    if unit < comptime!(STREAM / 2) {
        copy_async(&lse.slice(from + unit, from + unit + 1), &mut to_lse.slice_mut(base + unit, base + unit + 1), 2u32);
        copy_async(&delta.slice(from + unit, from + unit + 1), &mut to_delta.slice_mut(base + unit, base + unit + 1), 2u32);
    }
}

/// Gradients of keys and values. One cube per `PLANES * 16 * blocks` slots of a key head; walks the queries of all heads
/// of the group, `part` of them at a time in registers. Blocks are slots by queries.
#[cube(launch_unchecked, fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
pub(crate) fn key_grad_mma<F: Float, N8: Size, N2: Size>(
    q: &Array<Vector<F, N8>>,
    k: &Array<Vector<F, N8>>,
    v: &Array<Vector<F, N8>>,
    dout: &Array<Vector<F, N8>>,
    ids: &Array<i32>,
    lse: &Array<Vector<f32, N2>>,
    delta: &Array<Vector<f32, N2>>,
    dk: &mut Array<Vector<F, N8>>,
    dv: &mut Array<Vector<F, N8>>,
    qs: Strides,
    ks: Strides,
    vs: Strides,
    ds: Strides,
    os: Strides,
    z: Sizes,
    scale: f32,
    #[comptime] p: usize,
    #[comptime] blocks: usize,
    #[comptime] part: usize,
    #[comptime] hold: bool,
    #[comptime] has_ids: bool,
    #[define(F)] _dtype: StorageType,
) {
    let rows = comptime!(PLANES * 16 * blocks);
    let stride = comptime!(stride(p));
    let size = comptime!(STREAM * stride);
    let width = comptime!(p / 8);
    let columns = comptime!(part / 8);
    let mma = Mma::<F>::new(16usize, 8usize, 16usize);
    let mut tile_k = SharedMemory::<Vector<F, N8>>::new_aligned(comptime!(rows * stride), 128usize);
    let mut tile_v = SharedMemory::<Vector<F, N8>>::new_aligned(comptime!(rows * stride), 128usize);
    let mut tile_q = SharedMemory::<Vector<F, N8>>::new_aligned(comptime!(2 * size), 128usize);
    let mut tile_d = SharedMemory::<Vector<F, N8>>::new_aligned(comptime!(2 * size), 128usize);
    let mut tile_lse = SharedMemory::<Vector<f32, N2>>::new_aligned(STREAM, 128usize);
    let mut tile_delta = SharedMemory::<Vector<f32, N2>>::new_aligned(STREAM, 128usize);
    let even = Barrier::shared(CUBE_DIM, UNIT_POS == 0);
    let odd = Barrier::shared(CUBE_DIM, UNIT_POS == 0);

    // The first slots meet the most queries, and come first.
    let tiles = (z.s as usize).div_ceil(rows);
    let groups = z.groups as usize;
    let share = z.heads as usize / groups;
    let place = CUBE_POS;
    let row0 = place % tiles * rows;
    let batch = place / tiles / groups;
    let group = place / tiles % groups;
    let shift = shift(&z);
    let lane = lane(p);
    let plane = (UNIT_POS_Y as usize) % PLANES;
    let first_row = row0 + plane * comptime!(16 * blocks);
    sync_cube();

    let (first, end) = query_range(ids, &z, batch, row0, rows, has_ids);
    let start = first / STREAM * STREAM;
    copy::<F, N8>(k, &mut tile_k, ks.origin(batch, group), ks.row, row0, z.s, 0usize, rows, p);
    copy::<F, N8>(v, &mut tile_v, vs.origin(batch, group), vs.row, row0, z.s, 0usize, rows, p);
    let mut head = group * share;
    let last = head + share;
    let mut query0 = start;
    if query0 >= end {
        head = last;
    }
    if head < last {
        copy::<F, N8>(q, &mut tile_q, qs.origin(batch, head), qs.row, query0, z.l, 0usize, STREAM, p);
        copy::<F, N8>(dout, &mut tile_d, ds.origin(batch, head), ds.row, query0, z.l, 0usize, STREAM, p);
        let at = ((batch * z.heads as usize + head) * z.lp as usize + query0) / 2;
        copy_stats::<N2>(lse, delta, &mut tile_lse, &mut tile_delta, at, 0usize);
    }
    commit(&even);

    let mut own = Array::<i32>::new(comptime!(2 * blocks));
    #[unroll]
    for i in 0..comptime!(2 * blocks) {
        own[i] = 0i32;
        if comptime!(has_ids) {
            own[i] = slot_id(ids, &z, batch, first_row + lane.row + comptime!(i * 8));
        }
    }
    let mut sums_k = zeros::<N2>(comptime!(blocks * width));
    let mut sums_v = zeros::<N2>(comptime!(blocks * width));
    even.wait_parity(0u32);
    let own_at = plane * comptime!(16 * blocks * stride) + lane.left;
    let keys = hold_rows::<F, N8, N2>(mma, &tile_k, own_at, blocks, hold, p);
    let values = hold_rows::<F, N8, N2>(mma, &tile_v, own_at, blocks, hold, p);

    let mut turn = 0u32.runtime();
    while head < last {
        let mut next = query0 + STREAM;
        let mut next_head = head;
        if next >= end {
            next = start;
            next_head = head + 1;
        }
        let odd_turn = turn % 2;
        if turn > 0 {
            if odd_turn == 0 {
                even.wait_parity((turn / 2) % 2);
            } else {
                odd.wait_parity((turn / 2) % 2);
            }
            sync_cube();
        }
        if next_head < last {
            let base = (1 - odd_turn) as usize * size;
            copy::<F, N8>(q, &mut tile_q, qs.origin(batch, next_head), qs.row, next, z.l, base, STREAM, p);
            copy::<F, N8>(dout, &mut tile_d, ds.origin(batch, next_head), ds.row, next, z.l, base, STREAM, p);
            let at = ((batch * z.heads as usize + next_head) * z.lp as usize + next) / 2;
            copy_stats::<N2>(lse, delta, &mut tile_lse, &mut tile_delta, at, (1 - odd_turn) as usize * comptime!(STREAM / 2));
            if odd_turn == 0 {
                commit(&odd);
            } else {
                commit(&even);
            }
        }
        let base = odd_turn as usize * size;
        let stats = odd_turn as usize * comptime!(STREAM / 2) + lane.pair;
        // The last slot of the plane is no later than the first query.
        let mut all = first_row + comptime!(16 * blocks - 1) <= query0 + shift;
        if comptime!(has_ids) {
            let mine = ids[slot_plan(&z, batch, first_row / BLOCK) + 2];
            all = all && mine >= 0 && mine == ids[query_plan(&z, batch, query0 / BLOCK) + 2];
        }
        #[unroll]
        for c in 0..comptime!(STREAM / part) {
            let from = query0 + comptime!(c * part);
            if first_row <= from + comptime!(part - 1) + shift {
                let right = base + lane.right + comptime!(c * part * stride);
                let turned = base + lane.turned + comptime!(c * part * stride);
                let mut weights = scores::<F, N8, N2>(mma, &keys, &tile_k, own_at, &tile_q, right, blocks, columns, hold, p);
                if !all {
                    hide::<N2>(&mut weights, ids, &own, &z, batch, first_row, from, &lane, blocks, columns, true, has_ids);
                }
                #[unroll]
                for j in 0..columns {
                    let base = tile_lse[stats + comptime!(c * part / 2 + j * 4)];
                    #[unroll]
                    for m in 0..blocks {
                        let block = weights.index_mut(comptime!(m * columns + j));
                        block[0] = Vector::exp(block[0] * Vector::new(scale) - base);
                        block[1] = Vector::exp(block[1] * Vector::new(scale) - base);
                    }
                }
                gather::<F, N8, N2>(mma, &weights, &tile_d, turned, &mut sums_v, blocks, columns, p);
                let mut dots = scores::<F, N8, N2>(mma, &values, &tile_v, own_at, &tile_d, right, blocks, columns, hold, p);
                #[unroll]
                for j in 0..columns {
                    let mean = tile_delta[stats + comptime!(c * part / 2 + j * 4)];
                    #[unroll]
                    for m in 0..blocks {
                        let weight = weights.index(comptime!(m * columns + j));
                        let block = dots.index_mut(comptime!(m * columns + j));
                        block[0] = weight[0] * (block[0] - mean);
                        block[1] = weight[1] * (block[1] - mean);
                    }
                }
                gather::<F, N8, N2>(mma, &dots, &tile_q, turned, &mut sums_k, blocks, columns, p);
            }
        }
        query0 = next;
        head = next_head;
        turn += 1;
    }
    let mut ones = Array::<f32>::new(comptime!(2 * blocks));
    let mut factors = Array::<f32>::new(comptime!(2 * blocks));
    #[unroll]
    for i in 0..comptime!(2 * blocks) {
        ones[i] = 1.0f32;
        factors[i] = scale;
    }
    store::<F, N8, N2>(&sums_k, &factors, &mut tile_k, dk, os.origin(batch, group), os.row, row0, z.s, &lane, blocks, p);
    store::<F, N8, N2>(&sums_v, &ones, &mut tile_v, dv, os.origin(batch, group), os.row, row0, z.s, &lane, blocks, p);
}
