//! States at the edges of chunks: what each chunk adds, and the recurrence over chunks, in both directions.

use cubecl::prelude::*;

use super::tile::*;

/// What each chunk adds by itself to the state that leaves it, `sum_j delta_j e_j x_j B_j^T`; with `back`, what it adds
/// to the gradient of the state that enters it, `sum_i f_i dy_i C_i^T`. One cube per row, chunk, head and tile.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub(super) fn local_states<F: Numeric, WP: Size, WN: Size, V: Size>(
    x: &Array<Vector<F, WP>>,
    b: &Array<Vector<F, WN>>,
    delta: &Array<f32>,
    sums: &Array<f32>,
    filled: &Array<i32>,
    bounds: &Array<i32>,
    states: &mut Array<Vector<f32, WN>>,
    cubes: u32,
    l: u32,
    h: u32,
    p: u32,
    g: u32,
    n: u32,
    #[comptime] back: bool,
    #[comptime] plan: Plan,
    #[define(F)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let q = comptime!(plan.q);
    let (l, h, p, g, n) = (l as usize, h as usize, p as usize, g as usize, n as usize);
    let chunks = l.div_ceil(q);
    let tiles = n.div_ceil(q);
    let blocks = p.div_ceil(q);
    let column = CUBE_POS % tiles * q;
    let line = CUBE_POS / tiles % blocks * q;
    let rest = CUBE_POS / tiles / blocks;
    let at = place(bounds, rest / h / chunks, rest / h % chunks, rest % h, l, plan);
    let mut left = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let mut right = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let mut decays = new_decays(plan);
    load_decays(&mut decays, delta, sums, filled, bounds, at, l, h, chunks * q, plan);
    sync_cube();

    let from_x = tokens_of(at, l, h, at.head, p);
    let from_b = tokens_of(at, l, g, at.head / (h / g), n);
    let mut out = zeros::<V>(plan);
    let mut k = 0usize.runtime();
    while k < q {
        if comptime!(back) {
            load::<F, WP, V>(&mut left, x, from_x, k, line, &decays.enter, true, plan.wp, plan);
        } else {
            load::<F, WP, V>(&mut left, x, from_x, k, line, &decays.feed, true, plan.wp, plan);
        }
        load::<F, WN, V>(&mut right, b, from_b, k, column, &decays.sums, false, plan.wn, plan);
        sync_cube();
        multiply::<V>(&mut out, &left, 0usize, &right, plan);
        sync_cube();
        k += SLICE;
    }
    let to = state_of(at, chunks, h, p, n);
    #[unroll]
    for i in 0..plan.rows() {
        write::<f32, WN, V>(states, to, line + first_row(plan) + i, column + first_column(plan), out[i], plan.wn, plan.v);
    }
}

/// Chunks whose states a unit asks for at a time.
const BATCH: usize = 4;

/// Replaces what chunks add by the state that enters each, from the first chunk on; with `back` by the gradient of the
/// state that leaves each, from the last one on. One unit per row, head and vector of a state.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub(super) fn pass_states<W: Size>(
    states: &mut Array<Vector<f32, W>>,
    start: &Array<Vector<f32, W>>,
    end: &mut Array<Vector<f32, W>>,
    sums: &Array<f32>,
    filled: &Array<i32>,
    bounds: &Array<i32>,
    units: u32,
    l: u32,
    h: u32,
    size: u32,
    #[comptime] started: bool,
    #[comptime] back: bool,
    #[comptime] plan: Plan,
) {
    let unit = ABSOLUTE_POS;
    if unit >= units as usize {
        terminate!();
    }
    let q = comptime!(plan.q);
    let (l, h, size) = (l as usize, h as usize, size as usize);
    let chunks = l.div_ceil(q);
    let vector = unit % size;
    let head = unit / size % h;
    let row = unit / size / h;
    let mut state = Vector::<f32, W>::new(0.0f32);
    if comptime!(started) {
        state = start[unit];
    }
    let mut first = 0usize.runtime();
    while first < chunks {
        let mut added = Array::<Vector<f32, W>>::new(BATCH);
        let mut carry = Array::<f32>::new(BATCH);
        #[unroll]
        for i in 0..BATCH {
            let chunk = min(first + i, chunks - 1);
            let chunk = if comptime!(back) { chunks - 1 - chunk } else { chunk };
            added[i] = states[((row * chunks + chunk) * h + head) * size + vector];
            let mut kept = sums[(row * h + head) * chunks * q + chunk * q + comptime!(plan.q - 1)].exp();
            if comptime!(plan.segments) {
                if id_before(filled, bounds, row, chunk, l, plan) != id_after(filled, row, chunk, l, plan) {
                    kept = 0.0f32;
                }
            }
            carry[i] = kept;
        }
        #[unroll]
        for i in 0..BATCH {
            if first + i < chunks {
                let chunk = if comptime!(back) { chunks - 1 - first - i } else { first + i };
                states[((row * chunks + chunk) * h + head) * size + vector] = state;
                state = state * Vector::<f32, W>::new(carry[i]) + added[i];
            }
        }
        first += BATCH;
    }
    end[unit] = state;
}
