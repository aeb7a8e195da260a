//! Products of `C` and `B`, and the outputs.

use cubecl::prelude::*;

use super::tile::*;

/// `scores[i, j] = C_i . B_j` inside chunks, f32 `[b, chunks, g, q, q]`. One cube per row, chunk and group.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub(super) fn scores_kernel<F: Numeric, WN: Size, V: Size>(
    b: &Array<Vector<F, WN>>,
    c: &Array<Vector<F, WN>>,
    bounds: &Array<i32>,
    scores: &mut Array<Vector<f32, V>>,
    cubes: u32,
    l: u32,
    g: u32,
    n: u32,
    #[comptime] plan: Plan,
    #[define(F)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let q = comptime!(plan.q);
    let (l, g, n) = (l as usize, g as usize, n as usize);
    let chunks = l.div_ceil(q);
    let at = place(bounds, CUBE_POS / g / chunks, CUBE_POS / g % chunks, CUBE_POS % g, l, plan);
    let mut left = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let mut right = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let unused = SharedMemory::<f32>::new(1usize);
    let from = tokens_of(at, l, g, at.head, n);
    let mut out = zeros::<V>(plan);
    let mut k = 0usize.runtime();
    while k < n {
        load_turned::<F, WN, V>(&mut left, c, from, 0usize, k, &unused, false, plan.wn, plan);
        load_turned::<F, WN, V>(&mut right, b, from, 0usize, k, &unused, false, plan.wn, plan);
        sync_cube();
        multiply::<V>(&mut out, &left, 0usize, &right, plan);
        sync_cube();
        k += SLICE;
    }
    #[unroll]
    for i in 0..plan.rows() {
        scores[CUBE_POS * comptime!(plan.q * plan.q / plan.v) + ((first_row(plan) + i) * q + first_column(plan)) / plan.v] = out[i];
    }
}

/// `y_i = sum_j L_ij scores_ij delta_j x_j + f_i S C_i + d x_i`. One cube per row, chunk, head and tile of `p`.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub(super) fn output_kernel<F: Numeric, WP: Size, WN: Size, V: Size>(
    x: &Array<Vector<F, WP>>,
    c: &Array<Vector<F, WN>>,
    d: &Array<f32>,
    scores: &Array<Vector<f32, V>>,
    states: &Array<Vector<f32, WN>>,
    delta: &Array<f32>,
    sums: &Array<f32>,
    filled: &Array<i32>,
    bounds: &Array<i32>,
    y: &mut Array<Vector<F, WP>>,
    cubes: u32,
    l: u32,
    h: u32,
    p: u32,
    g: u32,
    n: u32,
    #[comptime] skip: bool,
    #[comptime] plan: Plan,
    #[define(F)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let q = comptime!(plan.q);
    let (l, h, p, g, n) = (l as usize, h as usize, p as usize, g as usize, n as usize);
    let chunks = l.div_ceil(q);
    let tiles = p.div_ceil(q);
    let column = CUBE_POS % tiles * q;
    let rest = CUBE_POS / tiles;
    let at = place(bounds, rest / h / chunks, rest / h % chunks, rest % h, l, plan);
    let group = at.head / (h / g);
    let mut left = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let mut right = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let mut mix = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(plan.q)), 16usize);
    let mut decays = new_decays(plan);
    load_decays(&mut decays, delta, sums, filled, bounds, at, l, h, chunks * q, plan);
    sync_cube();

    // L_ij scores_ij delta_j, lines by j.
    let (row, j) = (first_row(plan), first_column(plan));
    let from = ((at.row * chunks + at.chunk) * g + group) * comptime!(plan.q * plan.q / plan.v);
    #[unroll]
    for r in 0..comptime!(plan.rows() / plan.v) {
        let mut lines = Array::<Vector<f32, V>>::new(plan.v);
        #[unroll]
        for i in 0..plan.v {
            let i_row = row + comptime!(r * plan.v + i);
            let line = scores[from + (i_row * q + j) / plan.v];
            let mut mixed = Vector::<f32, V>::empty();
            #[unroll]
            for e in 0..plan.v {
                mixed[e] = line[e] * decay(&decays, i_row, j + e, plan) * decays.delta[j + e];
            }
            lines[i] = mixed;
        }
        #[unroll]
        for e in 0..plan.v {
            let mut turned = Vector::<f32, V>::empty();
            #[unroll]
            for i in 0..plan.v {
                let line = lines[i];
                turned[i] = line[e];
            }
            mix[(j + e) * plan.line() + row / plan.v + r] = turned;
        }
    }

    let from_x = tokens_of(at, l, h, at.head, p);
    let from_c = tokens_of(at, l, g, group, n);
    let from_state = state_of(at, chunks, h, p, n);
    let mut out = zeros::<V>(plan);
    let mut k = 0usize.runtime();
    while k < n {
        load_turned::<F, WN, V>(&mut left, c, from_c, 0usize, k, &decays.enter, true, plan.wn, plan);
        load_turned::<f32, WN, V>(&mut right, states, from_state, column, k, &decays.enter, false, plan.wn, plan);
        sync_cube();
        multiply::<V>(&mut out, &left, 0usize, &right, plan);
        sync_cube();
        k += SLICE;
    }
    let mut k = 0usize.runtime();
    while k < q {
        load::<F, WP, V>(&mut right, x, from_x, k, column, &decays.enter, false, plan.wp, plan);
        sync_cube();
        multiply::<V>(&mut out, &mix, k, &right, plan);
        sync_cube();
        k += SLICE;
    }

    let to = Matrix { start: from_x.start, stride: from_x.stride, rows: at.tokens, columns: p };
    #[unroll]
    for i in 0..plan.rows() {
        let mut value = out[i];
        if comptime!(skip) {
            value += Vector::<f32, V>::new(d[at.head]) * read::<F, WP, V>(x, from_x, row + i, column + j, plan.wp, plan.v);
        }
        if row + i >= at.real {
            value = Vector::new(0.0f32);
        }
        write::<F, WP, V>(y, to, row + i, column + j, value, plan.wp, plan.v);
    }
}
