//! On slices: one pass per row, rows shared out among threads.

use pulp::Arch;

use crate::cpu::math::{dot, sigmoid, silu, vectorized};
use crate::cpu::threads::{Shared, for_each};

/// Arguments as slices; shapes as in [`super::NormArgs`].
pub(crate) struct NormInput<'a> {
    pub y: &'a [f32],
    pub z: Option<&'a [f32]>,
    pub weight: &'a [f32],
    pub groups: usize,
    pub eps: f32,
}

impl NormInput<'_> {
    fn rows(&self) -> usize {
        self.y.len() / self.weight.len().max(1)
    }
}

/// Rows of a task: fixed, so that sums over rows do not depend on the number of threads.
const BLOCK: usize = 16;

/// `[b, l, e]`.
pub(crate) fn forward(input: &NormInput) -> Vec<f32> {
    let e = input.weight.len();
    let mut out = vec![0.0; input.y.len()];
    let shared = Shared::new(&mut out);
    let arch = Arch::new();
    for_each(
        input.rows().div_ceil(BLOCK),
        input.y.len() * 8,
        || (),
        |(), block| {
            for row in block * BLOCK..input.rows().min((block + 1) * BLOCK) {
                // SAFETY: each row belongs to one task.
                let out = unsafe { shared.part(row * e, e) };
                let (y, z) = (&input.y[row * e..][..e], input.z.map(|z| &z[row * e..][..e]));
                vectorized!(arch, normalize(out, y, z, input.weight, input.groups, input.eps));
            }
        },
    );
    out
}

#[inline(always)]
fn normalize(out: &mut [f32], y: &[f32], z: Option<&[f32]>, weight: &[f32], groups: usize, eps: f32) {
    match z {
        None => out.copy_from_slice(y),
        Some(z) => out.iter_mut().zip(y).zip(z).for_each(|((out, &y), &z)| *out = y * silu(z)),
    }
    let width = out.len() / groups;
    for (out, weight) in out.chunks_exact_mut(width).zip(weight.chunks_exact(width)) {
        let scale = 1.0 / (dot(out, out) / width as f32 + eps).sqrt();
        for (out, weight) in out.iter_mut().zip(weight) {
            *out *= scale * weight;
        }
    }
}

/// Gradients of `y`, `z` (empty without a gate) and `weight`.
pub(crate) fn backward(input: &NormInput, dout: &[f32]) -> [Vec<f32>; 3] {
    let e = input.weight.len();
    let blocks = input.rows().div_ceil(BLOCK);
    let gated = usize::from(input.z.is_some());
    let (mut dy, mut dz, mut parts) = (vec![0.0; dout.len()], vec![0.0; gated * dout.len()], vec![0.0; blocks * e]);
    let (shared_y, shared_z, shared_w) = (Shared::new(&mut dy), Shared::new(&mut dz), Shared::new(&mut parts));
    let arch = Arch::new();
    for_each(
        blocks,
        dout.len() * 16,
        || vec![0.0; 2 * e],
        |scratch, block| {
            // SAFETY: one part per task.
            let dw = unsafe { shared_w.part(block * e, e) };
            for row in block * BLOCK..input.rows().min((block + 1) * BLOCK) {
                // SAFETY: each row belongs to one task.
                let (dy, dz) = unsafe { (shared_y.part(row * e, e), shared_z.part(gated * row * e, gated * e)) };
                let row = row * e..(row + 1) * e;
                vectorized!(
                    arch,
                    differentiate(
                        input,
                        &input.y[row.clone()],
                        input.z.map(|z| &z[row.clone()]),
                        &dout[row.clone()],
                        [&mut *dy, &mut *dz, &mut *dw],
                        scratch
                    )
                );
            }
        },
    );
    let mut dw = vec![0.0; e];
    for part in parts.chunks_exact(e) {
        dw.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    [dy, dz, dw]
}

/// With `v = y silu(z)`, `u = v r` and `r = rsqrt(mean(v^2) + eps)`: `dv = r (g - u mean(g u))`, `g = dout * weight`.
#[inline(always)]
fn differentiate(input: &NormInput, y: &[f32], z: Option<&[f32]>, dout: &[f32], [dy, dz, dw]: [&mut [f32]; 3], scratch: &mut [f32]) {
    let width = y.len() / input.groups;
    let (v, g) = scratch.split_at_mut(y.len());
    for i in 0..y.len() {
        g[i] = dout[i] * input.weight[i];
    }
    match z {
        None => v.copy_from_slice(y),
        Some(z) => v.iter_mut().zip(y).zip(z).for_each(|((v, &y), &z)| *v = y * silu(z)),
    }
    for from in (0..y.len()).step_by(width) {
        let group = from..from + width;
        let (v, g) = (&v[group.clone()], &g[group.clone()]);
        let scale = 1.0 / (dot(v, v) / width as f32 + input.eps).sqrt();
        let pull = dot(g, v) / width as f32 * scale * scale;
        let (y, dout) = (&y[group.clone()], &dout[group.clone()]);
        let (dy, dw) = (&mut dy[group.clone()], &mut dw[group.clone()]);
        for i in 0..width {
            dy[i] = scale * (g[i] - v[i] * pull);
            dw[i] += dout[i] * v[i] * scale;
        }
        let Some(z) = z.map(|z| &z[group.clone()]) else { continue };
        let dz = &mut dz[group];
        for i in 0..width {
            let s = sigmoid(z[i]);
            dz[i] = dy[i] * y[i] * (s * (1.0 + z[i] * (1.0 - s)));
            dy[i] *= z[i] * s;
        }
    }
}
