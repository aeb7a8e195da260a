//! CubeCL kernels.

use burn::tensor::Tensor;
use burn_cubecl::element::BoolElement;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};

use super::{ConvArgs, ConvGrads, ConvOut};

/// Whether the kernels are there.
pub(crate) const READY: bool = false;

pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    _args: ConvArgs<CubeBackend<R, F, I, BT>>,
) -> ConvOut<CubeBackend<R, F, I, BT>> {
    unreachable!("declined above")
}

pub(crate) fn backward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    _args: ConvArgs<CubeBackend<R, F, I, BT>>,
    _dy: Option<Tensor<CubeBackend<R, F, I, BT>, 3>>,
    _dstate: Option<Tensor<CubeBackend<R, F, I, BT>, 3>>,
) -> ConvGrads<CubeBackend<R, F, I, BT>> {
    unreachable!("declined above")
}
