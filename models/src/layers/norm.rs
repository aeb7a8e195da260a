//! Norms before mixers: root mean square, or layer norm.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use terrarium_kernels::KernelBackend;
use terrarium_kernels::norm_residual::{ResidualNormArgs, ResidualNormOut, norm_residual};
use terrarium_kernels::rms_norm_gated::{NormArgs, rms_norm_gated};

use crate::params::{Bag, ParamInit, ParamSpec};

/// Kind of the norms of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `x / rms(x) * weight` (arXiv 1910.07467).
    Rms,
    /// `(x - mean) / std * weight + bias` (arXiv 1607.06450).
    Layer,
    /// Layer norm that keeps `weight - 1` (Megatron's `apply_layernorm_1p`).
    LayerOnePlus,
}

/// The norms before mixers and after the last layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormConfig {
    /// Which norm.
    pub kind: NormKind,
    /// Added to the mean square or the variance.
    pub eps: f32,
}

impl NormConfig {
    /// A root-mean-square norm.
    pub fn rms(eps: f32) -> Self {
        Self { kind: NormKind::Rms, eps }
    }

    pub(crate) fn parameters(&self, d: usize) -> Vec<ParamSpec> {
        let weight = |init| ParamSpec::new("weight", [d], init);
        let bias = || ParamSpec::new("bias", [d], ParamInit::Zeros);
        match self.kind {
            NormKind::Rms => vec![weight(ParamInit::Ones)],
            NormKind::Layer => vec![weight(ParamInit::Ones), bias()],
            NormKind::LayerOnePlus => vec![weight(ParamInit::Zeros), bias()],
        }
    }
}

/// A norm over the last axis, computed in float32.
#[derive(Module, Debug)]
pub struct Norm<B: Backend> {
    /// `[d]`.
    pub weight: Param<Tensor<B, 1>>,
    /// `[d]`, in layer norms.
    pub bias: Option<Param<Tensor<B, 1>>>,
    #[module(skip)]
    config: NormConfig,
}

impl<B: Backend> Norm<B> {
    pub(crate) fn take(config: &NormConfig, bag: &mut Bag<B>) -> Self {
        Self { weight: bag.take("weight"), bias: bag.optional("bias"), config: *config }
    }
}

impl<B: KernelBackend> Norm<B> {
    /// `[b, l, d]` -> `[b, l, d]`.
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        match self.bias {
            None => rms_norm_gated(NormArgs { y: x, z: None, weight: self.scale(), groups: 1, eps: self.config.eps }),
            Some(_) => self.forward_after(None, x).0,
        }
    }

    /// Adds what a branch gave, if one came before, to the stream `x` and norms the sum: the norm and the sum, `[b, l, d]`. The norm is in
    /// the dtype of the branch, without one in that of the stream.
    pub fn forward_after(&self, branch: Option<Tensor<B, 3>>, x: Tensor<B, 3>) -> (Tensor<B, 3>, Tensor<B, 3>) {
        if branch.is_none() && self.bias.is_none() {
            return (self.forward(x.clone()), x);
        }
        let bias = self.bias.as_ref().map(Param::val);
        let args = ResidualNormArgs { x: branch, residual: x, weight: self.scale(), bias, eps: self.config.eps };
        let ResidualNormOut { normed, sum } = norm_residual(args);
        (normed, sum)
    }

    /// Adds the one to weights that are kept without it.
    pub(crate) fn freeze(&mut self) {
        self.weight = Param::from_tensor(self.scale());
        if self.config.kind == NormKind::LayerOnePlus {
            self.config.kind = NormKind::Layer;
        }
    }

    fn scale(&self) -> Tensor<B, 1> {
        match self.config.kind {
            NormKind::LayerOnePlus => self.weight.val() + 1.0,
            NormKind::Rms | NormKind::Layer => self.weight.val(),
        }
    }
}

/// The gated norm of a Mamba-2 mixer.
#[derive(Module, Debug)]
pub struct RmsNorm<B: Backend> {
    /// `[e]`.
    pub weight: Param<Tensor<B, 1>>,
    /// Added to the mean square.
    pub eps: f32,
}

impl<B: Backend> RmsNorm<B> {
    pub(crate) fn take(bag: &mut Bag<B>, name: &str, eps: f32) -> Self {
        Self { weight: bag.take(name), eps }
    }
}
