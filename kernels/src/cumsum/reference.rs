//! Plain tensor operations.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

/// See [`super::cumsum()`]: along the middle of `x [outer, n, inner]`, from the end if `reverse`.
pub fn cumsum<B: Backend>(x: Tensor<B, 3>, reverse: bool) -> Tensor<B, 3> {
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    let sums = if reverse { x.flip([1]).cumsum(1).flip([1]) } else { x.cumsum(1) };
    sums.cast(dtype)
}
