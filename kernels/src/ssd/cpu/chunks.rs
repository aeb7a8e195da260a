//! What forward and backward share: the layout of tasks, and a chunk's data in padded scratch matrices.

use pulp::Arch;

use super::SsdInput;
use crate::cpu::math::{transposed, vectorized};
use crate::cpu::product::{ALIGN, Left, Product, Start, aligned};
use crate::ssd::SsdDims;

/// Tokens of a chunk.
pub(super) const CHUNK: usize = 64;

/// Rows of the batch times heads, cut into tasks: some heads of one group, so that what depends on the group alone is
/// computed once for them. Independent of the number of threads.
#[derive(Clone, Copy)]
pub(super) struct Tasks {
    dims: SsdDims,
    /// Heads of a task.
    pub heads: usize,
    /// Tasks of a group.
    pub blocks: usize,
}

/// One task.
#[derive(Clone, Copy)]
pub(super) struct Task {
    pub row: usize,
    pub group: usize,
    /// Index among the tasks of its group.
    pub block: usize,
    /// First head.
    pub first: usize,
    /// Number of heads.
    pub heads: usize,
}

impl Tasks {
    pub(super) fn new(dims: SsdDims) -> Self {
        const ENOUGH: usize = 8;
        let r = dims.h / dims.g;
        let heads = (dims.b * dims.h / ENOUGH).clamp(1, 8).min(r);
        Self { dims, heads, blocks: r.div_ceil(heads) }
    }

    pub(super) fn count(&self) -> usize {
        self.dims.b * self.dims.g * self.blocks
    }

    pub(super) fn get(&self, index: usize) -> Task {
        let r = self.dims.h / self.dims.g;
        let (block, rest) = (index % self.blocks, index / self.blocks);
        let (group, row) = (rest % self.dims.g, rest / self.dims.g);
        let inside = block * self.heads;
        Task { row, group, block, first: group * r + inside, heads: self.heads.min(r - inside) }
    }
}

/// Sizes of the scratch matrices.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    /// Chunk length, head width and state width, each rounded up to whole vectors.
    pub q: usize,
    pub p: usize,
    pub n: usize,
}

impl Sizes {
    pub(super) fn new(dims: SsdDims) -> Self {
        Self { q: aligned(dims.l.min(CHUNK)), p: aligned(dims.p), n: aligned(dims.n) }
    }
}

/// A chunk as its group sees it.
pub(super) struct Group {
    pub b: Vec<f32>,
    pub c: Vec<f32>,
    pub b_turned: Vec<f32>,
    /// `C B^T`, lower triangle. `[q, q]`
    pub scores: Vec<f32>,
}

/// Copies `rows` rows of `width` values into a matrix with rows of `stride`, and zeros what is left of it.
pub(super) fn gather<'a>(matrix: &mut [f32], stride: usize, width: usize, rows: impl Iterator<Item = &'a [f32]>) {
    let mut filled = 0;
    for (target, row) in matrix.chunks_exact_mut(stride).zip(rows) {
        target[..width].copy_from_slice(row);
        target[width..].fill(0.0);
        filled += stride;
    }
    matrix[filled..].fill(0.0);
}

impl Group {
    pub(super) fn new(sizes: Sizes) -> Self {
        let Sizes { q, n, .. } = sizes;
        Self { b: vec![0.0; q * n], c: vec![0.0; q * n], b_turned: vec![0.0; n * q], scores: vec![0.0; q * q] }
    }

    /// Tokens `from..from + len` of a row.
    pub(super) fn load(&mut self, arch: Arch, input: &SsdInput, sizes: Sizes, task: &Task, from: usize, len: usize) {
        let Sizes { q, n, .. } = sizes;
        let width = input.dims.n;
        let at = |t: usize| input.at_b(task.row, from + t, task.group);
        gather(&mut self.b, n, width, (0..len).map(|t| &input.b[at(t)..][..width]));
        gather(&mut self.c, n, width, (0..len).map(|t| &input.c[at(t)..][..width]));
        transposed(arch, &mut self.b_turned, q, &self.b, n, q, n);
        for i in (0..len.next_multiple_of(ALIGN)).step_by(ALIGN) {
            Product {
                out: &mut self.scores[i * q..],
                out_stride: q,
                left: Left::rows(&self.c[i * n..], n),
                right: &self.b_turned,
                right_stride: q,
                rows: ALIGN,
                columns: i + ALIGN,
                depth: width,
                start: Start::Zero,
            }
            .run(arch);
        }
    }
}

/// Step sizes and decays of one head in a chunk; entries past the chunk's tokens are 0 and 1.
pub(super) struct Decays {
    pub step: Vec<f32>,
    pub decay: Vec<f32>,
    /// Decay from the chunk's start through token `i`.
    pub from_start: Vec<f32>,
    /// Decay after token `i` to the chunk's end.
    pub to_end: Vec<f32>,
}

impl Decays {
    pub(super) fn new(q: usize) -> Self {
        Self { step: vec![0.0; q], decay: vec![1.0; q], from_start: vec![1.0; q], to_end: vec![1.0; q] }
    }

    pub(super) fn load(&mut self, input: &SsdInput, row: usize, head: usize, from: usize, len: usize) {
        self.step.fill(0.0);
        self.decay.fill(1.0);
        for t in 0..len {
            self.step[t] = input.step(row, from + t, head);
            self.decay[t] = input.decay(row, from + t, head, self.step[t]);
        }
        let mut product = 1.0;
        for (total, decay) in self.from_start.iter_mut().zip(&self.decay) {
            product *= decay;
            *total = product;
        }
        product = 1.0;
        for (total, decay) in self.to_end.iter_mut().zip(&self.decay).rev() {
            *total = product;
            product *= decay;
        }
    }

    /// Decay over the whole chunk.
    pub(super) fn carry(&self) -> f32 {
        self.from_start[self.from_start.len() - 1]
    }
}

/// Row `i` of `L` from row `i - 1`; the diagonal is 1. Values too small to matter become zero, since arithmetic on
/// subnormal numbers is slow.
#[inline(always)]
pub(super) fn decay_row(row: &mut [f32], i: usize, decay: f32) {
    for value in &mut row[..i] {
        let next = *value * decay;
        *value = if next > 1e-30 { next } else { 0.0 };
    }
    row[i] = 1.0;
}

/// `weights[i, j] = L[i, j] scores[i, j] step[j]` in the lower triangle, zeros above it in the diagonal blocks.
pub(super) fn mixing(arch: Arch, weights: &mut [f32], row: &mut [f32], scores: &[f32], decays: &Decays, q: usize) {
    #[inline(always)]
    fn fill(weights: &mut [f32], row: &mut [f32], scores: &[f32], decays: &Decays, q: usize) {
        for i in 0..q {
            decay_row(row, i, decays.decay[i]);
            let end = (i + 1).next_multiple_of(ALIGN);
            let (out, scores) = (&mut weights[i * q..][..end], &scores[i * q..][..end]);
            for (((out, l), score), step) in out.iter_mut().zip(&*row).zip(scores).zip(&decays.step) {
                *out = l * score * step;
            }
            out[i + 1..].fill(0.0);
        }
    }
    vectorized!(arch, fill(weights, row, scores, decays, q));
}

/// `state <- carry * state + B^T weighted`, with `weighted [q, p]` holding the tokens' contributions. `[n, p]`
pub(super) fn advance(arch: Arch, state: &mut [f32], carry: f32, b: &[f32], weighted: &[f32], sizes: Sizes, len: usize) {
    let Sizes { p, n, .. } = sizes;
    let left = Left::columns(b, n);
    let start = Start::Scaled(carry);
    Product { out: state, out_stride: p, left, right: weighted, right_stride: p, rows: n, columns: p, depth: len, start }.run(arch);
}

/// `[p, n]` values into a padded `[n, p]` matrix.
pub(super) fn state_in(arch: Arch, matrix: &mut [f32], sizes: Sizes, values: &[f32], dims: SsdDims) {
    matrix.fill(0.0);
    transposed(arch, matrix, sizes.p, values, dims.n, dims.p, dims.n);
}

/// The reverse of [`state_in`].
pub(super) fn state_out(arch: Arch, values: &mut [f32], matrix: &[f32], sizes: Sizes, dims: SsdDims) {
    transposed(arch, values, dims.n, matrix, sizes.p, dims.n, dims.p);
}
