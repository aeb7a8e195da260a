//! CubeCL kernels.

#![allow(dead_code, reason = "the rest follows")]

use burn::tensor::Tensor;
use burn_cubecl::element::BoolElement;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};

mod prepare;

use super::{SsdArgs, SsdGrads, SsdOut};

/// Whether the kernels are there.
pub(crate) const READY: bool = false;

pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    _args: SsdArgs<CubeBackend<R, F, I, BT>>,
) -> SsdOut<CubeBackend<R, F, I, BT>> {
    unreachable!("declined above")
}

pub(crate) fn backward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    _args: SsdArgs<CubeBackend<R, F, I, BT>>,
    _dy: Option<Tensor<CubeBackend<R, F, I, BT>, 4>>,
    _dstate: Option<Tensor<CubeBackend<R, F, I, BT>, 4>>,
) -> SsdGrads<CubeBackend<R, F, I, BT>> {
    unreachable!("declined above")
}
