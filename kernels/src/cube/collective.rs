//! Sums over devices of CubeCL backends: NCCL.

use std::sync::Arc;

use burn_cubecl::element::BoolElement;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};

use crate::collective::Collective;

type Made<R, F, I, BT> = Arc<dyn Collective<CubeBackend<R, F, I, BT>>>;

/// What adds up over `devices`, where their runtime has something.
#[cfg(feature = "cuda")]
pub(crate) fn collective<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    devices: &[R::Device],
) -> Option<Made<R, F, I, BT>> {
    super::cuda::collective::collective::<R>(devices).map(|found| Arc::new(found) as _)
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn collective<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    _devices: &[R::Device],
) -> Option<Made<R, F, I, BT>> {
    None
}
