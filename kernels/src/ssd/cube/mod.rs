//! CubeCL kernels: [`portable`] for any device, [`tensor`] where there are tensor cores.

#![allow(
    clippy::collapsible_if,
    clippy::if_same_then_else,
    clippy::manual_is_multiple_of,
    clippy::result_large_err,
    reason = "kernels are a subset of Rust: what is known when they are compiled stands in conditions of its own"
)]

mod call;
mod gradients;
mod output;
mod portable;
mod prepare;
mod states;
mod step;
mod tensor;
mod tile;
mod wider;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use burn_cubecl::element::BoolElement;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};

use self::call::{Call, Grads};
use super::{SsdArgs, SsdDims, SsdGrads, SsdOut, reference};
use crate::Segments;
use crate::cube::{Device, down, up, zeros_like};

/// Whether the kernels are there.
pub(crate) const READY: bool = true;

/// Whether the kernels fit a device; they take all sizes.
pub(crate) fn takes(device: &Device) -> bool {
    portable::supports(device)
}

impl SsdDims {
    /// Some tensor has no elements.
    fn is_empty(self) -> bool {
        let Self { b, l, h, p, g, n } = self;
        [b, l, h, p, g, n].contains(&0)
    }
}

/// Who runs a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Tensor,
    /// With states as wide as these.
    Wider(SsdDims),
    Portable,
    Reference,
}

impl Variant {
    fn of<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
        args: &SsdArgs<CubeBackend<R, F, I, BT>>,
        dims: SsdDims,
    ) -> Self {
        let client = R::client(&args.x.device());
        let device = Device::of(&client);
        // Its kernels write tiles by `stmatrix`, which GPUs before sm_90 lack.
        let fits = |dims: SsdDims| device.stores_matrices && tensor::supports(&device, args.x.dtype(), dims);
        let wider = wider::wider(dims).filter(|wider| fits(*wider));
        if fits(dims) {
            Self::Tensor
        } else if let Some(wider) = wider.filter(|_| dims.l > step::FEW) {
            Self::Wider(wider)
        } else if portable::supports(&device) {
            Self::Portable
        } else {
            Self::Reference
        }
    }
}

fn dims<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(args: &SsdArgs<CubeBackend<R, F, I, BT>>) -> SsdDims {
    args.check().unwrap_or_else(|error| panic!("{error}"))
}

pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: SsdArgs<CubeBackend<R, F, I, BT>>,
) -> SsdOut<CubeBackend<R, F, I, BT>> {
    let dims = dims(&args);
    if dims.is_empty() {
        return nothing(args, dims);
    }
    let variant = Variant::of(&args, dims);
    match variant {
        Variant::Reference => return reference::ssd(args),
        Variant::Wider(wider) => return wider::narrow(forward(wider::widen(args, wider.n)), dims.n),
        Variant::Tensor | Variant::Portable => {}
    }
    let mut call = Call::new(dims, args);
    if dims.l <= step::FEW {
        call = match step::forward(call) {
            Ok((y, state)) => return SsdOut { y: up(y), state: up(state) },
            Err(call) => call,
        };
    }
    let (y, state) = match variant {
        Variant::Tensor => tensor::forward(call.aligned()),
        _ => portable::forward(call.packed()),
    };
    SsdOut { y: up(y), state: up(state) }
}

pub(crate) fn backward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: SsdArgs<CubeBackend<R, F, I, BT>>,
    dy: Option<Tensor<CubeBackend<R, F, I, BT>, 4>>,
    dstate: Option<Tensor<CubeBackend<R, F, I, BT>, 4>>,
) -> SsdGrads<CubeBackend<R, F, I, BT>> {
    let dims = dims(&args);
    if dims.is_empty() {
        return empty_grads(args, dy, dstate);
    }
    let variant = Variant::of(&args, dims);
    if let Variant::Wider(wider) = variant {
        let grads = backward(wider::widen(args, wider.n), dy, wider::widen_gradient(dstate, wider.n));
        return wider::narrow_gradients(grads, dims.n);
    }
    let (dy, dstate) = (dy.map(down), dstate.map(down));
    let grads: Grads<R> = match variant {
        Variant::Tensor => tensor::backward(Call::new(dims, args).aligned(), dy, dstate),
        _ => portable::backward(Call::new(dims, args).packed(), dy, dstate),
    };
    SsdGrads {
        x: up(grads.x),
        dt: up(grads.dt),
        a: up(grads.a),
        b: up(grads.b),
        c: up(grads.c),
        d: grads.d.map(up),
        dt_bias: grads.dt_bias.map(up),
        state: grads.state.map(up),
    }
}

/// Outputs where nothing goes through the state: no tokens, no channels or a state of no width.
fn nothing<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: SsdArgs<CubeBackend<R, F, I, BT>>,
    SsdDims { b, h, p, n, .. }: SsdDims,
) -> SsdOut<CubeBackend<R, F, I, BT>> {
    let device = args.x.device();
    // Without tokens the state passes through; else it has no elements.
    let state = args.state.unwrap_or_else(|| zeros_like(&Tensor::empty([b, h, p, n], (&device, DType::F32)))).cast(DType::F32);
    let y = match args.d {
        Some(d) if n == 0 => skipped(args.x, &d, args.segments.as_ref()),
        _ => zeros_like(&args.x),
    };
    SsdOut { y, state }
}

/// `d * x`, zero at padding.
fn skipped<B: Backend>(x: Tensor<B, 4>, d: &Tensor<B, 1>, segments: Option<&Segments<B>>) -> Tensor<B, 4> {
    let shape = x.dims();
    if shape.contains(&0) {
        return x;
    }
    let y = x.clone() * d.clone().cast(x.dtype()).reshape([1, 1, shape[2], 1]);
    match segments {
        Some(segments) => y.mask_fill(segments.valid().bool_not().unsqueeze_dims::<4>(&[2, 3]).expand(shape), 0.0),
        None => y,
    }
}

/// Gradients of [`nothing`].
fn empty_grads<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: SsdArgs<CubeBackend<R, F, I, BT>>,
    dy: Option<Tensor<CubeBackend<R, F, I, BT>, 4>>,
    dstate: Option<Tensor<CubeBackend<R, F, I, BT>, 4>>,
) -> SsdGrads<CubeBackend<R, F, I, BT>> {
    let dims = args.x.dims();
    let dy = dy.filter(|_| !dims.contains(&0));
    let (dx, dd) = match (&args.d, dy) {
        (Some(d), Some(dy)) => {
            let ones = d.ones_like();
            let products = skipped(dy.clone() * args.x.clone(), &ones, args.segments.as_ref());
            let dd = products.sum_dim(3).sum_dim(1).sum_dim(0).reshape([dims[2]]).cast(d.dtype());
            (skipped(dy, d, args.segments.as_ref()), Some(dd))
        }
        (d, _) => (zeros_like(&args.x), d.as_ref().map(zeros_like)),
    };
    SsdGrads {
        x: dx,
        dt: zeros_like(&args.dt),
        a: zeros_like(&args.a),
        b: zeros_like(&args.b),
        c: zeros_like(&args.c),
        d: dd,
        dt_bias: args.dt_bias.as_ref().map(zeros_like),
        // Without tokens the state passes through.
        state: args.state.map(|state| dstate.map_or_else(|| zeros_like(&state), |dstate| dstate.cast(state.dtype()))),
    }
}
