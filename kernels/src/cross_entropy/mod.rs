//! Cross-entropy of logits over a large vocabulary.
//!
//! `loss[i] = ln(sum_j exp(logits[i, j])) - logits[i, target[i]]`, computed in float32 from logits of any float type, which
//! are never stored in float32. A row whose target is negative is left out: its loss and its gradient are zero.
//!
//! The backward computes `(softmax - one_hot) * dloss` from the logits and the logarithm of each row's sum, over the
//! logits where nobody else needs them.

#[cfg(any(feature = "flex", feature = "ndarray"))]
pub(crate) mod cpu;
#[cfg(feature = "_cube")]
pub(crate) mod cube;
pub mod reference;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor};

use crate::error::expect_shape;
use crate::path::announce;
use crate::{ArgumentError, KernelBackend, Op};

/// Arguments of [`cross_entropy`].
#[derive(Debug, Clone)]
pub struct CrossEntropyArgs<B: Backend> {
    /// `[rows, v]`.
    pub logits: Tensor<B, 2>,
    /// Ids below `v`, or negative for rows that do not count, `[rows]`.
    pub targets: Tensor<B, 1, Int>,
}

/// What a backend computes for [`cross_entropy`].
#[derive(Debug, Clone)]
pub struct CrossEntropyOut<B: Backend> {
    /// `[rows]`, float32.
    pub loss: Tensor<B, 1>,
    /// `ln(sum_j exp(logits[i, j]))`, for the backward; `[rows]`, float32. It carries no gradient.
    pub log_sum: Tensor<B, 1>,
}

impl<B: Backend> CrossEntropyArgs<B> {
    /// Checks that the shapes agree.
    ///
    /// # Errors
    /// The first disagreement found.
    pub fn check(&self) -> Result<(), ArgumentError> {
        let [rows, _] = self.logits.dims();
        expect_shape("cross_entropy", "targets", &self.targets.dims(), &[rows])
    }
}

/// Cross-entropy of each row, `[rows]` in float32; differentiable in the logits.
///
/// # Panics
/// When [`CrossEntropyArgs::check`] fails.
pub fn cross_entropy<B: KernelBackend>(args: CrossEntropyArgs<B>) -> Tensor<B, 1> {
    if let Err(error) = args.check() {
        panic!("{error}");
    }
    let [rows, v] = args.logits.dims();
    // Burn cannot fill a tensor of no elements on every GPU.
    if rows == 0 {
        return Tensor::empty([0], (&args.logits.device(), DType::F32));
    }
    if v == 0 {
        return Tensor::zeros([rows], (&args.logits.device(), DType::F32));
    }
    announce::<B>(Op::CrossEntropy, args.logits.dtype());
    B::cross_entropy(args).loss
}
