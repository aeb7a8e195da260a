//! Gradients inside chunks, given the state that enters and the gradient of the state that leaves each.
//!
//! With `T_ij = dy_i . x_j`, `P_ij = L_ij delta_j T_ij`, `E = P o scores` below the diagonal, `S` the entering state and
//! `G` the gradient of the leaving one:
//!
//! ```text
//! du_j = sum_i L_ij scores_ij dy_i + e_j G B_j         dx_j = delta_j du_j + d dy_j        ddelta_j = du_j . x_j
//! dC_i = sum_heads (sum_j P_ij B_j + f_i S^T dy_i)     dB_j = sum_heads (sum_i P_ij C_i + e_j delta_j G^T x_j)
//! dlog_t = sum_{i >= t} (sum_j E_ij - sum_j E_ji + f_i dy_i . S C_i) + sum_{j < t} e_j delta_j x_j . G B_j + e <G, S>
//! ```

use cubecl::prelude::*;

use super::tile::*;

/// Sums what the units of a row hold for each of their rows; unit `t` gets that of row `t`.
#[cube]
fn fold_rows(parts: &Array<f32>, scratch: &mut SharedMemory<f32>, #[comptime] plan: Plan) -> f32 {
    #[unroll]
    for i in 0..plan.rows() {
        scratch[(first_row(plan) + i) * comptime!(COLUMNS + 1) + UNIT_POS as usize % COLUMNS] = parts[i];
    }
    sync_cube();
    let mut sum = 0.0f32;
    if (UNIT_POS as usize) < plan.q {
        for i in 0..COLUMNS {
            sum += scratch[UNIT_POS as usize * comptime!(COLUMNS + 1) + i];
        }
    }
    sync_cube();
    sum
}

/// Sums what the units of a column hold for each of their columns; unit `t` gets that of column `t`.
#[cube]
fn fold_columns<V: Size>(parts: Vector<f32, V>, scratch: &mut SharedMemory<f32>, #[comptime] plan: Plan) -> f32 {
    #[unroll]
    for e in 0..plan.v {
        scratch[(first_column(plan) + e) * comptime!(COLUMNS + 1) + UNIT_POS as usize / COLUMNS] = parts[e];
    }
    sync_cube();
    let mut sum = 0.0f32;
    if (UNIT_POS as usize) < plan.q {
        for i in 0..ROWS {
            sum += scratch[UNIT_POS as usize * comptime!(COLUMNS + 1) + i];
        }
    }
    sync_cube();
    sum
}

/// Sum over all units, in every unit.
#[cube]
fn fold_all(part: f32, scratch: &mut SharedMemory<f32>) -> f32 {
    scratch[UNIT_POS as usize] = part;
    sync_cube();
    let mut half = comptime!(UNITS / 2).runtime();
    while half > 0 {
        if (UNIT_POS as usize) < half {
            scratch[UNIT_POS as usize] += scratch[UNIT_POS as usize + half];
        }
        sync_cube();
        half /= 2;
    }
    let sum = scratch[0];
    sync_cube();
    sum
}

/// Inner products of the unit's part of each row with the same part of `other`.
#[cube]
fn dot_rows<F: Numeric, W: Size, V: Size>(
    sums: &Array<Vector<f32, V>>,
    other: &Array<Vector<F, W>>,
    at: Matrix,
    column: usize,
    #[comptime] plan: Plan,
) -> Array<f32> {
    let mut dots = Array::<f32>::new(plan.rows());
    #[unroll]
    for i in 0..plan.rows() {
        let product = sums[i] * read::<F, W, V>(other, at, first_row(plan) + i, column + first_column(plan), plan.wp, plan.v);
        let mut dot = product[0];
        #[unroll]
        for e in 1..plan.v {
            dot += product[e];
        }
        dots[i] = dot;
    }
    dots
}

/// `P` summed over blocks of `per` heads of a group (`[b, chunks, g, blocks, q, q]`), what `E` adds to the gradients of
/// the log decays (`[b, h, lp]`, for tokens `i >= t`), and parts of the gradient of `d` (`[b, chunks, h]`). One cube per
/// row, chunk, group and block.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub(super) fn pair_grads<F: Numeric, WP: Size, V: Size>(
    x: &Array<Vector<F, WP>>,
    dy: &Array<Vector<F, WP>>,
    scores: &Array<Vector<f32, V>>,
    delta: &Array<f32>,
    sums: &Array<f32>,
    filled: &Array<i32>,
    bounds: &Array<i32>,
    pairs: &mut Array<Vector<f32, V>>,
    later: &mut Array<f32>,
    dd: &mut Array<f32>,
    cubes: u32,
    l: u32,
    h: u32,
    p: u32,
    g: u32,
    blocks: u32,
    per: u32,
    #[comptime] skip: bool,
    #[comptime] plan: Plan,
    #[define(F)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let q = comptime!(plan.q);
    let square = comptime!(plan.q * plan.q / plan.v);
    let (l, h, p, g) = (l as usize, h as usize, p as usize, g as usize);
    let (blocks, per) = (blocks as usize, per as usize);
    let chunks = l.div_ceil(q);
    let group = CUBE_POS / blocks % g;
    let rest = CUBE_POS / blocks / g;
    let first = group * (h / g) + CUBE_POS % blocks * per;
    let end = min(first + per, (group + 1) * (h / g));
    let unit = UNIT_POS as usize;
    let (row, column) = (first_row(plan), first_column(plan));
    let mut left = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let mut right = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let mut scratch = SharedMemory::<f32>::new(comptime!(plan.q * (COLUMNS + 1)));
    let mut decays = new_decays(plan);
    let mut all = zeros::<V>(plan);

    for head in first..end {
        let at = place(bounds, rest / chunks, rest % chunks, head, l, plan);
        let from_x = tokens_of(at, l, h, head, p);
        load_decays(&mut decays, delta, sums, filled, bounds, at, l, h, chunks * q, plan);
        sync_cube();

        // T.
        let mut products = zeros::<V>(plan);
        let mut k = 0usize.runtime();
        while k < p {
            load_turned::<F, WP, V>(&mut left, dy, from_x, 0usize, k, &decays.sums, false, plan.wp, plan);
            load_turned::<F, WP, V>(&mut right, x, from_x, 0usize, k, &decays.sums, false, plan.wp, plan);
            sync_cube();
            multiply::<V>(&mut products, &left, 0usize, &right, plan);
            sync_cube();
            k += SLICE;
        }

        // P and E.
        let from_scores = ((at.row * chunks + at.chunk) * g + group) * square;
        let mut skipped = 0.0f32;
        let mut of_rows = Array::<f32>::new(plan.rows());
        let mut of_columns = Vector::<f32, V>::new(0.0f32);
        #[unroll]
        for r in 0..plan.rows() {
            let i = row + r;
            let score = scores[from_scores + (i * q + column) / plan.v];
            let product = products[r];
            let mut pair = Vector::<f32, V>::empty();
            let mut sum = 0.0f32;
            #[unroll]
            for e in 0..plan.v {
                let j = column + e;
                let value = decay(&decays, i, j, plan) * decays.delta[j] * product[e];
                pair[e] = value;
                let grad = select(i > j, value * score[e], 0.0f32);
                sum += grad;
                of_columns[e] = of_columns[e] + grad;
                if comptime!(skip) {
                    skipped += select(i == j, product[e], 0.0f32);
                }
            }
            of_rows[r] = sum;
            all[r] += pair;
        }
        let sum = fold_rows(&of_rows, &mut scratch, plan) - fold_columns::<V>(of_columns, &mut scratch, plan);
        if unit < q {
            later[(at.row * h + head) * chunks * q + at.from + unit] = sum;
        }
        if comptime!(skip) {
            let sum = fold_all(skipped, &mut scratch);
            if unit == 0 {
                dd[(at.row * chunks + at.chunk) * h + head] = sum;
            }
        }
    }
    #[unroll]
    for i in 0..plan.rows() {
        pairs[CUBE_POS * square + ((row + i) * q + column) / plan.v] = all[i];
    }
}

/// `dx`, the gradient of `delta`, and the products of what comes from behind the chunk with its tokens, which add to the
/// gradients of later log decays (both `[b, h, lp]`). One cube per row, chunk and head.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub(super) fn input_grads<F: Numeric, WP: Size, WN: Size, V: Size>(
    x: &Array<Vector<F, WP>>,
    dy: &Array<Vector<F, WP>>,
    b: &Array<Vector<F, WN>>,
    d: &Array<f32>,
    scores: &Array<Vector<f32, V>>,
    dstates: &Array<Vector<f32, WN>>,
    delta: &Array<f32>,
    sums: &Array<f32>,
    filled: &Array<i32>,
    bounds: &Array<i32>,
    dx: &mut Array<Vector<F, WP>>,
    ddelta: &mut Array<f32>,
    earlier: &mut Array<f32>,
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
    let rest = CUBE_POS / h;
    let at = place(bounds, rest / chunks, rest % chunks, CUBE_POS % h, l, plan);
    let group = at.head / (h / g);
    let unit = UNIT_POS as usize;
    let (row, column) = (first_row(plan), first_column(plan));
    let mut left = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let mut right = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let mut mix = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(plan.q)), 16usize);
    let mut scratch = SharedMemory::<f32>::new(comptime!(plan.q * (COLUMNS + 1)));
    let mut decays = new_decays(plan);
    load_decays(&mut decays, delta, sums, filled, bounds, at, l, h, chunks * q, plan);
    sync_cube();

    // L o scores, lines by i.
    let from_scores = ((at.row * chunks + at.chunk) * g + group) * comptime!(plan.q * plan.q / plan.v);
    #[unroll]
    for r in 0..plan.rows() {
        let i = row + r;
        let score = scores[from_scores + (i * q + column) / plan.v];
        let mut mixed = Vector::<f32, V>::empty();
        #[unroll]
        for e in 0..plan.v {
            mixed[e] = decay(&decays, i, column + e, plan) * score[e];
        }
        mix[i * plan.line() + column / plan.v] = mixed;
    }

    let from_x = tokens_of(at, l, h, at.head, p);
    let from_b = tokens_of(at, l, g, group, n);
    let from_state = state_of(at, chunks, h, p, n);
    let to = Matrix { start: from_x.start, stride: from_x.stride, rows: at.tokens, columns: p };
    let mut behind = 0.0f32;
    let mut direct = 0.0f32;
    let mut tile = 0usize.runtime();
    while tile < p {
        let mut out = zeros::<V>(plan);
        let mut k = 0usize.runtime();
        while k < n {
            load_turned::<F, WN, V>(&mut left, b, from_b, 0usize, k, &decays.leave, true, plan.wn, plan);
            load_turned::<f32, WN, V>(&mut right, dstates, from_state, tile, k, &decays.sums, false, plan.wn, plan);
            sync_cube();
            multiply::<V>(&mut out, &left, 0usize, &right, plan);
            sync_cube();
            k += SLICE;
        }
        let dots = dot_rows::<F, WP, V>(&out, x, from_x, tile, plan);
        behind += fold_rows(&dots, &mut scratch, plan);
        let mut k = 0usize.runtime();
        while k < q {
            load::<F, WP, V>(&mut right, dy, from_x, k, tile, &decays.sums, false, plan.wp, plan);
            sync_cube();
            multiply::<V>(&mut out, &mix, k, &right, plan);
            sync_cube();
            k += SLICE;
        }
        let dots = dot_rows::<F, WP, V>(&out, x, from_x, tile, plan);
        direct += fold_rows(&dots, &mut scratch, plan);
        #[unroll]
        for i in 0..plan.rows() {
            let mut value = out[i] * Vector::<f32, V>::new(decays.delta[row + i]);
            if comptime!(skip) {
                value += Vector::<f32, V>::new(d[at.head]) * read::<F, WP, V>(dy, from_x, row + i, tile + column, plan.wp, plan.v);
            }
            write::<F, WP, V>(dx, to, row + i, tile + column, value, plan.wp, plan.v);
        }
        tile += q;
    }
    if unit < q {
        let to = (at.row * h + at.head) * chunks * q + at.from + unit;
        ddelta[to] = direct;
        earlier[to] = behind * decays.delta[unit];
    }
}

/// Gradients of the log decays, in place of what [`pair_grads`] left of them. One cube per row, chunk and head.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub(super) fn decay_grads<F: Numeric, WP: Size, WN: Size, V: Size>(
    dy: &Array<Vector<F, WP>>,
    c: &Array<Vector<F, WN>>,
    states: &Array<Vector<f32, WN>>,
    dstates: &Array<Vector<f32, WN>>,
    delta: &Array<f32>,
    sums: &Array<f32>,
    filled: &Array<i32>,
    bounds: &Array<i32>,
    earlier: &Array<f32>,
    dlog: &mut Array<f32>,
    cubes: u32,
    l: u32,
    h: u32,
    p: u32,
    g: u32,
    n: u32,
    #[comptime] plan: Plan,
    #[define(F)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let q = comptime!(plan.q);
    let (l, h, p, g, n) = (l as usize, h as usize, p as usize, g as usize, n as usize);
    let chunks = l.div_ceil(q);
    let rest = CUBE_POS / h;
    let at = place(bounds, rest / chunks, rest % chunks, CUBE_POS % h, l, plan);
    let unit = UNIT_POS as usize;
    let mut left = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let mut right = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let mut scratch = SharedMemory::<f32>::new(comptime!(plan.q * (COLUMNS + 1)));
    let mut decays = new_decays(plan);
    load_decays(&mut decays, delta, sums, filled, bounds, at, l, h, chunks * q, plan);
    sync_cube();

    // <G, S>
    let from_state = state_of(at, chunks, h, p, n);
    let mut carried = Vector::<f32, WN>::new(0.0f32);
    let base = from_state.start / plan.wn;
    let mut i = unit;
    while i < p * n / plan.wn {
        carried += states[base + i] * dstates[base + i];
        i += UNITS;
    }
    let mut part = carried[0];
    #[unroll]
    for e in 1..plan.wn {
        part += carried[e];
    }
    let mut kept = decays.sums[comptime!(plan.q - 1)].exp();
    if comptime!(plan.segments) {
        if id_before(filled, bounds, at.row, at.chunk, l, plan) != id_after(filled, at.row, at.chunk, l, plan) {
            kept = 0.0f32;
        }
    }
    let through = kept * fold_all(part, &mut scratch);

    // dy_i . f_i S C_i
    let from_x = tokens_of(at, l, h, at.head, p);
    let from_c = tokens_of(at, l, g, at.head / (h / g), n);
    let mut entered = 0.0f32;
    let mut tile = 0usize.runtime();
    while tile < p {
        let mut out = zeros::<V>(plan);
        let mut k = 0usize.runtime();
        while k < n {
            load_turned::<F, WN, V>(&mut left, c, from_c, 0usize, k, &decays.enter, true, plan.wn, plan);
            load_turned::<f32, WN, V>(&mut right, states, from_state, tile, k, &decays.sums, false, plan.wn, plan);
            sync_cube();
            multiply::<V>(&mut out, &left, 0usize, &right, plan);
            sync_cube();
            k += SLICE;
        }
        let dots = dot_rows::<F, WP, V>(&out, dy, from_x, tile, plan);
        entered += fold_rows(&dots, &mut scratch, plan);
        tile += q;
    }

    let to = (at.row * h + at.head) * chunks * q + at.from + unit;
    if unit < q {
        scratch[unit] = dlog[to] + entered;
        scratch[q + unit] = earlier[to];
    }
    sync_cube();
    if unit < q {
        let mut sum = through;
        for i in 0..plan.q {
            sum += select(i >= unit, scratch[i], scratch[q + i]);
        }
        dlog[to] = sum;
    }
}

/// `dC` from `dy`, the entering states and `B`; with `back`, `dB` from `x`, the gradients of the leaving states and `C`.
/// One cube per row, chunk, group and tile of `n`.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub(super) fn group_grads<F: Numeric, WP: Size, WN: Size, V: Size>(
    x: &Array<Vector<F, WP>>,
    other: &Array<Vector<F, WN>>,
    pairs: &Array<Vector<f32, V>>,
    states: &Array<Vector<f32, WN>>,
    delta: &Array<f32>,
    sums: &Array<f32>,
    filled: &Array<i32>,
    bounds: &Array<i32>,
    out: &mut Array<Vector<F, WN>>,
    cubes: u32,
    l: u32,
    h: u32,
    p: u32,
    g: u32,
    n: u32,
    blocks: u32,
    #[comptime] back: bool,
    #[comptime] plan: Plan,
    #[define(F)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let q = comptime!(plan.q);
    let (l, h, p, g, n) = (l as usize, h as usize, p as usize, g as usize, n as usize);
    let blocks = blocks as usize;
    let chunks = l.div_ceil(q);
    let tiles = n.div_ceil(q);
    let column = CUBE_POS % tiles * q;
    let group = CUBE_POS / tiles % g;
    let rest = CUBE_POS / tiles / g;
    let mut left = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let mut right = SharedMemory::<Vector<f32, V>>::new_aligned(comptime!(plan.operand(SLICE)), 16usize);
    let mut decays = new_decays(plan);
    let mut grads = zeros::<V>(plan);

    for head in group * (h / g)..(group + 1) * (h / g) {
        let at = place(bounds, rest / chunks, rest % chunks, head, l, plan);
        let from_x = tokens_of(at, l, h, head, p);
        let from_state = state_of(at, chunks, h, p, n);
        load_decays(&mut decays, delta, sums, filled, bounds, at, l, h, chunks * q, plan);
        sync_cube();
        let mut k = 0usize.runtime();
        while k < p {
            if comptime!(back) {
                load_turned::<F, WP, V>(&mut left, x, from_x, 0usize, k, &decays.feed, true, plan.wp, plan);
            } else {
                load_turned::<F, WP, V>(&mut left, x, from_x, 0usize, k, &decays.enter, true, plan.wp, plan);
            }
            load::<f32, WN, V>(&mut right, states, from_state, k, column, &decays.sums, false, plan.wn, plan);
            sync_cube();
            multiply::<V>(&mut grads, &left, 0usize, &right, plan);
            sync_cube();
            k += SLICE;
        }
    }

    let at = place(bounds, rest / chunks, rest % chunks, group, l, plan);
    let from = tokens_of(at, l, g, group, n);
    let mut k = 0usize.runtime();
    while k < q {
        load::<F, WN, V>(&mut right, other, from, k, column, &decays.sums, false, plan.wn, plan);
        for block in 0..blocks {
            let start = (((at.row * chunks + at.chunk) * g + group) * blocks + block) * comptime!(plan.q * plan.q);
            let matrix = Matrix { start, stride: q.runtime(), rows: q.runtime(), columns: q.runtime() };
            if comptime!(back) {
                load::<f32, V, V>(&mut left, pairs, matrix, k, 0usize, &decays.sums, false, plan.v, plan);
            } else {
                load_turned::<f32, V, V>(&mut left, pairs, matrix, 0usize, k, &decays.sums, false, plan.v, plan);
            }
            sync_cube();
            multiply::<V>(&mut grads, &left, 0usize, &right, plan);
            sync_cube();
        }
        k += SLICE;
    }
    let to = Matrix { start: from.start, stride: from.stride, rows: at.tokens, columns: n };
    #[unroll]
    for i in 0..plan.rows() {
        write::<F, WN, V>(out, to, first_row(plan) + i, column + first_column(plan), grads[i], plan.wn, plan.v);
    }
}
