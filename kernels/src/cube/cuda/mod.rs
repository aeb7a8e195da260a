//! What only CUDA has: the libraries beside the kernels, on CubeCL's own streams.

pub(crate) mod graph;
pub(crate) mod library;
mod plan;
mod stream;

use cubecl::Runtime;
use cubecl::cuda::CudaRuntime;

/// CubeCL's side of a device; it lives on a thread of its own, where all work is enqueued.
type Server = <CudaRuntime as Runtime>::Server;
