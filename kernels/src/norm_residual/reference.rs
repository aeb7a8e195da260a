//! Plain tensor operations.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use super::{ResidualNormArgs, ResidualNormOut};
use crate::rms_norm_gated::{NormArgs, reference};

/// See [`super::norm_residual`].
pub fn norm_residual<B: Backend>(args: ResidualNormArgs<B>) -> ResidualNormOut<B> {
    let (dtype, wide) = (args.dtype(), args.residual.dtype());
    let sum = match args.x {
        Some(x) => args.residual + x.cast(wide),
        None => args.residual,
    };
    let norm = |y| reference::rms_norm_gated(NormArgs { y, z: None, weight: args.weight, groups: 1, eps: args.eps });
    let normed = match args.bias {
        None => norm(sum.clone()),
        Some(bias) => {
            // The variance is the mean square of what is centred.
            norm(centred(sum.clone())) + bias.cast(DType::F32).unsqueeze()
        }
    };
    ResidualNormOut { normed: normed.cast(dtype), sum }
}

/// `[b, l, d]` less the mean of each row, in float32; taken twice, as a backend may add up large values one by one.
pub(super) fn centred<B: Backend>(x: Tensor<B, 3>) -> Tensor<B, 3> {
    let x = x.cast(DType::F32);
    let near = x.clone() - x.mean_dim(2);
    near.clone() - near.mean_dim(2)
}
