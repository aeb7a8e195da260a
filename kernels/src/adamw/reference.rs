//! AdamW as tensor operations.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use super::{AdamWArgs, AdamWOut};

/// One step; see [`super`].
pub fn adamw<B: Backend>(args: AdamWArgs<B>) -> AdamWOut<B> {
    let AdamWArgs { value, grad, moments, factors } = args;
    let dtype = value.dtype();
    let grad = grad.cast(DType::F32) * factors.clip;
    let squared = grad.clone() * grad.clone() * factors.second.1;
    let scaled = grad * factors.first.1;
    let (first, second) = match moments {
        Some((first, second)) => (first * factors.first.0 + scaled, second * factors.second.0 + squared),
        None => (scaled, squared),
    };
    let change = first.clone() / (second.clone().sqrt() * factors.root + factors.eps) * factors.step;
    AdamWOut { value: (value.cast(DType::F32) * factors.keep - change).cast(dtype), first, second }
}

/// Sum of the squares of each tensor, in float32 on the device.
pub fn square_sums<B: Backend>(tensors: &[Tensor<B, 1>]) -> Vec<f64> {
    let squares: Vec<Tensor<B, 1>> = tensors
        .iter()
        .map(|tensor| {
            let tensor = tensor.clone().cast(DType::F32);
            (tensor.clone() * tensor).sum()
        })
        .collect();
    if squares.is_empty() { Vec::new() } else { Tensor::cat(squares, 0).into_data().iter::<f64>().collect() }
}
