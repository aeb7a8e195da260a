//! Sizes, variants and launches.

use burn::tensor::{DType, Shape};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::ir::{AddressType, StorageType};
use cubecl::prelude::*;

use super::backward::{Back, TEAM, backward_kernel};
use super::forward::{combine_kernel, forward_kernel, survey_kernel};
use super::step::step_kernel;
use super::tile::Setting;
use crate::cube::{Device, Rows, Tokens, array, cast, down, empty, fold, line, packed, rows, tokens, vector_size, zeros};
use crate::selective_scan::{ScanArgs, ScanDims};

/// Channels of a cube, and tokens of a tile, at most.
const UNITS: usize = 128;
const TILE: usize = 16;
/// Up to this many tokens the states are read and written where they lie.
const STEPS: usize = 4;

/// Arrays of the kernel that has most, with that of the scalars.
const BINDINGS: u32 = 23;

/// A call, free of the backend's element types.
pub(super) struct Scan<R: CubeRuntime> {
    u: Tokens<R>,
    delta: Tokens<R>,
    /// float32, as are `skip`, `bias` and `past`. Stand-ins where the call has none.
    a: CubeTensor<R>,
    b: Tokens<R>,
    c: Tokens<R>,
    skip: CubeTensor<R>,
    z: Tokens<R>,
    bias: CubeTensor<R>,
    past: CubeTensor<R>,
    rows: Rows<R>,
    dims: ScanDims,
    device: Device,
    types: Types,
    /// With everything but the sizes set.
    set: Setting,
}

/// Of the arguments, as they came.
struct Types {
    u: DType,
    delta: DType,
    a: DType,
    b: DType,
    c: DType,
    z: DType,
}

pub(super) struct Grads<R: CubeRuntime> {
    pub u: CubeTensor<R>,
    pub delta: CubeTensor<R>,
    pub a: CubeTensor<R>,
    pub b: CubeTensor<R>,
    pub c: CubeTensor<R>,
    pub z: Option<CubeTensor<R>>,
    /// Of `d` and `delta_bias`, float32 `[2, e]`.
    pub channels: CubeTensor<R>,
    pub state: Option<CubeTensor<R>>,
}

/// How a row is cut.
#[derive(Clone, Copy)]
struct Cut {
    units: usize,
    /// Units of a channel.
    split: usize,
    tile: usize,
    /// Tokens of a piece, and pieces of a row.
    length: usize,
    pieces: usize,
}

/// What kernels read of a type: other floats as float32.
fn readable(dtype: DType) -> DType {
    if matches!(dtype, DType::F16 | DType::BF16) { dtype } else { DType::F32 }
}

impl<R: CubeRuntime> Scan<R> {
    pub fn new<F: FloatElement, I: IntElement, BT: BoolElement>(args: ScanArgs<CubeBackend<R, F, I, BT>>) -> Self {
        let [b, l, e] = args.u.dims();
        let dims = ScanDims { b, l, e, n: args.a.dims()[1] };
        let ready = |tensor: CubeTensor<R>| {
            let dtype = readable(tensor.dtype);
            cast(tensor, dtype)
        };
        let float = |tensor: CubeTensor<R>| packed(cast(tensor, DType::F32));
        let set = Setting {
            n: dims.n,
            tile: 0,
            units: 0,
            split: 1,
            bias: args.delta_bias.is_some(),
            skip: args.d.is_some(),
            gate: args.z.is_some(),
            state: args.state.is_some(),
            segments: args.segments.is_some(),
            softplus: args.delta_softplus,
            pieces: false,
        };
        let (u, delta, a, b, c) = (down(args.u), down(args.delta), down(args.a), down(args.b), down(args.c));
        let z = args.z.map_or_else(|| u.clone(), down);
        let types = Types { u: u.dtype, delta: delta.dtype, a: a.dtype, b: b.dtype, c: c.dtype, z: z.dtype };
        let (b, c) = if b.dtype == c.dtype { (ready(b), ready(c)) } else { (cast(b, DType::F32), cast(c, DType::F32)) };
        let a = float(a);
        let other = |tensor: Option<CubeTensor<R>>| tensor.map_or_else(|| a.clone(), float);
        Self {
            rows: rows(args.segments.as_ref(), &a),
            device: Device::of(&a.client),
            skip: other(args.d.map(down)),
            bias: other(args.delta_bias.map(down)),
            past: other(args.state.map(down)),
            u: tokens(ready(u), 1),
            delta: tokens(ready(delta), 1),
            b: tokens(b, 1),
            c: tokens(c, 1),
            z: tokens(ready(z), 1),
            a,
            dims,
            types,
            set,
        }
    }

    fn zeros(&self, shape: impl Into<Shape>, dtype: DType) -> CubeTensor<R> {
        zeros(&self.a, shape, dtype)
    }

    fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> CubeTensor<R> {
        empty(&self.a, shape, dtype)
    }

    fn cut(&self, bytes: fn(usize, usize, usize) -> usize, least: usize) -> Option<Cut> {
        cut(&self.device, self.dims, bytes, least)
    }

    /// The same cut with as many units to a cube as the survey finds room for.
    fn surveyed(&self, cut: Cut) -> Cut {
        let fits = |units: usize| survey_bytes(self.dims.n, cut.tile, units) <= self.device.shared_bytes;
        let units = std::iter::successors(Some(cut.units), |units| Some(units / 2)).find(|&units| units <= 1 || fits(units));
        Cut { units: units.unwrap_or(1), ..cut }
    }

    fn set(&self, cut: Cut) -> Setting {
        Setting { tile: cut.tile, units: cut.units, split: cut.split, pieces: cut.pieces > 1, ..self.set }
    }

    fn storage(&self) -> [StorageType; 4] {
        [&self.u, &self.delta, &self.b, &self.z].map(|tokens| tokens.tensor.dtype.into())
    }

    /// Indices wide enough for all inputs and for `outputs`.
    fn addresses(&self, outputs: &[&CubeTensor<R>]) -> AddressType {
        let inputs = [&self.u, &self.delta, &self.b, &self.c, &self.z].map(|tokens| &tokens.tensor);
        inputs.iter().chain(outputs).map(|tensor| tensor.required_address_type()).max().unwrap_or_default()
    }

    fn grid(&self, cut: Cut) -> CubeCount {
        line(self.dims.b * cut.pieces * self.dims.e.div_ceil(cut.units / cut.split), &self.device)
    }

    pub fn forward(mut self) -> (CubeTensor<R>, CubeTensor<R>) {
        let ScanDims { b, l, e, n } = self.dims;
        let y = self.empty([b, l, e], self.u.tensor.dtype);
        if b * l * e == 0 {
            let state = if self.set.state { self.past.clone() } else { self.zeros([b, e, n], DType::F32) };
            return (self.zeros([b, l, e], self.types.u), state);
        }
        let m = vector_size(&self.a.client, n, &[DType::F32]);
        if l <= STEPS && n / m <= 64 {
            // Decoding: nobody else holds the state, so it need not move.
            let in_place = self.set.state && self.past.can_mut();
            let state = if in_place { std::mem::replace(&mut self.past, self.a.clone()) } else { self.empty([b, e, n], DType::F32) };
            self.step(&y, &state, m, in_place);
            return (cast(y, self.types.u), state);
        }
        let state = self.empty([b, e, n], DType::F32);
        if let Some(cut) = self.cut(survey_bytes, 1) {
            self.walk(&y, &state, spread(&self.device, self.dims, cut));
        }
        (cast(y, self.types.u), state)
    }

    fn step(&self, y: &CubeTensor<R>, state: &CubeTensor<R>, m: usize, in_place: bool) {
        let ScanDims { b, l, e, n } = self.dims;
        let units = 64.min(self.device.max_units as usize).max(n / m);
        let blocks = e.div_ceil(units / (n / m));
        let set = Setting { tile: 4, units, ..self.set };
        unsafe {
            step_kernel::launch_unchecked::<R>(
                &self.a.client,
                line(b * blocks, &self.device),
                CubeDim::new_1d(units as u32),
                self.addresses(&[y, state]),
                m,
                array(&self.u.tensor),
                array(&self.delta.tensor),
                array(&self.a),
                array(&self.b.tensor),
                array(&self.c.tensor),
                array(&self.skip),
                array(&self.z.tensor),
                array(&self.bias),
                array(&self.rows.ids),
                array(&self.rows.bounds),
                array(&self.past),
                array(y),
                array(state),
                b as u32,
                l as u32,
                e as u32,
                self.u.row,
                self.u.token,
                self.delta.row,
                self.delta.token,
                self.b.row,
                self.b.token,
                self.c.row,
                self.c.token,
                self.z.row,
                self.z.token,
                m,
                in_place,
                set,
                self.storage(),
            );
        }
    }

    fn walk(&self, y: &CubeTensor<R>, state: &CubeTensor<R>, cut: Cut) {
        let ScanDims { b, l, e, n } = self.dims;
        let cut_up = cut.pieces > 1;
        let ends = self.empty(if cut_up { vec![b, cut.pieces, n, e] } else { vec![1] }, DType::F32);
        let none = self.empty([1], DType::F32);
        if cut_up {
            let sums = self.empty([b, cut.pieces, e], DType::F32);
            self.survey(cut, None, [&ends, &sums, &none, &none, &none]);
            self.combine(cut, None, &sums, &ends, None, Some(state));
        }
        let (enter, leave) = if cut_up { (&ends, &none) } else { (&self.past, state) };
        let (channel_stride, state_stride) = if cut_up { (1, e) } else { (n, 1) };
        unsafe {
            forward_kernel::launch_unchecked::<R>(
                &self.a.client,
                self.grid(cut),
                CubeDim::new_1d(cut.units as u32),
                self.addresses(&[y, state, &ends]),
                4,
                array(&self.u.tensor),
                array(&self.delta.tensor),
                array(&self.a),
                array(&self.b.tensor),
                array(&self.c.tensor),
                array(&self.skip),
                array(&self.z.tensor),
                array(&self.bias),
                array(&self.rows.ids),
                array(&self.rows.bounds),
                array(enter),
                array(y),
                array(leave),
                b as u32,
                l as u32,
                e as u32,
                cut.length as u32,
                self.u.row,
                self.u.token,
                self.delta.row,
                self.delta.token,
                self.b.row,
                self.b.token,
                self.c.row,
                self.c.token,
                self.z.row,
                self.z.token,
                channel_stride as u32,
                state_stride as u32,
                self.set(cut),
                self.storage(),
            );
        }
    }

    /// `outputs`: ends, sums, marks, offsets, backs. On the way back with `dy`.
    fn survey(&self, cut: Cut, dy: Option<&Tokens<R>>, outputs: [&CubeTensor<R>; 5]) {
        let ScanDims { b, l, e, .. } = self.dims;
        let cut = self.surveyed(cut);
        let back = dy.is_some();
        let dy = dy.unwrap_or(&self.u);
        let [ends, sums, marks, offsets, backs] = outputs;
        unsafe {
            survey_kernel::launch_unchecked::<R>(
                &self.a.client,
                self.grid(cut),
                CubeDim::new_1d(cut.units as u32),
                self.addresses(&outputs),
                4,
                array(&self.u.tensor),
                array(&self.delta.tensor),
                array(&self.a),
                array(&self.b.tensor),
                array(&self.c.tensor),
                array(&self.z.tensor),
                array(&self.bias),
                array(&self.rows.ids),
                array(&self.rows.bounds),
                array(&dy.tensor),
                array(&self.past),
                array(ends),
                array(sums),
                array(marks),
                array(offsets),
                array(backs),
                b as u32,
                l as u32,
                e as u32,
                cut.length as u32,
                self.u.row,
                self.u.token,
                self.delta.row,
                self.delta.token,
                self.b.row,
                self.b.token,
                self.c.row,
                self.c.token,
                self.z.row,
                self.z.token,
                dy.row,
                dy.token,
                back,
                self.set(cut),
                self.storage(),
            );
        }
    }

    /// States that enter pieces in place of `ends`, gradients that leave them in place of `backs`, or the last state.
    fn combine(
        &self,
        cut: Cut,
        dstate: Option<&CubeTensor<R>>,
        sums: &CubeTensor<R>,
        ends: &CubeTensor<R>,
        backs: Option<&CubeTensor<R>>,
        last: Option<&CubeTensor<R>>,
    ) {
        let ScanDims { b, l, e, n } = self.dims;
        let none = self.empty([1], DType::F32);
        let other = self.empty([1], DType::F32);
        unsafe {
            combine_kernel::launch_unchecked::<R>(
                &self.a.client,
                line((b * e * n).div_ceil(UNITS), &self.device),
                CubeDim::new_1d(UNITS as u32),
                ends.required_address_type(),
                array(&self.a),
                array(&self.rows.ids),
                array(&self.rows.bounds),
                array(&self.past),
                array(dstate.unwrap_or(&self.a)),
                array(sums),
                array(ends),
                array(backs.unwrap_or(&none)),
                array(last.unwrap_or(&other)),
                b as u32,
                l as u32,
                e as u32,
                cut.length as u32,
                cut.pieces as u32,
                backs.is_some(),
                dstate.is_some(),
                self.set(cut),
            );
        }
    }

    pub fn backward(self, dy: Option<CubeTensor<R>>, dstate: Option<CubeTensor<R>>) -> Grads<R> {
        let ScanDims { b, l, e, n } = self.dims;
        if b * l * e * n == 0 {
            return self.nothing(dstate);
        }
        let (cut, spill) = match self.cut(backward_bytes, TEAM) {
            Some(cut) => (cut, false),
            None => (self.cut(spilled_bytes, TEAM).expect("shared memory for a few tokens of all states"), true),
        };
        // What does not fit into shared memory keeps to one team.
        let cut = if spill { Cut { units: TEAM, ..cut } } else { cut };
        let back = Back { dstate: dstate.is_some(), plane: self.device.tensor_cores, spill };
        let cut_up = cut.pieces > 1;
        let dstate = dstate.map(|dstate| packed(cast(dstate, DType::F32)));
        let dy = match dy {
            Some(dy) => cast(dy, self.u.tensor.dtype),
            None => self.zeros([b, l, e], self.u.tensor.dtype),
        };
        let dy = tokens(dy, 1);
        let float = |there: bool, shape: Vec<usize>| self.empty(if there { shape } else { vec![1] }, DType::F32);
        let tiles = l.div_ceil(cut.tile);
        let marks = float(true, vec![b, tiles, n, e]);
        let offsets = float(cut_up, vec![b, tiles, e]);
        let ends = float(cut_up, vec![b, cut.pieces, n, e]);
        let sums = float(cut_up, vec![b, cut.pieces, e]);
        let backs = float(cut_up || spill, vec![b, cut.pieces, n, e]);
        self.survey(cut, Some(&dy), [&ends, &sums, &marks, &offsets, &backs]);
        if cut_up {
            self.combine(cut, dstate.as_ref(), &sums, &ends, Some(&backs), None);
        }
        let du = self.empty([b, l, e], self.u.tensor.dtype);
        let ddelta = self.empty([b, l, e], self.delta.tensor.dtype);
        let dz = self.empty(if self.set.gate { vec![b, l, e] } else { vec![1] }, self.z.tensor.dtype);
        let dpast = self.empty([b, e, n], DType::F32);
        let parts = float(true, vec![b * cut.pieces, e * (n + 2)]);
        let blocks = e.div_ceil(cut.units);
        let shares = float(true, vec![blocks, 2 * b * l * n]);
        unsafe {
            backward_kernel::launch_unchecked::<R>(
                &self.a.client,
                self.grid(cut),
                CubeDim::new_1d(cut.units as u32),
                self.addresses(&[&marks, &du, &parts, &shares]),
                4,
                array(&self.u.tensor),
                array(&self.delta.tensor),
                array(&self.a),
                array(&self.b.tensor),
                array(&self.c.tensor),
                array(&self.skip),
                array(&self.z.tensor),
                array(&self.bias),
                array(&self.rows.ids),
                array(&self.rows.bounds),
                array(&dy.tensor),
                array(dstate.as_ref().unwrap_or(&self.a)),
                array(&marks),
                array(&offsets),
                array(&ends),
                array(&backs),
                array(&du),
                array(&ddelta),
                array(&dz),
                array(&dpast),
                array(&parts),
                array(&shares),
                b as u32,
                l as u32,
                e as u32,
                cut.length as u32,
                self.u.row,
                self.u.token,
                self.delta.row,
                self.delta.token,
                self.b.row,
                self.b.token,
                self.c.row,
                self.c.token,
                self.z.row,
                self.z.token,
                dy.row,
                dy.token,
                back,
                self.set(cut),
                self.storage(),
            );
        }
        let [da, channels] = fold(parts, b * cut.pieces, ([e, n].into(), self.types.a), ([2, e].into(), DType::F32));
        let [db, dc] = fold(shares, blocks, ([b, l, n].into(), self.types.b), ([b, l, n].into(), self.types.c));
        Grads {
            u: cast(du, self.types.u),
            delta: cast(ddelta, self.types.delta),
            a: da,
            b: db,
            c: dc,
            z: self.set.gate.then(|| cast(dz, self.types.z)),
            channels,
            state: self.set.state.then_some(dpast),
        }
    }

    /// Gradients of a call without tokens, channels or states.
    fn nothing(&self, dstate: Option<CubeTensor<R>>) -> Grads<R> {
        let ScanDims { b, l, e, n } = self.dims;
        let Types { u, delta, a, b: b_type, c: c_type, z } = self.types;
        Grads {
            u: self.zeros([b, l, e], u),
            delta: self.zeros([b, l, e], delta),
            a: self.zeros([e, n], a),
            b: self.zeros([b, l, n], b_type),
            c: self.zeros([b, l, n], c_type),
            z: self.set.gate.then(|| self.zeros([b, l, e], z)),
            channels: self.zeros([2, e], DType::F32),
            state: self.set.state.then(|| dstate.unwrap_or_else(|| self.zeros([b, e, n], DType::F32))),
        }
    }
}

/// Cubes of as many units, and tiles of as many tokens, as `bytes(n, tile, units)` of shared memory allow.
fn cut(device: &Device, ScanDims { b, l, e, n }: ScanDims, bytes: fn(usize, usize, usize) -> usize, least: usize) -> Option<Cut> {
    let most = UNITS.min(e.next_power_of_two().max(32)).min(device.max_units as usize);
    let longest = TILE.min(l.max(1).next_multiple_of(4));
    let (tile, units) = [longest, longest.min(8), 4]
        .into_iter()
        .flat_map(|tile| [128, 64, 32, 16, 8, 4, 2, 1].map(|units| (tile, units)))
        .filter(|&(_, units)| units <= most && units >= least)
        .find(|&(tile, units)| bytes(n, tile, units) <= device.shared_bytes && (units >= 32 || tile == 4))?;
    // Two cubes to a processor go without a second walk over the row. Below that the row is cut for four.
    let processors = device.processors.unwrap_or(16) as usize;
    let cubes = (b * e.div_ceil(units)).max(1);
    let wanted = if cubes >= 2 * processors { 1 } else { (4 * processors).div_ceil(cubes).min(128) };
    let length = l.max(1).div_ceil(wanted).max(2 * tile).next_multiple_of(tile);
    Some(Cut { units, split: 1, tile, length, pieces: l.div_ceil(length) })
}

/// The way forward over few channels: states of a channel on several units, so that the row need not be walked twice in pieces.
fn spread(device: &Device, ScanDims { b, l, e, n }: ScanDims, cut: Cut) -> Cut {
    // Sixteen planes of 32 to a processor hide each other's waits; with half as many a second walk is as quick.
    let crowd = 512 * device.processors.unwrap_or(16) as usize;
    let units = UNITS.min(device.max_units as usize);
    let fits = |split: usize| {
        let bytes = 8 * n * cut.tile + 4 * units * (n / split + cut.tile) + 8 * cut.tile * units / split;
        n.is_multiple_of(split) && cut.tile.is_multiple_of(4 * split) && e * split >= units && bytes <= device.shared_bytes
    };
    let split = [1, 2, 4].into_iter().find(|split| 4 * b * e * split >= 3 * crowd).unwrap_or(4);
    if split == 1 || !fits(split) || 2 * b * e * split < crowd {
        return cut;
    }
    Cut { units, split, length: l.next_multiple_of(cut.tile), pieces: 1, ..cut }
}

/// Whether there are states, shared memory for them in both directions, and room for all arrays of a kernel.
pub(crate) fn takes(device: &Device, dims: ScanDims) -> bool {
    let back = || cut(device, dims, backward_bytes, TEAM).or_else(|| cut(device, dims, spilled_bytes, TEAM));
    dims.n > 0 && device.bindings >= BINDINGS && cut(device, dims, survey_bytes, 1).is_some() && back().is_some()
}

/// Shared memory of the survey, which needs no less than the way forward.
fn survey_bytes(n: usize, tile: usize, units: usize) -> usize {
    8 * n * tile + 12 * n * units + 16
}

/// Shared memory of the way back.
fn backward_bytes(n: usize, tile: usize, units: usize) -> usize {
    let rows = units / TEAM * tile * 2;
    8 * n * tile + 8 * n * units + 4 * rows * (TEAM + 1) + 4 * n * (rows + 1)
}

/// The same where the states' part lies in global memory.
fn spilled_bytes(n: usize, tile: usize, units: usize) -> usize {
    8 * n * tile + 4 * (units / TEAM * tile * 2) * (TEAM + 1) + 16
}
