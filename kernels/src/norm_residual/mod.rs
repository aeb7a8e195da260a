//! Residual addition and the norm that follows it, in one pass: the root-mean-square norm, or layer norm where there is a bias.
//!
//! `sum = residual + x`, in the dtype of `residual`; `normed`, computed in float32 from the rounded sum, in the dtype of `x`, is
//! - `sum * rsqrt(mean(sum^2) + eps) * weight` (arXiv 1910.07467), or
//! - `(sum - mean(sum)) * rsqrt(var(sum) + eps) * weight + bias` (arXiv 1607.06450), the variance that of what is centred: a stream far
//!   from zero loses nothing.
//!
//! Without `x` the residual itself is normed, in its own dtype. The backward keeps the sum alone, which the layers above hold anyway.

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

/// Arguments of [`norm_residual`].
#[derive(Debug, Clone)]
pub struct ResidualNormArgs<B: Backend> {
    /// Output of a branch, `[b, l, d]`, if one is to be added.
    pub x: Option<Tensor<B, 3>>,
    /// What it is added to, `[b, l, d]`.
    pub residual: Tensor<B, 3>,
    /// `[d]`.
    pub weight: Tensor<B, 1>,
    /// `[d]`, of a layer norm.
    pub bias: Option<Tensor<B, 1>>,
    /// Added to the mean square or the variance.
    pub eps: f32,
}

/// Results of [`norm_residual`].
#[derive(Debug, Clone)]
pub struct ResidualNormOut<B: Backend> {
    /// `[b, l, d]`, in [`ResidualNormArgs::dtype`].
    pub normed: Tensor<B, 3>,
    /// `residual + x`, `[b, l, d]`, in the dtype of `residual`.
    pub sum: Tensor<B, 3>,
}

/// What the backward of [`norm_residual`] reads.
#[derive(Debug, Clone)]
pub struct ResidualNormKept<B: Backend> {
    /// As in [`ResidualNormOut`].
    pub sum: Tensor<B, 3>,
    /// As in [`ResidualNormArgs`].
    pub weight: Tensor<B, 1>,
    /// Dtype of the bias of a layer norm.
    pub bias: Option<DType>,
    /// As in [`ResidualNormArgs`].
    pub eps: f32,
    /// [`ResidualNormArgs::dtype`].
    pub dtype: DType,
}

/// Gradients of [`ResidualNormArgs`].
#[derive(Debug, Clone)]
pub struct ResidualNormGrads<B: Backend> {
    /// That of `residual` in [`ResidualNormArgs::dtype`], which is that of `x` where there is one, `[b, l, d]`.
    pub x: Tensor<B, 3>,
    /// `[b, l, d]`.
    pub residual: Tensor<B, 3>,
    /// `[d]`.
    pub weight: Tensor<B, 1>,
    /// `[d]`, of a layer norm.
    pub bias: Option<Tensor<B, 1>>,
}

impl<B: Backend> ResidualNormArgs<B> {
    /// Checks that the shapes agree.
    ///
    /// # Errors
    /// The first disagreement found.
    pub fn check(&self) -> Result<(), ArgumentError> {
        const OP: &str = "norm_residual";
        let dims = self.residual.dims();
        if let Some(x) = &self.x {
            expect_shape(OP, "x", &x.dims(), &dims)?;
        }
        if let Some(bias) = &self.bias {
            expect_shape(OP, "bias", &bias.dims(), &dims[2..])?;
        }
        expect_shape(OP, "weight", &self.weight.dims(), &dims[2..])
    }

    /// Dtype of what is normed: that of `x`, without it that of the residual.
    pub fn dtype(&self) -> DType {
        self.x.as_ref().unwrap_or(&self.residual).dtype()
    }
}

/// Adds and norms; differentiable in all tensors.
///
/// # Panics
/// When [`ResidualNormArgs::check`] fails.
pub fn norm_residual<B: KernelBackend>(args: ResidualNormArgs<B>) -> ResidualNormOut<B> {
    if let Err(error) = args.check() {
        panic!("{error}");
    }
    if args.residual.dims().contains(&0) {
        return ResidualNormOut { normed: args.x.unwrap_or_else(|| args.residual.clone()), sum: args.residual };
    }
    announce::<B>(Op::NormResidual, args.dtype());
    B::norm_residual(args)
}
