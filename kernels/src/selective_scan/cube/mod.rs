//! CubeCL kernels.

mod backward;
mod forward;
mod launch;
mod step;
mod tile;

use burn::tensor::{DType, Tensor};
use burn_cubecl::element::BoolElement;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};

use self::launch::Scan;
pub(crate) use self::launch::takes;
use super::{ScanArgs, ScanGrads, ScanOut};
use crate::cube::{down, up};

/// Whether the kernels are there.
pub(crate) const READY: bool = true;

pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: ScanArgs<CubeBackend<R, F, I, BT>>,
) -> ScanOut<CubeBackend<R, F, I, BT>> {
    let (y, state) = Scan::new(args).forward();
    ScanOut { y: up(y), state: up(state) }
}

pub(crate) fn backward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: ScanArgs<CubeBackend<R, F, I, BT>>,
    dy: Option<Tensor<CubeBackend<R, F, I, BT>, 3>>,
    dstate: Option<Tensor<CubeBackend<R, F, I, BT>, 3>>,
) -> ScanGrads<CubeBackend<R, F, I, BT>> {
    let e = args.u.dims()[2];
    let [d_type, bias_type] = [&args.d, &args.delta_bias].map(|tensor| tensor.as_ref().map(Tensor::dtype));
    let grads = Scan::new(args).backward(dy.map(down), dstate.map(down));
    let channels: Tensor<CubeBackend<R, F, I, BT>, 2> = up(grads.channels);
    let channel = |index: usize, dtype: Option<DType>| dtype.map(|dtype| channels.clone().narrow(0, index, 1).reshape([e]).cast(dtype));
    ScanGrads {
        u: up(grads.u),
        delta: up(grads.delta),
        a: up(grads.a),
        b: up(grads.b),
        c: up(grads.c),
        d: channel(0, d_type),
        z: grads.z.map(up),
        delta_bias: channel(1, bias_type),
        state: grads.state.map(up),
    }
}
