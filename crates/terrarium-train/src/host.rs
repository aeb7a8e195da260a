//! The optimiser's arithmetic on tensors that are host memory: one pass over all of a parameter's numbers, on all cores.
//!
//! As tensor operations the same update makes a dozen passes, each on one core; on a CPU that takes as long as a good part of the
//! model's own work.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use rayon::prelude::*;
use terrarium_kernels::adamw::{AdamWArgs, AdamWFactors, AdamWOut};

/// Numbers per task. Sums are made per chunk and added in order, so that they do not depend on the number of threads.
const CHUNK: usize = 1 << 15;

/// True for backends whose tensors can be read and written without a transfer.
pub(crate) fn is_host<B: Backend>(device: &B::Device) -> bool {
    matches!(B::name(device).as_str(), "flex" | "ndarray")
}

/// The new value, first and second moment of one parameter. Memory is reused where nobody else holds it.
pub(crate) fn adamw<B: Backend>(args: AdamWArgs<B>) -> AdamWOut<B> {
    let AdamWArgs { value, grad, moments, factors } = args;
    let device = value.device();
    let zeros = |grad: &Tensor<B, 1>| TensorData::zeros::<f32, _>(grad.dims());
    let (mut first, mut second) = match moments {
        Some((first, second)) => (float(first), float(second)),
        None => (zeros(&grad), zeros(&grad)),
    };
    let (mut value, mut grad) = (float(value), float(grad));
    let AdamWFactors { clip, first: (b1, c1), second: (b2, c2), root, eps, step, keep } = factors;
    slice(&mut value)
        .par_chunks_mut(CHUNK)
        .zip(slice(&mut grad).par_chunks_mut(CHUNK))
        .zip(slice(&mut first).par_chunks_mut(CHUNK))
        .zip(slice(&mut second).par_chunks_mut(CHUNK))
        .for_each(|(((value, grad), first), second)| {
            for (((value, grad), first), second) in value.iter_mut().zip(grad.iter()).zip(first.iter_mut()).zip(second.iter_mut()) {
                let grad = grad * clip;
                *first = *first * b1 + grad * c1;
                *second = *second * b2 + grad * grad * c2;
                *value = *value * keep - *first / (second.sqrt() * root + eps) * step;
            }
        });
    let back = |data: TensorData| Tensor::from_data(data, (&device, DType::F32));
    AdamWOut { value: back(value), first: back(first), second: back(second) }
}

/// The tensor, and the sum of the squares of its numbers.
pub(crate) fn square_sum<B: Backend>(tensor: Tensor<B, 1>) -> (Tensor<B, 1>, f64) {
    let device = tensor.device();
    let mut data = float(tensor);
    let square = |chunk: &[f32]| chunk.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
    let sums: Vec<f64> = slice(&mut data).par_chunks(CHUNK).map(square).collect();
    (Tensor::from_data(data, (&device, DType::F32)), sums.iter().sum())
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
