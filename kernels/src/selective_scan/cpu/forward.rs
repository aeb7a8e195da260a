//! Chunks from first to last, carrying the state.

use super::ScanInput;
use super::chunks::{Block, Task, Tasks, chunks};
use crate::cpu::math::vectorized;
use crate::cpu::threads::{Shared, for_each};
use crate::selective_scan::ScanDims;

/// `y [b, l, e]` and the final state `[b, e, n]`.
pub(crate) fn forward(input: &ScanInput) -> (Vec<f32>, Vec<f32>) {
    let ScanDims { b, l, e, n } = input.dims;
    let (mut y, mut state) = (vec![0.0; b * l * e], vec![0.0; b * e * n]);
    let tasks = Tasks::new(input.dims);
    let (out_y, out_state) = (Shared::new(&mut y), Shared::new(&mut state));
    for_each(
        tasks.count(),
        input.work(),
        || {
            let block = Block::new(input, &tasks);
            let state = vec![0.0; block.size()];
            (block, state)
        },
        |(block, state), index| run(block, state, input, &tasks.get(index), &out_y, &out_state),
    );
    (y, state)
}

fn run(block: &mut Block, state: &mut [f32], input: &ScanInput, task: &Task, y: &Shared, final_state: &Shared) {
    let ScanDims { l, e, n, .. } = input.dims;
    block.begin(input, task);
    block.state_in(state, input.state, task, input.dims);
    for chunk in chunks(input, task.row) {
        block.load(input, task, chunk);
        if chunk.fresh {
            state.fill(0.0);
        }
        block.advance::<true>(state, chunk.len);
        for i in 0..chunk.len {
            let t = chunk.from + i;
            // SAFETY: a channel of a row belongs to one task.
            let y = unsafe { y.part((task.row * l + t) * e + task.first, task.count) };
            vectorized!(block.arch, input.finish(task.row, t, task.first, y, &block.read[i * block.width..][..task.count]));
        }
    }
    // SAFETY: as above.
    let target = unsafe { final_state.part((task.row * e + task.first) * n, task.count * n) };
    block.state_out(target, state, input.dims);
}
