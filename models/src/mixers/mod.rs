//! What a layer does between its norm and its residual: attention, Mamba-2, MLP. One file each: configuration,
//! parameters, forward, cache.

pub mod attention;
pub mod mamba2;
pub mod mlp;

pub use attention::{Attention, AttentionConfig, KvCache};
pub use mamba2::{Mamba2, Mamba2Cache, Mamba2Config};
pub use mlp::{Activation, Mlp, MlpConfig};

use crate::init::InitScale;
use crate::params::{ParamInit, ParamSpec};

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
