//! CubeCL kernels.

use burn::tensor::Tensor;
use burn_cubecl::element::BoolElement;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};

use super::{AttentionArgs, AttentionGrads};

/// Whether the kernels are there.
pub(crate) const READY: bool = false;

pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    _args: AttentionArgs<CubeBackend<R, F, I, BT>>,
) -> Tensor<CubeBackend<R, F, I, BT>, 4> {
    unreachable!("declined above")
}

pub(crate) fn backward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    _args: AttentionArgs<CubeBackend<R, F, I, BT>>,
    _dout: Tensor<CubeBackend<R, F, I, BT>, 4>,
) -> AttentionGrads<CubeBackend<R, F, I, BT>> {
    unreachable!("declined above")
}
