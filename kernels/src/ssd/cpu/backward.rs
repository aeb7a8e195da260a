//! Gradients: a first pass saves the state that enters each chunk, a second goes back over the chunks with
//! `G = dL/dS` of the state that leaves.
//!
//! With `s` the entering state, `DX[i, j] = <dy_i, x_j>`, `M = L o C B^T`, `P[i, j] = L[i, j] DX[i, j] delta_j`, `f` and
//! `e` the decays from the chunk's start and to its end:
//!
//! ```text
//! du_j = sum_i M[i, j] dy_i + e_j G b_j            dx = delta du + d dy
//! dc_i = sum_j P[i, j] b_j + f_i s^T dy_i          db_j = sum_i P[i, j] c_i + e_j delta_j G^T x_j
//! dlog_t = sum_{i >= t > j} (P o C B^T)[i, j] + sum_{i >= t} <c_i, f_i s^T dy_i> + sum_{j < t} delta_j <x_j, e_j G b_j> + f <G, s>
//! ddelta = <du, x> + a dlog                        G <- f G + sum_i f_i dy_i c_i^T
//! ```

use pulp::Arch;

use super::SsdInput;
use super::chunks::{CHUNK, Decays, Group, Sizes, Task, Tasks, advance, decay_row, gather, state_in, state_out};
use crate::cpu::math::{dot, transposed, vectorized};
use crate::cpu::product::{ALIGN, Left, Product, Start};
use crate::cpu::threads::{Shared, for_each};
use crate::ssd::SsdDims;

/// Gradients, shaped as the arguments; those of absent arguments are to be ignored.
pub(crate) struct Grads {
    pub x: Vec<f32>,
    pub dt: Vec<f32>,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub c: Vec<f32>,
    pub d: Vec<f32>,
    pub dt_bias: Vec<f32>,
    pub state: Vec<f32>,
}

/// Gradients from those of `y` and of the final state.
pub(crate) fn backward(input: &SsdInput, dy: Option<&[f32]>, dstate: Option<&[f32]>) -> Grads {
    let SsdDims { b, l, h, p, g, n } = input.dims;
    let tasks = Tasks::new(input.dims);
    let (mut x, mut dt, mut state) = (vec![0.0; b * l * h * p], vec![0.0; b * l * h], vec![0.0; b * h * p * n]);
    // One copy per task of a group, added up afterwards in a fixed order.
    let (mut bs, mut cs) = (vec![0.0; tasks.blocks * b * l * g * n], vec![0.0; tasks.blocks * b * l * g * n]);
    let mut sums = vec![0.0; b * h * 3];
    let out = Outputs {
        x: Shared::new(&mut x),
        dt: Shared::new(&mut dt),
        state: Shared::new(&mut state),
        b: Shared::new(&mut bs),
        c: Shared::new(&mut cs),
        sums: Shared::new(&mut sums),
    };
    for_each(
        tasks.count(),
        b * l * h * p * n,
        || Scratch::new(input, &tasks),
        |scratch, index| {
            scratch.run(input, &tasks.get(index), dy, dstate, &out);
        },
    );
    let fold = |mut parts: Vec<f32>| {
        let size = b * l * g * n;
        let (total, rest) = parts.split_at_mut(size);
        for part in rest.chunks_exact(size.max(1)) {
            total.iter_mut().zip(part).for_each(|(total, part)| *total += part);
        }
        parts.truncate(size);
        parts
    };
    let column = |which: usize| (0..h).map(|head| (0..b).map(|row| sums[(row * h + head) * 3 + which]).sum()).collect();
    Grads { a: column(0), d: column(1), dt_bias: column(2), x, dt, b: fold(bs), c: fold(cs), state }
}

struct Outputs<'a> {
    x: Shared<'a>,
    dt: Shared<'a>,
    state: Shared<'a>,
    b: Shared<'a>,
    c: Shared<'a>,
    /// Of `a`, `d` and `dt_bias`, per row and head.
    sums: Shared<'a>,
}

struct Scratch {
    arch: Arch,
    sizes: Sizes,
    group: Group,
    decays: Decays,
    /// `C^T`, `dB^T` and `dC^T` of the group. `[n, q]`
    c_turned: Vec<f32>,
    db: Vec<f32>,
    dc: Vec<f32>,
    /// Per head, what leaves the chunk that was looked at last. `[n, p]`
    grads: Vec<f32>,
    /// Per chunk and head, the entering state. `[n, p]`
    saved: Vec<f32>,
    head: Head,
}

/// Matrices of one head in one chunk.
struct Head {
    /// `[q, p]`
    x: Vec<f32>,
    dy: Vec<f32>,
    du: Vec<f32>,
    /// `[p, q]`
    x_turned: Vec<f32>,
    dy_turned: Vec<f32>,
    /// `M`, and `DX` that becomes `P`, and `P^T`. `[q, q]`
    m: Vec<f32>,
    p: Vec<f32>,
    p_turned: Vec<f32>,
    /// `f_i s^T dy_i`, turned. `[n, q]`
    read: Vec<f32>,
    /// Rows of `q`: a row of `L`, the parts of `dlog`, `ddelta`.
    row: Vec<f32>,
    later: Vec<f32>,
    earlier: Vec<f32>,
    dlog: Vec<f32>,
    ddelta: Vec<f32>,
}

impl Head {
    fn new(sizes: Sizes) -> Self {
        let Sizes { q, p, n } = sizes;
        let of = |size: usize| vec![0.0; size];
        Self {
            x: of(q * p),
            dy: of(q * p),
            du: of(q * p),
            x_turned: of(p * q),
            dy_turned: of(p * q),
            m: of(q * q),
            p: of(q * q),
            p_turned: of(q * q),
            read: of(n * q),
            row: of(q),
            later: of(q),
            earlier: of(q),
            dlog: of(q),
            ddelta: of(q),
        }
    }
}

impl Scratch {
    fn new(input: &SsdInput, tasks: &Tasks) -> Self {
        let sizes = Sizes::new(input.dims);
        let Sizes { q, p, n } = sizes;
        let chunks = input.dims.l.div_ceil(CHUNK);
        Self {
            arch: Arch::new(),
            sizes,
            group: Group::new(sizes),
            decays: Decays::new(q),
            c_turned: vec![0.0; n * q],
            db: vec![0.0; n * q],
            dc: vec![0.0; n * q],
            grads: vec![0.0; tasks.heads * n * p],
            saved: vec![0.0; chunks * tasks.heads * n * p],
            head: Head::new(sizes),
        }
    }

    fn run(&mut self, input: &SsdInput, task: &Task, dy: Option<&[f32]>, dstate: Option<&[f32]>, out: &Outputs) {
        let SsdDims { b, l, h, p, g, n } = input.dims;
        let len = input.documents.len(task.row);
        self.save_states(input, task, len);
        let size = self.sizes.n * self.sizes.p;
        let state_of = |head: usize| (task.row * h + head) * p * n;
        for (head, matrix) in (task.first..task.first + task.heads).zip(self.grads.chunks_exact_mut(size)) {
            match dstate {
                Some(dstate) => state_in(self.arch, matrix, self.sizes, &dstate[state_of(head)..][..p * n], input.dims),
                None => matrix.fill(0.0),
            }
        }
        for chunk in (0..len.div_ceil(CHUNK)).rev() {
            let from = chunk * CHUNK;
            let count = CHUNK.min(len - from);
            self.group.load(self.arch, input, self.sizes, task, from, count);
            let Sizes { q, n: stride, .. } = self.sizes;
            transposed(self.arch, &mut self.c_turned, q, &self.group.c, stride, q, stride);
            self.db.fill(0.0);
            self.dc.fill(0.0);
            for index in 0..task.heads {
                self.chunk(input, task, index, chunk, count, dy, out);
            }
            for (grad, turned) in [(&out.b, &self.db), (&out.c, &self.dc)] {
                for t in 0..count {
                    // SAFETY: each task writes its own block, row and group.
                    let target = unsafe { grad.part(task.block * b * l * g * n + input.at_b(task.row, from + t, task.group), n) };
                    target.iter_mut().enumerate().for_each(|(i, target)| *target = turned[i * q + t]);
                }
            }
        }
        for (head, matrix) in (task.first..task.first + task.heads).zip(self.grads.chunks_exact(size)) {
            // SAFETY: a head belongs to one task.
            let target = unsafe { out.state.part(state_of(head), p * n) };
            state_out(self.arch, target, matrix, self.sizes, input.dims);
        }
    }

    /// The forward pass, for the states alone.
    fn save_states(&mut self, input: &SsdInput, task: &Task, len: usize) {
        let SsdDims { h, p, n, .. } = input.dims;
        let Sizes { p: stride, n: rows, .. } = self.sizes;
        let size = rows * stride;
        let per_chunk = self.grads.len();
        for (head, matrix) in (task.first..task.first + task.heads).zip(self.saved.chunks_exact_mut(size)) {
            match input.state {
                Some(state) => state_in(self.arch, matrix, self.sizes, &state[(task.row * h + head) * p * n..][..p * n], input.dims),
                None => matrix.fill(0.0),
            }
        }
        for chunk in 1..len.div_ceil(CHUNK) {
            let from = (chunk - 1) * CHUNK;
            gather(&mut self.group.b, rows, n, (0..CHUNK).map(|t| &input.b[input.at_b(task.row, from + t, task.group)..][..n]));
            let (before, after) = self.saved.split_at_mut(chunk * per_chunk);
            for index in 0..task.heads {
                let head = task.first + index;
                self.decays.load(input, task.row, head, from, CHUNK);
                let x = &mut self.head.x;
                gather(x, stride, p, (0..CHUNK).map(|t| &input.x[input.at_x(task.row, from + t, head)..][..p]));
                weigh_rows(self.arch, x, stride, |t| self.decays.step[t] * self.decays.to_end[t]);
                let next = &mut after[index * size..][..size];
                next.copy_from_slice(&before[(chunk - 1) * per_chunk + index * size..][..size]);
                advance(self.arch, next, self.decays.carry(), &self.group.b, x, self.sizes, CHUNK);
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "one call, in the loop over heads")]
    fn chunk(&mut self, input: &SsdInput, task: &Task, index: usize, chunk: usize, len: usize, dy: Option<&[f32]>, out: &Outputs) {
        let Sizes { p, n, .. } = self.sizes;
        let (arch, from, head) = (self.arch, chunk * CHUNK, task.first + index);
        let state = &self.saved[chunk * self.grads.len() + index * n * p..][..n * p];
        let grad = &mut self.grads[index * n * p..][..n * p];
        let width = input.dims.p;
        let at = |t: usize| input.at_x(task.row, from + t, head);

        self.decays.load(input, task.row, head, from, len);
        let work = &mut self.head;
        gather(&mut work.x, p, width, (0..len).map(|t| &input.x[at(t)..][..width]));
        match dy {
            Some(dy) => gather(&mut work.dy, p, width, (0..len).map(|t| &dy[at(t)..][..width])),
            None => work.dy.fill(0.0),
        }
        work.mix(arch, self.sizes, &self.group, &self.decays, len);
        work.inputs(arch, self.sizes, &self.group, &self.decays, grad, len);

        // SAFETY: a head belongs to one task.
        let sums = unsafe { out.sums.part((task.row * input.dims.h + head) * 3, 3) };
        let skip = input.d.map_or(0.0, |d| d[head]);
        for t in 0..len {
            // SAFETY: as above.
            let dx = unsafe { out.x.part(at(t), width) };
            let row = t * p..t * p + width;
            let (du, dy, x) = (&work.du[row.clone()], &work.dy[row.clone()], &work.x[row]);
            vectorized!(arch, finish(dx, du, dy, x, self.decays.step[t], skip, &mut work.ddelta[t], &mut sums[1]));
        }
        work.groups(arch, self.sizes, &self.group, &self.decays, (state, grad), (&mut self.db, &mut self.dc), len);
        work.decay_grads(arch, self.sizes, &self.group, &self.c_turned, self.decays.carry(), (state, grad), &mut self.dc, len);
        advance(arch, grad, self.decays.carry(), &self.group.c, &work.dy, self.sizes, len);

        for t in 0..len {
            let total = work.ddelta[t] + input.a[head] * work.dlog[t];
            let ddt = total * input.step_slope(task.row, from + t, head);
            sums[0] += work.dlog[t] * self.decays.step[t];
            sums[2] += ddt;
            // SAFETY: as above.
            unsafe { out.dt.part((task.row * input.dims.l + from + t) * input.dims.h + head, 1)[0] = ddt };
        }
    }
}

impl Head {
    /// `M`, `P` and its transpose.
    fn mix(&mut self, arch: Arch, sizes: Sizes, group: &Group, decays: &Decays, len: usize) {
        let Sizes { q, p, .. } = sizes;
        transposed(arch, &mut self.x_turned, q, &self.x, p, q, p);
        for i in (0..len).step_by(ALIGN) {
            let left = Left::rows(&self.dy[i * p..], p);
            let (rows, columns) = (ALIGN, i + ALIGN);
            Product {
                out: &mut self.p[i * q..],
                out_stride: q,
                left,
                right: &self.x_turned,
                right_stride: q,
                rows,
                columns,
                depth: p,
                start: Start::Zero,
            }
            .run(arch);
        }
        vectorized!(arch, lower(&mut self.m, &mut self.p, &mut self.row, &group.scores, decays, q));
        transposed(arch, &mut self.p_turned, q, &self.p, q, q, q);
    }

    /// `du`, and the term of `dlog` that belongs to inputs before a token.
    fn inputs(&mut self, arch: Arch, sizes: Sizes, group: &Group, decays: &Decays, grad: &[f32], len: usize) {
        let Sizes { q, p, n } = sizes;
        let left = Left::rows(&group.b, n);
        Product {
            out: &mut self.du,
            out_stride: p,
            left,
            right: grad,
            right_stride: p,
            rows: len,
            columns: p,
            depth: n,
            start: Start::Zero,
        }
        .run(arch);
        for t in 0..len {
            let (x, du) = (&self.x[t * p..][..p], &self.du[t * p..][..p]);
            self.earlier[t] = decays.step[t] * decays.to_end[t] * vectorized!(arch, dot(x, du));
        }
        for j in (0..len).step_by(ALIGN) {
            Product {
                out: &mut self.du[j * p..],
                out_stride: p,
                left: Left::columns(&self.m, q).from(j, j),
                right: &self.dy[j * p..],
                right_stride: p,
                rows: ALIGN.min(len - j),
                columns: p,
                depth: len - j,
                start: Start::Rows(&decays.to_end[j..]),
            }
            .run(arch);
        }
    }

    /// Adds to `dB^T` and `dC^T`, all but what the entering state reads into `dC`, which goes to `self.read`. Leaves
    /// `dy` weighted by the decay from the chunk's start.
    #[allow(clippy::too_many_arguments, reason = "matrices of one formula")]
    fn groups(
        &mut self,
        arch: Arch,
        sizes: Sizes,
        group: &Group,
        decays: &Decays,
        (state, grad): (&[f32], &[f32]),
        (db, dc): (&mut [f32], &mut [f32]),
        len: usize,
    ) {
        const WIDE: usize = 2 * ALIGN;
        let Sizes { q, p, n } = sizes;
        for j in (0..len).step_by(WIDE) {
            let columns = WIDE.min(q - j);
            let left = Left::columns(&group.c, n).from(0, j);
            let right = &self.p[j * q + j..];
            Product { out: &mut db[j..], out_stride: q, left, right, right_stride: q, rows: n, columns, depth: len - j, start: Start::Old }
                .run(arch);
            let left = Left::columns(&group.b, n);
            let right = &self.p_turned[j..];
            let depth = len.min(j + columns);
            Product { out: &mut dc[j..], out_stride: q, left, right, right_stride: q, rows: n, columns, depth, start: Start::Old }
                .run(arch);
        }
        vectorized!(arch, weigh_columns(&mut self.x_turned, q, &decays.step, &decays.to_end));
        let left = Left::rows(grad, p);
        Product { out: db, out_stride: q, left, right: &self.x_turned, right_stride: q, rows: n, columns: q, depth: p, start: Start::Old }
            .run(arch);
        weigh_rows(arch, &mut self.dy, p, |t| decays.from_start[t]);
        transposed(arch, &mut self.dy_turned, q, &self.dy, p, q, p);
        let left = Left::rows(state, p);
        let (out, right) = (&mut self.read, &self.dy_turned);
        Product { out, out_stride: q, left, right, right_stride: q, rows: n, columns: q, depth: p, start: Start::Zero }.run(arch);
    }

    /// `dlog`; adds `self.read` to `dC^T`.
    #[allow(clippy::too_many_arguments, reason = "matrices of one formula")]
    fn decay_grads(
        &mut self,
        arch: Arch,
        sizes: Sizes,
        group: &Group,
        c_turned: &[f32],
        carry: f32,
        (state, grad): (&[f32], &[f32]),
        dc: &mut [f32],
        len: usize,
    ) {
        let q = sizes.q;
        let through = if carry == 0.0 { 0.0 } else { carry * vectorized!(arch, dot(state, grad)) };
        vectorized!(arch, read_grads(&mut self.later, dc, &self.read, c_turned, q));
        vectorized!(arch, crossings(&mut self.dlog, &mut self.row, &self.p, &group.scores, q, len));
        let mut sum = through;
        for t in (0..len).rev() {
            sum += self.later[t];
            self.dlog[t] += sum;
        }
        sum = 0.0;
        for t in 0..len {
            self.dlog[t] += sum;
            sum += self.earlier[t];
        }
    }
}

/// `M` from the scores, `P` from `DX` in place; zero above the diagonal.
#[inline(always)]
fn lower(m: &mut [f32], p: &mut [f32], row: &mut [f32], scores: &[f32], decays: &Decays, q: usize) {
    for i in 0..q {
        decay_row(row, i, decays.decay[i]);
        let (m, p, scores) = (&mut m[i * q..][..q], &mut p[i * q..][..q], &scores[i * q..][..q]);
        for j in 0..i + 1 {
            m[j] = row[j] * scores[j];
            p[j] *= row[j] * decays.step[j];
        }
        m[i + 1..].fill(0.0);
        p[i + 1..].fill(0.0);
    }
}

/// `dlog[t] = sum over i >= t > j of p[i, j] scores[i, j]`.
#[inline(always)]
fn crossings(dlog: &mut [f32], columns: &mut [f32], p: &[f32], scores: &[f32], q: usize, len: usize) {
    columns.fill(0.0);
    for t in (0..len).rev() {
        for ((column, p), score) in columns.iter_mut().zip(&p[t * q..][..t]).zip(&scores[t * q..][..t]) {
            *column += p * score;
        }
        dlog[t] = dot(&columns[..t], ONES);
    }
}

static ONES: &[f32] = &[1.0; CHUNK];

/// `later[i] = sum_n c[n, i] read[n, i]`, and `dc += read`.
#[inline(always)]
fn read_grads(later: &mut [f32], dc: &mut [f32], read: &[f32], c_turned: &[f32], q: usize) {
    later.fill(0.0);
    for ((dc, read), c) in dc.chunks_exact_mut(q).zip(read.chunks_exact(q)).zip(c_turned.chunks_exact(q)) {
        for (((later, dc), read), c) in later.iter_mut().zip(dc).zip(read).zip(c) {
            *later += c * read;
            *dc += read;
        }
    }
}

/// Writes a token's `dx`, and the parts of `ddelta` and `dd` that come with it.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the values of one token")]
fn finish(dx: &mut [f32], du: &[f32], dy: &[f32], x: &[f32], step: f32, skip: f32, ddelta: &mut f32, dd: &mut f32) {
    *ddelta = dot(du, x);
    *dd += dot(dy, x);
    for ((dx, du), dy) in dx.iter_mut().zip(du).zip(dy) {
        *dx = step * du + skip * dy;
    }
}

/// Multiplies each row of a matrix.
fn weigh_rows(arch: Arch, matrix: &mut [f32], stride: usize, weight: impl Fn(usize) -> f32) {
    #[inline(always)]
    fn each(matrix: &mut [f32], stride: usize, weight: impl Fn(usize) -> f32) {
        for (t, row) in matrix.chunks_exact_mut(stride).enumerate() {
            let weight = weight(t);
            row.iter_mut().for_each(|value| *value *= weight);
        }
    }
    vectorized!(arch, each(matrix, stride, &weight));
}

/// Multiplies each column of a matrix by two factors.
#[inline(always)]
fn weigh_columns(matrix: &mut [f32], stride: usize, left: &[f32], right: &[f32]) {
    for row in matrix.chunks_exact_mut(stride) {
        for ((value, left), right) in row.iter_mut().zip(left).zip(right) {
            *value *= left * right;
        }
    }
}
