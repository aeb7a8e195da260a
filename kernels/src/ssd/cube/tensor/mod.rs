//! The tensor-core path: bf16 and f16 operands, float32 sums and states, chunks of 64 tokens, heads of width 64.

mod grads;
mod tiles;
mod walk;

use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::call::{Call, Grads};
use super::prepare::{Documents, Prepared, finish, fold, prepare};
use crate::cube::{Device, array, cast, empty, packed};
use crate::ssd::SsdDims;
use grads::{GradsShape, ssd_grads};
use tiles::{P, Q};
use walk::{Walk, ssd_pass, ssd_walk};

/// Whether this path takes the sizes.
pub(super) fn supports(device: &Device, dtype: DType, dims: SsdDims) -> bool {
    let SsdDims { b, l, h, p, n, .. } = dims;
    let vectors = |tokens: usize, width: usize| tokens.checked_mul(width).is_some_and(|count| count / 2 < u32::MAX as usize / 2);
    device.tensor_cores
        && matches!(dtype, DType::BF16 | DType::F16)
        && p == P
        && matches!(n, 64 | 128 | 256)
        && b > 0
        && h > 0
        && l > 0
        // Offsets are 32 bits wide; the largest tensor is that of the states that enter chunks.
        && vectors(b * l, h * p)
        && vectors(b * l.div_ceil(Q), h * p * n)
        && shared_bytes(2, n) <= device.shared_bytes
}

/// Shared memory of a walk that writes outputs, bytes.
fn shared_bytes(hb: usize, n: usize) -> usize {
    let tiles = hb * 64 * 72 + 4 * 64 * (n + 8) + hb * 64 * 72;
    2 * tiles + hb * 64 * 4 * 12 + 1024
}

/// A tensor `[b, l, ..]` whose tokens are apart by `stride` 16-byte vectors and otherwise packed.
struct Strided<R: CubeRuntime> {
    tensor: CubeTensor<R>,
    stride: usize,
}

impl<R: CubeRuntime> Strided<R> {
    /// Takes a view of `[b, l, heads, width]` as it is where tokens are evenly apart and aligned, else copies.
    fn of(tensor: CubeTensor<R>) -> Self {
        let [_, l, heads, width] = tensor.shape().dims::<4>();
        let strides = tensor.meta.strides();
        let start = tensor.handle.offset_start.unwrap_or(0);
        let even = strides[3] == 1 && (heads == 1 || strides[2] == width) && strides[1] % 8 == 0 && strides[0] == l * strides[1];
        // Vectors are addressed with 32 bits.
        let short = u32::try_from(tensor.shape().dims::<4>()[0] * l * strides[1] / 8).is_ok();
        if even && short && start.is_multiple_of(16) && strides[1] >= heads * width {
            let stride = strides[1] / 8;
            return Self { tensor, stride };
        }
        Self { tensor: packed(tensor), stride: heads * width / 8 }
    }

    /// All vectors from the first to the end of the last token.
    fn arg(&self) -> ArrayArg<R> {
        let [b, l, heads, width] = self.tensor.shape().dims::<4>();
        let len = (b * l - 1) * self.stride * 8 + heads * width;
        // SAFETY: the view's last element is at `len - 1`.
        unsafe { ArrayArg::from_raw_parts(self.tensor.handle.clone(), len) }
    }
}

/// What the walks read besides the tensors that change roles.
struct Inputs<R: CubeRuntime> {
    dims: SsdDims,
    dtype: DType,
    b: Strided<R>,
    c: Strided<R>,
    prepared: Prepared<R>,
    documents: Option<Documents<R>>,
    /// float32 `[h]`.
    d: Option<CubeTensor<R>>,
}

impl<R: CubeRuntime> Inputs<R> {
    fn new(call: &Call<R>) -> Self {
        let documents = call.documents.clone();
        let prepared = prepare(&call.dt, call.dt_bias.as_ref(), &call.a, documents.as_ref(), call.dims, call.options, Q);
        Self {
            dims: call.dims,
            dtype: call.x.dtype(),
            b: Strided::of(call.b.clone()),
            c: Strided::of(call.c.clone()),
            prepared,
            documents,
            d: call.d.clone(),
        }
    }

    /// Document ids and bounds; any buffer where there are none.
    fn documents(&self) -> (ArrayArg<R>, ArrayArg<R>) {
        match &self.documents {
            Some(documents) => (array(&documents.filled), array(&documents.bounds)),
            None => (array(&self.prepared.delta), array(&self.prepared.delta)),
        }
    }
}

/// How heads share cubes, and the sequence its segments.
#[derive(Clone, Copy, Debug)]
struct Plan {
    hw: usize,
    hg: usize,
    /// Chunks of a segment.
    chunks: usize,
    segments: usize,
}

impl Plan {
    fn new(dims: SsdDims, processors: u32) -> Self {
        let SsdDims { b, l, h, g, n, .. } = dims;
        // Short rows whose heads are about as many as the processors: one head a cube leaves no processor idle and needs half as many segments.
        let apart = n == 128 && l <= 2048 && (processors as usize / 2..=processors as usize).contains(&(b * h));
        let hw = if n <= 128 && (h / g).is_multiple_of(2) && !apart { 2 } else { 1 };
        // Wide states leave one cube to a processor: two groups of planes then share keys and queries.
        let hg = if n > 128 && (h / g).is_multiple_of(2) { 2 } else { 1 };
        let all = l.div_ceil(Q);
        // Two cubes to a processor hide each other's waits; one with wide states has it alone. A segment costs a pass over its inputs.
        let cubes = b * h / (hw * hg);
        let room = processors as usize * if n > 128 { 1 } else { 2 };
        let wanted = (room / cubes.max(1)).min(all.div_ceil(4)).max(1);
        let chunks = all.div_ceil(wanted);
        Self { hw, hg, chunks, segments: all.div_ceil(chunks) }
    }
}

/// The state that enters each chunk and head, in a unit of its own (see [`tiles::unit_of`]).
struct Stored<R: CubeRuntime> {
    /// float16 `[b, c, h, p, n]`.
    states: CubeTensor<R>,
    /// float32 `[b, c, h, 8]`: the largest magnitudes in four parts of the chunk's input, the state's unit, and three that nobody writes.
    units: CubeTensor<R>,
}

/// What a walk made.
struct Walked<R: CubeRuntime> {
    /// `[b, l, h, p]`, if asked for.
    out: Option<CubeTensor<R>>,
    /// Last state in walking order, float32 `[b, h, p, n]`.
    end: Option<CubeTensor<R>>,
    /// State that enters each chunk in walking order, if asked for.
    dump: Option<Stored<R>>,
}

/// Walks forward (`input` = x) or backward (`input` = the gradient of y) from `state`.
fn run<R: CubeRuntime>(
    inputs: &Inputs<R>,
    input: &Strided<R>,
    state: Option<&CubeTensor<R>>,
    reverse: bool,
    out: bool,
    dump: bool,
) -> Walked<R> {
    let SsdDims { b, l, h, p, n, .. } = inputs.dims;
    let device = Device::of(&input.tensor.client);
    let plan = Plan::new(inputs.dims, device.processors.unwrap_or(108));
    let like = &input.tensor;
    let mut entering = state.cloned();
    if plan.segments > 1 {
        let locals = empty(like, [b, plan.segments, h, p, n], DType::F32);
        let kept = empty(like, [b, plan.segments, h], DType::F32);
        let walk = Walk { locals: true, ..walk(inputs, plan, reverse, false, dump) };
        launch(inputs, input, plan, walk, Buffers { end: Some(&locals), kept: Some(&kept), ..Buffers::default() });
        pass(&locals, &kept, state, plan.segments, h, p * n, reverse);
        entering = Some(locals);
    }
    let made = Walked {
        out: out.then(|| empty(like, [b, l, h, p], inputs.dtype)),
        end: (out || !dump).then(|| empty(like, [b, h, p, n], DType::F32)),
        dump: dump.then(|| Stored {
            states: empty(like, [b, l.div_ceil(Q), h, p, n], DType::F16),
            units: empty(like, [b, l.div_ceil(Q), h, 8], DType::F32),
        }),
    };
    let walk = Walk { init: entering.is_some(), dump, skip: out && inputs.d.is_some(), ..walk(inputs, plan, reverse, out, dump) };
    let buffers = Buffers { init: entering.as_ref(), out: made.out.as_ref(), end: made.end.as_ref(), dump: made.dump.as_ref(), kept: None };
    launch(inputs, input, plan, walk, buffers);
    made
}

fn walk<R: CubeRuntime>(inputs: &Inputs<R>, plan: Plan, reverse: bool, out: bool, backward: bool) -> Walk {
    Walk {
        hw: plan.hw,
        hg: plan.hg,
        n: inputs.dims.n,
        reverse,
        init: false,
        out,
        dump: false,
        locals: false,
        ids: inputs.documents.is_some(),
        skip: false,
        split_feed: backward,
    }
}

/// Buffers of one walk; absent ones are not touched.
struct Buffers<'a, R: CubeRuntime> {
    init: Option<&'a CubeTensor<R>>,
    out: Option<&'a CubeTensor<R>>,
    end: Option<&'a CubeTensor<R>>,
    dump: Option<&'a Stored<R>>,
    kept: Option<&'a CubeTensor<R>>,
}

impl<R: CubeRuntime> Default for Buffers<'_, R> {
    fn default() -> Self {
        Self { init: None, out: None, end: None, dump: None, kept: None }
    }
}

fn launch<R: CubeRuntime>(inputs: &Inputs<R>, input: &Strided<R>, plan: Plan, walk: Walk, buffers: Buffers<'_, R>) {
    let SsdDims { b, l, h, g, .. } = inputs.dims;
    let (keys, queries) = if walk.reverse { (&inputs.c, &inputs.b) } else { (&inputs.b, &inputs.c) };
    let (running, first) = match (walk.locals, walk.reverse) {
        (false, _) => (plan.segments, 0),
        (true, false) => (plan.segments - 1, 0),
        (true, true) => (plan.segments - 1, 1),
    };
    // Any buffer stands in for one that the variant does not touch.
    let nothing = &inputs.prepared.delta;
    let or = |tensor: Option<&CubeTensor<R>>| array(tensor.unwrap_or(nothing));
    let (ids, rows) = inputs.documents();
    // SAFETY: the kernel guards every index by the sizes that the tensors were made with.
    unsafe {
        ssd_walk::launch_unchecked::<R>(
            &input.tensor.client,
            CubeCount::Static((h / (plan.hw * plan.hg)) as u32, (b * running) as u32, 1),
            CubeDim::new_2d(32, 4 * plan.hg as u32),
            8,
            4,
            2,
            input.arg(),
            keys.arg(),
            queries.arg(),
            array(&inputs.prepared.delta),
            array(&inputs.prepared.sums),
            ids,
            rows,
            or(inputs.d.as_ref()),
            or(buffers.init),
            or(buffers.out),
            or(buffers.end),
            or(buffers.dump.map(|stored| &stored.states)),
            or(buffers.dump.map(|stored| &stored.units)),
            or(buffers.kept),
            l as u32,
            h as u32,
            g as u32,
            plan.chunks as u32,
            plan.segments as u32,
            running as u32,
            first,
            input.stride as u32,
            keys.stride as u32,
            queries.stride as u32,
            walk,
            inputs.dtype.into(),
        );
    }
}

/// Local states of segments -> entering states, in place.
fn pass<R: CubeRuntime>(
    states: &CubeTensor<R>,
    kept: &CubeTensor<R>,
    init: Option<&CubeTensor<R>>,
    segments: usize,
    heads: usize,
    per_head: usize,
    reverse: bool,
) {
    let batch = states.shape().dims::<5>()[0];
    let pairs = batch * heads * per_head / 2;
    // SAFETY: 256 divides p n / 2, so every unit has a pair of its own.
    unsafe {
        ssd_pass::launch_unchecked::<R>(
            &states.client,
            CubeCount::Static((pairs / 256) as u32, 1, 1),
            CubeDim::new_1d(256),
            2,
            array(states),
            array(kept),
            array(init.unwrap_or(states)),
            segments as u32,
            heads as u32,
            per_head / 2,
            reverse,
            init.is_some(),
        );
    }
}

/// `y` and the last state.
pub(super) fn forward<R: CubeRuntime>(call: Call<R>) -> (CubeTensor<R>, CubeTensor<R>) {
    let inputs = Inputs::new(&call);
    let made = run(&inputs, &Strided::of(call.x), call.state.as_ref(), false, true, false);
    (made.out.expect("asked for"), made.end.expect("made with outputs"))
}

/// Gradients from those of the output and the last state. States that enter chunks are made again, not kept.
pub(super) fn backward<R: CubeRuntime>(call: Call<R>, dy: Option<CubeTensor<R>>, dstate: Option<CubeTensor<R>>) -> Grads<R> {
    let SsdDims { b, l, h, p, g, n } = call.dims;
    let inputs = Inputs::new(&call);
    let dtype = inputs.dtype;
    let dy = dy.map_or_else(|| call.zeros([b, l, h, p], dtype), |dy| cast(dy, dtype));
    let dstate = dstate.map(|dstate| packed(cast(dstate, DType::F32)));
    let (x, dy) = (Strided::of(call.x.clone()), Strided::of(dy));
    let forward = run(&inputs, &x, call.state.as_ref(), false, false, true);
    let back = run(&inputs, &dy, dstate.as_ref(), true, true, true);
    let like = &x.tensor;
    let chunks = l.div_ceil(Q);
    let db = empty(like, [b, l, g, n], dtype);
    let dc = empty(like, [b, l, g, n], dtype);
    let ddelta = empty(like, [b, h, inputs.prepared.lp], DType::F32);
    let dlog = empty(like, [b, h, inputs.prepared.lp], DType::F32);
    let skip = empty(like, [b * chunks, h], DType::F32);
    let (states, dstates) = (forward.dump.expect("asked for"), back.dump.expect("asked for"));
    let (ids, rows) = inputs.documents();
    let shape = GradsShape { n, ids: inputs.documents.is_some(), slots: if n > 128 { 1 } else { 2 }, parts: if n == 128 { 2 } else { 1 } };
    // SAFETY: the kernel guards every index by the sizes that the tensors were made with.
    unsafe {
        ssd_grads::launch_unchecked::<R>(
            &like.client,
            CubeCount::Static((b * chunks) as u32, g as u32, 1),
            CubeDim::new_2d(32, (n / 16 * shape.parts) as u32),
            8,
            4,
            2,
            x.arg(),
            dy.arg(),
            inputs.b.arg(),
            inputs.c.arg(),
            array(&states.states),
            array(&dstates.states),
            array(&states.units),
            array(&dstates.units),
            array(&inputs.prepared.delta),
            array(&inputs.prepared.sums),
            ids,
            rows,
            array(&db),
            array(&dc),
            array(&ddelta),
            array(&dlog),
            array(&skip),
            l as u32,
            h as u32,
            g as u32,
            x.stride as u32,
            dy.stride as u32,
            inputs.b.stride as u32,
            inputs.c.stride as u32,
            shape,
            dtype.into(),
        );
    }
    let steps = finish(&call.dt, call.dt_bias.as_ref(), &call.a, call.documents.as_ref(), call.dims, call.options, &ddelta, &dlog);
    Grads {
        x: back.out.expect("asked for"),
        dt: steps.dt,
        a: steps.a,
        b: cast(db, call.dtypes.b),
        c: cast(dc, call.dtypes.c),
        d: call.d.as_ref().map(|_| fold(&skip, call.dtypes.d)),
        dt_bias: steps.dt_bias,
        state: call.state.as_ref().map(|_| cast(back.end.expect("made with outputs"), call.dtypes.state)),
    }
}
