//! A team of units holds a row in registers between the addition, the reduction and the output.

#![allow(clippy::manual_div_ceil, reason = "kernels have no such method")]

use cubecl::prelude::*;

use crate::cube::reduce::{RowPlan, lanes_sum, team_reduce};

/// `sum = residual + x`, `normed = sum * rsqrt(mean(sum^2) + eps) * weight`.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
pub(super) fn residual_forward<F: Float, S: Float, W: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    residual: &Array<Vector<S, N>>,
    weight: &Array<Vector<W, N>>,
    normed: &mut Array<Vector<F, N>>,
    sum: &mut Array<Vector<S, N>>,
    rows: u32,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[define(F, S, W)] _dtypes: [StorageType; 3],
) {
    let units = comptime!(plan.team.units as usize);
    let vectors = comptime!(plan.vectors);
    let each = comptime!(plan.each);
    let lane = UNIT_POS as usize % units;
    let row = CUBE_POS * comptime!(plan.team.per_cube as usize) + UNIT_POS as usize / units;
    let live = row < rows as usize;
    let base = select(live, row, rows as usize - 1) * vectors;

    let mut xs = Array::<Vector<F, N>>::new(each);
    let mut sums = Array::<Vector<S, N>>::new(each);
    #[unroll]
    for k in 0..each {
        let mut at = lane + k * units;
        if comptime!(plan.ragged()) {
            at = min(at, vectors - 1);
        }
        xs[k] = x[base + at];
        sums[k] = residual[base + at];
    }
    let mut squares = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for k in 0..each {
        // Rounded as it is stored: what the norm would read if it came by itself.
        let value = Vector::<S, N>::cast_from(Vector::<f32, N>::cast_from(sums[k]) + Vector::<f32, N>::cast_from(xs[k]));
        sums[k] = value;
        let value = Vector::<f32, N>::cast_from(value);
        if comptime!(plan.ragged()) {
            if lane + k * units < vectors {
                squares += value * value;
            }
        } else {
            squares += value * value;
        }
    }
    let mut totals = Array::<f32>::new(1usize);
    totals[0] = lanes_sum::<N>(squares);
    let mut scratch = SharedMemory::<f32>::new(comptime!(plan.team.scratch(1)));
    team_reduce(&mut totals, &mut scratch, 1usize, false, plan.team);
    let mean = totals[0] / comptime!((plan.vectors * plan.width) as f32);
    let scale = Vector::<f32, N>::new(1.0f32 / (mean + eps).sqrt());
    if live {
        #[unroll]
        for k in 0..each {
            let at = lane + k * units;
            if at < vectors {
                sum[base + at] = sums[k];
                normed[base + at] =
                    Vector::cast_from(Vector::<f32, N>::cast_from(sums[k]) * scale * Vector::<f32, N>::cast_from(weight[at]));
            }
        }
    }
}

/// With `r = rsqrt(mean(s^2) + eps)` and `g = dnormed * weight`: `ds = r (g - s r^2 mean(g s)) + dsum`, in the dtype of the
/// sum and, where `narrow` says so, in that of `x`. A team walks many rows and keeps its share of the weight's gradient in
/// registers; `parts` takes one row of it per team.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
pub(super) fn residual_backward<F: Float, S: Float, W: Float, N: Size>(
    sum: &Array<Vector<S, N>>,
    weight: &Array<Vector<W, N>>,
    dnormed: &Array<Vector<F, N>>,
    dsum: &Array<Vector<S, N>>,
    dx: &mut Array<Vector<F, N>>,
    dresidual: &mut Array<Vector<S, N>>,
    parts: &mut Array<Vector<f32, N>>,
    rows: u32,
    walkers: u32,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[comptime] summed: bool,
    #[comptime] narrow: bool,
    #[define(F, S, W)] _dtypes: [StorageType; 3],
) {
    let units = comptime!(plan.team.units as usize);
    let vectors = comptime!(plan.vectors);
    let each = comptime!(plan.each);
    let rows = rows as usize;
    let walkers = walkers as usize;
    let lane = UNIT_POS as usize % units;
    let walker = CUBE_POS * comptime!(plan.team.per_cube as usize) + UNIT_POS as usize / units;
    let working = walker < walkers;

    let mut w = Array::<Vector<W, N>>::new(each);
    let mut dw = Array::<Vector<f32, N>>::new(each);
    #[unroll]
    for k in 0..each {
        let mut at = lane + k * units;
        if comptime!(plan.ragged()) {
            at = min(at, vectors - 1);
        }
        w[k] = weight[at];
        dw[k] = Vector::new(0.0f32);
    }
    let mut scratch = SharedMemory::<f32>::new(comptime!(plan.team.scratch(2)));
    let count = comptime!((plan.vectors * plan.width) as f32);
    let turns = (rows + walkers - 1) / walkers;
    for turn in 0..turns {
        let row = turn * walkers + walker;
        let live = working && row < rows;
        let base = select(live, row, 0) * vectors;
        let mut ss = Array::<Vector<S, N>>::new(each);
        let mut ds = Array::<Vector<F, N>>::new(each);
        let mut us = Array::<Vector<S, N>>::new(each);
        #[unroll]
        for k in 0..each {
            let mut at = lane + k * units;
            if comptime!(plan.ragged()) {
                at = min(at, vectors - 1);
            }
            ss[k] = sum[base + at];
            ds[k] = dnormed[base + at];
            if comptime!(summed) {
                us[k] = dsum[base + at];
            }
        }
        let mut squares = Vector::<f32, N>::new(0.0f32);
        let mut pulls = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for k in 0..each {
            let s = Vector::<f32, N>::cast_from(ss[k]);
            let g = Vector::<f32, N>::cast_from(ds[k]) * Vector::<f32, N>::cast_from(w[k]);
            if comptime!(plan.ragged()) {
                if lane + k * units < vectors {
                    squares += s * s;
                    pulls += g * s;
                }
            } else {
                squares += s * s;
                pulls += g * s;
            }
        }
        let mut totals = Array::<f32>::new(2usize);
        totals[0] = lanes_sum::<N>(squares);
        totals[1] = lanes_sum::<N>(pulls);
        team_reduce(&mut totals, &mut scratch, 2usize, false, plan.team);
        let r = 1.0f32 / (totals[0] / count + eps).sqrt();
        let scale = Vector::<f32, N>::new(r);
        let pull = Vector::<f32, N>::new(totals[1] / count * r * r);
        if live {
            #[unroll]
            for k in 0..each {
                let at = lane + k * units;
                if at < vectors {
                    let s = Vector::<f32, N>::cast_from(ss[k]);
                    let d = Vector::<f32, N>::cast_from(ds[k]);
                    let g = d * Vector::<f32, N>::cast_from(w[k]);
                    dw[k] += d * s * scale;
                    let mut grad = scale * (g - s * pull);
                    if comptime!(summed) {
                        grad += Vector::<f32, N>::cast_from(us[k]);
                    }
                    dresidual[base + at] = Vector::cast_from(grad);
                    if comptime!(narrow) {
                        dx[base + at] = Vector::cast_from(grad);
                    }
                }
            }
        }
    }
    if working {
        #[unroll]
        for k in 0..each {
            let at = lane + k * units;
            if at < vectors {
                parts[walker * vectors + at] = dw[k];
            }
        }
    }
}
