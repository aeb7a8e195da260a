//! The recurrence, token by token, for decoding.

use pulp::{Arch, Simd, WithSimd};

use super::SsdInput;
use crate::cpu::threads::{Shared, for_each};
use crate::ssd::SsdDims;

/// Writes the final state `[b, h, p, n]` over the incoming one; returns `y [b, l, h, p]`.
pub(crate) fn steps(input: &SsdInput, states: &mut [f32]) -> Vec<f32> {
    let SsdDims { b, l, h, p, g, n } = input.dims;
    let mut y = vec![0.0; b * l * h * p];
    let (out, shared) = (Shared::new(&mut y), Shared::new(states));
    let arch = Arch::new();
    for_each(
        b * h,
        b * h * p * n * l,
        || (),
        |(), task| {
            let (row, head) = (task / h, task % h);
            // SAFETY: one state per task.
            let state = unsafe { shared.part(task * p * n, p * n) };
            for t in 0..input.documents.len(row) {
                let step = input.step(row, t, head);
                let (at_x, at_b) = (input.at_x(row, t, head), input.at_b(row, t, head / (h / g)));
                // SAFETY: one head of the output per task.
                let y = unsafe { out.part(at_x, p) };
                arch.dispatch(Step {
                    state: &mut *state,
                    y,
                    x: &input.x[at_x..][..p],
                    b: &input.b[at_b..][..n],
                    c: &input.c[at_b..][..n],
                    step,
                    decay: input.decay(row, t, head, step),
                    skip: input.d.map_or(0.0, |d| d[head]),
                });
            }
        },
    );
    y
}

/// One token of one head.
struct Step<'a> {
    state: &'a mut [f32],
    y: &'a mut [f32],
    x: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
    step: f32,
    decay: f32,
    skip: f32,
}

impl WithSimd for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (b, b_tail) = S::as_simd_f32s(self.b);
        let (c, c_tail) = S::as_simd_f32s(self.c);
        let decay = simd.splat_f32s(self.decay);
        for ((row, y), &x) in self.state.chunks_exact_mut(self.b.len().max(1)).zip(self.y).zip(self.x) {
            let fed = simd.splat_f32s(self.step * x);
            let (row, row_tail) = S::as_mut_simd_f32s(row);
            let mut sum = simd.splat_f32s(0.0);
            for ((s, &b), &c) in row.iter_mut().zip(b).zip(c) {
                *s = simd.mul_add_f32s(fed, b, simd.mul_f32s(*s, decay));
                sum = simd.mul_add_f32s(*s, c, sum);
            }
            let mut tail = 0.0;
            for ((s, &b), &c) in row_tail.iter_mut().zip(b_tail).zip(c_tail) {
                *s = *s * self.decay + self.step * x * b;
                tail += *s * c;
            }
            *y = simd.reduce_sum_f32s(sum) + tail + self.skip * x;
        }
    }
}
