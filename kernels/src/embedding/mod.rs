//! Lookup of rows by number, with a gradient that does not walk the tokens one by one.
//!
//! The gradient of a table is, row by row, the sum of the gradients at the places where the row was used, in float32 and
//! in the order of the places. Places are sorted by row first, with counts instead of comparisons and without atomic
//! operations on values, so that the sum is the same in every run.

#[cfg(any(feature = "flex", feature = "ndarray"))]
pub(crate) mod cpu;
#[cfg(feature = "_cube")]
pub(crate) mod cube;

use burn::tensor::{Int, Tensor};

use crate::path::announce;
use crate::{KernelBackend, Op};

/// Rows `ids [b, l]` of `weight [v, d]`: `[b, l, d]`; differentiable in the weight.
pub fn embedding<B: KernelBackend>(weight: Tensor<B, 2>, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
    let ([_, d], [b, l]) = (weight.dims(), ids.dims());
    if b * l * d == 0 {
        return Tensor::empty([b, l, d], (&weight.device(), weight.dtype()));
    }
    announce::<B>(Op::Embedding, weight.dtype());
    B::embed(weight, ids)
}
