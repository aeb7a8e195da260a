//! The attention of [`crate::attention`] for some queries of one row.

use std::sync::Mutex;

use rayon::prelude::*;

use super::{add, dot};

/// Inputs: `t` queries of `h` heads against `s` slots of `g` key heads.
#[derive(Debug, Clone, Default)]
pub(crate) struct Problem {
    pub h: usize,
    pub g: usize,
    pub t: usize,
    pub s: usize,
    pub p: usize,
    pub scale: f64,
    /// Slots that the first query sees; each further query sees one more.
    pub seen: usize,
    /// Key head of each query head.
    pub group: Vec<usize>,
    /// `[h, t, p]`.
    pub q: Vec<f64>,
    /// `[g, s, p]`.
    pub k: Vec<f64>,
    /// `[g, s, p]`.
    pub v: Vec<f64>,
    /// Document of each query, or empty.
    pub query_ids: Vec<i32>,
    /// Document of each slot, or empty.
    pub slot_ids: Vec<i32>,
}

/// Output and gradients, shaped as in [`Problem`].
#[derive(Debug, Clone, Default)]
pub(crate) struct Solution {
    pub out: Vec<f64>,
    pub dq: Vec<f64>,
    pub dk: Vec<f64>,
    pub dv: Vec<f64>,
}

/// Output, and gradients where that of the output is given (`[h, t, p]`).
pub(crate) fn run(problem: &Problem, dout: Option<&[f64]>) -> Solution {
    let &Problem { h, g, t, s, p, .. } = problem;
    let shared = Mutex::new((vec![0.0; g * s * p], vec![0.0; g * s * p]));
    let block = t.div_ceil(2 * rayon::current_num_threads()).clamp(1, 256);
    let tasks: Vec<(usize, usize)> = (0..h).flat_map(|head| (0..t).step_by(block).map(move |from| (head, from))).collect();
    let parts: Vec<(Vec<f64>, Vec<f64>)> = tasks
        .par_iter()
        .map(|&(head, from)| {
            let (mut dk, mut dv) = (vec![0.0; s * p], vec![0.0; s * p]);
            let (mut out, mut dq) = (Vec::new(), Vec::new());
            for i in from..(from + block).min(t) {
                let (o, d) = query(problem, (head, i), dout, (&mut dk, &mut dv));
                out.extend(o);
                dq.extend(d);
            }
            if dout.is_some() {
                let at = problem.group[head] * s * p;
                let mut all = shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                add(&mut all.0[at..at + s * p], &dk);
                add(&mut all.1[at..at + s * p], &dv);
            }
            (out, dq)
        })
        .collect();
    let (dk, dv) = shared.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (out, dq): (Vec<Vec<f64>>, Vec<Vec<f64>>) = parts.into_iter().unzip();
    Solution { out: out.concat(), dq: dq.concat(), dk, dv }
}

/// One query's output and gradient; adds to those of keys and values.
fn query(problem: &Problem, (head, i): (usize, usize), dout: Option<&[f64]>, (dk, dv): (&mut [f64], &mut [f64])) -> (Vec<f64>, Vec<f64>) {
    let &Problem { t, s, p, scale, .. } = problem;
    let group = problem.group[head] * s * p;
    let at = (head * t + i) * p;
    let q = &problem.q[at..at + p];
    let id = problem.query_ids.get(i).copied();
    let seen: Vec<usize> = (0..(problem.seen + i).min(s)).filter(|&j| id.is_none_or(|id| id >= 0 && problem.slot_ids[j] == id)).collect();
    let (mut out, mut dq) = (vec![0.0; p], vec![0.0; p]);
    let scores: Vec<f64> = seen.iter().map(|&j| scale * dot(q, &problem.k[group + j * p..group + (j + 1) * p])).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|w| *w /= total);
    for (&j, w) in seen.iter().zip(&weights) {
        out.iter_mut().zip(&problem.v[group + j * p..]).for_each(|(o, v)| *o += w * v);
    }
    let Some(dout) = dout else { return (out, dq) };
    let dout = &dout[at..at + p];
    let base = dot(dout, &out);
    for (&j, w) in seen.iter().zip(&weights) {
        let dscore = w * (dot(dout, &problem.v[group + j * p..group + (j + 1) * p]) - base) * scale;
        let key = &problem.k[group + j * p..group + (j + 1) * p];
        for c in 0..p {
            dv[j * p + c] += w * dout[c];
            dk[j * p + c] += dscore * q[c];
            dq[c] += dscore * key[c];
        }
    }
    (out, dq)
}
