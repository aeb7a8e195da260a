//! Chunks from first to last, carrying the state.

use pulp::Arch;

use super::SsdInput;
use super::chunks::{CHUNK, Decays, Group, Sizes, Task, Tasks, advance, gather, mixing, state_in, state_out};
use crate::cpu::math::vectorized;
use crate::cpu::product::{ALIGN, Left, Product, Start};
use crate::cpu::threads::{Shared, for_each};
use crate::ssd::SsdDims;

/// `y [b, l, h, p]` and the final state `[b, h, p, n]`.
pub(crate) fn forward(input: &SsdInput) -> (Vec<f32>, Vec<f32>) {
    let SsdDims { b, l, h, p, n, .. } = input.dims;
    let (mut y, mut state) = (vec![0.0; b * l * h * p], vec![0.0; b * h * p * n]);
    let tasks = Tasks::new(input.dims);
    let out = Outputs { y: Shared::new(&mut y), state: Shared::new(&mut state) };
    for_each(
        tasks.count(),
        b * l * h * p * n,
        || Scratch::new(input, &tasks),
        |scratch, index| scratch.run(input, &tasks.get(index), &out),
    );
    (y, state)
}

struct Outputs<'a> {
    y: Shared<'a>,
    state: Shared<'a>,
}

struct Scratch {
    arch: Arch,
    sizes: Sizes,
    group: Group,
    decays: Decays,
    /// Per head, `[n, p]`.
    states: Vec<f32>,
    x: Vec<f32>,
    y: Vec<f32>,
    weights: Vec<f32>,
    row: Vec<f32>,
}

impl Scratch {
    fn new(input: &SsdInput, tasks: &Tasks) -> Self {
        let sizes = Sizes::new(input.dims);
        let Sizes { q, p, n } = sizes;
        Self {
            arch: Arch::new(),
            sizes,
            group: Group::new(sizes),
            decays: Decays::new(q),
            states: vec![0.0; tasks.heads * n * p],
            x: vec![0.0; q * p],
            y: vec![0.0; q * p],
            weights: vec![0.0; q * q],
            row: vec![0.0; q],
        }
    }

    fn run(&mut self, input: &SsdInput, task: &Task, out: &Outputs) {
        let SsdDims { h, p, n, .. } = input.dims;
        let size = self.sizes.n * self.sizes.p;
        for (head, matrix) in (task.first..task.first + task.heads).zip(self.states.chunks_exact_mut(size)) {
            match input.state {
                Some(state) => state_in(self.arch, matrix, self.sizes, &state[(task.row * h + head) * p * n..][..p * n], input.dims),
                None => matrix.fill(0.0),
            }
        }
        let len = input.documents.len(task.row);
        for from in (0..len).step_by(CHUNK) {
            let count = CHUNK.min(len - from);
            self.group.load(self.arch, input, self.sizes, task, from, count);
            for head in 0..task.heads {
                self.chunk(input, task, head, from, count, out);
            }
        }
        for (head, matrix) in (task.first..task.first + task.heads).zip(self.states.chunks_exact(size)) {
            // SAFETY: one state per head, and a head belongs to one task.
            let target = unsafe { out.state.part((task.row * h + head) * p * n, p * n) };
            state_out(self.arch, target, matrix, self.sizes, input.dims);
        }
    }

    /// `y = diag(from_start) C S + (L o C B^T) diag(delta) X + d X`, then the state that leaves the chunk.
    fn chunk(&mut self, input: &SsdInput, task: &Task, index: usize, from: usize, len: usize, out: &Outputs) {
        let Sizes { q, p, n } = self.sizes;
        let (arch, head, width) = (self.arch, task.first + index, input.dims.p);
        self.decays.load(input, task.row, head, from, len);
        let at = |t: usize| input.at_x(task.row, from + t, head);
        gather(&mut self.x, p, width, (0..len).map(|t| &input.x[at(t)..][..width]));
        mixing(arch, &mut self.weights, &mut self.row, &self.group.scores, &self.decays, q);

        let state = &mut self.states[index * n * p..][..n * p];
        let left = Left::rows(&self.group.c, n);
        Product {
            out: &mut self.y,
            out_stride: p,
            left,
            right: state,
            right_stride: p,
            rows: len,
            columns: p,
            depth: input.dims.n,
            start: Start::Zero,
        }
        .run(arch);
        for i in (0..len).step_by(ALIGN) {
            Product {
                out: &mut self.y[i * p..],
                out_stride: p,
                left: Left::rows(&self.weights[i * q..], q),
                right: &self.x,
                right_stride: p,
                rows: ALIGN.min(len - i),
                columns: p,
                depth: len.min(i + ALIGN),
                start: Start::Rows(&self.decays.from_start[i..]),
            }
            .run(arch);
        }
        let skip = input.d.map_or(0.0, |d| d[head]);
        for t in 0..len {
            // SAFETY: a head belongs to one task.
            let y = unsafe { out.y.part(at(t), width) };
            let x = &mut self.x[t * p..][..p];
            vectorized!(arch, finish(y, &self.y[t * p..][..width], x, skip, self.decays.step[t] * self.decays.to_end[t]));
        }
        advance(arch, state, self.decays.carry(), &self.group.b, &self.x, self.sizes, len);
    }
}

/// Writes a token's output, and weighs its input for the state.
#[inline(always)]
fn finish(out: &mut [f32], y: &[f32], x: &mut [f32], skip: f32, weight: f32) {
    for ((out, y), x) in out.iter_mut().zip(y).zip(&*x) {
        *out = y + skip * x;
    }
    x.iter_mut().for_each(|x| *x *= weight);
}
