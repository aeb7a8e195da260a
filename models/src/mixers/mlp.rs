//! Feed-forward mixer: plain (up, activation, down) or gated (SwiGLU and relatives, arXiv 2002.05202).
//!
//! ```text
//! out = W_down act(W_up x)                    plain
//! out = W_down (act(W_gate x) * W_up x)       gated
//! ```

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use terrarium_kernels::KernelBackend;
pub use terrarium_kernels::glu::Activation;
use terrarium_kernels::glu::{GluArgs, glu};

use super::{Parameters, linear_specs};
use crate::init::InitScale;
use crate::layers::Linear;
use crate::params::{Bag, ParamSpec};

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
        let gate = self.gate_proj.as_ref().map(|gate| gate.forward(x.clone()));
        let args = GluArgs { up: self.up_proj.forward(x), gate, activation: self.config.activation };
        self.down_proj.forward(glu(args))
    }

    pub(crate) fn for_each_linear(&mut self, path: &str, f: &mut dyn FnMut(&str, &mut Linear<B>)) {
        if let Some(gate) = &mut self.gate_proj {
            f(&format!("{path}.gate_proj"), gate);
        }
        f(&format!("{path}.up_proj"), &mut self.up_proj);
        f(&format!("{path}.down_proj"), &mut self.down_proj);
    }
}
