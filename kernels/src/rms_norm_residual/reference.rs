//! Plain tensor operations.

use burn::tensor::backend::Backend;

use super::{ResidualNormArgs, ResidualNormOut};
use crate::rms_norm_gated::{NormArgs, reference};

/// See [`super::rms_norm_residual`].
pub fn rms_norm_residual<B: Backend>(args: ResidualNormArgs<B>) -> ResidualNormOut<B> {
    let (dtype, wide) = (args.x.dtype(), args.residual.dtype());
    let sum = args.residual + args.x.cast(wide);
    let normed = reference::rms_norm_gated(NormArgs { y: sum.clone(), z: None, weight: args.weight, groups: 1, eps: args.eps });
    ResidualNormOut { normed: normed.cast(dtype), sum }
}
