//! The recurrence of [`crate::ssd`] for some heads of one row.

use std::sync::Mutex;

use rayon::prelude::*;

use super::{RowIds, add, dot, sigmoid, softplus};

/// Tokens between kept states.
const CHUNK: usize = 256;
/// Rows of a state that one task walks.
const BLOCK: usize = 8;

/// Inputs, with `h` heads and `g` groups in this part.
#[derive(Debug, Clone, Default)]
pub(crate) struct Problem {
    pub l: usize,
    pub h: usize,
    pub p: usize,
    pub g: usize,
    pub n: usize,
    /// Group of each head.
    pub group: Vec<usize>,
    /// `[l, h, p]`.
    pub x: Vec<f64>,
    /// `[l, h]`.
    pub dt: Vec<f64>,
    /// `[h]`.
    pub a: Vec<f64>,
    /// `[l, g, n]`.
    pub b: Vec<f64>,
    /// `[l, g, n]`.
    pub c: Vec<f64>,
    /// `[h]`, or empty.
    pub d: Vec<f64>,
    /// `[h]`, or empty.
    pub dt_bias: Vec<f64>,
    /// `[h, p, n]`, or empty.
    pub state: Vec<f64>,
    pub ids: RowIds,
    pub softplus: bool,
}

/// Gradients of the outputs; the second may be empty.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cotangents {
    /// `[l, h, p]`.
    pub y: Vec<f64>,
    /// `[h, p, n]`.
    pub state: Vec<f64>,
}

/// Outputs and gradients, shaped as in [`Problem`].
#[derive(Debug, Clone, Default)]
pub(crate) struct Solution {
    pub y: Vec<f64>,
    pub state: Vec<f64>,
    pub dx: Vec<f64>,
    pub ddt: Vec<f64>,
    pub da: Vec<f64>,
    pub db: Vec<f64>,
    pub dc: Vec<f64>,
    pub dd: Vec<f64>,
    pub ddt_bias: Vec<f64>,
    pub dstate: Vec<f64>,
}

/// A sum that several tasks add to, per group.
type Shared = [Mutex<Vec<f64>>];

/// One head's step sizes and decays per token.
struct Steps {
    delta: Vec<f64>,
    /// Derivative of `delta` by `dt`.
    slope: Vec<f64>,
    /// Zero where a document begins.
    decay: Vec<f64>,
    real: Vec<bool>,
}

impl Steps {
    fn new(problem: &Problem, head: usize) -> Self {
        let marks = problem.ids.marks(problem.l);
        let raw = |t: usize| problem.dt[t * problem.h + head] + problem.dt_bias.get(head).copied().unwrap_or(0.0);
        let delta: Vec<f64> = (0..problem.l).map(|t| if problem.softplus { softplus(raw(t)) } else { raw(t).max(0.0) }).collect();
        let slope = (0..problem.l).map(|t| if problem.softplus { sigmoid(raw(t)) } else { f64::from(raw(t) > 0.0) }).collect();
        let decay =
            delta.iter().zip(&marks).map(|(delta, (_, joined))| if *joined { (delta * problem.a[head]).exp() } else { 0.0 }).collect();
        Self { delta, slope, decay, real: marks.iter().map(|mark| mark.0).collect() }
    }
}

/// Rows `from..from + rows` of one head's state.
struct Task<'a> {
    problem: &'a Problem,
    steps: &'a Steps,
    head: usize,
    from: usize,
    rows: usize,
}

/// What a task gives besides its share of `db` and `dc`.
struct Share {
    y: Vec<f64>,
    state: Vec<f64>,
    dx: Vec<f64>,
    ddelta: Vec<f64>,
    da: f64,
    dd: f64,
    dstate: Vec<f64>,
}

impl Task<'_> {
    fn x(&self, t: usize) -> &[f64] {
        let at = (t * self.problem.h + self.head) * self.problem.p + self.from;
        &self.problem.x[at..at + self.rows]
    }

    fn row<'a>(&self, values: &'a [f64], t: usize) -> &'a [f64] {
        let Problem { g, n, .. } = *self.problem;
        let at = (t * g + self.problem.group[self.head]) * n;
        &values[at..at + n]
    }

    /// The state after token `t` from that before it.
    fn advance(&self, state: &mut [f64], t: usize) {
        if !self.steps.real[t] {
            return;
        }
        let (decay, delta, b) = (self.steps.decay[t], self.steps.delta[t], self.row(&self.problem.b, t));
        for (state, x) in state.chunks_exact_mut(self.problem.n).zip(self.x(t)) {
            let fed = delta * x;
            state.iter_mut().zip(b).for_each(|(s, b)| *s = *s * decay + fed * b);
        }
    }

    fn first(&self) -> Vec<f64> {
        let Problem { p, n, .. } = *self.problem;
        let at = (self.head * p + self.from) * n;
        self.problem.state.get(at..at + self.rows * n).map_or_else(|| vec![0.0; self.rows * n], <[f64]>::to_vec)
    }

    fn run(&self, cotangents: Option<&Cotangents>, db: &Shared, dc: &Shared) -> Share {
        let Problem { l, .. } = *self.problem;
        let skip = self.problem.d.get(self.head).copied().unwrap_or(0.0);
        let mut state = self.first();
        let mut kept = Vec::with_capacity(l / CHUNK + 1);
        let mut y = vec![0.0; l * self.rows];
        for t in 0..l {
            if t % CHUNK == 0 {
                kept.push(state.clone());
            }
            self.advance(&mut state, t);
            if self.steps.real[t] {
                let c = self.row(&self.problem.c, t);
                for (i, (state, x)) in state.chunks_exact(self.problem.n).zip(self.x(t)).enumerate() {
                    y[t * self.rows + i] = dot(state, c) + skip * x;
                }
            }
        }
        let mut share = Share { y, state, dx: vec![0.0; l * self.rows], ddelta: vec![0.0; l], da: 0.0, dd: 0.0, dstate: Vec::new() };
        if let Some(cotangents) = cotangents {
            self.backward(cotangents, &kept, skip, &mut share, (db, dc));
        }
        share
    }

    fn backward(&self, cotangents: &Cotangents, kept: &[Vec<f64>], skip: f64, share: &mut Share, (db, dc): (&Shared, &Shared)) {
        let Problem { l, h, p, n, .. } = *self.problem;
        let size = self.rows * n;
        let at = (self.head * p + self.from) * n;
        let mut grad = cotangents.state.get(at..at + size).map_or_else(|| vec![0.0; size], <[f64]>::to_vec);
        let group = self.problem.group[self.head];
        for (index, first) in kept.iter().enumerate().rev() {
            let (begin, end) = (index * CHUNK, ((index + 1) * CHUNK).min(l));
            // States before each token of the chunk, and after its last.
            let mut states = vec![0.0; (end - begin + 1) * size];
            states[..size].copy_from_slice(first);
            for t in begin..end {
                let (before, after) = states.split_at_mut((t - begin + 1) * size);
                after[..size].copy_from_slice(&before[(t - begin) * size..]);
                self.advance(&mut after[..size], t);
            }
            let (mut db_part, mut dc_part) = (vec![0.0; (end - begin) * n], vec![0.0; (end - begin) * n]);
            for t in (begin..end).rev().filter(|&t| self.steps.real[t]) {
                let i = t - begin;
                let (before, after) = (&states[i * size..(i + 1) * size], &states[(i + 1) * size..(i + 2) * size]);
                let (decay, delta) = (self.steps.decay[t], self.steps.delta[t]);
                let (b, c) = (self.row(&self.problem.b, t), self.row(&self.problem.c, t));
                let (db, dc) = (&mut db_part[i * n..(i + 1) * n], &mut dc_part[i * n..(i + 1) * n]);
                let dy = &cotangents.y[(t * h + self.head) * p + self.from..][..self.rows];
                let (mut decayed, mut fed) = (0.0, 0.0);
                for row in 0..self.rows {
                    let (dy, x) = (dy[row], self.x(t)[row]);
                    let range = row * n..(row + 1) * n;
                    let (before, after, grad) = (&before[range.clone()], &after[range.clone()], &mut grad[range]);
                    share.dd += dy * x;
                    let mut read = 0.0;
                    for j in 0..n {
                        grad[j] += dy * c[j];
                        dc[j] += dy * after[j];
                        db[j] += delta * x * grad[j];
                        read += grad[j] * b[j];
                        decayed += grad[j] * before[j];
                        grad[j] *= decay;
                    }
                    share.dx[t * self.rows + row] = skip * dy + delta * read;
                    fed += x * read;
                }
                share.ddelta[t] = fed + self.problem.a[self.head] * decay * decayed;
                share.da += delta * decay * decayed;
            }
            for (all, part) in [(&db[group], &db_part), (&dc[group], &dc_part)] {
                let mut all = all.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                add(&mut all[begin * n..end * n], part);
            }
        }
        share.dstate = grad;
    }
}

/// Outputs, and gradients where cotangents are given.
pub(crate) fn run(problem: &Problem, cotangents: Option<&Cotangents>) -> Solution {
    let Problem { l, h, p, g, n, .. } = *problem;
    let shared = || -> Vec<Mutex<Vec<f64>>> { (0..g).map(|_| Mutex::new(vec![0.0; l * n])).collect() };
    let (db, dc) = (shared(), shared());
    let steps: Vec<Steps> = (0..h).into_par_iter().map(|head| Steps::new(problem, head)).collect();
    let blocks = p.div_ceil(BLOCK);
    let place = |i: usize| (i / blocks, i % blocks * BLOCK);
    let shares: Vec<Share> = (0..h * blocks)
        .into_par_iter()
        .map(|i| {
            let (head, from) = place(i);
            Task { problem, steps: &steps[head], head, from, rows: BLOCK.min(p - from) }.run(cotangents, &db, &dc)
        })
        .collect();
    let zeros = |count: usize| vec![0.0; count];
    let mut out = Solution { y: zeros(l * h * p), dx: zeros(l * h * p), ddt: zeros(l * h), ..Solution::default() };
    (out.da, out.dd, out.ddt_bias) = (zeros(h), zeros(h), zeros(h));
    for (i, share) in shares.iter().enumerate() {
        let (head, from) = place(i);
        let rows = BLOCK.min(p - from);
        for t in 0..l {
            let at = (t * h + head) * p + from;
            out.y[at..at + rows].copy_from_slice(&share.y[t * rows..(t + 1) * rows]);
            out.dx[at..at + rows].copy_from_slice(&share.dx[t * rows..(t + 1) * rows]);
            let ddt = share.ddelta[t] * steps[head].slope[t];
            out.ddt[t * h + head] += ddt;
            out.ddt_bias[head] += ddt;
        }
        out.state.extend(&share.state);
        out.dstate.extend(&share.dstate);
        out.da[head] += share.da;
        out.dd[head] += share.dd;
    }
    // [g, l, n] -> [l, g, n]
    let joined = |groups: Vec<Mutex<Vec<f64>>>| {
        let groups: Vec<Vec<f64>> = groups.into_iter().map(|m| m.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)).collect();
        (0..l).flat_map(|t| groups.iter().flat_map(move |group| group[t * n..(t + 1) * n].iter().copied())).collect()
    };
    (out.db, out.dc) = (joined(db), joined(dc));
    out
}
