//! Recorders of CubeCL backends: CUDA graphs.

use burn_cubecl::element::BoolElement;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};

use crate::record::Recorder;

type Made<R, F, I, BT> = Box<dyn Recorder<CubeBackend<R, F, I, BT>>>;

/// A recorder on `device`, where its runtime has one.
#[cfg(feature = "cuda")]
pub(crate) fn recorder<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(device: &R::Device) -> Option<Made<R, F, I, BT>> {
    super::cuda::graph::recorder::<R>(device).map(|recorder| Box::new(recorder) as _)
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn recorder<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(_device: &R::Device) -> Option<Made<R, F, I, BT>> {
    None
}
