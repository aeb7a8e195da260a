//! Residual addition and the root-mean-square norm that follows it, in one pass.
//!
//! `sum = residual + x`, in the dtype of `residual`; `normed = sum * rsqrt(mean(sum^2) + eps) * weight`, computed in
//! float32 from the rounded sum, in the dtype of `x`. The backward keeps the sum alone, which the layers above hold anyway.

#[cfg(any(feature = "flex", feature = "ndarray"))]
pub(crate) mod cpu;
#[cfg(feature = "_cube")]
pub(crate) mod cube;
pub mod gradients;
pub mod reference;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::error::expect_shape;
use crate::path::announce;
use crate::{ArgumentError, KernelBackend, Op};

/// Arguments of [`rms_norm_residual`].
#[derive(Debug, Clone)]
pub struct ResidualNormArgs<B: Backend> {
    /// Output of a branch, `[b, l, d]`.
    pub x: Tensor<B, 3>,
    /// What it is added to, `[b, l, d]`.
    pub residual: Tensor<B, 3>,
    /// `[d]`.
    pub weight: Tensor<B, 1>,
    /// Added to the mean square.
    pub eps: f32,
}

/// Results of [`rms_norm_residual`].
#[derive(Debug, Clone)]
pub struct ResidualNormOut<B: Backend> {
    /// `[b, l, d]`, in the dtype of `x`.
    pub normed: Tensor<B, 3>,
    /// `residual + x`, `[b, l, d]`, in the dtype of `residual`.
    pub sum: Tensor<B, 3>,
}

/// What the backward of [`rms_norm_residual`] reads.
#[derive(Debug, Clone)]
pub struct ResidualNormKept<B: Backend> {
    /// As in [`ResidualNormOut`].
    pub sum: Tensor<B, 3>,
    /// As in [`ResidualNormArgs`].
    pub weight: Tensor<B, 1>,
    /// As in [`ResidualNormArgs`].
    pub eps: f32,
    /// Dtype of `x`.
    pub dtype: DType,
}

/// Gradients of [`ResidualNormArgs`].
#[derive(Debug, Clone)]
pub struct ResidualNormGrads<B: Backend> {
    /// `[b, l, d]`.
    pub x: Tensor<B, 3>,
    /// `[b, l, d]`.
    pub residual: Tensor<B, 3>,
    /// `[d]`.
    pub weight: Tensor<B, 1>,
}

impl<B: Backend> ResidualNormArgs<B> {
    /// Checks that the shapes agree.
    ///
    /// # Errors
    /// The first disagreement found.
    pub fn check(&self) -> Result<(), ArgumentError> {
        const OP: &str = "rms_norm_residual";
        expect_shape(OP, "residual", &self.residual.dims(), &self.x.dims())?;
        expect_shape(OP, "weight", &self.weight.dims(), &self.x.dims()[2..])
    }
}

/// Adds and norms; differentiable in all three tensors.
///
/// # Panics
/// When [`ResidualNormArgs::check`] fails.
pub fn rms_norm_residual<B: KernelBackend>(args: ResidualNormArgs<B>) -> ResidualNormOut<B> {
    if let Err(error) = args.check() {
        panic!("{error}");
    }
    if args.x.dims().contains(&0) {
        return ResidualNormOut { normed: args.x, sum: args.residual };
    }
    announce::<B>(Op::RmsNormResidual, args.x.dtype());
    B::rms_norm_residual(args)
}
