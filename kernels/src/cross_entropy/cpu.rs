//! On slices: rows shared out among threads.

use pulp::Arch;

use crate::cpu::math::{exp, fold, vectorized};
use crate::cpu::threads::{Shared, for_each};

/// Values of a task, about: fixed, so that results do not depend on the number of threads.
const BLOCK: usize = 1 << 14;

fn rows_per_task(v: usize) -> usize {
    (BLOCK / v.max(1)).max(1)
}

/// Losses and logarithms of the sums of exponentials of `logits [rows, v]`.
pub(crate) fn forward(logits: &[f32], targets: &[i32], v: usize) -> [Vec<f32>; 2] {
    let rows = targets.len();
    let (mut loss, mut log_sum) = (vec![0.0; rows], vec![0.0; rows]);
    let (losses, log_sums) = (Shared::new(&mut loss), Shared::new(&mut log_sum));
    let arch = Arch::new();
    let block = rows_per_task(v);
    for_each(
        rows.div_ceil(block),
        logits.len() * 8,
        || (),
        |(), task| {
            for row in task * block..rows.min((task + 1) * block) {
                let logits = &logits[row * v..][..v];
                let sum = vectorized!(arch, log_sum_exp(logits));
                // SAFETY: each row belongs to one task.
                let (loss, log_sum) = unsafe { (losses.part(row, 1), log_sums.part(row, 1)) };
                log_sum[0] = sum;
                loss[0] = usize::try_from(targets[row]).map_or(0.0, |target| sum - logits[target]);
            }
        },
    );
    [loss, log_sum]
}

#[inline(always)]
fn log_sum_exp(logits: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [f32::MIN; LANES];
    let mut whole = logits.chunks_exact(LANES);
    for values in whole.by_ref() {
        for i in 0..LANES {
            lanes[i] = if values[i] > lanes[i] { values[i] } else { lanes[i] };
        }
    }
    let largest = lanes.iter().chain(whole.remainder()).fold(f32::MIN, |m, &x| m.max(x));
    largest + fold(logits, logits, |x, _| exp(x - largest)).ln()
}

/// Turns logits into their gradient, `(softmax - one_hot) * dloss`.
pub(crate) fn backward(logits: &mut [f32], targets: &[i32], log_sum: &[f32], dloss: &[f32], v: usize) {
    let rows = targets.len();
    let work = logits.len() * 8;
    let shared = Shared::new(logits);
    let arch = Arch::new();
    let block = rows_per_task(v);
    for_each(
        rows.div_ceil(block),
        work,
        || (),
        |(), task| {
            for row in task * block..rows.min((task + 1) * block) {
                // SAFETY: each row belongs to one task.
                let values = unsafe { shared.part(row * v, v) };
                let Ok(target) = usize::try_from(targets[row]) else {
                    values.fill(0.0);
                    continue;
                };
                let (log_sum, scale) = (log_sum[row], dloss[row]);
                vectorized!(arch, values.iter_mut().for_each(|x| *x = exp(*x - log_sum) * scale));
                values[target] -= scale;
            }
        },
    );
}
