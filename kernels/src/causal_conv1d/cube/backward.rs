//! The way back: a unit walks its channels over tiles of tokens, recomputes what went into SiLU, and keeps the last
//! inputs and the unfinished gradients of the last inputs in registers. Gradients of taps and bias add up in registers
//! and leave as one partial sum per unit.

#![allow(clippy::manual_div_ceil, clippy::collapsible_if, reason = "branches at compile time; integers of kernels have no div_ceil")]

use cubecl::prelude::*;

use super::forward::{Place, Setting, id_of, load_bias, load_taps, push, source};
use crate::cube::math::silu_slope;

/// `dx [b, l, e]`, the gradient of the incoming state `[b, k - 1, e]`, and partial sums `[groups, e k + e]` of the
/// gradients of weight and bias. A group is `per` tiles of `tile` tokens, of all channels.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
#[allow(clippy::too_many_arguments)]
pub(super) fn backward_kernel<F: Numeric, W: Numeric, N: Size, M: Size>(
    x: &Array<Vector<F, N>>,
    weight: &Array<Vector<W, M>>,
    bias: &Array<Vector<W, M>>,
    past: &Array<Vector<F, N>>,
    ids: &Array<i32>,
    bounds: &Array<i32>,
    dy: &Array<Vector<F, N>>,
    dstate: &Array<Vector<F, N>>,
    dx: &mut Array<Vector<F, N>>,
    dpast: &mut Array<Vector<F, N>>,
    parts: &mut Array<f32>,
    l: u32,
    width: u32,
    items: u32,
    tile: u32,
    per: u32,
    row_stride: u32,
    token_stride: u32,
    dy_row_stride: u32,
    dy_token_stride: u32,
    #[comptime] set: Setting,
    #[define(F, W)] _types: [StorageType; 2],
) {
    let k = comptime!(set.k);
    let before = comptime!(set.k - 1);
    let (l, width, tile) = (l as usize, width as usize, tile as usize);
    let v = ABSOLUTE_POS % width;
    let group = ABSOLUTE_POS / width;
    let first = group * per as usize;
    if first >= items as usize {
        terminate!();
    }
    let tiles = (l + tile - 1) / tile;
    let taps = load_taps::<W, M, N>(weight, v, set);
    let bias = load_bias::<W, M, N>(bias, v, set);
    let zero = Vector::<f32, N>::new(0.0f32);
    let mut dtaps = Array::<Vector<f32, N>>::new(k);
    let mut inputs = Array::<Vector<f32, N>>::new(comptime!(before.max(1)));
    // Of the input `j - (k - 1)` tokens after the current one.
    let mut sums = Array::<Vector<f32, N>>::new(k);
    #[unroll]
    for j in 0..k {
        dtaps[j] = zero;
    }
    let mut dbias = zero;

    for item in first..min(first + per as usize, items as usize) {
        let row = item / tiles;
        let from = (item % tiles) * tile;
        let to = min(from + tile, l);
        let place = Place { row, v, l, width, row_stride: row_stride as usize, token_stride: token_stride as usize };
        let mut real = l;
        let mut last = 0i32;
        if comptime!(set.segments) {
            real = bounds[row * 2] as usize;
            if comptime!(set.k > 1) {
                last = id_of(ids, bounds, place, from + before - 1, set);
            }
        }
        #[unroll]
        for j in 0..before {
            inputs[j] = Vector::cast_from(source::<F, N>(x, past, ids, bounds, place, from + j, last, set));
        }
        #[unroll]
        for j in 0..k {
            sums[j] = zero;
        }
        // Inputs before this one that belong to its document; far more than are looked at where none is known to differ.
        let mut run = 1_000_000u32;
        let end = to + before;
        let batch = comptime!(set.batch);
        for round in 0..(end - from + batch - 1) / batch {
            let t = from + round * batch;
            let mut news = Array::<Vector<F, N>>::new(comptime!(set.batch));
            let mut slopes = Array::<Vector<F, N>>::new(comptime!(set.batch));
            let mut new_ids = Array::<i32>::new(comptime!(set.batch));
            #[unroll]
            for i in 0..comptime!(set.batch) {
                let s = min(t + i, l - 1);
                news[i] = x[row * place.row_stride + s * place.token_stride + v];
                slopes[i] = dy[row * dy_row_stride as usize + s * dy_token_stride as usize + v];
                if comptime!(set.segments) {
                    new_ids[i] = ids[row * l + s];
                }
            }
            #[unroll]
            for i in 0..comptime!(set.batch) {
                let s = t + i;
                if s < real && s < end {
                    let new = Vector::<f32, N>::cast_from(news[i]);
                    if comptime!(set.segments) {
                        let id = new_ids[i];
                        run += 1u32;
                        if id != last {
                            #[unroll]
                            for j in 0..before {
                                inputs[j] = zero;
                            }
                            last = id;
                            run = 0u32;
                        }
                    }
                    let mut slope = Vector::<f32, N>::cast_from(slopes[i]);
                    if comptime!(set.silu) {
                        let mut sum = bias + new * taps[before];
                        #[unroll]
                        for j in 0..before {
                            sum += inputs[j] * taps[j];
                        }
                        slope *= silu_slope::<N>(sum);
                    }
                    if s < to {
                        #[unroll]
                        for j in 0..before {
                            dtaps[j] += slope * inputs[j];
                        }
                        dtaps[before] += slope * new;
                        dbias += slope;
                    }
                    sums[before] = slope * taps[before];
                    #[unroll]
                    for j in 0..before {
                        if comptime!(set.segments) {
                            if run >= comptime!((set.k - 1 - j) as u32) {
                                sums[j] += slope * taps[j];
                            }
                        } else {
                            sums[j] += slope * taps[j];
                        }
                    }
                    push::<N>(&mut inputs, new, before);
                }
                // The input `k - 1` tokens back has met all its outputs.
                let inside = s >= from + before;
                if s < end && (inside || from == 0) {
                    let mut sum = sums[0];
                    if comptime!(set.dstate && set.k > 1) {
                        if s >= real && s - real < before {
                            let wanted = id_of(ids, bounds, place, l + before - 1, set);
                            if id_of(ids, bounds, place, s, set) == wanted {
                                sum += Vector::cast_from(dstate[(row * before + s - real) * width + v]);
                            }
                        }
                    }
                    if inside {
                        dx[(row * l + s - before) * width + v] = Vector::cast_from(sum);
                    } else if comptime!(set.state) {
                        dpast[(row * before + s) * width + v] = Vector::cast_from(sum);
                    }
                }
                push::<N>(&mut sums, zero, k);
            }
        }
    }

    let channel = v * comptime!(set.n);
    let channels = width * comptime!(set.n);
    let base = group * channels * comptime!(set.k + 1);
    #[unroll]
    for i in 0..comptime!(set.n) {
        #[unroll]
        for j in 0..k {
            let dtap = dtaps[j];
            parts[base + (channel + i) * k + j] = dtap[i];
        }
        parts[base + channels * k + channel + i] = dbias[i];
    }
}
