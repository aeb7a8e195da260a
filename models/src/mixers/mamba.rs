//! The Mamba mixer (arXiv 2312.00752, section 3.4): input projection, short convolution, selective scan with input-dependent
//! step sizes, gate, output projection.
//!
//! ```text
//! [u, z]     = W_in x                                          e, e
//! u          = silu(conv(u))
//! [dt, B, C] = W_x u                                           r, n, n
//! delta      = softplus(W_dt dt + b_dt)                        e
//! h_t        = exp(delta_t A) h_{t-1} + delta_t B_t u_t        A = -exp(a_log), [e, n]
//! out        = W_out ((C_t h_t + d u_t) * silu(z_t))
//! ```

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use terrarium_kernels::KernelBackend;
use terrarium_kernels::causal_conv1d::{ConvArgs, causal_conv1d};
use terrarium_kernels::selective_scan::{ScanArgs, selective_scan};
use terrarium_kernels::split::split;

use super::{Conv1d, Parameters, linear_specs};
use crate::cache::Carried;
use crate::init::{InitScale, kaiming};
use crate::layers::Linear;
use crate::params::{Bag, ParamInit, ParamSpec};
use crate::sequence::Sequence;

/// Sizes of a Mamba mixer.
#[derive(Debug, Clone, PartialEq)]
pub struct MambaConfig {
    /// Inner width, `e`.
    pub inner: usize,
    /// State width per channel, `n`.
    pub state: usize,
    /// Rank of the projection to step sizes, `r`.
    pub dt_rank: usize,
    /// Taps of the convolution, `k`.
    pub conv_kernel: usize,
    /// Bias on the convolution.
    pub conv_bias: bool,
    /// Biases on the input and output projections.
    pub proj_bias: bool,
}

impl MambaConfig {
    /// Bytes of state per sequence, constant in its length: convolution inputs at `size` bytes, scan state in float32.
    pub fn cache_bytes(&self, size: usize) -> usize {
        (self.conv_kernel - 1) * self.inner * size + self.inner * self.state * 4
    }
}

impl Parameters for MambaConfig {
    fn parameters(&self, d: usize, scale: InitScale) -> Vec<ParamSpec> {
        let (e, n, r) = (self.inner, self.state, self.dt_rank);
        let mut specs = linear_specs("in_proj", 2 * e, d, self.proj_bias, scale.ssm_input(d));
        specs.push(ParamSpec::new("conv1d.weight", [e, self.conv_kernel], kaiming(self.conv_kernel)));
        if self.conv_bias {
            specs.push(ParamSpec::new("conv1d.bias", [e], kaiming(self.conv_kernel)));
        }
        specs.extend(linear_specs("x_proj", r + 2 * n, e, false, kaiming(e)));
        specs.push(ParamSpec::new("dt_proj.weight", [e, r], kaiming(r)));
        specs.push(ParamSpec::new("dt_proj.bias", [e], ParamInit::DtBias).in_float32());
        specs.push(ParamSpec::new("a_log", [e, n], ParamInit::S4dReal).in_float32());
        specs.push(ParamSpec::new("d", [e], ParamInit::Ones).in_float32());
        specs.extend(linear_specs("out_proj", d, e, self.proj_bias, scale.output(e, true)));
        specs
    }
}

/// Mamba mixer.
#[derive(Module, Debug)]
pub struct Mamba<B: Backend> {
    /// Rows x (`e`), z (`e`).
    pub in_proj: Linear<B>,
    /// Over x.
    pub conv1d: Conv1d<B>,
    /// Rows dt (`r`), B (`n`), C (`n`).
    pub x_proj: Linear<B>,
    /// `[e, r]`; its bias, float32, is added inside the scan.
    pub dt_proj: Linear<B>,
    /// Decay is `-exp(a_log)`, `[e, n]`.
    pub a_log: Param<Tensor<B, 2>>,
    /// Skip, `[e]`.
    pub d: Param<Tensor<B, 1>>,
    /// `[d, e]`.
    pub out_proj: Linear<B>,
    #[module(skip)]
    config: MambaConfig,
    /// `a_log` holds the decays themselves.
    #[module(skip)]
    frozen: bool,
}

/// What a Mamba mixer carries: constant in size.
#[derive(Debug, Clone)]
pub struct MambaCache<B: Backend> {
    /// The last `k - 1` inputs of the convolution, `[b, k - 1, e]`.
    pub conv: Tensor<B, 3>,
    /// Scan state, float32 `[b, e, n]`.
    pub ssm: Tensor<B, 3>,
}

impl<B: Backend> Carried<B> for MambaCache<B> {
    fn map(self, f: &mut impl FnMut(Tensor<B, 4>) -> Tensor<B, 4>) -> Self {
        let mut f = |x: Tensor<B, 3>| f(x.unsqueeze_dim(1)).squeeze_dim(1);
        Self { conv: f(self.conv), ssm: f(self.ssm) }
    }
}

impl<B: KernelBackend> Mamba<B> {
    pub(crate) fn take(config: &MambaConfig, bag: &mut Bag<B>) -> Self {
        Self {
            in_proj: Linear::take(bag, "in_proj"),
            conv1d: Conv1d::take(bag),
            x_proj: Linear::take(bag, "x_proj"),
            dt_proj: Linear::take(bag, "dt_proj"),
            a_log: bag.take("a_log"),
            d: bag.take("d"),
            out_proj: Linear::take(bag, "out_proj"),
            config: config.clone(),
            frozen: false,
        }
    }

    /// `[b, l, d]` -> `[b, l, d]`, for any length and any cache.
    pub fn forward(&self, x: Tensor<B, 3>, cache: Option<MambaCache<B>>, sequence: &Sequence<B>) -> (Tensor<B, 3>, MambaCache<B>) {
        let MambaConfig { inner: e, state: n, dt_rank: r, .. } = self.config;
        let (conv_state, ssm_state) = cache.map(|cache| (cache.conv, cache.ssm)).unzip();
        let [x, z] = split(self.in_proj.forward(x), [e, e]);
        let convolved = causal_conv1d(ConvArgs {
            x,
            weight: self.conv1d.weight.val(),
            bias: self.conv1d.bias.as_ref().map(Param::val),
            state: conv_state,
            segments: sequence.segments().cloned(),
            silu: true,
        });
        let u = convolved.y; // [b, l, e]
        let [step, keys, queries] = split(self.x_proj.forward(u.clone()), [r, n, n]);
        let scanned = selective_scan(ScanArgs {
            u,
            delta: self.dt_proj.forward_unbiased(step),
            a: self.rates(),
            b: keys,
            c: queries,
            d: Some(self.d.val()),
            z: Some(z),
            delta_bias: self.dt_proj.bias.as_ref().map(Param::val),
            state: ssm_state,
            segments: sequence.segments().cloned(),
            delta_softplus: true,
        });
        (self.out_proj.forward(scanned.y), MambaCache { conv: convolved.state, ssm: scanned.state })
    }

    /// The decays `A`, `[e, n]`.
    fn rates(&self) -> Tensor<B, 2> {
        if self.frozen { self.a_log.val() } else { -self.a_log.val().exp() }
    }

    pub(crate) fn freeze(&mut self) {
        self.conv1d.freeze();
        self.a_log = Param::from_tensor(self.rates());
        self.frozen = true;
    }

    pub(crate) fn for_each_linear(&mut self, path: &str, f: &mut dyn FnMut(&str, &mut Linear<B>)) {
        f(&format!("{path}.in_proj"), &mut self.in_proj);
        f(&format!("{path}.x_proj"), &mut self.x_proj);
        f(&format!("{path}.dt_proj"), &mut self.dt_proj);
        f(&format!("{path}.out_proj"), &mut self.out_proj);
    }
}
