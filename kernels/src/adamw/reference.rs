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

/// Sum of a tensor, of parts first: some backends add one number after another.
fn sum<B: Backend>(x: Tensor<B, 1>) -> Tensor<B, 1> {
    const PART: usize = 1024;
    let [n] = x.dims();
    let (parts, rest) = (n / PART, n % PART);
    if parts < 2 {
        return x.sum();
    }
    let whole = x.clone().narrow(0, 0, parts * PART).reshape([parts, PART]).sum_dim(1).sum();
    if rest == 0 { whole } else { whole + x.narrow(0, parts * PART, rest).sum() }
}

/// Sum of the squares of each tensor, in float32 on the device.
pub fn square_sums<B: Backend>(tensors: &[Tensor<B, 1>]) -> Vec<f64> {
    // Not every backend sums nothing.
    let filled = || tensors.iter().filter(|tensor| tensor.dims()[0] > 0);
    let squares: Vec<Tensor<B, 1>> = filled()
        .map(|tensor| {
            let tensor = tensor.clone().cast(DType::F32);
            sum(tensor.clone() * tensor)
        })
        .collect();
    if squares.is_empty() {
        return vec![0.0; tensors.len()];
    }
    let sums = Tensor::cat(squares, 0).into_data();
    let mut sums = sums.iter::<f64>();
    tensors.iter().map(|tensor| if tensor.dims()[0] > 0 { sums.next().unwrap_or(f64::NAN) } else { 0.0 }).collect()
}
