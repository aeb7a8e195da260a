//! Attention of a few queries over many slots: slots are cut in parts, and the parts' results merged.
//!
//! A cube takes the rows (query heads of a group times queries) that share the keys and values of one part, so that these
//! are read once. Memory traffic is all that counts: every unit reads whole vectors straight into registers.

use cubecl::prelude::*;

use crate::attention::cube::shared::*;

/// Units of a cube.
pub(crate) const UNITS: usize = 128;
/// Units of a cube that merges.
pub(crate) const MERGE_UNITS: usize = 256;

/// How a cube is laid out.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) struct Layout {
    pub p: usize,
    /// Elements of a vector.
    pub size: usize,
    /// Rows, a power of two.
    pub rows: usize,
    /// Slots of a part.
    pub slots: usize,
    /// Units that share a key; their parts of a score meet by plane shuffles.
    pub key_lanes: usize,
    /// Units that share a value.
    pub value_lanes: usize,
    /// There is one part: write the output, not something to merge.
    pub whole: bool,
}

impl Layout {
    const fn vectors(&self) -> usize {
        self.p / self.size
    }

    /// Vectors in flight per unit.
    fn ahead(&self, lanes: usize) -> usize {
        (4 * lanes / self.vectors()).clamp(1, self.slots * lanes / UNITS)
    }
}

/// Largest over the `width` units of a row; every unit gets it.
#[cube]
fn row_max(value: f32, parts: &mut SharedMemory<f32>, #[comptime] width: usize) -> f32 {
    let unit = UNIT_POS as usize;
    parts[unit] = value;
    sync_cube();
    #[unroll]
    for i in 1..comptime!(width.ilog2() as usize + 1) {
        let half = comptime!(width >> i);
        if unit % width < half {
            parts[unit] = max(parts[unit], parts[unit + half]);
        }
        sync_cube();
    }
    parts[unit / width * width]
}

/// Slots that there are: all of them, or in a buffer one more than the first of its places.
#[cube]
fn end_of(places: &Array<i32>, z: &Sizes, #[comptime] counted: bool) -> usize {
    let mut end = z.s as usize;
    if comptime!(counted) {
        end = min(end, places[0] as usize + 1);
    }
    end
}

/// Scores of the part's slots, scaled, [`HIDDEN`] where a row must not look.
#[cube]
fn scores<F: Float, N: Size>(
    k: &Array<Vector<F, N>>,
    ids: &Array<i32>,
    queries: &SharedMemory<Vector<f32, N>>,
    to: &mut SharedMemory<f32>,
    origin: usize,
    stride: u32,
    batch: usize,
    row0: usize,
    slot0: usize,
    end: usize,
    z: &Sizes,
    #[comptime] layout: Layout,
    #[comptime] has_ids: bool,
    #[comptime] counted: bool,
) {
    let vectors = comptime!(layout.vectors());
    let lanes = comptime!(layout.key_lanes);
    let own = comptime!(layout.vectors() / layout.key_lanes);
    let groups = comptime!(UNITS / layout.key_lanes);
    let ahead = comptime!(layout.ahead(layout.key_lanes));
    let lane = UNIT_POS as usize % lanes;
    let first = UNIT_POS as usize / lanes;
    for step in 0..comptime!(layout.slots * layout.key_lanes / UNITS / layout.ahead(layout.key_lanes)) {
        let mut keys = Array::<Vector<F, N>>::new(comptime!(ahead * own));
        #[unroll]
        for j in 0..ahead {
            let slot = min(slot0 + first + (step * ahead + j) * groups, end - 1);
            let at = origin + slot * stride as usize + lane;
            #[unroll]
            for i in 0..own {
                keys[comptime!(j * own + i)] = k[at + comptime!(i * lanes)];
            }
        }
        #[unroll]
        for j in 0..ahead {
            let local = first + (step * ahead + j) * groups;
            let slot = slot0 + local;
            let mut id = 0i32.runtime();
            if comptime!(has_ids) {
                id = slot_id(ids, z, batch, slot);
            }
            #[unroll]
            for r in 0..comptime!(layout.rows) {
                let mut products = Vector::<f32, N>::new(0.0f32);
                #[unroll]
                for i in 0..own {
                    let key = Vector::<f32, N>::cast_from(keys[comptime!(j * own + i)]);
                    products += key * queries[comptime!(r * vectors + i * lanes) + lane];
                }
                let mut score = f32::new(0.0);
                #[unroll]
                for e in 0..comptime!(layout.size) {
                    score += products[e];
                }
                #[unroll]
                for i in 0..comptime!(layout.key_lanes.ilog2() as usize) {
                    score += plane_shuffle_xor(score, comptime!(1u32 << i as u32));
                }
                if lane == comptime!(r % layout.key_lanes) {
                    let query = (row0 + r) % z.l as usize;
                    let mut seen = slot < end;
                    if comptime!(!counted) {
                        seen = slot <= query + shift(z);
                    }
                    if comptime!(has_ids) {
                        seen = seen && id >= 0 && id == query_id(ids, z, batch, query);
                    }
                    to[comptime!(r * layout.slots) + local] = select(seen, score, HIDDEN);
                }
            }
        }
    }
}

/// One part of the slots of a group. Without `whole`, `sums` get the weighted sums `[.., parts, p]` and `stats` the largest
/// score and the sum of weights `[.., parts, 2]`, both after `[b, h, l]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn decode_part<F: Float, N: Size>(
    q: &Array<Vector<F, N>>,
    k: &Array<Vector<F, N>>,
    v: &Array<Vector<F, N>>,
    ids: &Array<i32>,
    places: &Array<i32>,
    out: &mut Array<Vector<F, N>>,
    sums: &mut Array<Vector<f32, N>>,
    stats: &mut Array<f32>,
    qs: Strides,
    ks: Strides,
    vs: Strides,
    os: Strides,
    z: Sizes,
    scale: f32,
    parts: u32,
    #[comptime] layout: Layout,
    #[comptime] has_ids: bool,
    #[comptime] counted: bool,
    #[define(F)] _dtype: StorageType,
) {
    let rows = comptime!(layout.rows);
    let vectors = comptime!(layout.vectors());
    let lanes = comptime!(layout.value_lanes);
    let own = comptime!(layout.vectors() / layout.value_lanes);
    let groups = comptime!(UNITS / layout.value_lanes);
    let ahead = comptime!(layout.ahead(layout.value_lanes));
    let width = comptime!(UNITS / layout.rows);
    let mut queries = SharedMemory::<Vector<f32, N>>::new(comptime!(rows * vectors));
    let mut weights = SharedMemory::<f32>::new(comptime!(layout.rows * layout.slots));
    let mut scratch = SharedMemory::<f32>::new(UNITS);
    let mut totals = SharedMemory::<f32>::new(comptime!(rows * groups));
    let mut meeting = SharedMemory::<Vector<f32, N>>::new(UNITS);

    let share = z.heads as usize / z.groups as usize;
    let count = share * z.l as usize;
    let blocks = count.div_ceil(rows);
    let place = CUBE_POS;
    let end = end_of(places, &z, counted);
    // Of a buffer the cubes behind its end have nothing to do.
    if place < parts as usize * blocks * (z.groups * z.batch) as usize && place % parts as usize * comptime!(layout.slots) < end {
        let part = place % parts as usize;
        let row0 = place / parts as usize % blocks * rows;
        let group = place / parts as usize / blocks % z.groups as usize;
        let batch = place / parts as usize / blocks / z.groups as usize;
        let slot0 = part * comptime!(layout.slots);
        let unit = UNIT_POS as usize;

        let mut i = unit;
        while i < comptime!(rows * vectors) {
            let row = min(row0 + i / vectors, count - 1);
            let head = group * share + row / z.l as usize;
            let at = qs.origin(batch, head) + row % z.l as usize * qs.row as usize + i % vectors;
            queries[i] = Vector::<f32, N>::cast_from(q[at]) * Vector::new(scale);
            i += UNITS;
        }
        sync_cube();
        scores::<F, N>(
            k,
            ids,
            &queries,
            &mut weights,
            ks.origin(batch, group),
            ks.row,
            batch,
            row0,
            slot0,
            end,
            &z,
            layout,
            has_ids,
            counted,
        );
        sync_cube();
        let row = unit / width;
        let mut top = f32::new(HIDDEN);
        #[unroll]
        for i in 0..comptime!((layout.slots / width).max(1)) {
            let slot = unit % width + comptime!(i * width);
            if slot < comptime!(layout.slots) {
                top = max(top, weights[row * comptime!(layout.slots) + slot]);
            }
        }
        top = row_max(top, &mut scratch, width);
        #[unroll]
        for i in 0..comptime!((layout.slots / width).max(1)) {
            let slot = unit % width + comptime!(i * width);
            if slot < comptime!(layout.slots) {
                let at = row * comptime!(layout.slots) + slot;
                let score = weights[at];
                weights[at] = select(score > HIDDEN, f32::exp(score - top), 0.0f32);
            }
        }
        sync_cube();

        let lane = unit % lanes;
        let first = unit / lanes;
        let value0 = vs.origin(batch, group) + lane;
        let mut acc = Array::<Vector<f32, N>>::new(comptime!(rows * own));
        let mut total = Array::<f32>::new(rows);
        #[unroll]
        for r in 0..rows {
            total[r] = 0.0f32;
            #[unroll]
            for i in 0..own {
                acc[comptime!(r * own + i)] = Vector::new(0.0f32);
            }
        }
        for step in 0..comptime!(layout.slots * lanes / UNITS / ahead) {
            let mut values = Array::<Vector<F, N>>::new(comptime!(ahead * own));
            #[unroll]
            for j in 0..ahead {
                let slot = min(slot0 + first + (step * ahead + j) * groups, end - 1);
                #[unroll]
                for i in 0..own {
                    values[comptime!(j * own + i)] = v[value0 + slot * vs.row as usize + comptime!(i * lanes)];
                }
            }
            #[unroll]
            for j in 0..ahead {
                let local = first + (step * ahead + j) * groups;
                #[unroll]
                for r in 0..rows {
                    let weight = weights[comptime!(r * layout.slots) + local];
                    total[r] += weight;
                    #[unroll]
                    for i in 0..own {
                        let value = Vector::<f32, N>::cast_from(values[comptime!(j * own + i)]);
                        acc[comptime!(r * own + i)] += value * Vector::new(weight);
                    }
                }
            }
        }
        if lane == 0 {
            #[unroll]
            for r in 0..rows {
                totals[comptime!(r * groups) + first] = total[r];
            }
        }
        #[unroll]
        for r in 0..rows {
            #[unroll]
            for i in 0..own {
                sync_cube();
                meeting[unit] = acc[comptime!(r * own + i)];
                sync_cube();
                if unit < lanes && row0 + r < count {
                    let mut sum = Vector::<f32, N>::new(0.0f32);
                    let mut weight = f32::new(0.0);
                    for other in 0..groups {
                        sum += meeting[other * lanes + unit];
                        weight += totals[comptime!(r * groups) + other];
                    }
                    let head = group * share + (row0 + r) / z.l as usize;
                    let query = (row0 + r) % z.l as usize;
                    let column = unit + comptime!(i * lanes);
                    if comptime!(layout.whole) {
                        let factor = select(weight > 0.0f32, 1.0f32 / max(weight, 1e-37f32), 0.0f32);
                        let at = os.origin(batch, head) + query * os.row as usize + column;
                        out[at] = Vector::<F, N>::cast_from(sum * Vector::new(factor));
                    } else {
                        let at = ((batch * z.heads as usize + head) * z.l as usize + query) * parts as usize + part;
                        sums[at * vectors + column] = sum;
                        if column == 0 {
                            stats[at * 2] = scratch[comptime!(r * width)];
                            stats[at * 2 + 1] = weight;
                        }
                    }
                }
            }
        }
    }
}

/// Merges the parts of one row a cube.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn decode_merge<F: Float, N: Size>(
    sums: &Array<Vector<f32, N>>,
    stats: &Array<f32>,
    places: &Array<i32>,
    out: &mut Array<Vector<F, N>>,
    os: Strides,
    z: Sizes,
    parts: u32,
    slots: u32,
    #[comptime] vectors: usize,
    #[comptime] counted: bool,
    #[define(F)] _dtype: StorageType,
) {
    let groups = comptime!(MERGE_UNITS / vectors);
    let mut tops = SharedMemory::<f32>::new(MERGE_UNITS);
    let mut totals = SharedMemory::<f32>::new(groups);
    let mut meeting = SharedMemory::<Vector<f32, N>>::new(comptime!(groups * vectors));
    let place = CUBE_POS;
    if place < (z.batch * z.heads * z.l) as usize {
        let unit = UNIT_POS as usize;
        let column = unit % vectors;
        let group = unit / vectors;
        let live = end_of(places, &z, counted).div_ceil(slots as usize);
        let mut top = f32::new(HIDDEN);
        let mut i = unit;
        while i < live {
            top = max(top, stats[(place * parts as usize + i) * 2]);
            i += MERGE_UNITS;
        }
        top = row_max(top, &mut tops, MERGE_UNITS);
        let mut sum = Vector::<f32, N>::new(0.0f32);
        let mut total = f32::new(0.0);
        let mut part = group;
        if group < groups {
            while part < live {
                let at = place * parts as usize + part;
                let weight = f32::exp(stats[at * 2] - top);
                total += weight * stats[at * 2 + 1];
                sum += sums[at * vectors + column] * Vector::new(weight);
                part += groups;
            }
            meeting[unit] = sum;
            if column == 0 {
                totals[group] = total;
            }
        }
        sync_cube();
        if unit < vectors {
            sum = Vector::new(0.0f32);
            total = 0.0f32;
            for other in 0..groups {
                sum += meeting[other * vectors + unit];
                total += totals[other];
            }
            let query = place % z.l as usize;
            let head = place / z.l as usize % z.heads as usize;
            let batch = place / z.l as usize / z.heads as usize;
            let factor = select(total > 0.0f32, 1.0f32 / max(total, 1e-37f32), 0.0f32);
            let at = os.origin(batch, head) + query * os.row as usize + unit;
            out[at] = Vector::<F, N>::cast_from(sum * Vector::new(factor));
        }
    }
}
