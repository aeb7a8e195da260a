//! What only CUDA has: the libraries beside the kernels, on CubeCL's own streams.

pub(crate) mod collective;
pub(crate) mod graph;
pub(crate) mod library;
mod plan;
mod stream;

use std::any::Any;

use burn_cubecl::CubeRuntime;
use cubecl::Runtime;
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cudarc::driver::result::device as driver;

/// CubeCL's side of a device; it lives on a thread of its own, where all work is enqueued.
type Server = <CudaRuntime as Runtime>::Server;

/// Bytes of memory that `device` has, if it is one of CUDA's.
pub(crate) fn capacity<R: CubeRuntime>(device: &R::Device) -> Option<u64> {
    let device = (device as &dyn Any).downcast_ref::<CudaDevice>()?;
    // The driver answers once CubeCL has started it.
    drop(CudaRuntime::client(device));
    let found = driver::get(i32::try_from(device.index).ok()?).ok()?;
    // SAFETY: the driver gave the device.
    unsafe { driver::total_mem(found) }.ok().map(|bytes| bytes as u64)
}
