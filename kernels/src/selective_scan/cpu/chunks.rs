//! What forward and backward share: the layout of tasks, and a chunk's data in padded scratch matrices.

use pulp::{Arch, Simd, WithSimd};

use super::ScanInput;
use crate::cpu::math::{exp2_lanes, transposed, vectorized};
use crate::cpu::product::{ALIGN, aligned};
use crate::selective_scan::ScanDims;

/// Tokens of a chunk.
pub(super) const CHUNK: usize = 32;
/// States that one loop over tokens keeps in registers.
pub(super) const STATES: usize = 4;

/// Rows of the batch times blocks of channels. Independent of the number of threads.
#[derive(Clone, Copy)]
pub(super) struct Tasks {
    dims: ScanDims,
    /// Channels of a task, rounded up to whole vectors.
    pub width: usize,
    /// Tasks of a row.
    pub blocks: usize,
}

/// One task.
#[derive(Clone, Copy)]
pub(super) struct Task {
    pub row: usize,
    /// Index among the tasks of its row.
    pub block: usize,
    /// First channel.
    pub first: usize,
    /// Number of channels.
    pub count: usize,
}

impl Tasks {
    pub(super) fn new(dims: ScanDims) -> Self {
        const ENOUGH: usize = 8;
        let width = (dims.b * dims.e / ENOUGH / ALIGN * ALIGN).clamp(ALIGN, 4 * ALIGN).min(aligned(dims.e.max(1)));
        Self { dims, width, blocks: dims.e.div_ceil(width) }
    }

    pub(super) fn count(&self) -> usize {
        self.dims.b * self.blocks
    }

    pub(super) fn get(&self, index: usize) -> Task {
        let (row, block) = (index / self.blocks, index % self.blocks);
        let first = block * self.width;
        Task { row, block, first, count: self.width.min(self.dims.e - first) }
    }
}

/// Some tokens of one document.
#[derive(Clone, Copy)]
pub(super) struct Chunk {
    pub from: usize,
    pub len: usize,
    /// The document begins here.
    pub fresh: bool,
}

/// The chunks of a row, padding left out.
pub(super) fn chunks(input: &ScanInput, row: usize) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::with_capacity(input.documents.len(row).div_ceil(CHUNK));
    for t in 0..input.documents.len(row) {
        let fresh = input.documents.begins(row, t);
        match chunks.last_mut() {
            Some(last) if last.len < CHUNK && !fresh => last.len += 1,
            _ => chunks.push(Chunk { from: t, len: 1, fresh }),
        }
    }
    chunks
}

/// A chunk of a task; what is past the task's channels or the `n` states is zero.
pub(super) struct Block {
    pub arch: Arch,
    /// Row lengths: channels, and states rounded up.
    pub width: usize,
    pub states: usize,
    /// Rates times `log2 e`. `[n, width]`
    pub rates: Vec<f32>,
    /// `[q, width]`
    pub step: Vec<f32>,
    pub fed: Vec<f32>,
    pub read: Vec<f32>,
    /// `[q, n]`
    pub b: Vec<f32>,
    pub c: Vec<f32>,
}

impl Block {
    pub(super) fn new(input: &ScanInput, tasks: &Tasks) -> Self {
        let (width, states) = (tasks.width, input.dims.n.next_multiple_of(STATES));
        let of = |size: usize| vec![0.0; size];
        let rows = || of(CHUNK * width);
        Self {
            arch: Arch::new(),
            width,
            states,
            rates: of(states * width),
            step: rows(),
            fed: rows(),
            read: rows(),
            b: of(CHUNK * states),
            c: of(CHUNK * states),
        }
    }

    /// Values of a matrix of states.
    pub(super) fn size(&self) -> usize {
        self.states * self.width
    }

    /// Begins a task.
    pub(super) fn begin(&mut self, input: &ScanInput, task: &Task) {
        let n = input.dims.n;
        self.rates.fill(0.0);
        transposed(self.arch, &mut self.rates, self.width, &input.a[task.first * n..][..task.count * n], n, task.count, n);
        self.rates.iter_mut().for_each(|rate| *rate *= std::f32::consts::LOG2_E);
        for rows in [&mut self.step, &mut self.fed] {
            rows.fill(0.0);
        }
    }

    /// Reads the task's part of states `[b, e, n]` into a matrix `[n, width]`.
    pub(super) fn state_in(&self, matrix: &mut [f32], values: Option<&[f32]>, task: &Task, dims: ScanDims) {
        let ScanDims { e, n, .. } = dims;
        matrix.fill(0.0);
        if let Some(values) = values {
            let values = &values[(task.row * e + task.first) * n..][..task.count * n];
            transposed(self.arch, matrix, self.width, values, n, task.count, n);
        }
    }

    /// The reverse of [`Block::state_in`], for the task's part alone.
    pub(super) fn state_out(&self, values: &mut [f32], matrix: &[f32], dims: ScanDims) {
        transposed(self.arch, values, dims.n, matrix, self.width, dims.n, values.len() / dims.n.max(1));
    }

    /// Reads the arguments of a chunk.
    pub(super) fn load(&mut self, input: &ScanInput, task: &Task, chunk: Chunk) {
        let n = input.dims.n;
        for i in 0..chunk.len {
            let t = chunk.from + i;
            self.b[i * self.states..][..n].copy_from_slice(input.b.at(task.row, t));
            self.c[i * self.states..][..n].copy_from_slice(input.c.at(task.row, t));
            let (step, fed) = (&mut self.step[i * self.width..][..task.count], &mut self.fed[i * self.width..][..task.count]);
            vectorized!(self.arch, input.steps(task.row, t, task.first, step, fed));
        }
    }

    /// Takes states `[n, width]` through a chunk. If `READ`, leaves what the tokens read from them in `self.read`.
    pub(super) fn advance<const READ: bool>(&mut self, state: &mut [f32], len: usize) {
        if READ {
            self.read.fill(0.0);
        }
        let arch = self.arch;
        arch.dispatch(Advance::<READ> { block: self, state, len });
    }
}

struct Advance<'a, const READ: bool> {
    block: &'a mut Block,
    state: &'a mut [f32],
    len: usize,
}

impl<const READ: bool> WithSimd for Advance<'_, READ> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { block, state, len } = self;
        let stride = block.width / S::F32_LANES;
        let groups = block.states / STATES;
        let (step, fed) = (S::as_simd_f32s(&block.step).0, S::as_simd_f32s(&block.fed).0);
        let (rates, state) = (S::as_simd_f32s(&block.rates).0, S::as_mut_simd_f32s(state).0);
        let (b, c) = (block.b.as_chunks().0, block.c.as_chunks().0);
        let read = S::as_mut_simd_f32s(&mut block.read).0;
        for group in 0..groups {
            for lane in 0..stride {
                let rate = column(rates, stride, group, lane);
                let mut h = column(state, stride, group, lane);
                for t in 0..len {
                    let row = t * stride + lane;
                    let (step, fed, b) = (step[row], fed[row], splats(simd, &b[t * groups + group]));
                    for j in 0..STATES {
                        let decay = exp2_lanes(simd, simd.mul_f32s(step, rate[j]));
                        h[j] = simd.mul_add_f32s(fed, b[j], simd.mul_f32s(decay, h[j]));
                    }
                    if READ {
                        let c = splats(simd, &c[t * groups + group]);
                        let mut sum = read[row];
                        for j in 0..STATES {
                            sum = simd.mul_add_f32s(h[j], c[j], sum);
                        }
                        read[row] = sum;
                    }
                }
                set_column(state, stride, group, lane, h);
            }
        }
    }
}

/// Each value in every lane.
#[inline(always)]
pub(super) fn splats<S: Simd>(simd: S, values: &[f32; STATES]) -> [S::f32s; STATES] {
    let mut lanes = [simd.splat_f32s(0.0); STATES];
    for (lanes, value) in lanes.iter_mut().zip(values) {
        *lanes = simd.splat_f32s(*value);
    }
    lanes
}

/// A group of states in one column of vectors of a matrix `[n, stride]`.
#[inline(always)]
pub(super) fn column<V: Copy>(matrix: &[V], stride: usize, group: usize, lane: usize) -> [V; STATES] {
    let first = group * STATES * stride + lane;
    let mut values = [matrix[first]; STATES];
    for (j, value) in values.iter_mut().enumerate() {
        *value = matrix[first + j * stride];
    }
    values
}

/// The reverse of [`column`].
#[inline(always)]
pub(super) fn set_column<V: Copy>(matrix: &mut [V], stride: usize, group: usize, lane: usize, values: [V; STATES]) {
    for (j, value) in values.into_iter().enumerate() {
        matrix[(group * STATES + j) * stride + lane] = value;
    }
}
