//! The scan for any device and any sizes, in float32 multiply-adds: chunk by chunk as matrix products.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::call::{Call, Grads};
use super::gradients::{decay_grads, group_grads, input_grads, pair_grads};
use super::output::{output_kernel, scores_kernel};
use super::prepare::{Prepared, StepGrads, addresses, finish, flat_f32, fold, line, prepare};
use super::states::{local_states, pass_states};
use super::tile::{Plan, UNITS};
use crate::cube::{Device, array, cast, empty, packed};
use crate::ssd::SsdDims;

/// Arrays of the kernel that has most.
const BINDINGS: u32 = 15;
/// Heads whose `P` one cube adds up, at most.
const HEADS: usize = 8;

/// Whether the kernels fit.
pub(super) fn supports(device: &Device) -> bool {
    let least = Plan::new(32, 1, 1, false).shared_bytes().max(16 << 10);
    device.max_units >= 256 && device.shared_bytes >= least && device.bindings >= BINDINGS
}

/// A call with what all its kernels read.
struct Chunked<R: CubeRuntime> {
    call: Call<R>,
    plan: Plan,
    prepared: Prepared<R>,
    /// Ids and bounds, or stand-ins.
    filled: CubeTensor<R>,
    bounds: CubeTensor<R>,
    d: CubeTensor<R>,
    chunks: usize,
}

pub(super) fn forward<R: CubeRuntime>(call: Call<R>) -> (CubeTensor<R>, CubeTensor<R>) {
    let chunked = Chunked::new(call);
    let (states, state) = chunked.states();
    (chunked.output(&chunked.scores(), &states), state)
}

pub(super) fn backward<R: CubeRuntime>(call: Call<R>, dy: Option<CubeTensor<R>>, dstate: Option<CubeTensor<R>>) -> Grads<R> {
    let SsdDims { b, l, h, p, .. } = call.dims;
    let dtype = call.x.dtype;
    let dy = dy.map_or_else(|| call.zeros([b, l, h, p], dtype), |dy| packed(cast(dy, dtype)));
    let chunked = Chunked::new(call);
    let (states, _) = chunked.states();
    let (dstates, dstart) = chunked.dstates(&dy, dstate.map(|dstate| flat_f32(&dstate)));
    let scores = chunked.scores();
    let Pairs { pairs, blocks, dlog, dd } = chunked.pair_grads(&dy, &scores);
    let Inputs { dx, ddelta, earlier } = chunked.input_grads(&dy, &scores, &dstates);
    chunked.decay_grads(&dy, &states, &dstates, &earlier, &dlog);
    let dc = chunked.group_grads(&dy, &chunked.call.b, (&pairs, blocks), &states, false);
    let db = chunked.group_grads(&chunked.call.x, &chunked.call.c, (&pairs, blocks), &dstates, true);
    let call = chunked.call;
    let bias = call.dt_bias.as_ref();
    let StepGrads { dt, a, dt_bias } = finish(&call.dt, bias, &call.a, call.documents.as_ref(), call.dims, call.options, &ddelta, &dlog);
    Grads {
        x: dx,
        dt,
        a,
        b: cast(db, call.dtypes.b),
        c: cast(dc, call.dtypes.c),
        d: call.d.is_some().then(|| fold(&dd, call.dtypes.d)),
        dt_bias,
        state: call.state.is_some().then(|| cast(dstart, call.dtypes.state)),
    }
}

/// Results of [`pair_grads`].
struct Pairs<R: CubeRuntime> {
    pairs: CubeTensor<R>,
    /// Blocks of heads of a group.
    blocks: usize,
    /// Unfinished.
    dlog: CubeTensor<R>,
    dd: CubeTensor<R>,
}

/// Results of [`input_grads`].
struct Inputs<R: CubeRuntime> {
    dx: CubeTensor<R>,
    ddelta: CubeTensor<R>,
    earlier: CubeTensor<R>,
}

impl<R: CubeRuntime> Chunked<R> {
    fn new(call: Call<R>) -> Self {
        let SsdDims { l, p, n, .. } = call.dims;
        let documents = call.documents.as_ref();
        let plan = |q| Plan::new(q, p, n, documents.is_some());
        let plan = if plan(64).shared_bytes() <= call.device.shared_bytes { plan(64) } else { plan(32) };
        let prepared = prepare(&call.dt, call.dt_bias.as_ref(), &call.a, documents, call.dims, call.options, plan.q);
        let (filled, bounds) = match documents {
            Some(documents) => (documents.filled.clone(), documents.bounds.clone()),
            None => (prepared.sums.clone(), prepared.sums.clone()),
        };
        let d = call.d.clone().unwrap_or_else(|| prepared.sums.clone());
        Self { plan, filled, bounds, d, chunks: l.div_ceil(plan.q), prepared, call }
    }

    fn client(&self) -> &ComputeClient<R> {
        &self.call.x.client
    }

    fn grid(&self, cubes: usize) -> CubeCount {
        line(cubes, &self.call.device)
    }

    fn units() -> CubeDim {
        CubeDim::new_1d(UNITS as u32)
    }

    /// What each chunk adds to a state, or to the gradient of one.
    fn local(&self, x: &CubeTensor<R>, b: &CubeTensor<R>, back: bool) -> CubeTensor<R> {
        let SsdDims { b: rows, l, h, p, g, n } = self.call.dims;
        let states = empty(x, [rows, self.chunks, h, p, n], DType::F32);
        let cubes = rows * self.chunks * h * p.div_ceil(self.plan.q) * n.div_ceil(self.plan.q);
        // SAFETY: the kernel guards tokens, channels and cubes.
        unsafe {
            local_states::launch_unchecked::<R>(
                self.client(),
                self.grid(cubes),
                Self::units(),
                addresses(&[x, b, &states]),
                self.plan.wp,
                self.plan.wn,
                self.plan.v,
                array(x),
                array(b),
                array(&self.prepared.delta),
                array(&self.prepared.sums),
                array(&self.filled),
                array(&self.bounds),
                array(&states),
                cubes as u32,
                l as u32,
                h as u32,
                p as u32,
                g as u32,
                n as u32,
                back,
                self.plan,
                x.dtype.into(),
            );
        }
        states
    }

    /// Turns [`Self::local`] into states at the edges of chunks, in place; also what is left at the end.
    fn pass(&self, states: &CubeTensor<R>, start: Option<&CubeTensor<R>>, back: bool) -> CubeTensor<R> {
        let SsdDims { b, l, h, p, n, .. } = self.call.dims;
        let end = empty(states, [b, h, p, n], DType::F32);
        let size = p * n / self.plan.wn;
        let units = b * h * size;
        // SAFETY: the kernel guards units and chunks.
        unsafe {
            pass_states::launch_unchecked::<R>(
                self.client(),
                self.grid(units.div_ceil(UNITS)),
                Self::units(),
                addresses(&[states]),
                self.plan.wn,
                array(states),
                array(start.unwrap_or(&end)),
                array(&end),
                array(&self.prepared.sums),
                array(&self.filled),
                array(&self.bounds),
                units as u32,
                l as u32,
                h as u32,
                size as u32,
                start.is_some(),
                back,
                self.plan,
            );
        }
        end
    }

    /// States that enter the chunks, and the one that leaves the last.
    fn states(&self) -> (CubeTensor<R>, CubeTensor<R>) {
        let states = self.local(&self.call.x, &self.call.b, false);
        let state = self.pass(&states, self.call.state.as_ref(), false);
        (states, state)
    }

    /// Gradients of the states that leave the chunks, and of the one that enters the first.
    fn dstates(&self, dy: &CubeTensor<R>, dstate: Option<CubeTensor<R>>) -> (CubeTensor<R>, CubeTensor<R>) {
        let states = self.local(dy, &self.call.c, true);
        let state = self.pass(&states, dstate.as_ref(), true);
        (states, state)
    }

    fn scores(&self) -> CubeTensor<R> {
        let SsdDims { b, l, g, n, .. } = self.call.dims;
        let scores = empty(&self.call.b, [b, self.chunks, g, self.plan.q, self.plan.q], DType::F32);
        let cubes = b * self.chunks * g;
        // SAFETY: the kernel guards tokens, channels and cubes.
        unsafe {
            scores_kernel::launch_unchecked::<R>(
                self.client(),
                self.grid(cubes),
                Self::units(),
                addresses(&[&self.call.b, &scores]),
                self.plan.wn,
                self.plan.v,
                array(&self.call.b),
                array(&self.call.c),
                array(&self.bounds),
                array(&scores),
                cubes as u32,
                l as u32,
                g as u32,
                n as u32,
                self.plan,
                self.call.b.dtype.into(),
            );
        }
        scores
    }

    fn output(&self, scores: &CubeTensor<R>, states: &CubeTensor<R>) -> CubeTensor<R> {
        let SsdDims { b, l, h, p, g, n } = self.call.dims;
        let x = &self.call.x;
        let y = empty(x, [b, l, h, p], x.dtype);
        let cubes = b * self.chunks * h * p.div_ceil(self.plan.q);
        // SAFETY: the kernel guards tokens, channels and cubes.
        unsafe {
            output_kernel::launch_unchecked::<R>(
                self.client(),
                self.grid(cubes),
                Self::units(),
                addresses(&[x, &self.call.c, states, scores]),
                self.plan.wp,
                self.plan.wn,
                self.plan.v,
                array(x),
                array(&self.call.c),
                array(&self.d),
                array(scores),
                array(states),
                array(&self.prepared.delta),
                array(&self.prepared.sums),
                array(&self.filled),
                array(&self.bounds),
                array(&y),
                cubes as u32,
                l as u32,
                h as u32,
                p as u32,
                g as u32,
                n as u32,
                self.call.d.is_some(),
                self.plan,
                x.dtype.into(),
            );
        }
        y
    }

    fn pair_grads(&self, dy: &CubeTensor<R>, scores: &CubeTensor<R>) -> Pairs<R> {
        let SsdDims { b, l, h, p, g, .. } = self.call.dims;
        let (x, q) = (&self.call.x, self.plan.q);
        let heads = h / g;
        // Several cubes for every processor, then as many heads to a cube as that leaves.
        let wanted = self.call.device.processors.unwrap_or(16) as usize * 8;
        let per = (heads * b * self.chunks * g / wanted).clamp(1, HEADS.min(heads));
        let blocks = heads.div_ceil(per);
        let pairs = empty(x, [b, self.chunks, g, blocks, q * q], DType::F32);
        let dlog = empty(x, [b, h, self.prepared.lp], DType::F32);
        let dd = empty(x, [b * self.chunks, h], DType::F32);
        let cubes = b * self.chunks * g * blocks;
        // SAFETY: the kernel guards tokens, channels, heads and cubes.
        unsafe {
            pair_grads::launch_unchecked::<R>(
                self.client(),
                self.grid(cubes),
                Self::units(),
                addresses(&[x, scores, &pairs]),
                self.plan.wp,
                self.plan.v,
                array(x),
                array(dy),
                array(scores),
                array(&self.prepared.delta),
                array(&self.prepared.sums),
                array(&self.filled),
                array(&self.bounds),
                array(&pairs),
                array(&dlog),
                array(&dd),
                cubes as u32,
                l as u32,
                h as u32,
                p as u32,
                g as u32,
                blocks as u32,
                per as u32,
                self.call.d.is_some(),
                self.plan,
                x.dtype.into(),
            );
        }
        Pairs { pairs, blocks, dlog, dd }
    }

    fn input_grads(&self, dy: &CubeTensor<R>, scores: &CubeTensor<R>, dstates: &CubeTensor<R>) -> Inputs<R> {
        let SsdDims { b, l, h, p, g, n } = self.call.dims;
        let x = &self.call.x;
        let dx = empty(x, [b, l, h, p], x.dtype);
        let ddelta = empty(x, [b, h, self.prepared.lp], DType::F32);
        let earlier = empty(x, [b, h, self.prepared.lp], DType::F32);
        let cubes = b * self.chunks * h;
        // SAFETY: the kernel guards tokens, channels and cubes.
        unsafe {
            input_grads::launch_unchecked::<R>(
                self.client(),
                self.grid(cubes),
                Self::units(),
                addresses(&[x, &self.call.b, scores, dstates]),
                self.plan.wp,
                self.plan.wn,
                self.plan.v,
                array(x),
                array(dy),
                array(&self.call.b),
                array(&self.d),
                array(scores),
                array(dstates),
                array(&self.prepared.delta),
                array(&self.prepared.sums),
                array(&self.filled),
                array(&self.bounds),
                array(&dx),
                array(&ddelta),
                array(&earlier),
                cubes as u32,
                l as u32,
                h as u32,
                p as u32,
                g as u32,
                n as u32,
                self.call.d.is_some(),
                self.plan,
                x.dtype.into(),
            );
        }
        Inputs { dx, ddelta, earlier }
    }

    /// Finishes `dlog`.
    fn decay_grads(
        &self,
        dy: &CubeTensor<R>,
        states: &CubeTensor<R>,
        dstates: &CubeTensor<R>,
        earlier: &CubeTensor<R>,
        dlog: &CubeTensor<R>,
    ) {
        let SsdDims { b, l, h, p, g, n } = self.call.dims;
        let cubes = b * self.chunks * h;
        // SAFETY: the kernel guards tokens, channels and cubes.
        unsafe {
            decay_grads::launch_unchecked::<R>(
                self.client(),
                self.grid(cubes),
                Self::units(),
                addresses(&[dy, &self.call.c, states, dlog]),
                self.plan.wp,
                self.plan.wn,
                self.plan.v,
                array(dy),
                array(&self.call.c),
                array(states),
                array(dstates),
                array(&self.prepared.delta),
                array(&self.prepared.sums),
                array(&self.filled),
                array(&self.bounds),
                array(earlier),
                array(dlog),
                cubes as u32,
                l as u32,
                h as u32,
                p as u32,
                g as u32,
                n as u32,
                self.plan,
                dy.dtype.into(),
            );
        }
    }

    /// Gradient of `c`, or with `back` of `b`.
    fn group_grads(
        &self,
        x: &CubeTensor<R>,
        other: &CubeTensor<R>,
        (pairs, blocks): (&CubeTensor<R>, usize),
        states: &CubeTensor<R>,
        back: bool,
    ) -> CubeTensor<R> {
        let SsdDims { b, l, h, p, g, n } = self.call.dims;
        let out = empty(other, [b, l, g, n], other.dtype);
        let cubes = b * self.chunks * g * n.div_ceil(self.plan.q);
        // SAFETY: the kernel guards tokens, channels and cubes.
        unsafe {
            group_grads::launch_unchecked::<R>(
                self.client(),
                self.grid(cubes),
                Self::units(),
                addresses(&[x, other, pairs, states]),
                self.plan.wp,
                self.plan.wn,
                self.plan.v,
                array(x),
                array(other),
                array(pairs),
                array(states),
                array(&self.prepared.delta),
                array(&self.prepared.sums),
                array(&self.filled),
                array(&self.bounds),
                array(&out),
                cubes as u32,
                l as u32,
                h as u32,
                p as u32,
                g as u32,
                n as u32,
                blocks as u32,
                back,
                self.plan,
                x.dtype.into(),
            );
        }
        out
    }
}
