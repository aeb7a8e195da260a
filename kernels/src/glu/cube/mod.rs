//! CubeCL kernels: a unit for each vector.

mod kernels;

use burn::tensor::{Tensor, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::*;

use super::{Activation, GluArgs, GluGrads};
use crate::cube::reduce::{addresses, cube_grid, vector_width};
use crate::cube::{Device, array, cast, down, empty, packed, up};

/// Whether the kernels are there.
pub(crate) const READY: bool = true;

/// Units of a cube.
const UNITS: usize = 256;

/// What both directions ask of a launch.
struct Plan {
    width: usize,
    vectors: usize,
    grid: CubeCount,
}

impl Plan {
    fn new<R: CubeRuntime>(x: &CubeTensor<R>) -> Self {
        let elements = x.shape().num_elements();
        let width = vector_width(&x.client, &[x.dtype()], elements);
        let vectors = elements / width;
        Self { width, vectors, grid: cube_grid(&Device::of(&x.client), vectors.div_ceil(UNITS)) }
    }
}

fn activate<R: CubeRuntime>(x: CubeTensor<R>, gate: Option<CubeTensor<R>>, activation: Activation) -> CubeTensor<R> {
    let (x, gate) = (packed(x), gate.map(packed));
    let out = empty(&x, x.shape(), x.dtype());
    let Plan { width, vectors, grid } = Plan::new(&x);
    // SAFETY: the kernel guards its vectors.
    unsafe {
        kernels::forward::launch_unchecked::<R>(
            &x.client,
            grid,
            CubeDim::new_1d(UNITS as u32),
            addresses(&[&x]),
            width,
            array(&x),
            array(gate.as_ref().unwrap_or(&x)),
            array(&out),
            vectors as u32,
            activation,
            gate.is_some(),
            x.dtype().into(),
        );
    }
    out
}

/// Gradients of `x` and, where there is one, of the gate.
fn differentiate<R: CubeRuntime>(
    [x, dout]: [CubeTensor<R>; 2],
    gate: Option<CubeTensor<R>>,
    activation: Activation,
) -> (CubeTensor<R>, Option<CubeTensor<R>>) {
    let ([x, dout], gate) = ([x, dout].map(packed), gate.map(packed));
    let dx = empty(&x, x.shape(), x.dtype());
    let dgate = gate.as_ref().map(|gate| empty(gate, gate.shape(), gate.dtype()));
    let Plan { width, vectors, grid } = Plan::new(&x);
    // SAFETY: the kernel guards its vectors, and leaves what stands for an absent tensor alone.
    unsafe {
        kernels::backward::launch_unchecked::<R>(
            &x.client,
            grid,
            CubeDim::new_1d(UNITS as u32),
            addresses(&[&x]),
            width,
            array(&x),
            array(gate.as_ref().unwrap_or(&x)),
            array(&dout),
            array(&dx),
            array(dgate.as_ref().unwrap_or(&dx)),
            vectors as u32,
            activation,
            gate.is_some(),
            x.dtype().into(),
        );
    }
    (dx, dgate)
}

pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: GluArgs<CubeBackend<R, F, I, BT>>,
) -> Tensor<CubeBackend<R, F, I, BT>, 3> {
    up(activate(down(args.up), args.gate.map(down), args.activation))
}

pub(crate) fn backward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: GluArgs<CubeBackend<R, F, I, BT>>,
    dout: Tensor<CubeBackend<R, F, I, BT>, 3>,
) -> GluGrads<CubeBackend<R, F, I, BT>> {
    let dout = cast(down(dout), args.up.dtype());
    let (dx, dgate) = differentiate([down(args.up), dout], args.gate.map(down), args.activation);
    GluGrads { up: up(dx), gate: dgate.map(up) }
}
