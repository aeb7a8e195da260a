//! On slices: one pass per row, rows shared out among threads.

use pulp::Arch;

use crate::cpu::math::{dot, vectorized};
use crate::cpu::threads::{Shared, for_each};

/// Rows of a task: fixed, so that sums over rows do not depend on the number of threads.
const BLOCK: usize = 16;

/// Adds `x` to the residual, which is what `sum` holds where it is not given, rounds by `round` to what the sum's dtype holds and
/// leaves that in `sum`; returns what is normed.
pub(crate) fn forward(
    sum: &mut [f32],
    residual: Option<&[f32]>,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    round: Option<fn(f32) -> f32>,
) -> Vec<f32> {
    let d = weight.len();
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
                vectorized!(arch, {
                    let scale = 1.0 / (dot(sum, sum) / d as f32 + eps).sqrt();
                    normed.iter_mut().zip(sum.iter()).zip(weight).for_each(|((out, sum), weight)| *out = sum * (scale * weight));
                });
            }
        },
    );
    normed
}

/// From `dnormed`, the gradient of what is normed, which is what `grad` holds where it is not given: leaves that of the sum in
/// `grad` and returns that of the weight.
pub(crate) fn backward(grad: &mut [f32], dnormed: Option<&[f32]>, sum: &[f32], dsum: Option<&[f32]>, weight: &[f32], eps: f32) -> Vec<f32> {
    let d = weight.len();
    let rows = sum.len() / d.max(1);
    let blocks = rows.div_ceil(BLOCK);
    let work = sum.len() * 16;
    let mut parts = vec![0.0; blocks * d];
    let (grads, shared_w) = (Shared::new(grad), Shared::new(&mut parts));
    let arch = Arch::new();
    for_each(
        blocks,
        work,
        || (),
        |(), block| {
            // SAFETY: one part per task.
            let dw = unsafe { shared_w.part(block * d, d) };
            for row in block * BLOCK..rows.min((block + 1) * BLOCK) {
                // SAFETY: each row belongs to one task.
                let grad = unsafe { grads.part(row * d, d) };
                if let Some(dnormed) = dnormed {
                    grad.copy_from_slice(&dnormed[row * d..][..d]);
                }
                let sum = &sum[row * d..][..d];
                vectorized!(arch, differentiate(grad, sum, weight, dw, eps));
                if let Some(dsum) = dsum {
                    let dsum = &dsum[row * d..][..d];
                    vectorized!(arch, grad.iter_mut().zip(dsum).for_each(|(grad, dsum)| *grad += dsum));
                }
            }
        },
    );
    let mut dw = vec![0.0; d];
    for part in parts.chunks_exact(d.max(1)) {
        dw.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    dw
}

/// With `r = rsqrt(mean(s^2) + eps)` and `g = grad * weight`: `r (g - s r^2 mean(g s))`.
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
