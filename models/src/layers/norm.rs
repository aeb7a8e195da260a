//! Root-mean-square norm.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use terrarium_kernels::KernelBackend;
use terrarium_kernels::rms_norm_gated::{NormArgs, rms_norm_gated};

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
}

impl<B: KernelBackend> RmsNorm<B> {
    /// `[b, l, d]` -> `[b, l, d]`.
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        rms_norm_gated(NormArgs { y: x, z: None, weight: self.weight.val(), groups: 1, eps: self.eps })
    }
}
