//! Feed-forward mixer: plain (up, activation, down) or gated (SwiGLU and relatives, arXiv 2002.05202).
//!
//! ```text
//! out = W_down act(W_up x)                    plain
//! out = W_down (act(W_gate x) * W_up x)       gated
//! ```

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::activation::{gelu_approximate, relu, silu};
use burn::tensor::backend::Backend;
use terrarium_kernels::KernelBackend;

use super::{Parameters, linear_specs};
use crate::init::InitScale;
use crate::layers::Linear;
use crate::params::{Bag, ParamSpec};

/// Nonlinearity, by its Hugging Face name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `gelu`: exact, with the error function.
    Gelu,
    /// `gelu_new`, `gelu_pytorch_tanh`: tanh approximation.
    GeluTanh,
    /// `relu2`: squared ReLU.
    Relu2,
    /// `silu`, `swish`.
    Silu,
}

impl Activation {
    /// The activation of that Hugging Face name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "gelu" => Some(Self::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" => Some(Self::GeluTanh),
            "relu2" => Some(Self::Relu2),
            "silu" | "swish" => Some(Self::Silu),
            _ => None,
        }
    }

    fn apply<B: Backend>(self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        match self {
            // Not Burn's `gelu`: its gradient is that of the tanh approximation on most backends.
            Self::Gelu => x.clone() * ((x * std::f32::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5,
            Self::GeluTanh => gelu_approximate(x),
            Self::Relu2 => relu(x).powi_scalar(2),
            Self::Silu => silu(x),
        }
    }
}

/// Sizes of an MLP mixer.
#[derive(Debug, Clone, PartialEq)]
pub struct MlpConfig {
    /// Inner width.
    pub intermediate: usize,
    /// Nonlinearity.
    pub activation: Activation,
    /// `act(gate x) * (up x)` instead of `act(up x)`.
    pub gated: bool,
    /// Biases on all projections.
    pub bias: bool,
}

impl Parameters for MlpConfig {
    fn parameters(&self, d: usize, scale: InitScale) -> Vec<ParamSpec> {
        let f = self.intermediate;
        let mut specs = Vec::new();
        if self.gated {
            specs.extend(linear_specs("gate_proj", f, d, self.bias, scale.linear(d)));
        }
        specs.extend(linear_specs("up_proj", f, d, self.bias, scale.linear(d)));
        specs.extend(linear_specs("down_proj", d, f, self.bias, scale.output(f, false)));
        specs
    }
}

/// MLP mixer.
#[derive(Module, Debug)]
pub struct Mlp<B: Backend> {
    /// `[f, d]`, in gated MLPs.
    pub gate_proj: Option<Linear<B>>,
    /// `[f, d]`.
    pub up_proj: Linear<B>,
    /// `[d, f]`.
    pub down_proj: Linear<B>,
    #[module(skip)]
    config: MlpConfig,
}

impl<B: KernelBackend> Mlp<B> {
    pub(crate) fn take(config: &MlpConfig, bag: &mut Bag<B>) -> Self {
        Self {
            gate_proj: config.gated.then(|| Linear::take(bag, "gate_proj")),
            up_proj: Linear::take(bag, "up_proj"),
            down_proj: Linear::take(bag, "down_proj"),
            config: config.clone(),
        }
    }

    /// `[b, l, d]` -> `[b, l, d]`.
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let activation = self.config.activation;
        let inner = match &self.gate_proj {
            Some(gate) => activation.apply(gate.forward(x.clone())) * self.up_proj.forward(x),
            None => activation.apply(self.up_proj.forward(x)),
        };
        self.down_proj.forward(inner)
    }

    pub(crate) fn for_each_linear(&mut self, path: &str, f: &mut dyn FnMut(&str, &mut Linear<B>)) {
        if let Some(gate) = &mut self.gate_proj {
            f(&format!("{path}.gate_proj"), gate);
        }
        f(&format!("{path}.up_proj"), &mut self.up_proj);
        f(&format!("{path}.down_proj"), &mut self.down_proj);
    }
}
