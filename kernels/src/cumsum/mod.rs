//! Running sum along a dimension, in linear time.

#[cfg(feature = "_cube")]
pub(crate) mod cube;

pub mod reference;

use burn::tensor::Tensor;

use crate::path::announce;
use crate::{KernelBackend, Op};

/// `out[.., i, ..] = sum over j <= i of x[.., j, ..]` along `dim`; summed in float32, differentiable.
///
/// # Panics
/// When `x` has no dimension `dim`.
pub fn cumsum<B: KernelBackend, const D: usize>(x: Tensor<B, D>, dim: usize) -> Tensor<B, D> {
    assert!(dim < D, "cumsum: there is no dimension {dim} in {D}");
    let shape = x.dims();
    if shape.contains(&0) {
        return x;
    }
    announce::<B>(Op::Cumsum, x.dtype());
    let (before, after) = (shape[..dim].iter().product(), shape[dim + 1..].iter().product());
    B::running_sum(x.reshape([before, shape[dim], after]), false).reshape(shape)
}
