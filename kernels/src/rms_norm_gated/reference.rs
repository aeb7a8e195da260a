//! Plain tensor operations.

use burn::tensor::activation::silu;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use super::NormArgs;

/// See [`super::rms_norm_gated`].
pub fn rms_norm_gated<B: Backend>(args: NormArgs<B>) -> Tensor<B, 3> {
    let [b, l, e] = args.y.dims();
    let g = args.groups;
    let dtype = args.y.dtype();
    let y = args.y.cast(DType::F32);
    let v = match args.z {
        Some(z) => y * silu(z.cast(DType::F32)),
        None => y,
    };
    let v = v.reshape([b, l, g, e / g]);
    let scale = (v.clone().powi_scalar(2).mean_dim(3) + args.eps).sqrt().recip(); // [b, l, g, 1]
    ((v * scale).reshape([b, l, e]) * args.weight.cast(DType::F32).reshape([1, 1, e])).cast(dtype)
}
