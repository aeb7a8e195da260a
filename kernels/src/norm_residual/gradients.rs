//! Gradients in plain tensor operations, for what no faster path takes.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use super::reference::centred;
use super::{ResidualNormGrads, ResidualNormKept};
use crate::rms_norm_gated::{NormArgs, gradients};

/// Gradients of [`super::norm_residual`] from those of its outputs; an absent one of the sum is zero.
pub fn gradients<B: Backend>(kept: ResidualNormKept<B>, dnormed: Tensor<B, 3>, dsum: Option<Tensor<B, 3>>) -> ResidualNormGrads<B> {
    let wide = kept.sum.dtype();
    let norm = |y, dout| gradients::gradients(NormArgs { y, z: None, weight: kept.weight, groups: 1, eps: kept.eps }, dout);
    let (own, weight, bias) = match kept.bias {
        None => {
            let grads = norm(kept.sum, dnormed.cast(wide));
            (grads.y, grads.weight, None)
        }
        Some(dtype) => {
            let dnormed = dnormed.cast(DType::F32);
            let grads = norm(centred(kept.sum), dnormed.clone());
            let own = grads.y.clone() - grads.y.mean_dim(2);
            let [.., d] = dnormed.dims();
            (own.cast(wide), grads.weight, Some(dnormed.sum_dim(0).sum_dim(1).reshape([d]).cast(dtype)))
        }
    };
    let residual = match dsum {
        Some(dsum) => own + dsum,
        None => own,
    };
    ResidualNormGrads { x: residual.clone().cast(kept.dtype), residual, weight, bias }
}
