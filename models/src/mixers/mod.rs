//! What a layer does between its norm and its residual: attention, Mamba, Mamba-2, MLP. One file each: configuration,
//! parameters, forward, cache.
//!
//! A layer is `x + mixer(norm(x))`. For `x` after the norm, with the letters of [`terrarium_kernels`] (`r` is the rank of step
//! sizes, `f` the width of an MLP):
//!
//! | mixer | parameters, in the order of the model | carried from call to call |
//! |---|---|---|
//! | attention | `q_proj` `[h p, d]`, `k_proj` and `v_proj` `[g p, d]`, (`conv1d` `[(h + 2 g) p, k]`), `o_proj` `[d, h p]` | keys and values of all tokens, (`k - 1` inputs of the convolution) |
//! | Mamba | `in_proj` `[2 e, d]`, `conv1d` `[e, k]`, `x_proj` `[r + 2 n, e]`, `dt_proj` `[e, r]`, `a_log` `[e, n]`, `d` `[e]`, `out_proj` `[d, e]` | `k - 1` inputs of the convolution, state `[b, e, n]` |
//! | Mamba-2 | `in_proj` `[2 e + 2 g n + h, d]`, `conv1d` `[e + 2 g n, k]`, `dt_bias`, `a_log` and `d` `[h]`, `norm` `[e]`, `out_proj` `[d, e]` | `k - 1` inputs of the convolution, state `[b, h, p, n]` |
//! | MLP | (`gate_proj` `[f, d]`), `up_proj` `[f, d]`, `down_proj` `[d, f]` | nothing |
//!
//! What is in parentheses is there where the configuration says so, and so are biases. States of scans, `a_log`, `d`,
//! `dt_bias` and the bias of `dt_proj` are float32 whatever the model's dtype. A convolution carries its **inputs**, so that
//! it continues as if it had not been cut; a cache is a value, and copying it is a snapshot.
//!
//! Equations stand in the files of the mixers, and with the names and rows of published files on the pages of
//! [the families](crate::families).

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

    /// Packs the taps: where a backend pads rows, every call would do it.
    fn freeze(&mut self) {
        let [channels, taps] = self.weight.dims();
        self.weight = Param::from_tensor(self.weight.val().reshape([channels * taps]).reshape([channels, taps]));
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
