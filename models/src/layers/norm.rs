//! Root-mean-square norm.

use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::params::Bag;

/// `x * rsqrt(mean(x^2) + eps) * weight`, computed in float32.
#[derive(Module, Debug)]
pub struct RmsNorm<B: Backend> {
    /// `[d]`.
    pub weight: Param<Tensor<B, 1>>,
    /// Added to the mean square.
    pub eps: f32,
}

impl<B: Backend> RmsNorm<B> {
    pub(crate) fn take(bag: &mut Bag<B>, name: &str, eps: f32) -> Self {
        Self { weight: bag.take(name), eps }
    }

    /// `[b, l, d]` -> `[b, l, d]`.
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let dtype = x.dtype();
        let x = x.cast(DType::F32);
        let scale = (x.clone().powi_scalar(2).mean_dim(2) + self.eps).sqrt().recip(); // [b, l, 1]
        (x * scale * self.weight.val().cast(DType::F32).unsqueeze()).cast(dtype)
    }
}
