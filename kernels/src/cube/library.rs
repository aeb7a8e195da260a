//! Products by the vendor's library, where a device has one: cuBLASLt on CUDA.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

/// Whether the library is there; nothing where there can be none.
#[cfg(feature = "cuda")]
pub(crate) fn present<R: CubeRuntime>() -> Option<bool> {
    use super::cuda::library;
    library::serves::<R>().then(library::available)
}

#[cfg(not(feature = "cuda"))]
#[allow(clippy::extra_unused_type_parameters, reason = "with CUDA it decides")]
pub(crate) fn present<R: CubeRuntime>() -> Option<bool> {
    None
}

/// `left [m, k] x right [k, n] + bias [n]` by the library, if it is there and can.
#[cfg(feature = "cuda")]
pub(crate) fn product<R: CubeRuntime>(left: &CubeTensor<R>, right: &CubeTensor<R>, bias: Option<&CubeTensor<R>>) -> Option<CubeTensor<R>> {
    super::cuda::library::product(left.clone(), right.clone(), bias.cloned())
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn product<R: CubeRuntime>(_: &CubeTensor<R>, _: &CubeTensor<R>, _: Option<&CubeTensor<R>>) -> Option<CubeTensor<R>> {
    None
}
