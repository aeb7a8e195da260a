//! Forward with tensor cores (FlashAttention-2, arXiv 2307.08691): scores, running softmax and weighted sum in registers.

use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;

use super::tiles::*;
use crate::attention::cube::shared::*;

/// Sums of the values and what the running softmax needs, for the plane's rows.
#[derive(CubeType)]
struct Running<N2: Size> {
    sums: Sequence<Array<Vector<f32, N2>>>,
    /// Largest score so far, not scaled.
    largest: Array<f32>,
    /// This unit's part of the sum of weights.
    total: Array<f32>,
}

/// Turns scores into weights and rescales what was summed before.
#[cube]
fn soften<N2: Size>(
    scores: &mut Sums<N2>,
    running: &mut Running<N2>,
    scale: f32,
    #[comptime] blocks: usize,
    #[comptime] columns: usize,
    #[comptime] width: usize,
) {
    let mut decays = Array::<f32>::new(comptime!(2 * blocks));
    let mut least = f32::new(1.0);
    #[unroll]
    for m in 0..blocks {
        #[unroll]
        for r in 0..2usize {
            let at = comptime!(m * 2 + r);
            let before = running.largest[at];
            let mut top = before;
            #[unroll]
            for j in 0..columns {
                let pair = scores.index(comptime!(m * columns + j))[r];
                top = max(top, max(pair[0], pair[1]));
            }
            top = max(top, plane_shuffle_xor(top, 1u32));
            top = max(top, plane_shuffle_xor(top, 2u32));
            running.largest[at] = top;
            // A row that has seen nothing yet: any base will do that leaves its weights zero.
            let base = select(top <= HIDDEN, 0.0f32, top);
            let decay = f32::exp((before - base) * scale);
            decays[at] = decay;
            least = min(least, decay);
            let shift = Vector::<f32, N2>::new(base * scale);
            let factor = Vector::<f32, N2>::new(scale);
            let mut part = Vector::<f32, N2>::new(0.0f32);
            #[unroll]
            for j in 0..columns {
                let block = scores.index_mut(comptime!(m * columns + j));
                let weight = Vector::exp(block[r] * factor - shift);
                block[r] = weight;
                part += weight;
            }
            running.total[at] = running.total[at] * decay + part[0] + part[1];
        }
    }
    // The largest score changes ever more rarely along a row.
    if least < 1.0f32 {
        #[unroll]
        for m in 0..blocks {
            #[unroll]
            for r in 0..2usize {
                let decay = Vector::<f32, N2>::new(decays[comptime!(m * 2 + r)]);
                #[unroll]
                for j in 0..width {
                    let block = running.sums.index_mut(comptime!(m * width + j));
                    block[r] *= decay;
                }
            }
        }
    }
}

/// Output and log-sum-exps. One cube per `PLANES * 16 * blocks` queries of a head; `hold` keeps the queries in registers.
#[cube(launch_unchecked, fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
pub(crate) fn forward_mma<F: Float, N8: Size, N2: Size>(
    q: &Array<Vector<F, N8>>,
    k: &Array<Vector<F, N8>>,
    v: &Array<Vector<F, N8>>,
    ids: &Array<i32>,
    out: &mut Array<Vector<F, N8>>,
    lse: &mut Array<f32>,
    qs: Strides,
    ks: Strides,
    vs: Strides,
    os: Strides,
    z: Sizes,
    scale: f32,
    #[comptime] p: usize,
    #[comptime] blocks: usize,
    #[comptime] hold: bool,
    #[comptime] has_ids: bool,
    #[define(F)] _dtype: StorageType,
) {
    let rows = comptime!(PLANES * 16 * blocks);
    let stride = comptime!(stride(p));
    let size = comptime!(STREAM * stride);
    let width = comptime!(p / 8);
    let steps = comptime!(p / 16);
    let columns = comptime!(STREAM / 8);
    let mma = Mma::<F>::new(16usize, 8usize, 16usize);
    let mut tile_q = SharedMemory::<Vector<F, N8>>::new_aligned(comptime!(rows * stride), 128usize);
    let mut tile_k = SharedMemory::<Vector<F, N8>>::new_aligned(comptime!(2 * size), 128usize);
    let mut tile_v = SharedMemory::<Vector<F, N8>>::new_aligned(comptime!(2 * size), 128usize);
    let even = Barrier::shared(CUBE_DIM, UNIT_POS == 0);
    let odd = Barrier::shared(CUBE_DIM, UNIT_POS == 0);

    let tiles = (z.l as usize).div_ceil(rows);
    let heads = z.heads as usize;
    let place = CUBE_POS;
    // The longest first.
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
    if slot0 < end {
        copy::<F, N8>(k, &mut tile_k, key0, ks.row, slot0, z.s, 0usize, STREAM, p);
        copy::<F, N8>(v, &mut tile_v, value0, vs.row, slot0, z.s, 0usize, STREAM, p);
    }
    commit(&even);

    let mut own = Array::<i32>::new(comptime!(2 * blocks));
    let mut running = Running::<N2> {
        sums: zeros::<N2>(comptime!(blocks * width)),
        largest: Array::new(comptime!(2 * blocks)),
        total: Array::new(comptime!(2 * blocks)),
    };
    #[unroll]
    for i in 0..comptime!(2 * blocks) {
        running.largest[i] = HIDDEN;
        running.total[i] = 0.0f32;
        own[i] = 0i32;
        if comptime!(has_ids) {
            own[i] = query_id(ids, &z, batch, first_row + lane.row + comptime!(i * 8));
        }
    }
    even.wait_parity(0u32);
    let query_at = plane * comptime!(16 * blocks * stride) + lane.left;
    let mut queries = Sequence::<Array<Vector<F, N2>>>::new();
    if comptime!(hold) {
        #[unroll]
        for m in 0..blocks {
            #[unroll]
            for d in 0..steps {
                queries.push(fragment::<F, N8, N2>(mma, &tile_q, query_at + comptime!(m * 16 * stride + d * 2), false));
            }
        }
    }

    let mut turn = 0u32.runtime();
    while slot0 < end {
        let next = slot0 + STREAM;
        let odd_turn = turn % 2;
        // The first tile has been waited for.
        if turn > 0 {
            if odd_turn == 0 {
                even.wait_parity((turn / 2) % 2);
            } else {
                odd.wait_parity((turn / 2) % 2);
            }
            // All planes are through with the tiles before.
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
        if slot0 <= first_row + comptime!(16 * blocks - 1) + shift {
            let mut scores = zeros::<N2>(comptime!(blocks * columns));
            let key_at = base + lane.right;
            #[unroll]
            for d in 0..steps {
                let mut now = Sequence::<Array<Vector<F, N2>>>::new();
                if comptime!(!hold) {
                    #[unroll]
                    for m in 0..blocks {
                        now.push(fragment::<F, N8, N2>(mma, &tile_q, query_at + comptime!(m * 16 * stride + d * 2), false));
                    }
                }
                #[unroll]
                for j in 0..comptime!(STREAM / 16) {
                    let keys = fragment::<F, N8, N2>(mma, &tile_k, key_at + comptime!(j * 16 * stride + d * 2), false);
                    #[unroll]
                    for m in 0..blocks {
                        if comptime!(hold) {
                            multiply::<F, N2>(
                                mma,
                                queries.index(comptime!(m * steps + d)),
                                &keys,
                                &mut scores,
                                comptime!(m * columns + 2 * j),
                            );
                        } else {
                            multiply::<F, N2>(mma, now.index(m), &keys, &mut scores, comptime!(m * columns + 2 * j));
                        }
                    }
                }
            }
            let mut all = next <= first_row + shift + 1;
            if comptime!(has_ids) {
                let mine = ids[query_plan(&z, batch, first_row / BLOCK) + 2];
                all = all && mine >= 0 && mine == ids[slot_plan(&z, batch, slot0 / BLOCK) + 2];
            }
            if !all {
                hide::<N2>(&mut scores, ids, &own, &z, batch, first_row, slot0, &lane, blocks, columns, false, has_ids);
            }
            soften::<N2>(&mut scores, &mut running, scale, blocks, columns, width);
            let value_at = base + lane.turned;
            #[unroll]
            for i in 0..comptime!(STREAM / 16) {
                let mut weights = Sequence::<Array<Vector<F, N2>>>::new();
                #[unroll]
                for m in 0..blocks {
                    weights.push(left::<F, N2>(&scores, comptime!(m * columns + 2 * i)));
                }
                #[unroll]
                for j in 0..steps {
                    let values = fragment::<F, N8, N2>(mma, &tile_v, value_at + comptime!(i * 16 * stride + j * 2), true);
                    #[unroll]
                    for m in 0..blocks {
                        multiply::<F, N2>(mma, weights.index(m), &values, &mut running.sums, comptime!(m * width + 2 * j));
                    }
                }
            }
        }
        slot0 = next;
        turn += 1;
    }

    let stats = (batch * heads + head) * z.lp as usize + first_row + lane.row;
    let mut factors = Array::<f32>::new(comptime!(2 * blocks));
    #[unroll]
    for i in 0..comptime!(2 * blocks) {
        let mut total = running.total[i];
        total += plane_shuffle_xor(total, 1u32);
        total += plane_shuffle_xor(total, 2u32);
        let some = total > 0.0f32 && first_row + lane.row + comptime!(i * 8) < z.l as usize;
        factors[i] = select(some, 1.0f32 / total, 0.0f32);
        if lane.pair == 0 {
            lse[stats + comptime!(i * 8)] = select(some, running.largest[i] * scale + f32::ln(total), NOTHING);
        }
    }
    store::<F, N8, N2>(&running.sums, &factors, &mut tile_q, out, os.origin(batch, head), os.row, row0, z.l, &lane, blocks, p);
}
