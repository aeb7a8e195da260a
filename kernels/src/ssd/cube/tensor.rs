//! Stub: the variant for tensor cores goes here.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::call::{Call, Grads};
use crate::cube::Device;
use crate::ssd::SsdDims;

/// Whether this variant runs such a call.
pub(super) fn supports(_device: &Device, _dtype: DType, _dims: SsdDims) -> bool {
    false
}

pub(super) fn forward<R: CubeRuntime>(_call: Call<R>) -> (CubeTensor<R>, CubeTensor<R>) {
    unreachable!("not supported")
}

pub(super) fn backward<R: CubeRuntime>(_call: Call<R>, _dy: Option<CubeTensor<R>>, _dstate: Option<CubeTensor<R>>) -> Grads<R> {
    unreachable!("not supported")
}
