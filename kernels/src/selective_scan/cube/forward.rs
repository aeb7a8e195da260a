//! The way forward: `forward_kernel` writes the outputs of a piece from the state that enters it. Where there are several
//! pieces to a row, `survey_kernel` has found what each adds to the state, and `combine_kernel` what enters each.

#![allow(clippy::manual_div_ceil, clippy::collapsible_if, reason = "branches at compile time; integers of kernels have no div_ceil")]

use cubecl::prelude::*;

use super::tile::{Setting, begins, keeps, load, place, sigmoid, stage, steps};

/// Takes the unit's states over a tile, and adds what tokens read from them to `read`.
#[cube]
#[allow(clippy::too_many_arguments)]
fn advance<Q: Size>(
    states: &mut SharedMemory<f32>,
    a: &Array<f32>,
    b: &SharedMemory<Vector<f32, Q>>,
    c: &SharedMemory<Vector<f32, Q>>,
    step: &Array<f32>,
    fed: &Array<f32>,
    keep: &Array<f32>,
    read: &mut Array<f32>,
    channel: usize,
    #[comptime] resets: bool,
    #[comptime] set: Setting,
) {
    let own = comptime!(set.n / set.split);
    let quads = comptime!(set.tile / 4);
    let first = first_state(set);
    for i in 0..own {
        let j = first + i;
        let rate = a[channel * comptime!(set.n) + j];
        let at = i * comptime!(set.units) + UNIT_POS as usize;
        let mut h = states[at];
        #[unroll]
        for quad in 0..quads {
            let bs = b[j * quads + quad];
            let cs = c[j * quads + quad];
            #[unroll]
            for k in 0..4usize {
                let i = comptime!(quad * 4 + k);
                let mut decay = (step[i] * rate).exp();
                if comptime!(resets) {
                    decay *= keep[i];
                }
                h = h * decay + fed[i] * bs[k];
                read[i] += h * cs[k];
            }
        }
        states[at] = h;
    }
}

/// The first of the unit's states.
#[cube]
fn first_state(#[comptime] set: Setting) -> usize {
    UNIT_POS as usize / comptime!(set.units / set.split) * comptime!(set.n / set.split)
}

/// `y [b, l, e]`, and with one piece to a row the outgoing state.
///
/// `enter` and `leave` are states `[b, pieces, ..]`: a channel's states lie `state_stride` apart, channels
/// `channel_stride`.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
pub(super) fn forward_kernel<U: Numeric, D: Numeric, B: Numeric, Z: Numeric, Q: Size>(
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
    enter: &Array<f32>,
    y: &mut Array<U>,
    leave: &mut Array<f32>,
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
    channel_stride: u32,
    state_stride: u32,
    #[comptime] set: Setting,
    #[define(U, D, B, Z)] _types: [StorageType; 4],
) {
    let tile = comptime!(set.tile);
    let n = comptime!(set.n);
    let own = comptime!(set.n / set.split);
    let mut staged_b = SharedMemory::<Vector<f32, Q>>::new_aligned(comptime!(set.n * set.tile / 4), 16usize);
    let mut staged_c = SharedMemory::<Vector<f32, Q>>::new_aligned(comptime!(set.n * set.tile / 4), 16usize);
    let mut states = SharedMemory::<f32>::new(comptime!(set.n / set.split * set.units));
    // Of a channel on several units: step sizes and what they feed, four tokens in a vector, and what tokens read from each's states.
    let shared = comptime!(if set.split > 1 { set.tile / 4 * set.units / set.split } else { 1 });
    let mut shared_steps = SharedMemory::<Vector<f32, Q>>::new_aligned(shared, 16usize);
    let mut shared_fed = SharedMemory::<Vector<f32, Q>>::new_aligned(shared, 16usize);
    let mut parts = SharedMemory::<f32>::new(comptime!(if set.split > 1 { set.tile * set.units } else { 1 }));
    let place = place(bounds, rows, l, e, length, set);
    if place.row >= rows as usize {
        terminate!();
    }
    let (row, channel) = (place.row, place.channel);
    let pieces = (place.l + length as usize - 1) / length as usize;
    let state_at = (row * pieces + place.piece) * n * place.e + channel * channel_stride as usize;
    let first = first_state(set);
    for j in 0..own {
        let mut h = 0.0f32;
        if comptime!(set.state || set.pieces) {
            h = enter[state_at + (first + j) * state_stride as usize];
        }
        states[j * comptime!(set.units) + UNIT_POS as usize] = h;
    }
    let mut step_bias = 0.0f32;
    if comptime!(set.bias) {
        step_bias = bias[channel];
    }
    let mut direct = 0.0f32;
    if comptime!(set.skip) {
        direct = skip[channel];
    }

    let quads = comptime!(set.tile / 4);
    let channels = comptime!(set.units / set.split);
    // Tokens of a tile that a unit prepares, adds up and writes.
    let some = comptime!(set.tile / set.split);
    let unit = UNIT_POS as usize;
    let lane = unit % channels;
    let turn = unit / channels * some;
    for from in range_stepped(place.from, place.to, tile) {
        let raw = load::<D>(delta, row * delta_row as usize + channel, delta_token, from + turn, place.l, some);
        let inputs = load::<U>(u, row * u_row as usize + channel, u_token, from + turn, place.l, some);
        sync_cube();
        stage::<B, Q>(b, &mut staged_b, row * b_row as usize, b_token, from, place.l, set);
        stage::<B, Q>(c, &mut staged_c, row * c_row as usize, c_token, from, place.l, set);
        let prepared = steps(&raw, step_bias, from + turn, place.real, some, set);
        let mut step = Array::<f32>::new(tile);
        let mut fed = Array::<f32>::new(tile);
        let mut read = Array::<f32>::new(tile);
        if comptime!(set.split > 1) {
            #[unroll]
            for quad in 0..comptime!(set.tile / set.split / 4) {
                let mut four_steps = Vector::<f32, Q>::empty();
                let mut four_fed = Vector::<f32, Q>::empty();
                #[unroll]
                for k in 0..4usize {
                    four_steps[k] = prepared[comptime!(quad * 4 + k)];
                    four_fed[k] = prepared[comptime!(quad * 4 + k)] * inputs[comptime!(quad * 4 + k)];
                }
                shared_steps[(turn / 4 + quad) * channels + lane] = four_steps;
                shared_fed[(turn / 4 + quad) * channels + lane] = four_fed;
            }
            sync_cube();
            #[unroll]
            for quad in 0..quads {
                let four_steps = shared_steps[quad * channels + lane];
                let four_fed = shared_fed[quad * channels + lane];
                #[unroll]
                for k in 0..4usize {
                    step[comptime!(quad * 4 + k)] = four_steps[k];
                    fed[comptime!(quad * 4 + k)] = four_fed[k];
                    read[comptime!(quad * 4 + k)] = 0.0f32;
                }
            }
        } else {
            sync_cube();
            #[unroll]
            for i in 0..tile {
                step[i] = prepared[i];
                fed[i] = prepared[i] * inputs[i];
                read[i] = direct * inputs[i];
            }
        }
        if comptime!(set.segments) {
            if begins(ids, bounds, row, place.l, from, min(from + tile, place.l), set) {
                let keep = keeps(ids, bounds, place, from, set);
                advance::<Q>(&mut states, a, &staged_b, &staged_c, &step, &fed, &keep, &mut read, channel, true, set);
            } else {
                advance::<Q>(&mut states, a, &staged_b, &staged_c, &step, &fed, &step, &mut read, channel, false, set);
            }
        } else {
            advance::<Q>(&mut states, a, &staged_b, &staged_c, &step, &fed, &step, &mut read, channel, false, set);
        }
        if comptime!(set.split > 1) {
            #[unroll]
            for i in 0..tile {
                parts[i * comptime!(set.units) + unit] = read[i];
            }
            sync_cube();
            #[unroll]
            for k in 0..some {
                let i = turn + k;
                let mut sum = direct * inputs[k];
                #[unroll]
                for other in 0..comptime!(set.split) {
                    sum += parts[i * comptime!(set.units) + other * channels + lane];
                }
                if comptime!(set.gate) {
                    let token = min(from + i, place.l - 1) * z_token as usize;
                    let gate = f32::cast_from(z[row * z_row as usize + channel + token]);
                    sum *= gate * sigmoid(gate);
                }
                if place.active && from + i < place.l {
                    y[(row * place.l + from + i) * place.e + channel] = U::cast_from(select(from + i < place.real, sum, 0.0f32));
                }
            }
        } else {
            if comptime!(set.gate) {
                let gates = load::<Z>(z, row * z_row as usize + channel, z_token, from, place.l, tile);
                #[unroll]
                for i in 0..tile {
                    read[i] *= gates[i] * sigmoid(gates[i]);
                }
            }
            #[unroll]
            for i in 0..tile {
                if place.active && from + i < place.l {
                    y[(row * place.l + from + i) * place.e + channel] = U::cast_from(select(from + i < place.real, read[i], 0.0f32));
                }
            }
        }
    }
    if comptime!(!set.pieces) {
        if place.active {
            for j in 0..own {
                leave[state_at + (first + j) * state_stride as usize] = states[j * comptime!(set.units) + UNIT_POS as usize];
            }
        }
    }
}

/// Of every piece, the state it ends with when it starts from nothing, and the sum of its step sizes; with one piece to a
/// row it starts from the incoming state. On the way back also
/// - `marks [b, tiles, n, e]`: the states at the start of each tile, and `offsets [b, tiles, e]`: the step sizes of the
///   piece up to there;
/// - `backs [b, pieces, n, e]`: the gradient that the piece's outputs give to the state that enters it.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
pub(super) fn survey_kernel<U: Numeric, D: Numeric, B: Numeric, Z: Numeric, Q: Size>(
    u: &Array<U>,
    delta: &Array<D>,
    a: &Array<f32>,
    b: &Array<B>,
    c: &Array<B>,
    z: &Array<Z>,
    bias: &Array<f32>,
    ids: &Array<i32>,
    bounds: &Array<i32>,
    dy: &Array<U>,
    state: &Array<f32>,
    ends: &mut Array<f32>,
    sums: &mut Array<f32>,
    marks: &mut Array<f32>,
    offsets: &mut Array<f32>,
    backs: &mut Array<f32>,
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
    #[comptime] back: bool,
    #[comptime] set: Setting,
    #[define(U, D, B, Z)] _types: [StorageType; 4],
) {
    let tile = comptime!(set.tile);
    let n = comptime!(set.n);
    let quads = comptime!(set.tile / 4);
    let mut staged_b = SharedMemory::<Vector<f32, Q>>::new_aligned(comptime!(set.n * set.tile / 4), 16usize);
    let mut staged_c =
        SharedMemory::<Vector<f32, Q>>::new_aligned(comptime!(if back && set.pieces { set.n * set.tile / 4 } else { 1 }), 16usize);
    let mut states = SharedMemory::<f32>::new(comptime!(set.n * set.units));
    // Products of the decays so far, and the gradient of the entering state.
    let mut products = SharedMemory::<f32>::new(comptime!(if back && set.pieces { set.n * set.units } else { 1 }));
    let mut gathered = SharedMemory::<f32>::new(comptime!(if back && set.pieces { set.n * set.units } else { 1 }));
    let place = place(bounds, rows, l, e, length, set);
    if place.row >= rows as usize {
        terminate!();
    }
    let (row, channel) = (place.row, place.channel);
    let pieces = (place.l + length as usize - 1) / length as usize;
    let tiles = (place.l + tile - 1) / tile;
    for j in 0..n {
        let at = j * comptime!(set.units) + UNIT_POS as usize;
        let mut h = 0.0f32;
        if comptime!(set.state && !set.pieces) {
            h = state[(row * place.e + channel) * n + j];
        }
        states[at] = h;
        if comptime!(back && set.pieces) {
            products[at] = 1.0f32;
            gathered[at] = 0.0f32;
        }
    }
    let mut step_bias = 0.0f32;
    if comptime!(set.bias) {
        step_bias = bias[channel];
    }
    let mut total = 0.0f32;

    for from in range_stepped(place.from, place.to, tile) {
        let raw = load::<D>(delta, row * delta_row as usize + channel, delta_token, from, place.l, tile);
        let inputs = load::<U>(u, row * u_row as usize + channel, u_token, from, place.l, tile);
        let mut weights = Array::<f32>::new(tile);
        if comptime!(back && set.pieces) {
            let grads = load::<U>(dy, row * dy_row as usize + channel, dy_token, from, place.l, tile);
            #[unroll]
            for i in 0..tile {
                weights[i] = select(from + i < place.real, grads[i], 0.0f32);
            }
            if comptime!(set.gate) {
                let gates = load::<Z>(z, row * z_row as usize + channel, z_token, from, place.l, tile);
                #[unroll]
                for i in 0..tile {
                    weights[i] *= gates[i] * sigmoid(gates[i]);
                }
            }
        }
        sync_cube();
        stage::<B, Q>(b, &mut staged_b, row * b_row as usize, b_token, from, place.l, set);
        if comptime!(back && set.pieces) {
            stage::<B, Q>(c, &mut staged_c, row * c_row as usize, c_token, from, place.l, set);
        }
        sync_cube();
        let step = steps(&raw, step_bias, from, place.real, tile, set);
        let keep = keeps(ids, bounds, place, from, set);
        let mark = (row * tiles + from / tile) * place.e;
        if comptime!(back && set.pieces) {
            if place.active {
                offsets[mark + channel] = total;
            }
        }
        for j in 0..n {
            let rate = a[channel * n + j];
            let at = j * comptime!(set.units) + UNIT_POS as usize;
            let mut h = states[at];
            if comptime!(back) {
                if place.active {
                    marks[mark * n + j * place.e + channel] = h;
                }
            }
            let mut product = 1.0f32;
            let mut gather = 0.0f32;
            if comptime!(back && set.pieces) {
                product = products[at];
                gather = gathered[at];
            }
            #[unroll]
            for quad in 0..quads {
                let bs = staged_b[j * quads + quad];
                let mut cs = bs;
                if comptime!(back && set.pieces) {
                    cs = staged_c[j * quads + quad];
                }
                #[unroll]
                for k in 0..4usize {
                    let i = comptime!(quad * 4 + k);
                    let mut decay = (step[i] * rate).exp();
                    if comptime!(set.segments) {
                        decay *= keep[i];
                    }
                    h = h * decay + step[i] * inputs[i] * bs[k];
                    if comptime!(back && set.pieces) {
                        product *= decay;
                        gather += product * weights[i] * cs[k];
                    }
                }
            }
            states[at] = h;
            if comptime!(back && set.pieces) {
                products[at] = product;
                gathered[at] = gather;
            }
        }
        #[unroll]
        for i in 0..tile {
            total += step[i];
        }
    }
    if comptime!(set.pieces) {
        if place.active {
            let piece = row * pieces + place.piece;
            sums[piece * place.e + channel] = total;
            for j in 0..n {
                let at = j * comptime!(set.units) + UNIT_POS as usize;
                ends[(piece * n + j) * place.e + channel] = states[at];
                if comptime!(back) {
                    backs[(piece * n + j) * place.e + channel] = gathered[at];
                }
            }
        }
    }
}

/// Replaces what the survey found in `ends [b, pieces, n, e]` by the state that enters each piece, and in `backs` by the
/// gradient of the state that leaves it. `last [b, e, n]` is the state after the row. One unit per state.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
pub(super) fn combine_kernel(
    a: &Array<f32>,
    ids: &Array<i32>,
    bounds: &Array<i32>,
    state: &Array<f32>,
    dstate: &Array<f32>,
    sums: &Array<f32>,
    ends: &mut Array<f32>,
    backs: &mut Array<f32>,
    last: &mut Array<f32>,
    rows: u32,
    l: u32,
    e: u32,
    length: u32,
    pieces: u32,
    #[comptime] back: bool,
    #[comptime] dstate_given: bool,
    #[comptime] set: Setting,
) {
    let n = comptime!(set.n);
    let (l, e, length, pieces) = (l as usize, e as usize, length as usize, pieces as usize);
    let channel = ABSOLUTE_POS % e;
    let j = (ABSOLUTE_POS / e) % n;
    let row = ABSOLUTE_POS / (e * n);
    if row >= rows as usize {
        terminate!();
    }
    let rate = a[channel * n + j];
    let own = (row * e + channel) * n + j;
    let mut h = 0.0f32;
    if comptime!(set.state) {
        h = state[own];
    }
    for piece in 0..pieces {
        let index = row * pieces + piece;
        let at = (index * n + j) * e + channel;
        let end = ends[at];
        ends[at] = h;
        if begins(ids, bounds, row, l, piece * length, min(piece * length + length, l), set) {
            h = end;
        } else {
            h = h * (rate * sums[index * e + channel]).exp() + end;
        }
    }
    if comptime!(back) {
        let mut g = 0.0f32;
        if comptime!(dstate_given) {
            g = dstate[own];
        }
        for i in 0..pieces {
            let piece = pieces - 1 - i;
            let index = row * pieces + piece;
            let at = (index * n + j) * e + channel;
            let back = backs[at];
            backs[at] = g;
            if begins(ids, bounds, row, l, piece * length, min(piece * length + length, l), set) {
                g = back;
            } else {
                g = g * (rate * sums[index * e + channel]).exp() + back;
            }
        }
    } else {
        last[own] = h;
    }
}
