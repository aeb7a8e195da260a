//! On slices: one pass per row, rows shared out among threads.

use pulp::Arch;

use crate::cpu::math::{dot, fold, vectorized};
use crate::cpu::threads::{Shared, for_each};

/// Rows of a task: fixed, so that sums over rows do not depend on the number of threads.
const BLOCK: usize = 16;

/// Parameters of a norm; a layer norm where there is a bias.
pub(crate) struct Norm<'a> {
    pub weight: &'a [f32],
    pub bias: Option<&'a [f32]>,
    pub eps: f32,
}

/// Adds `x` to the residual, which is what `sum` holds where it is not given, rounds by `round` to what the sum's dtype holds and
/// leaves that in `sum`; returns what is normed.
pub(crate) fn forward(sum: &mut [f32], residual: Option<&[f32]>, x: &[f32], norm: &Norm, round: Option<fn(f32) -> f32>) -> Vec<f32> {
    let d = norm.weight.len();
    let rows = x.len() / d.max(1);
    let mut normed = vec![0.0; x.len()];
    let (sums, norms) = (Shared::new(sum), Shared::new(&mut normed));
    let arch = Arch::new();
    for_each(
        rows.div_ceil(BLOCK),
        x.len() * 8,
        || (),
        |(), block| {
            for row in block * BLOCK..rows.min((block + 1) * BLOCK) {
                // SAFETY: each row belongs to one task.
                let (sum, normed) = unsafe { (sums.part(row * d, d), norms.part(row * d, d)) };
                if let Some(residual) = residual {
                    sum.copy_from_slice(&residual[row * d..][..d]);
                }
                let x = &x[row * d..][..d];
                vectorized!(arch, sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x));
                if let Some(round) = round {
                    sum.iter_mut().for_each(|sum| *sum = round(*sum));
                }
                vectorized!(arch, normalize(normed, sum, norm));
            }
        },
    );
    normed
}

/// The norm of what nothing is added to.
pub(crate) fn alone(values: &[f32], norm: &Norm) -> Vec<f32> {
    let d = norm.weight.len();
    let rows = values.len() / d.max(1);
    let mut normed = vec![0.0; values.len()];
    let norms = Shared::new(&mut normed);
    let arch = Arch::new();
    for_each(
        rows.div_ceil(BLOCK),
        values.len() * 8,
        || (),
        |(), block| {
            for row in block * BLOCK..rows.min((block + 1) * BLOCK) {
                // SAFETY: each row belongs to one task.
                let normed = unsafe { norms.part(row * d, d) };
                vectorized!(arch, normalize(normed, &values[row * d..][..d], norm));
            }
        },
    );
    normed
}

#[inline(always)]
fn normalize(normed: &mut [f32], sum: &[f32], norm: &Norm) {
    let width = sum.len() as f32;
    let Some(bias) = norm.bias else {
        let scale = 1.0 / (dot(sum, sum) / width + norm.eps).sqrt();
        normed.iter_mut().zip(sum).zip(norm.weight).for_each(|((out, sum), weight)| *out = sum * (scale * weight));
        return;
    };
    centre(normed, sum);
    let scale = 1.0 / (dot(normed, normed) / width + norm.eps).sqrt();
    normed.iter_mut().zip(norm.weight).zip(bias).for_each(|((out, weight), bias)| *out = *out * (scale * weight) + bias);
}

/// `values` less their mean.
#[inline(always)]
fn centre(centred: &mut [f32], values: &[f32]) {
    let mean = fold(values, values, |value, _| value) / values.len() as f32;
    centred.iter_mut().zip(values).for_each(|(out, value)| *out = value - mean);
}

/// From `dnormed`, the gradient of what is normed, which is what `grad` holds where it is not given: leaves that of the sum in
/// `grad` and returns those of the weight and, of a layer norm, the bias, else nothing for it.
pub(crate) fn backward(
    grad: &mut [f32],
    dnormed: Option<&[f32]>,
    sum: &[f32],
    dsum: Option<&[f32]>,
    weight: &[f32],
    layer: bool,
    eps: f32,
) -> [Vec<f32>; 2] {
    let d = weight.len();
    let biases = if layer { d } else { 0 };
    let rows = sum.len() / d.max(1);
    let blocks = rows.div_ceil(BLOCK);
    let work = sum.len() * 16;
    let (mut parts, mut bias_parts) = (vec![0.0; blocks * d], vec![0.0; blocks * biases]);
    let (grads, shared_w, shared_b) = (Shared::new(grad), Shared::new(&mut parts), Shared::new(&mut bias_parts));
    let arch = Arch::new();
    for_each(
        blocks,
        work,
        || vec![0.0; biases],
        |centred, block| {
            // SAFETY: one part per task.
            let (dw, db) = unsafe { (shared_w.part(block * d, d), shared_b.part(block * biases, biases)) };
            for row in block * BLOCK..rows.min((block + 1) * BLOCK) {
                // SAFETY: each row belongs to one task.
                let grad = unsafe { grads.part(row * d, d) };
                if let Some(dnormed) = dnormed {
                    grad.copy_from_slice(&dnormed[row * d..][..d]);
                }
                let sum = &sum[row * d..][..d];
                if layer {
                    vectorized!(arch, {
                        db.iter_mut().zip(grad.iter()).for_each(|(db, grad)| *db += grad);
                        centre(centred, sum);
                        differentiate(grad, centred, weight, dw, eps);
                        let level = fold(grad, grad, |grad, _| grad) / d as f32;
                        grad.iter_mut().for_each(|grad| *grad -= level);
                    });
                } else {
                    vectorized!(arch, differentiate(grad, sum, weight, dw, eps));
                }
                if let Some(dsum) = dsum {
                    let dsum = &dsum[row * d..][..d];
                    vectorized!(arch, grad.iter_mut().zip(dsum).for_each(|(grad, dsum)| *grad += dsum));
                }
            }
        },
    );
    [(parts, d), (bias_parts, biases)].map(|(parts, d)| {
        let mut total = vec![0.0; d];
        for part in parts.chunks_exact(d.max(1)) {
            total.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        total
    })
}

/// With `r = rsqrt(mean(s^2) + eps)` and `g = grad * weight`: `r (g - s r^2 mean(g s))`. Of a layer norm `s` is what was centred,
/// and the mean of this is still to be taken off.
#[inline(always)]
fn differentiate(grad: &mut [f32], sum: &[f32], weight: &[f32], dw: &mut [f32], eps: f32) {
    let width = sum.len() as f32;
    let scale = 1.0 / (dot(sum, sum) / width + eps).sqrt();
    for i in 0..sum.len() {
        dw[i] += grad[i] * sum[i] * scale;
        grad[i] *= weight[i];
    }
    let pull = dot(grad, sum) / width * scale * scale;
    for i in 0..sum.len() {
        grad[i] = scale * (grad[i] - sum[i] * pull);
    }
}
