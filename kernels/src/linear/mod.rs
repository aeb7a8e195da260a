//! Linear projection with the weight stored as in Hugging Face files, `[out, in]`.

#[cfg(any(feature = "flex", feature = "ndarray"))]
pub(crate) mod cpu;
pub mod reference;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::error::expect_shape;
use crate::path::announce;
use crate::{ArgumentError, KernelBackend, Op};

/// Checks that `x [rows, in]` and `weight [out, in]` fit, dtypes included: Burn's GPU products read mixed dtypes as
/// garbage without an error.
///
/// # Errors
/// The first disagreement found.
pub fn check<B: Backend>(x: &Tensor<B, 2>, weight: &Tensor<B, 2>) -> Result<(), ArgumentError> {
    let [_, inputs] = x.dims();
    let [out, _] = weight.dims();
    expect_shape("linear", "weight", &weight.dims(), &[out, inputs])?;
    if x.dtype() != weight.dtype() {
        return Err(ArgumentError::Dtype {
            op: "linear",
            tensor: "weight",
            expected: format!("{:?}", x.dtype()),
            found: format!("{:?}", weight.dtype()),
        });
    }
    Ok(())
}

/// `x weight^T + bias` over the last dimension: `x [.., in]`, `weight [out, in]`, `bias [out]`; returns `[.., out]`.
///
/// # Panics
/// When [`check`] fails.
pub fn linear<B: KernelBackend, const D: usize>(x: Tensor<B, D>, weight: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Tensor<B, D> {
    let mut shape = x.dims();
    let rows = shape[..D - 1].iter().product();
    let x = x.reshape([rows, shape[D - 1]]);
    if let Err(error) = check(&x, &weight) {
        panic!("{error}");
    }
    let [out, _] = weight.dims();
    shape[D - 1] = out;
    announce::<B>(Op::Linear, x.dtype());
    let mut y = <B as KernelBackend>::linear(x, weight);
    if let Some(bias) = bias {
        y = y + bias.reshape([1, out]);
    }
    y.reshape(shape)
}
