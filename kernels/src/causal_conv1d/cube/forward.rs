//! One unit computes a vector of channels over a tile of tokens and keeps the last `k - 1` inputs in registers, so that
//! each input is read once, plus `k - 1` more per tile.

#![allow(clippy::manual_div_ceil, clippy::collapsible_if, reason = "branches at compile time; integers of kernels have no div_ceil")]

use cubecl::prelude::*;

use crate::cube::math::silu;

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Setting {
    /// Taps.
    pub k: usize,
    /// Channels of a unit, and elements of a vector of weights.
    pub n: usize,
    pub m: usize,
    /// Tokens whose inputs a unit asks for at a time.
    pub batch: usize,
    /// Every tile has a multiple of `batch` tokens.
    pub even: bool,
    pub bias: bool,
    pub state: bool,
    /// The outgoing state has a gradient. Only for the way back.
    pub dstate: bool,
    /// The incoming state lies where the outgoing one goes; then a unit sees whole rows, and there are no documents. Only
    /// for the way there.
    pub in_place: bool,
    pub segments: bool,
    pub silu: bool,
}

/// Where a unit works: sizes and strides in vectors.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Place {
    pub row: usize,
    /// Vector of the token's channels.
    pub v: usize,
    /// Tokens of a row, and vectors of a token.
    pub l: usize,
    pub width: usize,
    /// Of the input.
    pub row_stride: usize,
    pub token_stride: usize,
}

/// `weight [e, k]` of a unit's channels, one vector per tap.
#[cube]
pub(super) fn load_taps<W: Numeric, M: Size, N: Size>(
    weight: &Array<Vector<W, M>>,
    v: usize,
    #[comptime] set: Setting,
) -> Array<Vector<f32, N>> {
    let k = comptime!(set.k);
    let count = comptime!(set.n * set.k / set.m);
    let mut raw = Array::<Vector<f32, M>>::new(count);
    #[unroll]
    for i in 0..count {
        raw[i] = Vector::cast_from(weight[v * count + i]);
    }
    let mut taps = Array::<Vector<f32, N>>::new(k);
    #[unroll]
    for j in 0..k {
        let mut tap = Vector::<f32, N>::empty();
        #[unroll]
        for i in 0..comptime!(set.n) {
            let part = raw[comptime!((i * k + j) / set.m)];
            tap[i] = part[comptime!((i * k + j) % set.m)];
        }
        taps[j] = tap;
    }
    taps
}

/// `bias [e]` of a unit's channels; zero without one.
#[cube]
pub(super) fn load_bias<W: Numeric, M: Size, N: Size>(bias: &Array<Vector<W, M>>, v: usize, #[comptime] set: Setting) -> Vector<f32, N> {
    let mut value = Vector::<f32, N>::new(0.0f32);
    if comptime!(set.bias) {
        let count = comptime!(set.n / set.m);
        let mut parts = Vector::<f32, N>::empty();
        #[unroll]
        for c in 0..count {
            let part = Vector::<f32, M>::cast_from(bias[v * count + c]);
            #[unroll]
            for i in 0..comptime!(set.m) {
                parts[comptime!(c * set.m + i)] = part[i];
            }
        }
        value = parts;
    }
    value
}

/// Id of the input `at - (k - 1)` tokens after the row's start: the state's where that is negative.
#[cube]
pub(super) fn id_of(ids: &Array<i32>, bounds: &Array<i32>, place: Place, at: usize, #[comptime] set: Setting) -> i32 {
    let before = comptime!(set.k - 1);
    let mut id = 0i32;
    if comptime!(set.segments) {
        if at >= before {
            id = ids[place.row * place.l + at - before];
        } else {
            id = bounds[place.row * 2 + 1];
        }
    }
    id
}

/// The input `at - (k - 1)` tokens after the row's start as document `id` sees it.
#[cube]
pub(super) fn source<F: Numeric, N: Size>(
    x: &Array<Vector<F, N>>,
    past: &Array<Vector<F, N>>,
    ids: &Array<i32>,
    bounds: &Array<i32>,
    place: Place,
    at: usize,
    id: i32,
    #[comptime] set: Setting,
) -> Vector<F, N> {
    let before = comptime!(set.k - 1);
    let mut value = Vector::<F, N>::new(F::from_int(0));
    if id_of(ids, bounds, place, at, set) == id {
        if at >= before {
            value = x[place.row * place.row_stride + (at - before) * place.token_stride + place.v];
        } else if comptime!(set.state) {
            value = past[(place.row * before + at) * place.width + place.v];
        }
    }
    value
}

/// Forgets the oldest of `inputs` and takes in `new`.
#[cube]
pub(super) fn push<N: Size>(inputs: &mut Array<Vector<f32, N>>, new: Vector<f32, N>, #[comptime] count: usize) {
    if comptime!(count > 0) {
        #[unroll]
        for j in 1..count {
            inputs[comptime!(j - 1)] = inputs[j];
        }
        inputs[comptime!(count.max(1) - 1)] = new;
    }
}

/// `y [b, l, e]` and the outgoing state `[b, k - 1, e]`.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
pub(super) fn forward_kernel<F: Numeric, W: Numeric, N: Size, M: Size>(
    x: &Array<Vector<F, N>>,
    weight: &Array<Vector<W, M>>,
    bias: &Array<Vector<W, M>>,
    past: &Array<Vector<F, N>>,
    ids: &Array<i32>,
    bounds: &Array<i32>,
    y: &mut Array<Vector<F, N>>,
    state: &mut Array<Vector<F, N>>,
    l: u32,
    width: u32,
    items: u32,
    tile: u32,
    row_stride: u32,
    token_stride: u32,
    #[comptime] set: Setting,
    #[define(F, W)] _types: [StorageType; 2],
) {
    let before = comptime!(set.k - 1);
    let (l, width, tile) = (l as usize, width as usize, tile as usize);
    let v = ABSOLUTE_POS % width;
    let item = ABSOLUTE_POS / width;
    if item >= items as usize {
        terminate!();
    }
    let tiles = (l + tile - 1) / tile;
    let row = item / tiles;
    let from = (item % tiles) * tile;
    let to = min(from + tile, l);
    let place = Place { row, v, l, width, row_stride: row_stride as usize, token_stride: token_stride as usize };
    let mut real = l;
    if comptime!(set.segments) {
        real = bounds[row * 2] as usize;
    }

    let taps = load_taps::<W, M, N>(weight, v, set);
    let bias = load_bias::<W, M, N>(bias, v, set);
    let mut last = 0i32;
    if comptime!(set.segments && set.k > 1) {
        last = id_of(ids, bounds, place, from + before - 1, set);
    }
    let mut inputs = Array::<Vector<f32, N>>::new(comptime!(before.max(1)));
    #[unroll]
    for j in 0..before {
        if comptime!(set.in_place) {
            inputs[j] = Vector::cast_from(state[(row * before + j) * width + v]);
        } else {
            inputs[j] = Vector::cast_from(source::<F, N>(x, past, ids, bounds, place, from + j, last, set));
        }
    }
    let batch = comptime!(set.batch);
    for round in 0..(to - from + batch - 1) / batch {
        let t = from + round * batch;
        let mut news = Array::<Vector<F, N>>::new(comptime!(set.batch));
        let mut new_ids = Array::<i32>::new(comptime!(set.batch));
        #[unroll]
        for i in 0..comptime!(set.batch) {
            let s = min(t + i, l - 1);
            news[i] = x[row * place.row_stride + s * place.token_stride + v];
            if comptime!(set.segments) {
                new_ids[i] = ids[row * l + s];
            }
        }
        #[unroll]
        for i in 0..comptime!(set.batch) {
            let s = t + i;
            if comptime!(set.even) || s < to {
                let new = Vector::<f32, N>::cast_from(news[i]);
                if comptime!(set.segments) {
                    let id = new_ids[i];
                    // Ids never return: what came before a change counts as zero for good.
                    if id != last {
                        #[unroll]
                        for j in 0..before {
                            inputs[j] = Vector::new(0.0f32);
                        }
                        last = id;
                    }
                }
                let mut sum = bias + new * taps[before];
                #[unroll]
                for j in 0..before {
                    sum += inputs[j] * taps[j];
                }
                if comptime!(set.silu) {
                    sum = silu::<N>(sum);
                }
                if comptime!(set.segments) {
                    if s >= real {
                        sum = Vector::new(0.0f32);
                    }
                }
                y[(row * l + s) * width + v] = Vector::cast_from(sum);
                push::<N>(&mut inputs, new, before);
            }
        }
    }
    if from == 0 {
        let id = id_of(ids, bounds, place, l + before - 1, set);
        #[unroll]
        for j in 0..before {
            if comptime!(set.in_place) {
                state[(row * before + j) * width + v] = Vector::cast_from(inputs[j]);
            } else {
                state[(row * before + j) * width + v] = source::<F, N>(x, past, ids, bounds, place, real + j, id, set);
            }
        }
    }
}
