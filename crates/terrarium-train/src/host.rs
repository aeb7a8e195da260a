//! Sums of gradients that are host memory: on all cores, where Burn takes one.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use rayon::prelude::*;

/// Numbers per task.
const CHUNK: usize = 1 << 15;

/// True for backends whose tensors can be read and written without a transfer.
pub(crate) fn is_host<B: Backend>(device: &B::Device) -> bool {
    matches!(B::name(device).as_str(), "flex" | "ndarray")
}

/// Adds two tensors.
pub(crate) fn add<B: Backend>(a: Tensor<B, 1>, b: Tensor<B, 1>) -> Tensor<B, 1> {
    let device = a.device();
    let (mut a, mut b) = (float(a), float(b));
    let add = |(a, b): (&mut [f32], &mut [f32])| a.iter_mut().zip(b.iter()).for_each(|(a, b)| *a += b);
    slice(&mut a).par_chunks_mut(CHUNK).zip(slice(&mut b).par_chunks_mut(CHUNK)).for_each(add);
    Tensor::from_data(a, (&device, DType::F32))
}

fn float<B: Backend>(tensor: Tensor<B, 1>) -> TensorData {
    tensor.into_data().convert_dtype(DType::F32)
}

fn slice(data: &mut TensorData) -> &mut [f32] {
    data.as_mut_slice().expect("converted to float32 above")
}
