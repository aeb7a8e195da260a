//! On slices: places sorted by counting, rows of the table shared out among threads.

use pulp::Arch;

use crate::cpu::math::vectorized;
use crate::cpu::threads::{Shared, for_each};

/// Rows of a task.
const BLOCK: usize = 64;

/// `[v, d]` from `dout [n, d]` at rows `ids [n]`.
pub(crate) fn backward(ids: &[i32], dout: &[f32], v: usize, d: usize) -> Vec<f32> {
    // Where the places of each row begin, and the places in that order.
    let mut starts = vec![0usize; v + 1];
    ids.iter().for_each(|&id| starts[id as usize + 1] += 1);
    (0..v).for_each(|row| starts[row + 1] += starts[row]);
    let (mut next, mut places) = (starts.clone(), vec![0usize; ids.len()]);
    for (place, &id) in ids.iter().enumerate() {
        places[next[id as usize]] = place;
        next[id as usize] += 1;
    }
    let mut sums = vec![0.0; v * d];
    let shared = Shared::new(&mut sums);
    let arch = Arch::new();
    for_each(
        v.div_ceil(BLOCK),
        dout.len() * 4,
        || (),
        |(), block| {
            for row in block * BLOCK..v.min((block + 1) * BLOCK) {
                // SAFETY: each row belongs to one task.
                let sum = unsafe { shared.part(row * d, d) };
                for &place in &places[starts[row]..starts[row + 1]] {
                    let grad = &dout[place * d..][..d];
                    vectorized!(arch, sum.iter_mut().zip(grad).for_each(|(sum, grad)| *sum += grad));
                }
            }
        },
    );
    sums
}
