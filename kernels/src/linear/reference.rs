//! Plain tensor operations.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

/// `x [rows, in]`, `weight [out, in]` -> `[rows, out]`.
pub fn linear<B: Backend>(x: Tensor<B, 2>, weight: Tensor<B, 2>) -> Tensor<B, 2> {
    x.matmul(weight.transpose())
}
