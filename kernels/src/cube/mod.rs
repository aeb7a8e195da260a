//! What the CubeCL kernels share: device properties, tensors as flat arrays, the extension trait.
//!
//! One source for CUDA, Vulkan, WGPU and Metal. A kernel takes `Array`s and scalars (a `Tensor` argument costs one
//! more copy per launch for its metadata); its launcher sits beside it and works on [`CubeTensor`]s.

mod collective;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod device;
mod fold;
mod glue;
pub(crate) mod library;
pub(crate) mod math;
pub(crate) mod record;
pub(crate) mod reduce;
mod rows;

/// Bytes of memory that `device` has, where its runtime tells.
#[cfg(feature = "cuda")]
fn capacity<R: burn_cubecl::CubeRuntime>(device: &R::Device) -> Option<u64> {
    cuda::capacity::<R>(device)
}

#[cfg(not(feature = "cuda"))]
fn capacity<R: burn_cubecl::CubeRuntime>(_device: &R::Device) -> Option<u64> {
    None
}

pub(crate) use device::Device;
pub(crate) use fold::fold;
pub(crate) use rows::{Rows, Tokens, line, rows, tokens, vector_size};

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Shape, Tensor, TensorMetadata, TensorPrimitive};
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::{empty_device_contiguous_dtype, zeros_client};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::ArrayArg;

/// Name of these paths in reports.
pub(crate) const NAME: &str = "cubecl kernel";

/// Densely packed, row-major, first element on the device's alignment. Burn's CUDA tensors may have padded rows.
pub(crate) fn packed<R: CubeRuntime>(tensor: CubeTensor<R>) -> CubeTensor<R> {
    into_contiguous(tensor)
}

/// The whole of a packed tensor as a kernel argument.
pub(crate) fn array<R: CubeRuntime>(tensor: &CubeTensor<R>) -> ArrayArg<R> {
    tensor.clone().into_array_arg()
}

/// A packed tensor beside `like`, not initialised.
pub(crate) fn empty<R: CubeRuntime>(like: &CubeTensor<R>, shape: impl Into<Shape>, dtype: DType) -> CubeTensor<R> {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape.into(), dtype)
}

/// Zeros beside `like`, packed.
pub(crate) fn zeros<R: CubeRuntime>(like: &CubeTensor<R>, shape: impl Into<Shape>, dtype: DType) -> CubeTensor<R> {
    let shape = shape.into();
    // There is no launch without elements.
    if shape.num_elements() == 0 {
        return empty(like, shape, dtype);
    }
    // As one row: Burn pads the rows of others on CUDA.
    let flat = zeros_client(like.client.clone(), like.device.clone(), [shape.num_elements()].into(), dtype);
    burn_cubecl::ops::reshape(flat, shape)
}

/// A tensor of zeros like `tensor`, also where there is nothing to launch a kernel for.
pub(crate) fn zeros_like<B: Backend, const D: usize>(tensor: &Tensor<B, D>) -> Tensor<B, D> {
    match tensor.shape().num_elements() {
        0 => Tensor::empty(tensor.dims(), (&tensor.device(), tensor.dtype())),
        _ => tensor.zeros_like(),
    }
}

/// A float tensor's primitive.
pub(crate) fn down<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> B::FloatTensorPrimitive {
    tensor.into_primitive().tensor()
}

/// An integer tensor's primitive.
pub(crate) fn down_int<B: Backend, const D: usize>(tensor: Tensor<B, D, Int>) -> B::IntTensorPrimitive {
    tensor.into_primitive()
}

/// A float tensor from its primitive.
pub(crate) fn up<B: Backend, const D: usize>(primitive: B::FloatTensorPrimitive) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// `tensor` in `dtype`.
pub(crate) fn cast<R: CubeRuntime>(tensor: CubeTensor<R>, dtype: DType) -> CubeTensor<R> {
    if tensor.dtype() == dtype { tensor } else { burn_cubecl::kernel::cast(tensor, dtype) }
}
