//! The way back over a piece, tile by tile from its end: from the states at a tile's start it computes them again, keeps
//! what each token's decay left of the state before it, and goes back with the gradient of the state. With
//! `v = dy silu(z)`, `w_t = e^{delta_t a}` and `p_t = w_t h_{t-1}`, for every channel and state:
//!
//! ```text
//! g_t = v_t c_t + w_{t+1} g_{t+1}
//! db_t = sum_e g_t delta_t u_t                    dc_t = sum_e v_t h_t
//! du_t = d v_t + delta_t sum_n g_t b_t            da = sum_t g_t p_t delta_t
//! ddelta_t = u_t sum_n g_t b_t + sum_n g_t p_t a  dz_t = dy_t (sum_n c_t h_t + d u_t) silu'(z_t)
//! ```
//!
//! Sums over channels: 32 units write their terms of a state's tokens to shared memory as columns, and each of them adds
//! up a row.

#![allow(clippy::manual_div_ceil, clippy::collapsible_if, reason = "branches at compile time; integers of kernels have no div_ceil")]

use cubecl::prelude::*;

use super::tile::{Setting, begins, keeps, load, place, sigmoid, stage, steps};

/// Units that reduce together.
pub(super) const TEAM: usize = 32;

/// What the way back is compiled for beside [`Setting`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Back {
    /// The outgoing state has a gradient.
    pub dstate: bool,
    /// A team is a plane.
    pub plane: bool,
    /// Too many states for shared memory: what is kept of each lies in global memory. One team to a cube.
    pub spill: bool,
}

#[cube]
fn sync_team(#[comptime] back: Back) {
    if comptime!(back.plane) {
        sync_plane();
    } else {
        sync_cube();
    }
}

/// Gradients. `parts [b, pieces, e n + 2 e]`: of `a`, `d` and `delta_bias`; `shares [blocks, 2, b, l, n]`: of `b` and `c`.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
pub(super) fn backward_kernel<U: Numeric, D: Numeric, B: Numeric, Z: Numeric, Q: Size>(
    u: &Array<U>,
    delta: &Array<D>,
    a: &Array<f32>,
    b: &Array<B>,
    c: &Array<B>,
    skip: &Array<f32>,
    z: &Array<Z>,
    bias: &Array<f32>,
    ids: &Array<i32>,
    bounds: &Array<i32>,
    dy: &Array<U>,
    dstate: &Array<f32>,
    marks: &Array<f32>,
    offsets: &Array<f32>,
    enter: &Array<f32>,
    backs: &mut Array<f32>,
    du: &mut Array<U>,
    ddelta: &mut Array<D>,
    dz: &mut Array<Z>,
    dpast: &mut Array<f32>,
    parts: &mut Array<f32>,
    shares: &mut Array<f32>,
    rows: u32,
    l: u32,
    e: u32,
    length: u32,
    u_row: u32,
    u_token: u32,
    delta_row: u32,
    delta_token: u32,
    b_row: u32,
    b_token: u32,
    c_row: u32,
    c_token: u32,
    z_row: u32,
    z_token: u32,
    dy_row: u32,
    dy_token: u32,
    #[comptime] back: Back,
    #[comptime] set: Setting,
    #[define(U, D, B, Z)] _types: [StorageType; 4],
) {
    let tile = comptime!(set.tile);
    let n = comptime!(set.n);
    let quads = comptime!(set.tile / 4);
    let units = comptime!(set.units);
    let teams = comptime!(set.units / TEAM);
    let per_state = comptime!(set.units / TEAM * set.tile * 2 + 1);
    let kept = comptime!(if back.spill { 1 } else { set.n * set.units });
    let mut staged_b = SharedMemory::<Vector<f32, Q>>::new_aligned(comptime!(set.n * set.tile / 4), 16usize);
    let mut staged_c = SharedMemory::<Vector<f32, Q>>::new_aligned(comptime!(set.n * set.tile / 4), 16usize);
    let mut grads = SharedMemory::<f32>::new(kept);
    let mut drates = SharedMemory::<f32>::new(kept);
    let mut columns = SharedMemory::<f32>::new(comptime!(set.units / TEAM * set.tile * 2 * (TEAM + 1)));
    let mut sums = SharedMemory::<f32>::new(comptime!(if back.spill { 1 } else { set.n * (set.units / TEAM * set.tile * 2 + 1) }));

    let place = place(bounds, rows, l, e, length, set);
    if place.row >= rows as usize {
        terminate!();
    }
    let (row, channel) = (place.row, place.channel);
    let unit = UNIT_POS as usize;
    let team = unit / comptime!(TEAM);
    let lane = unit % comptime!(TEAM);
    let own = team * comptime!(set.tile * 2 * (TEAM + 1));
    let pieces = (place.l + length as usize - 1) / length as usize;
    let tiles = (place.l + tile - 1) / tile;
    let tokens = rows as usize * place.l;
    let piece = row * pieces + place.piece;
    let state_at = (row * place.e + channel) * n;
    let piece_at = piece * n * place.e + channel;
    let part_at = piece * place.e * (n + 2);
    for j in 0..n {
        let mut g = 0.0f32;
        if comptime!(set.pieces) {
            g = backs[piece_at + j * place.e];
        } else if comptime!(back.dstate) {
            g = dstate[state_at + j];
        }
        if comptime!(back.spill) {
            if place.active {
                backs[piece_at + j * place.e] = g;
                parts[part_at + channel * n + j] = 0.0f32;
            }
        } else {
            grads[j * units + unit] = g;
            drates[j * units + unit] = 0.0f32;
        }
    }
    let mut step_bias = 0.0f32;
    if comptime!(set.bias) {
        step_bias = bias[channel];
    }
    let mut direct = 0.0f32;
    if comptime!(set.skip) {
        direct = skip[channel];
    }
    let mut dskip = 0.0f32;
    let mut dbias = 0.0f32;
    // Zero, which no compiler can tell: inputs are read a second time instead of held in registers across the states.
    let nothing = rows as usize / (rows as usize + 1);

    let count = (place.to - place.from + tile - 1) / tile;
    for back_index in 0..count {
        let from = place.from + (count - 1 - back_index) * tile;
        let raw = load::<D>(delta, row * delta_row as usize + channel, delta_token, from, place.l, tile);
        let inputs = load::<U>(u, row * u_row as usize + channel, u_token, from, place.l, tile);
        // Behind the last channel there is nothing to sum up.
        let mut weights = load::<U>(dy, row * dy_row as usize + channel, dy_token, from, place.l, tile);
        #[unroll]
        for i in 0..tile {
            weights[i] = select(place.active && from + i < place.real, weights[i], 0.0f32);
        }
        if comptime!(set.gate) {
            let gates = load::<Z>(z, row * z_row as usize + channel, z_token, from, place.l, tile);
            #[unroll]
            for i in 0..tile {
                weights[i] *= gates[i] * sigmoid(gates[i]);
            }
        }
        sync_cube();
        stage::<B, Q>(b, &mut staged_b, row * b_row as usize, b_token, from, place.l, set);
        stage::<B, Q>(c, &mut staged_c, row * c_row as usize, c_token, from, place.l, set);
        sync_cube();
        let step = steps(&raw, step_bias, from, place.real, tile, set);
        let mut fed = Array::<f32>::new(tile);
        let mut dfed = Array::<f32>::new(tile);
        let mut dlog = Array::<f32>::new(tile);
        let mut read = Array::<f32>::new(tile);
        #[unroll]
        for i in 0..tile {
            fed[i] = step[i] * inputs[i];
            dfed[i] = 0.0f32;
            dlog[i] = 0.0f32;
            read[i] = 0.0f32;
        }
        let keep = keeps(ids, bounds, place, from, set);
        let mark = (row * tiles + from / tile) * place.e;
        // How much of the state that entered the piece is there at the tile's start; more than nothing only if `carries`.
        let mut offset = 0.0f32;
        let mut carries = false;
        if comptime!(set.pieces) {
            offset = offsets[mark + channel];
            carries = true;
            if from > place.from {
                carries = !begins(ids, bounds, row, place.l, place.from, from, set);
            }
        }

        for j in 0..n {
            let rate = a[channel * n + j];
            let mut h = marks[mark * n + j * place.e + channel];
            if comptime!(set.pieces) {
                if carries {
                    h += (rate * offset).exp() * enter[piece_at + j * place.e];
                }
            }
            let mut decays = Array::<f32>::new(tile);
            let mut pasts = Array::<f32>::new(tile);
            #[unroll]
            for quad in 0..quads {
                let bs = staged_b[j * quads + quad];
                let cs = staged_c[j * quads + quad];
                #[unroll]
                for k in 0..4usize {
                    let i = comptime!(quad * 4 + k);
                    let mut decay = (step[i] * rate).exp();
                    if comptime!(set.segments) {
                        decay *= keep[i];
                    }
                    let past = decay * h;
                    h = past + fed[i] * bs[k];
                    decays[i] = decay;
                    pasts[i] = past;
                    if comptime!(set.gate) {
                        read[i] += h * cs[k];
                    }
                    columns[own + comptime!((set.tile + quad * 4 + k) * (TEAM + 1)) + lane] = weights[i] * h;
                }
            }
            let mut g = if comptime!(back.spill) { backs[piece_at + j * place.e] } else { grads[j * units + unit] };
            let mut drate = 0.0f32;
            #[unroll]
            for from_end in 0..quads {
                let quad = comptime!(set.tile / 4 - 1 - from_end);
                let bs = staged_b[j * quads + quad];
                let cs = staged_c[j * quads + quad];
                #[unroll]
                for from_last in 0..4usize {
                    let k = comptime!(3 - from_last);
                    let i = comptime!((set.tile / 4 - 1 - from_end) * 4 + 3 - from_last);
                    g += weights[i] * cs[k];
                    dfed[i] += g * bs[k];
                    let log = g * pasts[i];
                    dlog[i] += log * rate;
                    drate += log * step[i];
                    let mut term = g * fed[i];
                    if !place.active {
                        term = 0.0f32;
                    }
                    columns[own + comptime!(((set.tile / 4 - 1 - from_end) * 4 + 3 - from_last) * (TEAM + 1)) + lane] = term;
                    g *= decays[i];
                }
            }
            if comptime!(back.spill) {
                if place.active {
                    backs[piece_at + j * place.e] = g;
                    parts[part_at + channel * n + j] += drate;
                }
            } else {
                grads[j * units + unit] = g;
                drates[j * units + unit] += drate;
            }
            sync_team(back);
            if lane < comptime!(set.tile * 2) {
                let mut sum = 0.0f32;
                #[unroll]
                for column in 0..comptime!(TEAM) {
                    sum += columns[own + lane * comptime!(TEAM + 1) + column];
                }
                if comptime!(back.spill) {
                    let token = from + lane % tile;
                    if token < place.l {
                        shares[((place.block * 2 + lane / tile) * tokens + row * place.l + token) * n + j] = sum;
                    }
                } else {
                    sums[j * per_state + team * comptime!(set.tile * 2) + lane] = sum;
                }
            }
            sync_team(back);
        }

        if comptime!(!back.spill) {
            sync_cube();
            for index in range_stepped(unit, comptime!(set.n * set.tile * 2), units) {
                let j = index % n;
                let token_row = index / n;
                let token = from + token_row % tile;
                let mut sum = 0.0f32;
                #[unroll]
                for other in 0..teams {
                    sum += sums[j * per_state + comptime!(other * set.tile * 2) + token_row];
                }
                if token < place.l {
                    shares[((place.block * 2 + token_row / tile) * tokens + row * place.l + token) * n + j] = sum;
                }
            }
        }

        let raw = load::<D>(delta, row * delta_row as usize + channel, delta_token, from + nothing, place.l, tile);
        let inputs = load::<U>(u, row * u_row as usize + channel, u_token, from + nothing, place.l, tile);
        #[unroll]
        for i in 0..tile {
            let mut slope = 1.0f32;
            if comptime!(set.softplus) {
                slope = sigmoid(raw[i] + step_bias);
            }
            let gradient = select(from + i < place.real, slope * (inputs[i] * dfed[i] + dlog[i]), 0.0f32);
            dbias += gradient;
            dskip += weights[i] * inputs[i];
            if place.active && from + i < place.l {
                let at = (row * place.l + from + i) * place.e + channel;
                du[at] = U::cast_from(step[i] * dfed[i] + direct * weights[i]);
                ddelta[at] = D::cast_from(gradient);
            }
        }
        if comptime!(set.gate) {
            let gates = load::<Z>(z, row * z_row as usize + channel, z_token, from + nothing, place.l, tile);
            let outer = load::<U>(dy, row * dy_row as usize + channel, dy_token, from + nothing, place.l, tile);
            #[unroll]
            for i in 0..tile {
                if place.active && from + i < place.l {
                    let gate = sigmoid(gates[i]);
                    let slope = gate + gates[i] * gate * (1.0f32 - gate);
                    let value = outer[i] * (read[i] + direct * inputs[i]) * slope;
                    dz[(row * place.l + from + i) * place.e + channel] = Z::cast_from(select(from + i < place.real, value, 0.0f32));
                }
            }
        }
    }

    if place.active {
        for j in 0..n {
            if comptime!(!back.spill) {
                parts[part_at + channel * n + j] = drates[j * units + unit];
            }
            if place.piece == 0 {
                if comptime!(back.spill) {
                    dpast[state_at + j] = backs[piece_at + j * place.e];
                } else {
                    dpast[state_at + j] = grads[j * units + unit];
                }
            }
        }
        parts[part_at + place.e * n + channel] = dskip;
        parts[part_at + place.e * (n + 1) + channel] = dbias;
    }
}
