//! Gradients: a first pass saves the state that enters each chunk, a second goes back over the chunks with
//! `G = dL/dh` of the state that leaves.
//!
//! With `v = dy silu(z)`, `w_t = e^{delta_t a}` and `p_t = w_t h_{t-1}`, for every channel and state:
//!
//! ```text
//! g_t = v_t c_t + w_{t+1} g_{t+1}                 G <- w_t g_t
//! db_t = sum_e g_t delta_t u_t                    dc_t = sum_e v_t h_t
//! du_t = d v_t + delta_t sum_n g_t b_t            da = sum_t g_t p_t delta_t
//! ddelta_t = u_t sum_n g_t b_t + sum_n g_t p_t a  dz_t = dy_t (sum_n c_t h_t + d u_t) silu'(z_t)
//! ```

use pulp::{Simd, WithSimd};

use super::ScanInput;
use super::chunks::{Block, CHUNK, Chunk, STATES, Task, Tasks, chunks, column, set_column, splats};
use crate::cpu::math::{exp2_lanes, sigmoid, silu, silu_with_slope, vectorized};
use crate::cpu::product::ALIGN;
use crate::cpu::threads::{Shared, for_each};
use crate::selective_scan::ScanDims;

/// Gradients, shaped as the arguments; those of absent arguments are to be ignored.
pub(crate) struct Grads {
    pub u: Vec<f32>,
    pub delta: Vec<f32>,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub c: Vec<f32>,
    pub d: Vec<f32>,
    pub z: Vec<f32>,
    pub delta_bias: Vec<f32>,
    pub state: Vec<f32>,
}

/// Gradients from those of `y [b, l, e]` and of the final state `[b, e, n]`.
pub(crate) fn backward(input: &ScanInput, dy: Option<&[f32]>, dstate: Option<&[f32]>) -> Grads {
    let ScanDims { b, l, e, n } = input.dims;
    let tasks = Tasks::new(input.dims);
    let of = |size: usize| vec![0.0; size];
    let (mut u, mut delta, mut state) = (of(b * l * e), of(b * l * e), of(b * e * n));
    let mut z = of(if input.z.is_some() { b * l * e } else { 0 });
    // One copy per row of the batch, or per task of a row, added up afterwards in a fixed order.
    let (mut rates, mut channels) = (of(b * e * n), of(b * 2 * e));
    let (mut bs, mut cs) = (of(tasks.blocks * b * l * n), of(tasks.blocks * b * l * n));
    let out = Outputs {
        u: Shared::new(&mut u),
        delta: Shared::new(&mut delta),
        z: Shared::new(&mut z),
        state: Shared::new(&mut state),
        rates: Shared::new(&mut rates),
        channels: Shared::new(&mut channels),
        b: Shared::new(&mut bs),
        c: Shared::new(&mut cs),
    };
    for_each(
        tasks.count(),
        3 * input.work(),
        || Scratch::new(input, &tasks),
        |scratch, index| scratch.run(input, &tasks.get(index), dy, dstate, &out),
    );
    let mut channels = fold(channels, 2 * e);
    let delta_bias = channels.split_off(e);
    Grads { a: fold(rates, e * n), b: fold(bs, b * l * n), c: fold(cs, b * l * n), d: channels, u, delta, z, delta_bias, state }
}

/// The sum of parts of `size` values.
fn fold(mut parts: Vec<f32>, size: usize) -> Vec<f32> {
    if !parts.is_empty() {
        let (total, rest) = parts.split_at_mut(size);
        for part in rest.chunks_exact(size) {
            total.iter_mut().zip(part).for_each(|(total, part)| *total += part);
        }
    }
    parts.resize(size, 0.0);
    parts
}

struct Outputs<'a> {
    u: Shared<'a>,
    delta: Shared<'a>,
    z: Shared<'a>,
    state: Shared<'a>,
    /// Of `a`, per row.
    rates: Shared<'a>,
    /// Of `d` and of `delta_bias`, per row.
    channels: Shared<'a>,
    /// Per block of channels.
    b: Shared<'a>,
    c: Shared<'a>,
}

struct Scratch {
    block: Block,
    back: Back,
    /// Per chunk, the entering state. `[n, width]`
    saved: Vec<f32>,
    /// Of `d` and `delta_bias`. `[width]`
    skip: Vec<f32>,
    bias: Vec<f32>,
}

/// What the way back over a chunk reads and writes besides the block.
struct Back {
    /// What leaves the chunk that was looked at last, and of the rates. `[n, width]`
    grads: Vec<f32>,
    rates: Vec<f32>,
    /// `v`, and the sums over states of `g b` and `g p a`, the latter times `log2 e`. `[q, width]`
    read: Vec<f32>,
    fed: Vec<f32>,
    log: Vec<f32>,
    /// `w` and `p` of some states, and parts of `db` and `dc`. `[q, STATES, lanes]`
    decay: Vec<f32>,
    past: Vec<f32>,
    b_parts: Vec<f32>,
    c_parts: Vec<f32>,
    /// `[q, n]`
    b: Vec<f32>,
    c: Vec<f32>,
}

impl Scratch {
    fn new(input: &ScanInput, tasks: &Tasks) -> Self {
        let block = Block::new(input, tasks);
        let of = |size: usize| vec![0.0; size];
        let rows = || of(CHUNK * block.width);
        let parts = || of(CHUNK * STATES * ALIGN);
        let back = Back {
            grads: of(block.size()),
            rates: of(block.size()),
            read: rows(),
            fed: rows(),
            log: rows(),
            decay: parts(),
            past: parts(),
            b_parts: parts(),
            c_parts: parts(),
            b: of(CHUNK * block.states),
            c: of(CHUNK * block.states),
        };
        Self { back, saved: Vec::new(), skip: of(tasks.width), bias: of(tasks.width), block }
    }

    fn run(&mut self, input: &ScanInput, task: &Task, dy: Option<&[f32]>, dstate: Option<&[f32]>, out: &Outputs) {
        let ScanDims { b, l, e, n } = input.dims;
        let chunks = chunks(input, task.row);
        self.block.begin(input, task);
        self.save_states(input, task, &chunks);
        self.block.state_in(&mut self.back.grads, dstate, task, input.dims);
        for values in [&mut self.back.rates, &mut self.back.read, &mut self.skip, &mut self.bias] {
            values.fill(0.0);
        }
        let size = self.block.size();
        for (index, &chunk) in chunks.iter().enumerate().rev() {
            self.block.load(input, task, chunk);
            self.weigh(input, task, chunk, dy);
            let state = &self.saved[index * size..][..size];
            let arch = self.block.arch;
            self.block.read.fill(0.0);
            arch.dispatch(Retreat { block: &mut self.block, back: &mut self.back, state, len: chunk.len, gated: input.z.is_some() });
            if chunk.fresh {
                self.back.grads.fill(0.0);
            }
            self.finish(input, task, chunk, dy, out);
            for i in 0..chunk.len {
                let at = (task.block * b * l + task.row * l + chunk.from + i) * n;
                for (grad, values) in [(&out.b, &self.back.b), (&out.c, &self.back.c)] {
                    // SAFETY: each task writes its own block and row.
                    unsafe { grad.part(at, n) }.copy_from_slice(&values[i * self.block.states..][..n]);
                }
            }
        }
        for (grad, matrix) in [(&out.state, &self.back.grads), (&out.rates, &self.back.rates)] {
            // SAFETY: a channel of a row belongs to one task.
            let target = unsafe { grad.part((task.row * e + task.first) * n, task.count * n) };
            self.block.state_out(target, matrix, input.dims);
        }
        for (which, values) in [&self.skip, &self.bias].into_iter().enumerate() {
            // SAFETY: as above.
            let target = unsafe { out.channels.part((task.row * 2 + which) * e + task.first, task.count) };
            target.copy_from_slice(&values[..task.count]);
        }
    }

    /// The forward pass, for the states alone.
    fn save_states(&mut self, input: &ScanInput, task: &Task, chunks: &[Chunk]) {
        let size = self.block.size();
        self.saved.resize(chunks.len().max(1) * size, 0.0);
        self.block.state_in(&mut self.saved[..size], input.state, task, input.dims);
        for (index, &chunk) in chunks.iter().enumerate() {
            let (before, after) = self.saved.split_at_mut((index + 1) * size);
            let entering = &mut before[index * size..];
            if chunk.fresh {
                entering.fill(0.0);
            }
            let Some(next) = after.get_mut(..size) else { break };
            if chunks[index + 1].fresh {
                continue;
            }
            next.copy_from_slice(entering);
            self.block.load(input, task, chunk);
            self.block.advance::<false>(next, chunk.len);
        }
    }

    /// `v` of a chunk.
    fn weigh(&mut self, input: &ScanInput, task: &Task, chunk: Chunk, dy: Option<&[f32]>) {
        #[inline(always)]
        fn each(v: &mut [f32], dy: &[f32], z: Option<&[f32]>) {
            v.copy_from_slice(dy);
            if let Some(z) = z {
                v.iter_mut().zip(z).for_each(|(v, z)| *v *= silu(*z));
            }
        }
        let Some(dy) = dy else { return };
        let ScanDims { l, e, .. } = input.dims;
        for i in 0..chunk.len {
            let t = chunk.from + i;
            let v = &mut self.back.read[i * self.block.width..][..task.count];
            let dy = &dy[(task.row * l + t) * e + task.first..][..task.count];
            let z = input.z.as_ref().map(|z| &z.at(task.row, t)[task.first..][..task.count]);
            vectorized!(self.block.arch, each(v, dy, z));
        }
    }

    /// Gradients of what belongs to one channel.
    fn finish(&mut self, input: &ScanInput, task: &Task, chunk: Chunk, dy: Option<&[f32]>, out: &Outputs) {
        let ScanDims { l, e, .. } = input.dims;
        let count = task.count;
        let bias = input.delta_bias.map(|bias| &bias[task.first..][..count]);
        let skip = input.d.map(|d| &d[task.first..][..count]);
        for i in 0..chunk.len {
            let t = chunk.from + i;
            let (row, at) = (i * self.block.width..i * self.block.width + count, (task.row * l + t) * e + task.first);
            let u = &input.u.at(task.row, t)[task.first..][..count];
            // SAFETY: a channel of a row belongs to one task.
            let (du, ddelta) = unsafe { (out.u.part(at, count), out.delta.part(at, count)) };
            let token = Token {
                u,
                delta: &input.delta.at(task.row, t)[task.first..][..count],
                step: &self.block.step[row.clone()],
                v: &self.back.read[row.clone()],
                dfed: &self.back.fed[row.clone()],
                dlog: &self.back.log[row.clone()],
                bias,
                skip,
                softplus: input.delta_softplus,
            };
            vectorized!(self.block.arch, token.inputs(du, ddelta, &mut self.skip, &mut self.bias));
            if let (Some(z), Some(dy)) = (&input.z, dy) {
                let (z, dy, read) = (&z.at(task.row, t)[task.first..][..count], &dy[at..][..count], &self.block.read[row]);
                // SAFETY: as above.
                let dz = unsafe { out.z.part(at, count) };
                vectorized!(self.block.arch, gate(dz, dy, read, z, u, skip));
            }
        }
    }
}

/// Some channels of a token.
struct Token<'a> {
    u: &'a [f32],
    delta: &'a [f32],
    step: &'a [f32],
    v: &'a [f32],
    dfed: &'a [f32],
    dlog: &'a [f32],
    bias: Option<&'a [f32]>,
    skip: Option<&'a [f32]>,
    softplus: bool,
}

impl Token<'_> {
    #[inline(always)]
    fn inputs(&self, du: &mut [f32], ddelta: &mut [f32], dskip: &mut [f32], dbias: &mut [f32]) {
        let count = du.len();
        let (u, step, v, dfed, dlog) = (&self.u[..count], &self.step[..count], &self.v[..count], &self.dfed[..count], &self.dlog[..count]);
        let (ddelta, dskip, dbias) = (&mut ddelta[..count], &mut dskip[..count], &mut dbias[..count]);
        for i in 0..count {
            du[i] = step[i] * dfed[i];
            dskip[i] += v[i] * u[i];
        }
        if let Some(skip) = self.skip {
            du.iter_mut().zip(skip).zip(v).for_each(|((du, skip), v)| *du += skip * v);
        }
        if self.softplus {
            ddelta.copy_from_slice(self.delta);
            if let Some(bias) = self.bias {
                ddelta.iter_mut().zip(bias).for_each(|(raw, bias)| *raw += bias);
            }
            ddelta.iter_mut().for_each(|slope| *slope = sigmoid(*slope));
        } else {
            ddelta.fill(1.0);
        }
        for i in 0..count {
            ddelta[i] *= u[i] * dfed[i] + std::f32::consts::LN_2 * dlog[i];
            dbias[i] += ddelta[i];
        }
    }
}

#[inline(always)]
fn gate(dz: &mut [f32], dy: &[f32], read: &[f32], z: &[f32], u: &[f32], skip: Option<&[f32]>) {
    dz.copy_from_slice(read);
    if let Some(skip) = skip {
        dz.iter_mut().zip(skip).zip(u).for_each(|((y, skip), u)| *y += skip * u);
    }
    for ((dz, dy), z) in dz.iter_mut().zip(dy).zip(z) {
        *dz *= dy * silu_with_slope(*z).1;
    }
}

/// Takes `back.grads` from the end of a chunk to its start, given the state that enters it. With a gate it also leaves
/// what the tokens read from their states in `block.read`.
struct Retreat<'a> {
    block: &'a mut Block,
    back: &'a mut Back,
    state: &'a [f32],
    len: usize,
    gated: bool,
}

impl WithSimd for Retreat<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { block, back, state, len, gated } = self;
        let stride = block.width / S::F32_LANES;
        let groups = block.states / STATES;
        let (step, fed) = (S::as_simd_f32s(&block.step).0, S::as_simd_f32s(&block.fed).0);
        let (rates, state) = (S::as_simd_f32s(&block.rates).0, S::as_simd_f32s(state).0);
        let (b, c) = (block.b.as_chunks().0, block.c.as_chunks().0);
        let read = S::as_mut_simd_f32s(&mut block.read).0;
        let (grads, drates) = (S::as_mut_simd_f32s(&mut back.grads).0, S::as_mut_simd_f32s(&mut back.rates).0);
        let v = S::as_simd_f32s(&back.read).0;
        let (dfed, dlog) = (S::as_mut_simd_f32s(&mut back.fed).0, S::as_mut_simd_f32s(&mut back.log).0);
        let decays = &mut S::as_mut_simd_f32s(&mut back.decay).0.as_chunks_mut::<STATES>().0[..len];
        let pasts = &mut S::as_mut_simd_f32s(&mut back.past).0.as_chunks_mut::<STATES>().0[..len];
        let b_parts = &mut S::as_mut_simd_f32s(&mut back.b_parts).0.as_chunks_mut::<STATES>().0[..len];
        let c_parts = &mut S::as_mut_simd_f32s(&mut back.c_parts).0.as_chunks_mut::<STATES>().0[..len];
        let (db, dc) = (back.b.as_chunks_mut::<STATES>().0, back.c.as_chunks_mut::<STATES>().0);
        let zero = simd.splat_f32s(0.0);
        dfed[..len * stride].fill(zero);
        dlog[..len * stride].fill(zero);
        for group in 0..groups {
            b_parts.fill([zero; STATES]);
            c_parts.fill([zero; STATES]);
            for lane in 0..stride {
                let rate = column(rates, stride, group, lane);
                let mut h = column(state, stride, group, lane);
                for t in 0..len {
                    let row = t * stride + lane;
                    let (step, fed, b) = (step[row], fed[row], splats(simd, &b[t * groups + group]));
                    for j in 0..STATES {
                        let decay = exp2_lanes(simd, simd.mul_f32s(step, rate[j]));
                        let past = simd.mul_f32s(decay, h[j]);
                        h[j] = simd.mul_add_f32s(fed, b[j], past);
                        decays[t][j] = decay;
                        pasts[t][j] = past;
                    }
                    if gated {
                        let c = splats(simd, &c[t * groups + group]);
                        let mut sum = read[row];
                        for j in 0..STATES {
                            sum = simd.mul_add_f32s(h[j], c[j], sum);
                        }
                        read[row] = sum;
                    }
                }
                let mut later = column(grads, stride, group, lane);
                let mut drate = column(drates, stride, group, lane);
                for t in (0..len).rev() {
                    let row = t * stride + lane;
                    let (step, fed, v) = (step[row], fed[row], v[row]);
                    let (b, c) = (splats(simd, &b[t * groups + group]), splats(simd, &c[t * groups + group]));
                    let (mut fed_sum, mut log_sum) = (dfed[row], dlog[row]);
                    let (decay, past, b_part, c_part) = (&decays[t], &pasts[t], &mut b_parts[t], &mut c_parts[t]);
                    for j in 0..STATES {
                        let g = simd.mul_add_f32s(v, c[j], later[j]);
                        let h = simd.mul_add_f32s(fed, b[j], past[j]);
                        c_part[j] = simd.mul_add_f32s(v, h, c_part[j]);
                        b_part[j] = simd.mul_add_f32s(g, fed, b_part[j]);
                        fed_sum = simd.mul_add_f32s(g, b[j], fed_sum);
                        let through = simd.mul_f32s(g, past[j]);
                        drate[j] = simd.mul_add_f32s(through, step, drate[j]);
                        log_sum = simd.mul_add_f32s(through, rate[j], log_sum);
                        later[j] = simd.mul_f32s(decay[j], g);
                    }
                    dfed[row] = fed_sum;
                    dlog[row] = log_sum;
                }
                set_column(grads, stride, group, lane, later);
                set_column(drates, stride, group, lane, drate);
            }
            for t in 0..len {
                for j in 0..STATES {
                    db[t * groups + group][j] = simd.reduce_sum_f32s(b_parts[t][j]);
                    dc[t * groups + group][j] = simd.reduce_sum_f32s(c_parts[t][j]);
                }
            }
        }
    }
}
