//! The Mamba-2 mixer (arXiv 2405.21060, section 7): input projection, short convolution, SSD, gated norm, output
//! projection.
//!
//! ```text
//! [z, u, B, C, dt] = W_in x                                            e, e, g n, g n, h
//! [u, B, C]        = silu(conv([u, B, C]))
//! delta            = clamp(softplus(dt + dt_bias), dt_limit)           h
//! S_t              = exp(delta_t A) S_{t-1} + delta_t u_t B_t^T        A = -exp(a_log), [h]; head j reads group j / (h / g)
//! v                = (S_t C_t + d u_t) * silu(z_t)                     the gate first
//! out              = W_out (norm * v / rms of v over each of g runs of e / g channels)
//! ```

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use terrarium_kernels::KernelBackend;
use terrarium_kernels::causal_conv1d::{ConvArgs, causal_conv1d};
use terrarium_kernels::rms_norm_gated::{NormArgs, rms_norm_gated};
use terrarium_kernels::split::{heads, split};
use terrarium_kernels::ssd::{SsdArgs, SsdOptions, ssd};

use super::{Conv1d, Parameters, linear_specs};
use crate::cache::Carried;
use crate::init::{InitScale, kaiming};
use crate::layers::{Linear, RmsNorm};
use crate::params::{Bag, ParamInit, ParamSpec};
use crate::sequence::Sequence;

/// Sizes of a Mamba-2 mixer.
#[derive(Debug, Clone, PartialEq)]
pub struct Mamba2Config {
    /// Heads, `h`.
    pub heads: usize,
    /// Width of a head, `p`.
    pub head_dim: usize,
    /// Groups that share `B` and `C`, `g`.
    pub groups: usize,
    /// State width, `n`.
    pub state: usize,
    /// Taps of the convolution, `k`.
    pub conv_kernel: usize,
    /// Bias on the convolution.
    pub conv_bias: bool,
    /// Biases on the input and output projections.
    pub proj_bias: bool,
    /// Limits on the step size after softplus.
    pub dt_limit: (f32, f32),
    /// Chunk length.
    pub chunk: usize,
    /// Epsilon of the gated norm.
    pub norm_eps: f32,
}

impl Mamba2Config {
    /// Inner width, `e = h * p`.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels that are convolved: x, B and C.
    pub fn conv_channels(&self) -> usize {
        self.inner() + 2 * self.groups * self.state
    }

    /// Bytes of state per sequence, constant in its length: convolution inputs at `size` bytes, SSM state in float32.
    pub fn cache_bytes(&self, size: usize) -> usize {
        (self.conv_kernel - 1) * self.conv_channels() * size + self.inner() * self.state * 4
    }
}

impl Parameters for Mamba2Config {
    fn parameters(&self, d: usize, scale: InitScale) -> Vec<ParamSpec> {
        let (e, conv, h) = (self.inner(), self.conv_channels(), self.heads);
        let mut specs = linear_specs("in_proj", e + conv + h, d, self.proj_bias, scale.ssm_input(d));
        specs.push(ParamSpec::new("conv1d.weight", [conv, self.conv_kernel], kaiming(self.conv_kernel)));
        if self.conv_bias {
            specs.push(ParamSpec::new("conv1d.bias", [conv], kaiming(self.conv_kernel)));
        }
        specs.push(ParamSpec::new("dt_bias", [h], ParamInit::DtBias).in_float32());
        specs.push(ParamSpec::new("a_log", [h], ParamInit::ALog).in_float32());
        specs.push(ParamSpec::new("d", [h], ParamInit::Ones).in_float32());
        specs.push(ParamSpec::new("norm.weight", [e], ParamInit::Ones));
        specs.extend(linear_specs("out_proj", d, e, self.proj_bias, scale.output(e, true)));
        specs
    }
}

/// Mamba-2 mixer.
#[derive(Module, Debug)]
pub struct Mamba2<B: Backend> {
    /// Rows z (`e`), x (`e`), B (`g n`), C (`g n`), dt (`h`).
    pub in_proj: Linear<B>,
    /// Over x, B and C.
    pub conv1d: Conv1d<B>,
    /// `[h]`.
    pub dt_bias: Param<Tensor<B, 1>>,
    /// Decay is `-exp(a_log)`, `[h]`.
    pub a_log: Param<Tensor<B, 1>>,
    /// Skip, `[h]`.
    pub d: Param<Tensor<B, 1>>,
    /// Gated norm, `[e]`.
    pub norm: RmsNorm<B>,
    /// `[d, e]`.
    pub out_proj: Linear<B>,
    #[module(skip)]
    config: Mamba2Config,
    /// `a_log` holds the decays themselves.
    #[module(skip)]
    frozen: bool,
}

/// What a Mamba-2 mixer carries: constant in size.
#[derive(Debug, Clone)]
pub struct Mamba2Cache<B: Backend> {
    /// The last `k - 1` inputs of the convolution, `[b, k - 1, channels]`.
    pub conv: Tensor<B, 3>,
    /// SSM state, float32 `[b, h, p, n]`.
    pub ssm: Tensor<B, 4>,
}

impl<B: Backend> Carried<B> for Mamba2Cache<B> {
    fn map(self, f: &mut impl FnMut(Tensor<B, 4>) -> Tensor<B, 4>) -> Self {
        Self { conv: f(self.conv.unsqueeze_dim(1)).squeeze_dim(1), ssm: f(self.ssm) }
    }
}

impl<B: KernelBackend> Mamba2<B> {
    pub(crate) fn take(config: &Mamba2Config, bag: &mut Bag<B>) -> Self {
        Self {
            in_proj: Linear::take(bag, "in_proj"),
            conv1d: Conv1d::take(bag),
            dt_bias: bag.take("dt_bias"),
            a_log: bag.take("a_log"),
            d: bag.take("d"),
            norm: RmsNorm::take(bag, "norm.weight", config.norm_eps),
            out_proj: Linear::take(bag, "out_proj"),
            config: config.clone(),
            frozen: false,
        }
    }

    /// `[b, l, d]` -> `[b, l, d]`, for any length and any cache.
    pub fn forward(&self, x: Tensor<B, 3>, cache: Option<Mamba2Cache<B>>, sequence: &Sequence<B>) -> (Tensor<B, 3>, Mamba2Cache<B>) {
        let config = &self.config;
        let [b, l, _] = x.dims();
        let (e, h, g, n) = (config.inner(), config.heads, config.groups, config.state);
        let conv = config.conv_channels();
        let (conv_state, ssm_state) = cache.map(|cache| (cache.conv, cache.ssm)).unzip();

        let projected = self.in_proj.forward(x); // [b, l, e + conv + h]
        let [z, xbc, dt] = split(projected, [e, conv, h]);

        let convolved = causal_conv1d(ConvArgs {
            x: xbc,
            weight: self.conv1d.weight.val(),
            bias: self.conv1d.bias.as_ref().map(Param::val),
            state: conv_state,
            segments: sequence.segments().cloned(),
            silu: true,
        });
        let [u, keys, queries] = split(convolved.y, [e, g * n, g * n]);
        let scanned = ssd(SsdArgs {
            x: heads(u, h),
            dt,
            a: self.rates(),
            b: heads(keys, g),
            c: heads(queries, g),
            d: Some(self.d.val()),
            dt_bias: Some(self.dt_bias.val()),
            state: ssm_state,
            segments: sequence.segments().cloned(),
            options: SsdOptions { dt_softplus: true, dt_limit: config.dt_limit, chunk: config.chunk },
        });
        let y = rms_norm_gated(NormArgs {
            y: scanned.y.reshape([b, l, e]),
            z: Some(z),
            weight: self.norm.weight.val(),
            groups: g,
            eps: self.norm.eps,
        });
        (self.out_proj.forward(y), Mamba2Cache { conv: convolved.state, ssm: scanned.state })
    }

    /// The decays `A`, `[h]`.
    fn rates(&self) -> Tensor<B, 1> {
        if self.frozen { self.a_log.val() } else { -self.a_log.val().exp() }
    }

    pub(crate) fn freeze(&mut self) {
        self.conv1d.freeze();
        self.a_log = Param::from_tensor(self.rates());
        self.frozen = true;
    }

    pub(crate) fn for_each_linear(&mut self, path: &str, f: &mut dyn FnMut(&str, &mut Linear<B>)) {
        f(&format!("{path}.in_proj"), &mut self.in_proj);
        f(&format!("{path}.out_proj"), &mut self.out_proj);
    }
}
