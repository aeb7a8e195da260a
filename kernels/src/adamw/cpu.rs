//! On slices: all numbers of a parameter in one pass, in chunks shared out among threads.

use pulp::Arch;
use rayon::prelude::*;

use super::AdamWFactors;
use crate::cpu::math::vectorized;
use crate::cpu::threads::{Shared, for_each};

/// Numbers of a task. Sums are made per chunk and added in order, so that they do not depend on the number of threads.
const CHUNK: usize = 1 << 15;

/// Writes the new value and moments over the old ones, `tensors`, all as long as `grad`.
pub(crate) fn adamw(tensors: [&mut [f32]; 3], grad: &[f32], factors: AdamWFactors) {
    let n = grad.len();
    let shared = tensors.map(Shared::new);
    let arch = Arch::new();
    for_each(
        n.div_ceil(CHUNK),
        n * 16,
        || (),
        |(), chunk| {
            let (from, to) = (chunk * CHUNK, n.min((chunk + 1) * CHUNK));
            // SAFETY: each chunk belongs to one task.
            let [value, first, second] = shared.each_ref().map(|tensor| unsafe { tensor.part(from, to - from) });
            vectorized!(arch, update(value, first, second, &grad[from..to], factors));
        },
    );
}

#[inline(always)]
fn update(value: &mut [f32], first: &mut [f32], second: &mut [f32], grad: &[f32], factors: AdamWFactors) {
    let AdamWFactors { clip, first: (b1, c1), second: (b2, c2), root, eps, step, keep } = factors;
    for (((value, first), second), grad) in value.iter_mut().zip(first).zip(second).zip(grad) {
        let grad = grad * clip;
        *first = *first * b1 + grad * c1;
        *second = *second * b2 + grad * grad * c2;
        *value = *value * keep - *first / (second.sqrt() * root + eps) * step;
    }
}

/// Sum of the squares, in float64.
pub(crate) fn square_sum(values: &[f32]) -> f64 {
    let arch = Arch::new();
    if values.len() <= CHUNK {
        return vectorized!(arch, squares(values));
    }
    let sums: Vec<f64> = values.par_chunks(CHUNK).map(|values| vectorized!(arch, squares(values))).collect();
    sums.iter().sum()
}

#[inline(always)]
fn squares(values: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut lanes = [0.0f64; LANES];
    let mut whole = values.chunks_exact(LANES);
    for values in whole.by_ref() {
        for i in 0..LANES {
            lanes[i] += f64::from(values[i]) * f64::from(values[i]);
        }
    }
    let rest: f64 = whole.remainder().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    lanes.iter().sum::<f64>() + rest
}
