//! The norms of [`crate::rms_norm_gated`] and [`crate::norm_residual`] for some tokens.

use super::silu;

/// Inputs, with `rows` tokens in this part.
#[derive(Debug, Clone, Default)]
pub(crate) struct Problem {
    pub rows: usize,
    pub e: usize,
    pub groups: usize,
    pub eps: f64,
    /// `[rows, e]`.
    pub y: Vec<f64>,
    /// `[rows, e]`, or empty.
    pub z: Vec<f64>,
    /// `[e]`.
    pub weight: Vec<f64>,
    /// `[e]` of a layer norm, or empty.
    pub bias: Vec<f64>,
}

/// Output and gradients, shaped as in [`Problem`].
#[derive(Debug, Clone, Default)]
pub(crate) struct Solution {
    pub out: Vec<f64>,
    pub dy: Vec<f64>,
    pub dz: Vec<f64>,
    pub dweight: Vec<f64>,
    pub dbias: Vec<f64>,
}

/// Output, and gradients where that of the output is given (`[rows, e]`).
pub(crate) fn run(problem: &Problem, dout: Option<&[f64]>) -> Solution {
    let &Problem { rows, e, groups, eps, .. } = problem;
    let width = e / groups;
    let zeros = |count: usize| vec![0.0; count];
    let mut out = Solution {
        out: zeros(rows * e),
        dy: zeros(rows * e),
        dz: zeros(problem.z.len()),
        dweight: zeros(e),
        dbias: zeros(problem.bias.len()),
    };
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / width as f64;
    let layer = !problem.bias.is_empty();
    for begin in (0..rows * e).step_by(width) {
        let range = begin..begin + width;
        let gates: Vec<(f64, f64)> = range.clone().map(|i| problem.z.get(i).map_or((1.0, 0.0), |&z| silu(z))).collect();
        let mut v: Vec<f64> = range.clone().zip(&gates).map(|(i, gate)| problem.y[i] * gate.0).collect();
        let centre = if layer { mean(&mut v.iter().copied()) } else { 0.0 };
        v.iter_mut().for_each(|v| *v -= centre);
        let scale = 1.0 / (mean(&mut v.iter().map(|v| v * v)) + eps).sqrt();
        let weight = |i: usize| problem.weight[i % e];
        for (i, v) in range.clone().zip(&v) {
            out.out[i] = v * scale * weight(i) + problem.bias.get(i % e).unwrap_or(&0.0);
        }
        let Some(dout) = dout else { continue };
        let pull = mean(&mut range.clone().zip(&v).map(|(i, v)| dout[i] * weight(i) * v));
        let level = if layer { mean(&mut range.clone().map(|i| dout[i] * weight(i))) } else { 0.0 };
        for ((i, v), (gate, slope)) in range.zip(&v).zip(&gates) {
            let dv = scale * (dout[i] * weight(i) - level - v * scale * scale * pull);
            out.dweight[i % e] += dout[i] * v * scale;
            if let Some(dbias) = out.dbias.get_mut(i % e) {
                *dbias += dout[i];
            }
            out.dy[i] = dv * gate;
            if let Some(dz) = out.dz.get_mut(i) {
                *dz = dv * problem.y[i] * slope;
            }
        }
    }
    out
}
