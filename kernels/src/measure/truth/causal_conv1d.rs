//! The convolution of [`crate::causal_conv1d`] for some channels of one row.

use super::{RowIds, silu};

/// Inputs, with `e` channels in this part.
#[derive(Debug, Clone, Default)]
pub(crate) struct Problem {
    pub l: usize,
    pub e: usize,
    pub k: usize,
    /// `[l, e]`.
    pub x: Vec<f64>,
    /// `[e, k]`.
    pub weight: Vec<f64>,
    /// `[e]`, or empty.
    pub bias: Vec<f64>,
    /// `[k - 1, e]`, or empty.
    pub state: Vec<f64>,
    pub ids: RowIds,
    pub silu: bool,
}

/// Outputs and gradients, shaped as in [`Problem`].
#[derive(Debug, Clone, Default)]
pub(crate) struct Solution {
    pub y: Vec<f64>,
    pub dx: Vec<f64>,
    pub dweight: Vec<f64>,
    pub dbias: Vec<f64>,
    pub dstate: Vec<f64>,
}

/// Output, and gradients where that of the output is given (`[l, e]`).
pub(crate) fn run(problem: &Problem, dy: Option<&[f64]>) -> Solution {
    let &Problem { l, e, k, .. } = problem;
    let mut ids = vec![problem.ids.prev; k - 1];
    let mut last = problem.ids.prev;
    let real: Vec<bool> = (0..l)
        .map(|t| {
            let id = problem.ids.ids.get(t).copied().unwrap_or(problem.ids.prev);
            last = if id >= 0 { id } else { last };
            ids.push(last);
            id >= 0
        })
        .collect();
    let zeros = |count: usize| vec![0.0; count];
    let mut out =
        Solution { y: zeros(l * e), dx: zeros(l * e), dweight: zeros(e * k), dbias: zeros(e), dstate: zeros(problem.state.len()) };
    for t in (0..l).filter(|&t| real[t]) {
        // Tap j reads input t + j, counted from the state's first.
        let taps: Vec<usize> = (0..k).filter(|j| ids[t + j] == ids[t + k - 1]).collect();
        for i in 0..e {
            let input = |j: usize| match (t + j).checked_sub(k - 1) {
                Some(at) => problem.x[at * e + i],
                None => problem.state.get((t + j) * e + i).copied().unwrap_or(0.0),
            };
            let sum = problem.bias.get(i).copied().unwrap_or(0.0) + taps.iter().map(|&j| problem.weight[i * k + j] * input(j)).sum::<f64>();
            let (value, slope) = if problem.silu { silu(sum) } else { (sum, 1.0) };
            out.y[t * e + i] = value;
            let Some(dy) = dy else { continue };
            let grad = dy[t * e + i] * slope;
            out.dbias[i] += grad;
            for &j in &taps {
                out.dweight[i * k + j] += grad * input(j);
                let fed = grad * problem.weight[i * k + j];
                match (t + j).checked_sub(k - 1) {
                    Some(at) => out.dx[at * e + i] += fed,
                    None if !problem.state.is_empty() => out.dstate[(t + j) * e + i] += fed,
                    None => {}
                }
            }
        }
    }
    out
}
