//! CubeCL kernels: [`portable`] for any device, [`tensor`] where there are tensor cores.

mod call;
mod gradients;
mod output;
mod portable;
mod prepare;
mod states;
mod step;
mod tensor;
mod tile;

use burn::tensor::Tensor;
use burn_cubecl::element::BoolElement;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};

use self::call::{Call, Grads};
use super::{SsdArgs, SsdDims, SsdGrads, SsdOut, reference};
use crate::cube::{Device, down, up};

/// Whether the kernels are there.
pub(crate) const READY: bool = true;

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
    Portable,
    Reference,
}

impl Variant {
    fn of<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
        args: &SsdArgs<CubeBackend<R, F, I, BT>>,
        dims: SsdDims,
    ) -> Self {
        if dims.is_empty() {
            return Self::Reference;
        }
        let client = R::client(&args.x.device());
        let device = Device::of(&client);
        if tensor::supports(&device, args.x.dtype(), dims) {
            Self::Tensor
        } else if portable::supports(&client, &device) {
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
    let variant = Variant::of(&args, dims);
    if variant == Variant::Reference {
        return reference::ssd(args);
    }
    let mut call = Call::new(dims, args);
    if dims.l <= step::FEW {
        call = match step::forward(call) {
            Ok((y, state)) => return SsdOut { y: up(y), state: up(state) },
            Err(call) => call,
        };
    }
    let (y, state) = match variant {
        Variant::Tensor => tensor::forward(call.packed()),
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
    let variant = Variant::of(&args, dims);
    if dims.is_empty() {
        return empty_grads(args, dy, dstate);
    }
    let (dy, dstate) = (dy.map(down), dstate.map(down));
    let grads: Grads<R> = match variant {
        Variant::Tensor => tensor::backward(Call::new(dims, args).packed(), dy, dstate),
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

/// Gradients where nothing goes through the state: no tokens, no channels or a state of no width.
fn empty_grads<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: SsdArgs<CubeBackend<R, F, I, BT>>,
    dy: Option<Tensor<CubeBackend<R, F, I, BT>, 4>>,
    dstate: Option<Tensor<CubeBackend<R, F, I, BT>, 4>>,
) -> SsdGrads<CubeBackend<R, F, I, BT>> {
    let [_, _, h, _] = args.x.dims();
    let dy = match dy {
        Some(dy) => match &args.segments {
            Some(segments) => dy.clone().mask_fill(segments.valid().bool_not().unsqueeze_dims::<4>(&[2, 3]).expand(dy.dims()), 0.0),
            None => dy,
        },
        None => args.x.zeros_like(),
    };
    let (dx, dd) = match &args.d {
        Some(d) => (
            dy.clone() * d.clone().cast(dy.dtype()).reshape([1, 1, h as i32, 1]),
            Some((dy * args.x.clone()).sum_dim(3).sum_dim(1).sum_dim(0).reshape([h]).cast(d.dtype())),
        ),
        None => (args.x.zeros_like(), None),
    };
    SsdGrads {
        x: dx,
        dt: args.dt.zeros_like(),
        a: args.a.zeros_like(),
        b: args.b.zeros_like(),
        c: args.c.zeros_like(),
        d: dd,
        dt_bias: args.dt_bias.map(|bias| bias.zeros_like()),
        // Without tokens the state passes through.
        state: args.state.map(|state| dstate.map_or_else(|| state.zeros_like(), |dstate| dstate.cast(state.dtype()))),
    }
}
