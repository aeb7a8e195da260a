//! Gradients in plain tensor operations, for what no faster path takes.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::{ResidualNormGrads, ResidualNormKept};
use crate::rms_norm_gated::{NormArgs, gradients};

/// Gradients of [`super::rms_norm_residual`] from those of its outputs; an absent one of the sum is zero.
pub fn gradients<B: Backend>(kept: ResidualNormKept<B>, dnormed: Tensor<B, 3>, dsum: Option<Tensor<B, 3>>) -> ResidualNormGrads<B> {
    let wide = kept.sum.dtype();
    let args = NormArgs { y: kept.sum, z: None, weight: kept.weight, groups: 1, eps: kept.eps };
    let grads = gradients::gradients(args, dnormed.cast(wide));
    let residual = match dsum {
        Some(dsum) => grads.y + dsum,
        None => grads.y,
    };
    ResidualNormGrads { x: residual.clone().cast(kept.dtype), residual, weight: grads.weight }
}
