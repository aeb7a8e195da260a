//! The recurrence, token by token, for decoding.

use pulp::{Arch, Simd, WithSimd};

use super::ScanInput;
use crate::cpu::math::{exp2_lanes, vectorized};
use crate::cpu::threads::{Shared, for_each};
use crate::selective_scan::ScanDims;

/// Channels of a task.
const CHANNELS: usize = 64;

/// Writes the final state `[b, e, n]` over the incoming one; returns `y [b, l, e]`.
pub(crate) fn steps(input: &ScanInput, states: &mut [f32]) -> Vec<f32> {
    let ScanDims { b, l, e, n } = input.dims;
    let mut y = vec![0.0; b * l * e];
    let (out, shared) = (Shared::new(&mut y), Shared::new(states));
    let arch = Arch::new();
    let blocks = e.div_ceil(CHANNELS);
    for_each(
        b * blocks,
        input.work(),
        || [[0.0; CHANNELS]; 3],
        |[step, fed, read], task| {
            let (row, first) = (task / blocks, task % blocks * CHANNELS);
            let count = CHANNELS.min(e - first);
            let (step, fed, read) = (&mut step[..count], &mut fed[..count], &mut read[..count]);
            // SAFETY: one block of channels per task.
            let state = unsafe { shared.part((row * e + first) * n, count * n) };
            for t in 0..input.documents.len(row) {
                vectorized!(arch, input.steps(row, t, first, step, fed));
                if input.documents.begins(row, t) {
                    state.fill(0.0);
                }
                let rates = &input.a[first * n..][..count * n];
                arch.dispatch(Step { state, read, rates, step, fed, b: input.b.at(row, t), c: input.c.at(row, t) });
                // SAFETY: as above.
                let y = unsafe { out.part((row * l + t) * e + first, count) };
                vectorized!(arch, input.finish(row, t, first, y, read));
            }
        },
    );
    y
}

/// One token of some channels.
struct Step<'a> {
    state: &'a mut [f32],
    read: &'a mut [f32],
    rates: &'a [f32],
    step: &'a [f32],
    fed: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
}

impl WithSimd for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let n = self.b.len();
        let (b, b_tail) = S::as_simd_f32s(self.b);
        let (c, c_tail) = S::as_simd_f32s(self.c);
        let (b_tail, c_tail) = (simd.partial_load_f32s(b_tail), simd.partial_load_f32s(c_tail));
        for (i, read) in self.read.iter_mut().enumerate() {
            let step = simd.splat_f32s(self.step[i] * std::f32::consts::LOG2_E);
            let fed = simd.splat_f32s(self.fed[i]);
            let (rates, rates_tail) = S::as_simd_f32s(&self.rates[i * n..][..n]);
            let (state, state_tail) = S::as_mut_simd_f32s(&mut self.state[i * n..][..n]);
            let mut sum = simd.splat_f32s(0.0);
            for (((h, &a), &b), &c) in state.iter_mut().zip(rates).zip(b).zip(c) {
                *h = next(simd, *h, simd.mul_f32s(step, a), simd.mul_f32s(fed, b));
                sum = simd.mul_add_f32s(*h, c, sum);
            }
            if !state_tail.is_empty() {
                let (h, a) = (simd.partial_load_f32s(state_tail), simd.partial_load_f32s(rates_tail));
                let h = next(simd, h, simd.mul_f32s(step, a), simd.mul_f32s(fed, b_tail));
                simd.partial_store_f32s(state_tail, h);
                sum = simd.mul_add_f32s(h, c_tail, sum);
            }
            *read = simd.reduce_sum_f32s(sum);
        }
    }
}

/// `2^log h + fed`.
#[inline(always)]
fn next<S: Simd>(simd: S, h: S::f32s, log: S::f32s, fed: S::f32s) -> S::f32s {
    simd.mul_add_f32s(h, exp2_lanes(simd, log), fed)
}
