//! One or a few tokens: the states of a channel lie side by side, so units take a vector of them each.

#![allow(clippy::manual_div_ceil, clippy::collapsible_if, reason = "branches at compile time; integers of kernels have no div_ceil")]

use cubecl::prelude::*;

use super::tile::{Setting, id_before, sigmoid, softplus};

/// `y [b, l, e]` and the outgoing state `[b, e, n]`, which holds the incoming one if `in_place`. `parts` units to a channel, `m` states each.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
pub(super) fn step_kernel<U: Numeric, D: Numeric, B: Numeric, Z: Numeric, M: Size>(
    u: &Array<U>,
    delta: &Array<D>,
    a: &Array<Vector<f32, M>>,
    b: &Array<B>,
    c: &Array<B>,
    skip: &Array<f32>,
    z: &Array<Z>,
    bias: &Array<f32>,
    ids: &Array<i32>,
    bounds: &Array<i32>,
    enter: &Array<Vector<f32, M>>,
    y: &mut Array<U>,
    leave: &mut Array<Vector<f32, M>>,
    rows: u32,
    l: u32,
    e: u32,
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
    #[comptime] m: usize,
    #[comptime] in_place: bool,
    #[comptime] set: Setting,
    #[define(U, D, B, Z)] _types: [StorageType; 4],
) {
    let parts = comptime!(set.n / m);
    let channels = comptime!(set.units / (set.n / m));
    let mut reads = SharedMemory::<f32>::new(comptime!(set.units));
    let (l, e) = (l as usize, e as usize);
    let blocks = (e + channels - 1) / channels;
    let row = CUBE_POS / blocks;
    if row >= rows as usize {
        terminate!();
    }
    let first = (CUBE_POS % blocks) * channels;
    let unit = UNIT_POS as usize;
    let part = unit % parts;
    let active = unit / parts < channels && first + unit / parts < e;
    let channel = min(first + unit / parts, e - 1);
    let mut real = l;
    let mut last = 0i32;
    if comptime!(set.segments) {
        real = bounds[row * 2] as usize;
        last = id_before(ids, bounds, row, l, 0usize);
    }
    let mut step_bias = 0.0f32;
    if comptime!(set.bias) {
        step_bias = bias[channel];
    }
    let rates = a[channel * parts + part];
    let state_at = (row * e + channel) * parts + part;
    let mut h = Vector::<f32, M>::new(0.0f32);
    if comptime!(in_place) {
        h = leave[state_at];
    } else if comptime!(set.state) {
        h = enter[state_at];
    }
    for t in 0..l {
        let input = f32::cast_from(u[row * u_row as usize + t * u_token as usize + channel]);
        let mut step = f32::cast_from(delta[row * delta_row as usize + t * delta_token as usize + channel]) + step_bias;
        if comptime!(set.softplus) {
            step = softplus(step);
        }
        step = select(t < real, step, 0.0f32);
        if comptime!(set.segments) {
            let id = ids[row * l + t];
            if id != last {
                h = Vector::new(0.0f32);
                last = id;
            }
        }
        let mut bs = Vector::<f32, M>::empty();
        let mut cs = Vector::<f32, M>::empty();
        #[unroll]
        for i in 0..m {
            bs[i] = f32::cast_from(b[row * b_row as usize + t * b_token as usize + part * m + i]);
            cs[i] = f32::cast_from(c[row * c_row as usize + t * c_token as usize + part * m + i]);
        }
        h = h * (Vector::<f32, M>::new(step) * rates).exp() + Vector::<f32, M>::new(step * input) * bs;
        let products = h * cs;
        let mut read = 0.0f32;
        #[unroll]
        for i in 0..m {
            read += products[i];
        }
        reads[unit] = read;
        sync_cube();
        // The first units finish a channel each.
        if unit < channels && first + unit < e {
            let finished = first + unit;
            let mut total = 0.0f32;
            for i in 0..parts {
                total += reads[unit * parts + i];
            }
            if comptime!(set.skip) {
                let value = f32::cast_from(u[row * u_row as usize + t * u_token as usize + finished]);
                total += skip[finished] * value;
            }
            if comptime!(set.gate) {
                let gate = f32::cast_from(z[row * z_row as usize + t * z_token as usize + finished]);
                total *= gate * sigmoid(gate);
            }
            y[(row * l + t) * e + finished] = U::cast_from(select(t < real, total, 0.0f32));
        }
        sync_cube();
    }
    if active {
        leave[state_at] = h;
    }
}
