//! Causal self-attention: multi-head or grouped-query, with full, partial or no rotary positions, and, in the attention
//! layers of mamba_ssm's hybrids, a short convolution over queries, keys and values before rotation.
//!
//! ```text
//! q, k, v = W_q x, W_k x, W_v x               h, g, g heads of width p
//! q, k, v = conv(q, k, v)                     only with conv_kernel: causal, depthwise, with a bias, no activation
//! q, k    = rope(q, k)                        only with rope: the first rope.dim channels, pairs (i, i + rope.dim / 2)
//! y       = softmax(causal(scale q k^T)) v    scale is 1 / sqrt(p) unless given; query head j reads head j / (h / g)
//! out     = W_o y
//! ```

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use terrarium_kernels::KernelBackend;
use terrarium_kernels::attention::step::{StepArgs, attention_step};
use terrarium_kernels::attention::{AttentionArgs, attention};
use terrarium_kernels::causal_conv1d::{ConvArgs, causal_conv1d};

use super::{Conv1d, Parameters, linear_specs};
use crate::cache::Carried;
use crate::init::{InitScale, kaiming};
use crate::layers::{Linear, RopeConfig, rotate};
use crate::params::{Bag, ParamSpec};
use crate::sequence::{Sequence, StepPlace};

/// Sizes of an attention mixer.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; query head `j` reads head `j / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rotary positions, if any.
    pub rope: Option<RopeConfig>,
    /// Multiplies the scores; `1 / sqrt(head_dim)` when absent.
    pub scale: Option<f32>,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub out_bias: bool,
    /// Taps of the convolution over queries, keys and values, if there is one; it has a bias and no activation.
    pub conv_kernel: Option<usize>,
}

impl AttentionConfig {
    /// Bytes of keys and values per token, at `size` bytes per element.
    pub fn cache_bytes(&self, size: usize) -> usize {
        2 * self.kv_heads * self.head_dim * size
    }

    /// Bytes of convolution inputs per sequence, constant in its length.
    pub fn conv_bytes(&self, size: usize) -> usize {
        self.conv_kernel.map_or(0, |taps| (taps - 1) * self.conv_channels() * size)
    }

    /// Channels of queries, keys and values together.
    pub fn conv_channels(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

impl Parameters for AttentionConfig {
    fn parameters(&self, d: usize, scale: InitScale) -> Vec<ParamSpec> {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let input = scale.linear(d);
        let mut specs: Vec<ParamSpec> = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
            .into_iter()
            .flat_map(|(name, out)| linear_specs(name, out, d, self.qkv_bias, input))
            .collect();
        if let Some(taps) = self.conv_kernel {
            specs.push(ParamSpec::new("conv1d.weight", [self.conv_channels(), taps], kaiming(taps)));
            specs.push(ParamSpec::new("conv1d.bias", [self.conv_channels()], kaiming(taps)));
        }
        specs.extend(linear_specs("o_proj", d, q, self.out_bias, scale.output(q, false)));
        specs
    }
}

/// Attention mixer.
#[derive(Module, Debug)]
pub struct Attention<B: Backend> {
    /// `[h * p, d]`.
    pub q_proj: Linear<B>,
    /// `[g * p, d]`.
    pub k_proj: Linear<B>,
    /// `[g * p, d]`.
    pub v_proj: Linear<B>,
    /// Over the channels of queries, keys and values in this order.
    pub conv1d: Option<Conv1d<B>>,
    /// `[d, h * p]`.
    pub o_proj: Linear<B>,
    #[module(skip)]
    config: AttentionConfig,
}

/// Keys (after rotation) and values of all tokens so far. The buffer grows by doubling, so that a token appended to an
/// unshared cache is written in place.
#[derive(Debug, Clone)]
pub struct KvCache<B: Backend> {
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    used: usize,
    /// The last `k - 1` inputs of the convolution, `[b, k - 1, channels]`, where there is one.
    pub conv: Option<Tensor<B, 3>>,
}

impl<B: Backend> KvCache<B> {
    /// The slots in use, `[b, g, s, p]` each.
    pub fn used(&self) -> (Tensor<B, 4>, Tensor<B, 4>) {
        (self.k.clone().narrow(2, 0, self.used), self.v.clone().narrow(2, 0, self.used))
    }

    /// Slots of the buffers.
    pub(crate) fn capacity(&self) -> usize {
        self.k.dims()[2]
    }

    /// Takes note of how many slots are in use.
    pub(crate) fn set_used(&mut self, used: usize) {
        self.used = used;
    }

    /// Buffers of exactly `capacity` slots, which are at least those in use.
    pub(crate) fn with_capacity(self, capacity: usize) -> Self {
        let Self { k, v, used, conv } = self;
        let sized = |buffer: Tensor<B, 4>| {
            let [b, g, had, p] = buffer.dims();
            if had == capacity {
                return buffer;
            }
            let zeros = Tensor::zeros([b, g, capacity, p], (&buffer.device(), buffer.dtype()));
            zeros.slice_assign([0..b, 0..g, 0..used, 0..p], buffer.narrow(2, 0, used))
        };
        Self { k: sized(k), v: sized(v), used, conv }
    }

    /// Has room for `slots` in all: up to there nothing is copied when tokens are appended.
    pub(crate) fn reserve(self, slots: usize) -> Self {
        let slots = slots.max(self.capacity());
        self.with_capacity(slots)
    }

    /// Adds `[b, g, l, p]` keys and values behind those in use.
    fn append(past: Option<Self>, k: Tensor<B, 4>, v: Tensor<B, 4>, conv: Option<Tensor<B, 3>>) -> Self {
        let Some(Self { k: old_k, v: old_v, used, .. }) = past else {
            let used = k.dims()[2];
            return Self { k, v, used, conv };
        };
        let after = used + k.dims()[2];
        Self { k: write(old_k, used, k), v: write(old_v, used, v), used: after, conv }
    }

    /// Keys and values `[b, g, s, p]` from elsewhere.
    pub(crate) fn restored(k: Tensor<B, 4>, v: Tensor<B, 4>, conv: Option<Tensor<B, 3>>) -> Self {
        Self { used: k.dims()[2], k, v, conv }
    }

    /// As it was after `slots` of its slots; `None` where a convolution has gone on.
    pub(crate) fn cut(self, slots: usize) -> Option<Self> {
        self.conv.is_none().then(|| Self { used: self.used.min(slots), ..self })
    }

    /// The tokens over and over, up to `slots`, with room for `room`.
    pub(crate) fn repeat(self, slots: usize, room: usize) -> Self {
        let (used, (k, v)) = (self.used, self.used());
        // Larger, and so a buffer of its own that is written in place.
        let mut cache = self.reserve(room.max(slots));
        while used > 0 && cache.used < slots {
            let more = used.min(slots - cache.used);
            let conv = cache.conv.clone();
            cache = Self::append(Some(cache), k.clone().narrow(2, 0, more), v.clone().narrow(2, 0, more), conv);
        }
        cache
    }
}

/// Writes `new` at slot `used` of `buffer`, which is enlarged when it is full.
fn write<B: Backend>(buffer: Tensor<B, 4>, used: usize, new: Tensor<B, 4>) -> Tensor<B, 4> {
    let [b, g, capacity, p] = buffer.dims();
    let after = used + new.dims()[2];
    let buffer = if after <= capacity {
        buffer
    } else {
        let spare = after.max(2 * capacity).next_multiple_of(64) - used;
        Tensor::cat(vec![buffer.narrow(2, 0, used), Tensor::zeros([b, g, spare, p], (&new.device(), new.dtype()))], 2)
    };
    buffer.slice_assign([0..b, 0..g, used..after, 0..p], new)
}

impl<B: Backend> Carried<B> for KvCache<B> {
    fn map(self, f: &mut impl FnMut(Tensor<B, 4>) -> Tensor<B, 4>) -> Self {
        let conv = self.conv.map(|conv| f(conv.unsqueeze_dim(1)).squeeze_dim(1));
        Self { k: f(self.k), v: f(self.v), used: self.used, conv }
    }
}

impl<B: KernelBackend> Attention<B> {
    pub(crate) fn take(config: &AttentionConfig, bag: &mut Bag<B>) -> Self {
        Self {
            q_proj: Linear::take(bag, "q_proj"),
            k_proj: Linear::take(bag, "k_proj"),
            v_proj: Linear::take(bag, "v_proj"),
            conv1d: config.conv_kernel.map(|_| Conv1d::take(bag)),
            o_proj: Linear::take(bag, "o_proj"),
            config: config.clone(),
        }
    }

    /// `[b, l, d]` -> `[b, l, d]`, for any length and any cache.
    pub fn forward(&self, x: Tensor<B, 3>, cache: Option<KvCache<B>>, sequence: &Sequence<B>) -> (Tensor<B, 3>, KvCache<B>) {
        if let Some(place) = sequence.place() {
            return self.step(x, cache.expect("who stands somewhere has a cache"), place, sequence);
        }
        let config = &self.config;
        let [b, l, _] = x.dims();
        let heads = |y: Tensor<B, 3>, count: usize| y.reshape([b, l, count, config.head_dim]).swap_dims(1, 2); // [b, count, l, p]
        let projected = [self.q_proj.forward(x.clone()), self.k_proj.forward(x.clone()), self.v_proj.forward(x)];
        let state = cache.as_ref().and_then(|cache| cache.conv.clone());
        let ([q, k, v], conv) = self.convolve(projected, state, sequence);
        let (mut q, mut k, v) = (heads(q, config.heads), heads(k, config.kv_heads), heads(v, config.kv_heads));
        if let Some(rope) = &config.rope {
            let tables = sequence.rope(rope, &q.device());
            q = rotate(q, &tables);
            k = rotate(k, &tables);
        }
        let cache = KvCache::append(cache, k, v, conv);
        let (k, v) = cache.used();
        let scale = config.scale.unwrap_or(1.0 / (config.head_dim as f32).sqrt());
        let y = attention(AttentionArgs { q, k, v, scale, mask: sequence.mask().clone() });
        let y = y.swap_dims(1, 2).reshape([b, l, config.heads * config.head_dim]);
        (self.o_proj.forward(y), cache)
    }

    /// One token of every row, `[b, 1, d]` -> `[b, 1, d]`.
    fn step(&self, x: Tensor<B, 3>, cache: KvCache<B>, place: &StepPlace<B>, sequence: &Sequence<B>) -> (Tensor<B, 3>, KvCache<B>) {
        let config = &self.config;
        let [b, _, _] = x.dims();
        let heads = |y: Tensor<B, 3>, count: usize| y.reshape([b, count, config.head_dim]);
        let projected = [self.q_proj.forward(x.clone()), self.k_proj.forward(x.clone()), self.v_proj.forward(x)];
        let KvCache { k: keys, v: values, used, conv } = cache;
        let ([q, k, v], conv) = self.convolve(projected, conv, sequence);
        let out = attention_step(StepArgs {
            q: heads(q, config.heads),
            k: heads(k, config.kv_heads),
            v: heads(v, config.kv_heads),
            angles: config.rope.as_ref().map(|rope| place.angles(rope, &keys.device())),
            keys,
            values,
            scale: config.scale.unwrap_or(1.0 / (config.head_dim as f32).sqrt()),
            standing: place.standing().clone(),
        });
        let y = self.o_proj.forward(out.y.reshape([b, 1, config.heads * config.head_dim]));
        (y, KvCache { k: out.keys, v: out.values, used: used + 1, conv })
    }

    /// The convolution of queries, keys and values, and its inputs to carry on.
    fn convolve(
        &self,
        projected: [Tensor<B, 3>; 3],
        state: Option<Tensor<B, 3>>,
        sequence: &Sequence<B>,
    ) -> ([Tensor<B, 3>; 3], Option<Tensor<B, 3>>) {
        let Some(conv1d) = &self.conv1d else { return (projected, None) };
        let widths = projected.each_ref().map(|part| part.dims()[2]);
        let convolved = causal_conv1d(ConvArgs {
            x: Tensor::cat(projected.to_vec(), 2),
            weight: conv1d.weight.val(),
            bias: conv1d.bias.as_ref().map(Param::val),
            state,
            segments: sequence.segments().cloned(),
            silu: false,
        });
        let mut start = 0;
        let parts = widths.map(|width| {
            start += width;
            convolved.y.clone().narrow(2, start - width, width)
        });
        (parts, Some(convolved.state))
    }

    /// Sets the base of the rotary positions, if there are any.
    pub(crate) fn rotate_by(&mut self, base: f64) {
        if let Some(rope) = &mut self.config.rope {
            rope.theta = base;
        }
    }

    pub(crate) fn for_each_linear(&mut self, path: &str, f: &mut dyn FnMut(&str, &mut Linear<B>)) {
        f(&format!("{path}.q_proj"), &mut self.q_proj);
        f(&format!("{path}.k_proj"), &mut self.k_proj);
        f(&format!("{path}.v_proj"), &mut self.v_proj);
        f(&format!("{path}.o_proj"), &mut self.o_proj);
    }
}
