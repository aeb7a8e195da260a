//! A team of units holds a row in registers between the addition, the reduction and the output.

#![allow(clippy::manual_div_ceil, reason = "kernels have no such method")]

use cubecl::prelude::*;

use crate::cube::reduce::{RowPlan, lanes_sum, team_reduce};

/// `sum = residual + x`, or what is there already unless `added`; `normed = sum * rsqrt(mean(sum^2) + eps) * weight`. A `layer` norm
/// centres the sum first and ends with the bias.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
pub(super) fn residual_forward<F: Float, S: Float, W: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    residual: &Array<Vector<S, N>>,
    weight: &Array<Vector<W, N>>,
    bias: &Array<Vector<W, N>>,
    normed: &mut Array<Vector<F, N>>,
    sum: &mut Array<Vector<S, N>>,
    rows: u32,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[comptime] added: bool,
    #[comptime] layer: bool,
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
        if comptime!(added) {
            xs[k] = x[base + at];
        }
        sums[k] = residual[base + at];
    }
    let mut scratch = SharedMemory::<f32>::new(comptime!(plan.team.scratch(1)));
    let count = comptime!((plan.vectors * plan.width) as f32);
    let mut centre = Vector::<f32, N>::new(0.0f32);
    if comptime!(added) {
        #[unroll]
        for k in 0..each {
            // Rounded as it is stored: what the norm would read if it came by itself.
            sums[k] = Vector::cast_from(Vector::<f32, N>::cast_from(sums[k]) + Vector::<f32, N>::cast_from(xs[k]));
        }
    }
    if comptime!(layer) {
        let mut levels = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for k in 0..each {
            if lane + k * units < vectors {
                levels += Vector::<f32, N>::cast_from(sums[k]);
            }
        }
        let mut totals = Array::<f32>::new(1usize);
        totals[0] = lanes_sum::<N>(levels);
        team_reduce(&mut totals, &mut scratch, 1usize, false, plan.team);
        centre = Vector::new(totals[0] / count);
    }
    let mut squares = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for k in 0..each {
        let mut value = Vector::<f32, N>::cast_from(sums[k]);
        if comptime!(layer) {
            value -= centre;
        }
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
    team_reduce(&mut totals, &mut scratch, 1usize, false, plan.team);
    let scale = Vector::<f32, N>::new(1.0f32 / (totals[0] / count + eps).sqrt());
    if live {
        #[unroll]
        for k in 0..each {
            let at = lane + k * units;
            if at < vectors {
                if comptime!(added) {
                    sum[base + at] = sums[k];
                }
                let mut value = Vector::<f32, N>::cast_from(sums[k]);
                if comptime!(layer) {
                    value -= centre;
                }
                value = value * scale * Vector::<f32, N>::cast_from(weight[at]);
                if comptime!(layer) {
                    value += Vector::<f32, N>::cast_from(bias[at]);
                }
                normed[base + at] = Vector::cast_from(value);
            }
        }
    }
}

/// With `r = rsqrt(mean(s^2) + eps)` and `g = dnormed * weight`: `ds = r (g - s r^2 mean(g s)) + dsum`, in the dtype of the
/// sum and, where `narrow` says so, in that of `x`. For a `layer` norm `s` is centred and `r mean(g)` taken off as well. A team walks
/// many rows and keeps its share of the gradients of weight and bias in registers; `parts` takes one row per team: the weight's, then the bias's.
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
    #[comptime] layer: bool,
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
    let mut db = Array::<Vector<f32, N>>::new(each);
    #[unroll]
    for k in 0..each {
        let mut at = lane + k * units;
        if comptime!(plan.ragged()) {
            at = min(at, vectors - 1);
        }
        w[k] = weight[at];
        dw[k] = Vector::new(0.0f32);
        if comptime!(layer) {
            db[k] = Vector::new(0.0f32);
        }
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
        let mut centre = Vector::<f32, N>::new(0.0f32);
        let mut level = Vector::<f32, N>::new(0.0f32);
        if comptime!(layer) {
            let mut sums = Vector::<f32, N>::new(0.0f32);
            let mut levels = Vector::<f32, N>::new(0.0f32);
            #[unroll]
            for k in 0..each {
                if lane + k * units < vectors {
                    sums += Vector::<f32, N>::cast_from(ss[k]);
                    levels += Vector::<f32, N>::cast_from(ds[k]) * Vector::<f32, N>::cast_from(w[k]);
                }
            }
            let mut totals = Array::<f32>::new(2usize);
            totals[0] = lanes_sum::<N>(sums);
            totals[1] = lanes_sum::<N>(levels);
            team_reduce(&mut totals, &mut scratch, 2usize, false, plan.team);
            centre = Vector::new(totals[0] / count);
            level = Vector::new(totals[1] / count);
        }
        let mut squares = Vector::<f32, N>::new(0.0f32);
        let mut pulls = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for k in 0..each {
            let mut s = Vector::<f32, N>::cast_from(ss[k]);
            if comptime!(layer) {
                s -= centre;
            }
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
                    let mut s = Vector::<f32, N>::cast_from(ss[k]);
                    if comptime!(layer) {
                        s -= centre;
                    }
                    let d = Vector::<f32, N>::cast_from(ds[k]);
                    let mut g = d * Vector::<f32, N>::cast_from(w[k]);
                    dw[k] += d * s * scale;
                    if comptime!(layer) {
                        db[k] += d;
                        g -= level;
                    }
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
                if comptime!(layer) {
                    parts[2 * walker * vectors + at] = dw[k];
                    parts[(2 * walker + 1) * vectors + at] = db[k];
                } else {
                    parts[walker * vectors + at] = dw[k];
                }
            }
        }
    }
}
