//! Plain tensor operations.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use super::RotaryArgs;

/// See [`super::rotary()`]; by the negative angles if `back`.
pub fn rotary<B: Backend>(args: RotaryArgs<B>, back: bool) -> Tensor<B, 4> {
    let RotaryArgs { x, cos, sin } = args;
    let ([_, _, _, p], [_, _, _, half], dtype) = (x.dims(), cos.dims(), x.dtype());
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let (cos, sin) = (cos.cast(wide), if back { -sin } else { sin }.cast(wide));
    let first = x.clone().narrow(3, 0, half).cast(wide);
    let second = x.clone().narrow(3, half, half).cast(wide);
    let mut parts = vec![
        (first.clone() * cos.clone() - second.clone() * sin.clone()).cast(dtype),
        (second * cos + first * sin).cast(dtype), //
    ];
    if 2 * half < p {
        parts.push(x.narrow(3, 2 * half, p - 2 * half));
    }
    Tensor::cat(parts, 3)
}
