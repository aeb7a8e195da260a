//! What a layer does between its norm and its residual: attention, Mamba, Mamba-2, MLP. One file each: configuration,
//! parameters, forward, cache.

pub mod attention;
pub mod mamba;
pub mod mamba2;
pub mod mlp;

pub use attention::{Attention, AttentionConfig, KvCache};
pub use mamba::{Mamba, MambaCache, MambaConfig};
pub use mamba2::{Mamba2, Mamba2Cache, Mamba2Config};
pub use mlp::{Activation, Mlp, MlpConfig};

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::init::InitScale;
use crate::params::{Bag, ParamInit, ParamSpec};

/// Depthwise convolution weights.
#[derive(Module, Debug)]
pub struct Conv1d<B: Backend> {
    /// Taps, oldest first, `[channels, k]`.
    pub weight: Param<Tensor<B, 2>>,
    /// `[channels]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
}

impl<B: Backend> Conv1d<B> {
    fn take(bag: &mut Bag<B>) -> Self {
        Self { weight: bag.take("conv1d.weight"), bias: bag.optional("conv1d.bias") }
    }
}

/// `<name>.weight [out, in]` and, if wanted, `<name>.bias [out]`.
pub(crate) fn linear_specs(name: &str, out: usize, inputs: usize, bias: bool, init: ParamInit) -> Vec<ParamSpec> {
    let mut specs = vec![ParamSpec::new(format!("{name}.weight"), [out, inputs], init)];
    if bias {
        specs.push(ParamSpec::new(format!("{name}.bias"), [out], ParamInit::Zeros));
    }
    specs
}

/// A configuration that knows its parameters.
pub(crate) trait Parameters {
    /// The mixer's parameters for model width `d`, named relative to the mixer.
    fn parameters(&self, d: usize, scale: InitScale) -> Vec<ParamSpec>;
}
