//! The recurrence of [`crate::selective_scan`] for some channels of one row.

use rayon::prelude::*;

use super::{RowIds, add, sigmoid, silu, softplus};

/// Inputs, with `e` channels in this part.
#[derive(Debug, Clone, Default)]
pub(crate) struct Problem {
    pub l: usize,
    pub e: usize,
    pub n: usize,
    /// `[l, e]`.
    pub u: Vec<f64>,
    /// `[l, e]`.
    pub delta: Vec<f64>,
    /// `[e, n]`.
    pub a: Vec<f64>,
    /// `[l, n]`.
    pub b: Vec<f64>,
    /// `[l, n]`.
    pub c: Vec<f64>,
    /// `[e]`, or empty.
    pub d: Vec<f64>,
    /// `[l, e]`, or empty.
    pub z: Vec<f64>,
    /// `[e]`, or empty.
    pub delta_bias: Vec<f64>,
    /// `[e, n]`, or empty.
    pub state: Vec<f64>,
    pub ids: RowIds,
    pub softplus: bool,
}

/// Gradients of the outputs; the second may be empty.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cotangents {
    /// `[l, e]`.
    pub y: Vec<f64>,
    /// `[e, n]`.
    pub state: Vec<f64>,
}

/// Outputs and gradients, shaped as in [`Problem`].
#[derive(Debug, Clone, Default)]
pub(crate) struct Solution {
    pub y: Vec<f64>,
    pub state: Vec<f64>,
    pub du: Vec<f64>,
    pub ddelta: Vec<f64>,
    pub da: Vec<f64>,
    pub db: Vec<f64>,
    pub dc: Vec<f64>,
    pub dd: Vec<f64>,
    pub dz: Vec<f64>,
    pub ddelta_bias: Vec<f64>,
    pub dstate: Vec<f64>,
}

/// One channel's part of a [`Solution`]; sequences are `[l]`.
#[derive(Default)]
struct Channel {
    y: Vec<f64>,
    state: Vec<f64>,
    du: Vec<f64>,
    ddelta: Vec<f64>,
    da: Vec<f64>,
    dd: f64,
    dz: Vec<f64>,
    dstate: Vec<f64>,
}

fn channel(problem: &Problem, i: usize, cotangents: Option<&Cotangents>, (db, dc): (&mut [f64], &mut [f64])) -> Channel {
    let &Problem { l, e, n, .. } = problem;
    let marks = problem.ids.marks(l);
    let raw = |t: usize| problem.delta[t * e + i] + problem.delta_bias.get(i).copied().unwrap_or(0.0);
    let delta: Vec<f64> = (0..l).map(|t| if problem.softplus { softplus(raw(t)) } else { raw(t) }).collect();
    let (a, skip) = (&problem.a[i * n..(i + 1) * n], problem.d.get(i).copied().unwrap_or(0.0));
    // The state before each token, and after the last.
    let mut states = vec![0.0; (l + 1) * n];
    if let Some(state) = problem.state.get(i * n..(i + 1) * n) {
        states[..n].copy_from_slice(state);
    }
    let mut out = Channel { y: vec![0.0; l], ..Channel::default() };
    let mut sums = vec![0.0; l];
    for t in 0..l {
        let (before, after) = states.split_at_mut((t + 1) * n);
        let (before, after) = (&before[t * n..], &mut after[..n]);
        if !marks[t].0 {
            after.copy_from_slice(before);
            continue;
        }
        let u = problem.u[t * e + i];
        sums[t] = skip * u;
        for j in 0..n {
            let decay = if marks[t].1 { (delta[t] * a[j]).exp() } else { 0.0 };
            after[j] = decay * before[j] + delta[t] * problem.b[t * n + j] * u;
            sums[t] += problem.c[t * n + j] * after[j];
        }
        out.y[t] = problem.z.get(t * e + i).map_or(sums[t], |&z| sums[t] * silu(z).0);
    }
    out.state = states[l * n..].to_vec();
    let Some(cotangents) = cotangents else { return out };
    let mut grad = cotangents.state.get(i * n..(i + 1) * n).map_or_else(|| vec![0.0; n], <[f64]>::to_vec);
    (out.du, out.ddelta, out.dz, out.da) = (vec![0.0; l], vec![0.0; l], vec![0.0; l], vec![0.0; n]);
    for t in (0..l).rev().filter(|&t| marks[t].0) {
        let (before, after) = (&states[t * n..(t + 1) * n], &states[(t + 1) * n..(t + 2) * n]);
        let (u, mut dy) = (problem.u[t * e + i], cotangents.y[t * e + i]);
        if let Some(&z) = problem.z.get(t * e + i) {
            let (gate, slope) = silu(z);
            out.dz[t] = dy * sums[t] * slope;
            dy *= gate;
        }
        out.dd += dy * u;
        let (mut du, mut ddelta) = (skip * dy, 0.0);
        for j in 0..n {
            let (b, c) = (problem.b[t * n + j], problem.c[t * n + j]);
            let decay = if marks[t].1 { (delta[t] * a[j]).exp() } else { 0.0 };
            grad[j] += dy * c;
            dc[t * n + j] += dy * after[j];
            db[t * n + j] += grad[j] * delta[t] * u;
            du += delta[t] * grad[j] * b;
            ddelta += grad[j] * (b * u + a[j] * decay * before[j]);
            out.da[j] += grad[j] * delta[t] * decay * before[j];
            grad[j] *= decay;
        }
        out.du[t] = du;
        out.ddelta[t] = ddelta * if problem.softplus { sigmoid(raw(t)) } else { 1.0 };
    }
    out.dstate = grad;
    out
}

/// Outputs, and gradients where cotangents are given.
pub(crate) fn run(problem: &Problem, cotangents: Option<&Cotangents>) -> Solution {
    let &Problem { l, e, n, .. } = problem;
    let block = e.div_ceil(4 * rayon::current_num_threads()).max(1);
    let indices: Vec<usize> = (0..e).collect();
    let parts: Vec<(Vec<Channel>, Vec<f64>, Vec<f64>)> = indices
        .par_chunks(block)
        .map(|channels| {
            let (mut db, mut dc) = (vec![0.0; l * n], vec![0.0; l * n]);
            let results = channels.iter().map(|&i| channel(problem, i, cotangents, (&mut db, &mut dc))).collect();
            (results, db, dc)
        })
        .collect();
    let mut out = Solution { db: vec![0.0; l * n], dc: vec![0.0; l * n], ..Solution::default() };
    let mut channels = Vec::with_capacity(e);
    for (results, db, dc) in parts {
        add(&mut out.db, &db);
        add(&mut out.dc, &dc);
        channels.extend(results);
    }
    let sequence = |of: fn(&Channel) -> &[f64]| -> Vec<f64> {
        if channels.iter().any(|channel| of(channel).is_empty()) {
            return Vec::new();
        }
        (0..l).flat_map(|t| channels.iter().map(move |channel| of(channel)[t])).collect()
    };
    let joined = |of: fn(&Channel) -> &[f64]| -> Vec<f64> { channels.iter().flat_map(|channel| of(channel).to_vec()).collect() };
    (out.y, out.du, out.ddelta, out.dz) = (sequence(|c| &c.y), sequence(|c| &c.du), sequence(|c| &c.ddelta), sequence(|c| &c.dz));
    (out.state, out.dstate, out.da) = (joined(|c| &c.state), joined(|c| &c.dstate), joined(|c| &c.da));
    out.dd = channels.iter().map(|channel| channel.dd).collect();
    out.ddelta_bias = channels.iter().map(|channel| channel.ddelta.iter().sum()).collect();
    out
}
