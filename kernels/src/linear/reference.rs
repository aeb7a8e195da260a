//! Plain tensor operations.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::{LinearGrads, LinearKept};

/// `x [rows, in]`, `weight [out, in]`, `bias [out]` -> `[rows, out]`.
pub fn linear<B: Backend>(x: Tensor<B, 2>, weight: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Tensor<B, 2> {
    let y = x.matmul(weight.transpose());
    match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}

/// Gradients of [`linear`] from that of its output, `[rows, out]`.
pub fn gradients<B: Backend>(kept: LinearKept<B>, dy: Tensor<B, 2>) -> LinearGrads<B> {
    LinearGrads {
        bias: kept.bias.then(|| dy.clone().sum_dim(0).squeeze_dim(0)),
        x: kept.weight.map(|weight| dy.clone().matmul(weight)),
        // As [out, in] at once, not as a transposed view that later steps would have to copy.
        weight: kept.x.map(|x| dy.transpose().matmul(x)),
    }
}
