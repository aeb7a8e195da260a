//! The norm on rows of vectors: a team of units holds one group of one row in registers, so that memory is read once and
//! written once.

#![allow(clippy::manual_div_ceil, reason = "kernels have no such method")]

use cubecl::prelude::*;

use crate::cube::reduce::{RowPlan, lanes_sum, team_reduce};

/// `z * sigmoid(z)` and its slope.
#[cube]
fn silu_with_slope<N: Size>(z: Vector<f32, N>) -> (Vector<f32, N>, Vector<f32, N>) {
    let one = Vector::new(1.0f32);
    let s = one / (one + (Vector::new(0.0f32) - z).exp());
    (z * s, s * (one + z * (one - s)))
}

/// `v = y * silu(z)`, or `y` without a gate.
#[cube]
fn signal<F: Float, Z: Float, N: Size>(y: Vector<F, N>, z: Vector<Z, N>, #[comptime] gated: bool) -> Vector<f32, N> {
    let y = Vector::<f32, N>::cast_from(y);
    if comptime!(gated) {
        let z = Vector::<f32, N>::cast_from(z);
        y * z / (Vector::new(1.0f32) + (Vector::new(0.0f32) - z).exp())
    } else {
        y
    }
}

/// `out[row, group] = v * rsqrt(mean(v^2) + eps) * weight[group]`. `pieces` counts pairs of a row and a group.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
pub(super) fn norm_forward<F: Float, Z: Float, W: Float, N: Size>(
    y: &Array<Vector<F, N>>,
    z: &Array<Vector<Z, N>>,
    weight: &Array<Vector<W, N>>,
    out: &mut Array<Vector<F, N>>,
    pieces: u32,
    groups: u32,
    gate_pitch: u32,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[comptime] gated: bool,
    #[define(F, Z, W)] _dtypes: [StorageType; 3],
) {
    let units = comptime!(plan.team.units as usize);
    let vectors = comptime!(plan.vectors);
    let each = comptime!(plan.each);
    let lane = UNIT_POS as usize % units;
    let piece = CUBE_POS * comptime!(plan.team.per_cube as usize) + UNIT_POS as usize / units;
    // Beyond the last piece, and beyond the end of a row, the last one is read again: no branch around a load.
    let live = piece < pieces as usize;
    let safe = select(live, piece, pieces as usize - 1);
    let base = safe * vectors;
    let weights = safe % groups as usize * vectors;
    let gates = safe / groups as usize * gate_pitch as usize + weights;

    let mut ys = Array::<Vector<F, N>>::new(each);
    let mut zs = Array::<Vector<Z, N>>::new(each);
    #[unroll]
    for k in 0..each {
        let mut at = lane + k * units;
        if comptime!(plan.ragged()) {
            at = min(at, vectors - 1);
        }
        ys[k] = y[base + at];
        if comptime!(gated) {
            zs[k] = z[gates + at];
        }
    }
    let mut v = Array::<Vector<f32, N>>::new(each);
    let mut squares = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for k in 0..each {
        let value = signal::<F, Z, N>(ys[k], zs[k], gated);
        v[k] = value;
        if comptime!(plan.ragged()) {
            if lane + k * units < vectors {
                squares += value * value;
            }
        } else {
            squares += value * value;
        }
    }
    let mut sums = Array::<f32>::new(1usize);
    sums[0] = lanes_sum::<N>(squares);
    let mut scratch = SharedMemory::<f32>::new(comptime!(plan.team.scratch(1)));
    team_reduce(&mut sums, &mut scratch, 1usize, false, plan.team);
    let mean = sums[0] / comptime!((plan.vectors * plan.width) as f32);
    let scale = Vector::<f32, N>::new(1.0f32 / (mean + eps).sqrt());
    if live {
        #[unroll]
        for k in 0..each {
            let at = lane + k * units;
            if at < vectors {
                out[base + at] = Vector::cast_from(v[k] * scale * Vector::<f32, N>::cast_from(weight[weights + at]));
            }
        }
    }
}

/// Gradients of [`norm_forward`]. With `u = v r`, `r = rsqrt(mean(v^2) + eps)` and `g = dout * weight`:
/// `dv = r (g - u mean(g u))`.
///
/// A team walks the rows of one group and keeps that group's share of the weight's gradient in registers; `parts` takes
/// one row of it per team of the group.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
pub(super) fn norm_backward<F: Float, Z: Float, W: Float, N: Size>(
    y: &Array<Vector<F, N>>,
    z: &Array<Vector<Z, N>>,
    weight: &Array<Vector<W, N>>,
    dout: &Array<Vector<F, N>>,
    dy: &mut Array<Vector<F, N>>,
    dz: &mut Array<Vector<Z, N>>,
    parts: &mut Array<Vector<f32, N>>,
    rows: u32,
    groups: u32,
    walkers: u32,
    gate_pitch: u32,
    eps: f32,
    #[comptime] plan: RowPlan,
    #[comptime] gated: bool,
    #[define(F, Z, W)] _dtypes: [StorageType; 3],
) {
    let units = comptime!(plan.team.units as usize);
    let vectors = comptime!(plan.vectors);
    let each = comptime!(plan.each);
    let rows = rows as usize;
    let groups = groups as usize;
    let walkers = walkers as usize;
    let lane = UNIT_POS as usize % units;
    let number = CUBE_POS * comptime!(plan.team.per_cube as usize) + UNIT_POS as usize / units;
    let working = number < walkers * groups;
    let group = number % groups;
    let walker = number / groups;
    let weights = group * vectors;

    let mut w = Array::<Vector<W, N>>::new(each);
    let mut dw = Array::<Vector<f32, N>>::new(each);
    #[unroll]
    for k in 0..each {
        let mut at = lane + k * units;
        if comptime!(plan.ragged()) {
            at = min(at, vectors - 1);
        }
        w[k] = weight[weights + at];
        dw[k] = Vector::new(0.0f32);
    }
    let mut scratch = SharedMemory::<f32>::new(comptime!(plan.team.scratch(2)));
    let count = comptime!((plan.vectors * plan.width) as f32);
    let turns = (rows + walkers - 1) / walkers;
    for turn in 0..turns {
        let row = turn * walkers + walker;
        let live = working && row < rows;
        let base = (select(live, row, 0) * groups + group) * vectors;
        let gates = select(live, row, 0) * gate_pitch as usize + weights;
        let mut ys = Array::<Vector<F, N>>::new(each);
        let mut zs = Array::<Vector<Z, N>>::new(each);
        let mut ds = Array::<Vector<F, N>>::new(each);
        #[unroll]
        for k in 0..each {
            let mut at = lane + k * units;
            if comptime!(plan.ragged()) {
                at = min(at, vectors - 1);
            }
            ys[k] = y[base + at];
            ds[k] = dout[base + at];
            if comptime!(gated) {
                zs[k] = z[gates + at];
            }
        }
        let mut squares = Vector::<f32, N>::new(0.0f32);
        let mut pulls = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for k in 0..each {
            let v = signal::<F, Z, N>(ys[k], zs[k], gated);
            let g = Vector::<f32, N>::cast_from(ds[k]) * Vector::<f32, N>::cast_from(w[k]);
            if comptime!(plan.ragged()) {
                if lane + k * units < vectors {
                    squares += v * v;
                    pulls += g * v;
                }
            } else {
                squares += v * v;
                pulls += g * v;
            }
        }
        let mut sums = Array::<f32>::new(2usize);
        sums[0] = lanes_sum::<N>(squares);
        sums[1] = lanes_sum::<N>(pulls);
        team_reduce(&mut sums, &mut scratch, 2usize, false, plan.team);
        let r = 1.0f32 / (sums[0] / count + eps).sqrt();
        let scale = Vector::<f32, N>::new(r);
        let pull = Vector::<f32, N>::new(sums[1] / count * r * r);
        if live {
            #[unroll]
            for k in 0..each {
                let at = lane + k * units;
                if at < vectors {
                    let y = Vector::<f32, N>::cast_from(ys[k]);
                    let d = Vector::<f32, N>::cast_from(ds[k]);
                    let g = d * Vector::<f32, N>::cast_from(w[k]);
                    if comptime!(gated) {
                        let (gate, slope) = silu_with_slope::<N>(Vector::cast_from(zs[k]));
                        let v = y * gate;
                        let dv = scale * (g - v * pull);
                        dw[k] += d * v * scale;
                        dy[base + at] = Vector::cast_from(dv * gate);
                        dz[base + at] = Vector::cast_from(dv * y * slope);
                    } else {
                        dw[k] += d * y * scale;
                        dy[base + at] = Vector::cast_from(scale * (g - y * pull));
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
                parts[number * vectors + at] = dw[k];
            }
        }
    }
}
