//! Attention on any device: tiles in shared memory, float32 arithmetic.
//!
//! A cube owns `rows` rows of one head, [`UNITS_PER_ROW`] units a row, and walks the tiles of `cols` rows on the other side.

use cubecl::prelude::*;

use crate::attention::cube::shared::*;

/// Units that share a row: each has every fourth column of the scores and every fourth vector of the sums.
pub(crate) const UNITS_PER_ROW: usize = 4;

/// Rows of a tile as float32 vectors of 4, padded with zeros; rows past the end repeat the last one, and are masked later.
#[cube]
fn load<F: Float, N4: Size>(
    from: &Array<F>,
    to: &mut SharedMemory<Vector<f32, N4>>,
    origin: usize,
    stride: u32,
    row0: usize,
    limit: u32,
    #[comptime] rows: usize,
    #[comptime] units: usize,
    #[comptime] p: usize,
) {
    let vectors = comptime!(p.div_ceil(4));
    let mut i = UNIT_POS as usize;
    while i < comptime!(rows * vectors) {
        let row = min(row0 + i / vectors, limit as usize - 1);
        let column = i % vectors;
        let at = origin + row * stride as usize + column * 4;
        let mut value = Vector::<f32, N4>::new(0.0f32);
        #[unroll]
        for e in 0..4usize {
            if comptime!(p.is_multiple_of(4)) || column * 4 + e < p {
                value[e] = f32::cast_from(from[at + e]);
            }
        }
        to[i / vectors * comptime!(vectors | 1) + column] = value;
        i += units;
    }
}

/// Products of the unit's row with its columns of a tile.
#[cube]
fn products<N4: Size>(
    rows: &SharedMemory<Vector<f32, N4>>,
    cols: &SharedMemory<Vector<f32, N4>>,
    row: usize,
    part: usize,
    #[comptime] count: usize,
    #[comptime] p: usize,
) -> Array<f32> {
    let vectors = comptime!(p.div_ceil(4));
    let stride = comptime!(p.div_ceil(4) | 1);
    let mut sums = Array::<Vector<f32, N4>>::new(count);
    #[unroll]
    for i in 0..count {
        sums[i] = Vector::new(0.0f32);
    }
    for d in 0..vectors {
        let own = rows[row * stride + d];
        #[unroll]
        for i in 0..count {
            sums[i] += own * cols[(part + comptime!(i * UNITS_PER_ROW)) * stride + d];
        }
    }
    let mut totals = Array::<f32>::new(count);
    #[unroll]
    for i in 0..count {
        let sum = sums[i];
        totals[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    totals
}

/// Adds `sum over j of weights[row, j] * cols[j]` to the unit's vectors of its row.
#[cube]
fn accumulate<N4: Size>(
    sums: &mut Array<Vector<f32, N4>>,
    weights: &SharedMemory<f32>,
    cols: &SharedMemory<Vector<f32, N4>>,
    row: usize,
    part: usize,
    #[comptime] tile: usize,
    #[comptime] p: usize,
) {
    let vectors = comptime!(p.div_ceil(4));
    let stride = comptime!(p.div_ceil(4) | 1);
    for j in 0..tile {
        let weight = Vector::<f32, N4>::new(weights[row * comptime!(tile + 1) + j]);
        #[unroll]
        for i in 0..comptime!(p.div_ceil(4).div_ceil(UNITS_PER_ROW)) {
            // The last vectors may be past the row: their sums are never stored, but the read must stay inside.
            let at = min(part + comptime!(i * UNITS_PER_ROW), vectors - 1);
            sums[i] += weight * cols[j * stride + at];
        }
    }
}

#[cube]
fn zeros<N4: Size>(#[comptime] p: usize) -> Array<Vector<f32, N4>> {
    let count = comptime!(p.div_ceil(4).div_ceil(UNITS_PER_ROW));
    let mut sums = Array::<Vector<f32, N4>>::new(count);
    #[unroll]
    for i in 0..count {
        sums[i] = Vector::new(0.0f32);
    }
    sums
}

/// Stores the unit's vectors of its row, times `factor`.
#[cube]
fn store<F: Float, N4: Size>(sums: &Array<Vector<f32, N4>>, to: &mut Array<F>, at: usize, part: usize, factor: f32, #[comptime] p: usize) {
    #[unroll]
    for i in 0..comptime!(p.div_ceil(4).div_ceil(UNITS_PER_ROW)) {
        let column = (part + comptime!(i * UNITS_PER_ROW)) * 4;
        let sum = sums[i];
        #[unroll]
        for e in 0..4usize {
            if column + e < p {
                to[at + column + e] = F::cast_from(sum[e] * factor);
            }
        }
    }
}

#[cube]
fn sees(ids: &Array<i32>, z: &Sizes, batch: usize, query: usize, slot: usize, #[comptime] has_ids: bool) -> bool {
    let mut seen = query < z.l as usize && slot <= query + shift(z);
    if comptime!(has_ids) {
        let id = query_id(ids, z, batch, query);
        seen = seen && id >= 0 && id == slot_id(ids, z, batch, slot);
    }
    seen
}

/// Output and log-sum-exps. One cube per `rows` queries of a head.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn forward_tiled<F: Float, N4: Size>(
    q: &Array<F>,
    k: &Array<F>,
    v: &Array<F>,
    ids: &Array<i32>,
    out: &mut Array<F>,
    lse: &mut Array<f32>,
    qs: Strides,
    ks: Strides,
    vs: Strides,
    os: Strides,
    z: Sizes,
    scale: f32,
    #[comptime] p: usize,
    #[comptime] rows: usize,
    #[comptime] cols: usize,
    #[comptime] has_ids: bool,
    #[define(F)] _dtype: StorageType,
) {
    let units = comptime!(rows * UNITS_PER_ROW);
    let stride = comptime!(p.div_ceil(4) | 1);
    let own = comptime!(cols / UNITS_PER_ROW);
    let mut tile_q = SharedMemory::<Vector<f32, N4>>::new(comptime!(rows * stride));
    let mut tile_k = SharedMemory::<Vector<f32, N4>>::new(comptime!(cols * stride));
    let mut weights = SharedMemory::<f32>::new(comptime!(rows * (cols + 1)));
    let mut parts = SharedMemory::<f32>::new(units);

    let tiles = (z.l as usize).div_ceil(rows);
    let heads = z.heads as usize;
    let place = CUBE_POS;
    if place < tiles * heads * z.batch as usize {
        // The longest first.
        let row0 = (tiles - 1 - place % tiles) * rows;
        let batch = place / tiles / heads;
        let head = place / tiles % heads;
        let group = head / (heads / z.groups as usize);
        let row = UNIT_POS as usize / UNITS_PER_ROW;
        let part = UNIT_POS as usize % UNITS_PER_ROW;
        load::<F, N4>(q, &mut tile_q, qs.origin(batch, head), qs.row, row0, z.l, rows, units, p);

        let mut sums = zeros::<N4>(p);
        let mut largest = f32::new(HIDDEN);
        let mut total = f32::new(0.0);
        let (first, end) = slot_range(ids, &z, batch, row0, rows, has_ids);
        let mut slot0 = first / cols * cols;
        while slot0 < end {
            sync_cube();
            load::<F, N4>(k, &mut tile_k, ks.origin(batch, group), ks.row, slot0, z.s, cols, units, p);
            sync_cube();
            let mut scores = products::<N4>(&tile_q, &tile_k, row, part, own, p);
            let mut top = f32::new(HIDDEN);
            #[unroll]
            for i in 0..own {
                let seen = sees(ids, &z, batch, row0 + row, slot0 + part + comptime!(i * UNITS_PER_ROW), has_ids);
                scores[i] = select(seen, scores[i] * scale, HIDDEN);
                top = max(top, scores[i]);
            }
            parts[UNIT_POS as usize] = top;
            sync_cube();
            let before = largest;
            #[unroll]
            for i in 0..UNITS_PER_ROW {
                largest = max(largest, parts[row * UNITS_PER_ROW + i]);
            }
            let decay = f32::exp(before - largest);
            total *= decay;
            #[unroll]
            for i in 0..own {
                let weight = select(scores[i] > HIDDEN, f32::exp(scores[i] - largest), 0.0f32);
                total += weight;
                weights[row * comptime!(cols + 1) + part + comptime!(i * UNITS_PER_ROW)] = weight;
            }
            load::<F, N4>(v, &mut tile_k, vs.origin(batch, group), vs.row, slot0, z.s, cols, units, p);
            sync_cube();
            #[unroll]
            for i in 0..comptime!(p.div_ceil(4).div_ceil(UNITS_PER_ROW)) {
                sums[i] *= Vector::new(decay);
            }
            accumulate::<N4>(&mut sums, &weights, &tile_k, row, part, cols, p);
            slot0 += cols;
        }
        sync_cube();
        parts[UNIT_POS as usize] = total;
        sync_cube();
        total = 0.0f32;
        #[unroll]
        for i in 0..UNITS_PER_ROW {
            total += parts[row * UNITS_PER_ROW + i];
        }
        let query = row0 + row;
        if query < z.l as usize {
            let factor = select(total > 0.0f32, 1.0f32 / max(total, 1e-37f32), 0.0f32);
            store::<F, N4>(&sums, out, os.origin(batch, head) + query * os.row as usize, part, factor, p);
            if part == 0 {
                let at = (batch * heads + head) * z.lp as usize + query;
                lse[at] = select(total > 0.0f32, largest + f32::ln(max(total, 1e-37f32)), NOTHING);
            }
        }
    }
}

/// Gradient of the queries (`keys` false, `dv` unused) or of the keys and values. One cube per `rows` queries of a head, or slots of
/// a key head. `delta` is the row sum of the output times its gradient.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments, unused_assignments)]
pub(crate) fn backward_tiled<F: Float, N4: Size>(
    q: &Array<F>,
    k: &Array<F>,
    v: &Array<F>,
    dout: &Array<F>,
    ids: &Array<i32>,
    lse: &Array<f32>,
    delta: &Array<f32>,
    dq: &mut Array<F>,
    dv: &mut Array<F>,
    qs: Strides,
    ks: Strides,
    vs: Strides,
    ds: Strides,
    os: Strides,
    z: Sizes,
    scale: f32,
    #[comptime] keys: bool,
    #[comptime] p: usize,
    #[comptime] rows: usize,
    #[comptime] cols: usize,
    #[comptime] has_ids: bool,
    #[define(F)] _dtype: StorageType,
) {
    let units = comptime!(rows * UNITS_PER_ROW);
    let stride = comptime!(p.div_ceil(4) | 1);
    let own = comptime!(cols / UNITS_PER_ROW);
    // Own side: queries and output gradients, or keys and values; the other side streams.
    let mut own_a = SharedMemory::<Vector<f32, N4>>::new(comptime!(rows * stride));
    let mut own_b = SharedMemory::<Vector<f32, N4>>::new(comptime!(rows * stride));
    let mut other_a = SharedMemory::<Vector<f32, N4>>::new(comptime!(cols * stride));
    let mut other_b = SharedMemory::<Vector<f32, N4>>::new(comptime!(cols * stride));
    let mut weights = SharedMemory::<f32>::new(comptime!(if keys { rows * (cols + 1) } else { 1 }));
    let mut slopes = SharedMemory::<f32>::new(comptime!(rows * (cols + 1)));

    let share = (z.heads / z.groups) as usize;
    let mut owners = z.heads as usize;
    let mut count = z.l as usize;
    if comptime!(keys) {
        owners = z.groups as usize;
        count = z.s as usize;
    }
    let tiles = count.div_ceil(rows);
    let place = CUBE_POS;
    if place < tiles * owners * z.batch as usize {
        let mut tile = place % tiles;
        if comptime!(!keys) {
            tile = tiles - 1 - tile;
        }
        let row0 = tile * rows;
        let batch = place / tiles / owners;
        let owner = place / tiles % owners;
        let row = UNIT_POS as usize / UNITS_PER_ROW;
        let part = UNIT_POS as usize % UNITS_PER_ROW;
        let mut heads = 1usize.runtime();
        if comptime!(keys) {
            heads = share;
            load::<F, N4>(k, &mut own_a, ks.origin(batch, owner), ks.row, row0, z.s, rows, units, p);
            load::<F, N4>(v, &mut own_b, vs.origin(batch, owner), vs.row, row0, z.s, rows, units, p);
        } else {
            load::<F, N4>(q, &mut own_a, qs.origin(batch, owner), qs.row, row0, z.l, rows, units, p);
            load::<F, N4>(dout, &mut own_b, ds.origin(batch, owner), ds.row, row0, z.l, rows, units, p);
        }
        let mut sum_a = zeros::<N4>(p);
        let mut sum_b = zeros::<N4>(comptime!(if keys { p } else { 1 }));
        for i in 0..heads {
            let mut head = owner;
            if comptime!(keys) {
                head = owner * share + i;
            }
            let group = head / share;
            let stats = (batch * z.heads as usize + head) * z.lp as usize;
            let mut from = 0usize.runtime();
            let mut end = 0usize.runtime();
            if comptime!(keys) {
                let (a, b) = query_range(ids, &z, batch, row0, rows, has_ids);
                from = a / cols * cols;
                end = b;
            } else {
                let (a, b) = slot_range(ids, &z, batch, row0, rows, has_ids);
                from = a / cols * cols;
                end = b;
            }
            while from < end {
                sync_cube();
                if comptime!(keys) {
                    load::<F, N4>(q, &mut other_a, qs.origin(batch, head), qs.row, from, z.l, cols, units, p);
                    load::<F, N4>(dout, &mut other_b, ds.origin(batch, head), ds.row, from, z.l, cols, units, p);
                } else {
                    load::<F, N4>(k, &mut other_a, ks.origin(batch, group), ks.row, from, z.s, cols, units, p);
                    load::<F, N4>(v, &mut other_b, vs.origin(batch, group), vs.row, from, z.s, cols, units, p);
                }
                sync_cube();
                let scores = products::<N4>(&own_a, &other_a, row, part, own, p);
                let dots = products::<N4>(&own_b, &other_b, row, part, own, p);
                #[unroll]
                for i in 0..own {
                    let column = part + comptime!(i * UNITS_PER_ROW);
                    let mut query = row0 + row;
                    let mut slot = from + column;
                    if comptime!(keys) {
                        query = from + column;
                        slot = row0 + row;
                    }
                    let at = stats + min(query, z.l as usize - 1);
                    let seen = sees(ids, &z, batch, query, slot, has_ids);
                    let weight = select(seen, f32::exp(min(scores[i] * scale - lse[at], 0.0f32)), 0.0f32);
                    if comptime!(keys) {
                        weights[row * comptime!(cols + 1) + column] = weight;
                    }
                    slopes[row * comptime!(cols + 1) + column] = weight * (dots[i] - delta[at]);
                }
                sync_cube();
                accumulate::<N4>(&mut sum_a, &slopes, &other_a, row, part, cols, p);
                if comptime!(keys) {
                    accumulate::<N4>(&mut sum_b, &weights, &other_b, row, part, cols, p);
                }
                from += cols;
            }
        }
        if row0 + row < count {
            let at = os.origin(batch, owner) + (row0 + row) * os.row as usize;
            store::<F, N4>(&sum_a, dq, at, part, scale, p);
            if comptime!(keys) {
                store::<F, N4>(&sum_b, dv, at, part, 1.0f32, p);
            }
        }
    }
}
