//! CubeCL kernels.

mod backward;
mod forward;

use burn::tensor::{DType, Tensor};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::*;

use self::backward::backward_kernel;
use self::forward::{Setting, forward_kernel};
use super::{ConvArgs, ConvGrads, ConvOut};
use crate::cube::{Device, Rows, Tokens, array, cast, down, empty, fold, line, packed, rows, tokens, up, vector_size, zeros};

/// Whether the kernels are there.
pub(crate) const READY: bool = true;

/// Arrays of the kernel that has most, with that of the scalars.
const BINDINGS: u32 = 12;
/// Most taps: a unit keeps a weight and an input for each.
const TAPS: usize = 16;

/// Whether the kernels take `k` taps on a device.
pub(crate) fn takes(device: &Device, k: usize) -> bool {
    k <= TAPS && device.bindings >= BINDINGS
}

/// Units of a cube.
const UNITS: u32 = 128;
/// Tokens whose inputs a unit asks for at a time.
const BATCH: usize = 8;
/// Channels of a unit at most: with more, fewer units fit a processor, and what they ask for at a time arrives later.
const WIDEST: usize = 4;

pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: ConvArgs<CubeBackend<R, F, I, BT>>,
) -> ConvOut<CubeBackend<R, F, I, BT>> {
    let (y, state) = Conv::new(args).forward();
    ConvOut { y: up(y), state: up(state) }
}

pub(crate) fn backward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: ConvArgs<CubeBackend<R, F, I, BT>>,
    dy: Option<Tensor<CubeBackend<R, F, I, BT>, 3>>,
    dstate: Option<Tensor<CubeBackend<R, F, I, BT>, 3>>,
) -> ConvGrads<CubeBackend<R, F, I, BT>> {
    let grads = Conv::new(args).backward(dy.map(down), dstate.map(down));
    ConvGrads { x: up(grads.x), weight: up(grads.weight), bias: grads.bias.map(up), state: grads.state.map(up) }
}

/// A call, free of the backend's element types.
struct Conv<R: CubeRuntime> {
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    bias: Option<CubeTensor<R>>,
    past: Option<CubeTensor<R>>,
    rows: Rows<R>,
    silu: bool,
    /// `b`, `l`, `e`, `k`.
    dims: [usize; 4],
    device: Device,
}

struct Grads<R: CubeRuntime> {
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    bias: Option<CubeTensor<R>>,
    state: Option<CubeTensor<R>>,
}

impl<R: CubeRuntime> Conv<R> {
    fn new<F: FloatElement, I: IntElement, BT: BoolElement>(args: ConvArgs<CubeBackend<R, F, I, BT>>) -> Self {
        let [b, l, e] = args.x.dims();
        let k = args.weight.dims()[1];
        let x = down(args.x);
        Self {
            rows: rows(args.segments.as_ref(), &x),
            weight: packed(down(args.weight)),
            bias: args.bias.map(|bias| packed(down(bias))),
            past: args.state.map(|state| packed(cast(down(state), x.dtype))).filter(|_| k > 1),
            silu: args.silu,
            dims: [b, l, e, k],
            device: Device::of(&x.client),
            x,
        }
    }

    /// Weights and bias in one of the types that kernels read.
    fn parameters(&self) -> (CubeTensor<R>, CubeTensor<R>) {
        let dtype = match self.weight.dtype {
            half @ (DType::F16 | DType::BF16) => half,
            _ => DType::F32,
        };
        let weight = cast(self.weight.clone(), dtype);
        let bias = self.bias.clone().map_or_else(|| weight.clone(), |bias| cast(bias, dtype));
        (weight, bias)
    }

    /// The variant without what a direction adds.
    fn setting(&self, weight: DType) -> Setting {
        let [_, l, e, k] = self.dims;
        let n = vector_size(&self.x.client, e, &[self.x.dtype]).min(WIDEST);
        Setting {
            k,
            n,
            m: vector_size(&self.x.client, n, &[weight]),
            batch: BATCH.min(l.next_power_of_two()),
            even: false,
            bias: self.bias.is_some(),
            state: self.past.is_some(),
            dstate: false,
            in_place: false,
            segments: self.rows.present,
            silu: self.silu,
        }
    }

    /// Units that keep the device busy, several times over.
    fn units(&self) -> usize {
        self.device.processors.unwrap_or(16) as usize * 4096
    }

    fn forward(mut self) -> (CubeTensor<R>, CubeTensor<R>) {
        let [b, l, e, k] = self.dims;
        let dtype = self.x.dtype;
        let y = empty(&self.x, [b, l, e], dtype);
        if b * l * e == 0 {
            let state = self.past.clone().unwrap_or_else(|| zeros(&self.x, [b, k - 1, e], dtype));
            return (y, state);
        }
        let (weight, bias) = self.parameters();
        let mut set = self.setting(weight.dtype);
        let width = e / set.n;
        let tile = (b * l * width / self.units()).clamp(8, 64).next_multiple_of(set.batch).min(l);
        // Decoding: nobody else holds the state, so it need not move.
        set.in_place = tile == l && !set.segments && self.past.as_ref().is_some_and(CubeTensor::can_mut);
        let state = if set.in_place { self.past.take() } else { None };
        let state = state.unwrap_or_else(|| empty(&self.x, [b, k - 1, e], dtype));
        let bound_state = if k > 1 { state.clone() } else { empty(&self.x, [1], dtype) };
        set.even = l.is_multiple_of(set.batch) && tile.is_multiple_of(set.batch);
        let items = b * l.div_ceil(tile);
        let past = self.past.clone().unwrap_or_else(|| self.x.clone());
        let Tokens { tensor: x, token, row } = tokens(self.x, set.n);
        unsafe {
            forward_kernel::launch_unchecked::<R>(
                &x.client,
                line((items * width).div_ceil(UNITS as usize), &self.device),
                CubeDim::new_1d(UNITS),
                x.required_address_type().max(y.required_address_type()),
                set.n,
                set.m,
                array(&x),
                array(&weight),
                array(&bias),
                array(&past),
                array(&self.rows.ids),
                array(&self.rows.bounds),
                array(&y),
                array(&bound_state),
                l as u32,
                width as u32,
                items as u32,
                tile as u32,
                row,
                token,
                set,
                [dtype.into(), weight.dtype.into()],
            );
        }
        (y, state)
    }

    fn backward(self, dy: Option<CubeTensor<R>>, dstate: Option<CubeTensor<R>>) -> Grads<R> {
        let [b, l, e, k] = self.dims;
        let (dtype, weight_type) = (self.x.dtype, self.weight.dtype);
        let bias_type = self.bias.as_ref().map(|bias| bias.dtype);
        let has_state = self.past.is_some();
        let dx = empty(&self.x, [b, l, e], dtype);
        if b * l * e == 0 {
            let state = dstate.unwrap_or_else(|| zeros(&self.x, [b, k - 1, e], dtype));
            return Grads {
                weight: zeros(&self.x, [e, k], weight_type),
                bias: bias_type.map(|dtype| zeros(&self.x, [e], dtype)),
                state: has_state.then_some(state),
                x: dx,
            };
        }
        let (weight, bias) = self.parameters();
        let mut set = self.setting(weight.dtype);
        set.dstate = dstate.is_some() && k > 1;
        let width = e / set.n;
        let tile = (b * l * width / self.units()).clamp(16, 256).next_multiple_of(set.batch).min(l);
        let items = b * l.div_ceil(tile);
        let per = (items * width / self.units()).max(1);
        let groups = items.div_ceil(per);
        let dy = dy.map_or_else(|| zeros(&self.x, [b, l, e], dtype), |dy| cast(dy, dtype));
        let dstate = dstate.map_or_else(|| dy.clone(), |dstate| packed(cast(dstate, dtype)));
        let dpast = empty(&self.x, [b, k - 1, e], dtype);
        let bound_dpast = if k > 1 { dpast.clone() } else { empty(&self.x, [1], dtype) };
        let parts = empty(&self.x, [groups, e * (k + 1)], DType::F32);
        let past = self.past.clone().unwrap_or_else(|| self.x.clone());
        let (x, dy) = (tokens(self.x, set.n), tokens(dy, set.n));
        let addresses = [&x.tensor, &dy.tensor, &dx, &parts].into_iter().map(CubeTensor::required_address_type).max();
        unsafe {
            backward_kernel::launch_unchecked::<R>(
                &dx.client,
                line((groups * width).div_ceil(UNITS as usize), &self.device),
                CubeDim::new_1d(UNITS),
                addresses.unwrap_or_default(),
                set.n,
                set.m,
                array(&x.tensor),
                array(&weight),
                array(&bias),
                array(&past),
                array(&self.rows.ids),
                array(&self.rows.bounds),
                array(&dy.tensor),
                array(&dstate),
                array(&dx),
                array(&bound_dpast),
                array(&parts),
                l as u32,
                width as u32,
                items as u32,
                tile as u32,
                per as u32,
                x.row,
                x.token,
                dy.row,
                dy.token,
                set,
                [dtype.into(), weight.dtype.into()],
            );
        }
        let [dweight, dbias] = fold(parts, groups, ([e, k].into(), weight_type), ([e].into(), bias_type.unwrap_or(weight_type)));
        Grads { x: dx, weight: dweight, bias: bias_type.map(|_| dbias), state: has_state.then_some(dpast) }
    }
}
