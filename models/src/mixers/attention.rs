//! Causal self-attention: multi-head or grouped-query, with full, partial or no rotary positions.

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use terrarium_kernels::KernelBackend;
use terrarium_kernels::attention::{AttentionArgs, attention};

use super::{Parameters, linear_specs};
use crate::cache::Carried;
use crate::init::InitScale;
use crate::layers::{Linear, RopeConfig, rotate};
use crate::params::{Bag, ParamSpec};
use crate::sequence::Sequence;

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
    /// Biases on all four projections.
    pub bias: bool,
}

impl AttentionConfig {
    /// Bytes of keys and values per token, at `size` bytes per element.
    pub fn cache_bytes(&self, size: usize) -> usize {
        2 * self.kv_heads * self.head_dim * size
    }
}

impl Parameters for AttentionConfig {
    fn parameters(&self, d: usize, scale: InitScale) -> Vec<ParamSpec> {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let input = scale.linear(d);
        [("q_proj", q, d, input), ("k_proj", kv, d, input), ("v_proj", kv, d, input), ("o_proj", d, q, scale.output(q, false))]
            .into_iter()
            .flat_map(|(name, out, inputs, init)| linear_specs(name, out, inputs, self.bias, init))
            .collect()
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
}

impl<B: Backend> KvCache<B> {
    /// The slots in use, `[b, g, s, p]` each.
    pub fn used(&self) -> (Tensor<B, 4>, Tensor<B, 4>) {
        (self.k.clone().narrow(2, 0, self.used), self.v.clone().narrow(2, 0, self.used))
    }

    /// Adds `[b, g, l, p]` keys and values behind those in use.
    fn append(past: Option<Self>, k: Tensor<B, 4>, v: Tensor<B, 4>) -> Self {
        let Some(Self { k: old_k, v: old_v, used }) = past else {
            let used = k.dims()[2];
            return Self { k, v, used };
        };
        let after = used + k.dims()[2];
        Self { k: write(old_k, used, k), v: write(old_v, used, v), used: after }
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
        Self { k: f(self.k), v: f(self.v), used: self.used }
    }
}

impl<B: KernelBackend> Attention<B> {
    pub(crate) fn take(config: &AttentionConfig, bag: &mut Bag<B>) -> Self {
        Self {
            q_proj: Linear::take(bag, "q_proj"),
            k_proj: Linear::take(bag, "k_proj"),
            v_proj: Linear::take(bag, "v_proj"),
            o_proj: Linear::take(bag, "o_proj"),
            config: config.clone(),
        }
    }

    /// `[b, l, d]` -> `[b, l, d]`, for any length and any cache.
    pub fn forward(&self, x: Tensor<B, 3>, cache: Option<KvCache<B>>, sequence: &Sequence<B>) -> (Tensor<B, 3>, KvCache<B>) {
        let config = &self.config;
        let [b, l, _] = x.dims();
        let heads = |y: Tensor<B, 3>, count: usize| y.reshape([b, l, count, config.head_dim]).swap_dims(1, 2); // [b, count, l, p]
        let mut q = heads(self.q_proj.forward(x.clone()), config.heads);
        let mut k = heads(self.k_proj.forward(x.clone()), config.kv_heads);
        let v = heads(self.v_proj.forward(x), config.kv_heads);
        if let Some(rope) = &config.rope {
            let tables = sequence.rope(rope, &q.device());
            q = rotate(q, &tables);
            k = rotate(k, &tables);
        }
        let cache = KvCache::append(cache, k, v);
        let (k, v) = cache.used();
        let scale = config.scale.unwrap_or(1.0 / (config.head_dim as f32).sqrt());
        let y = attention(AttentionArgs { q, k, v, scale, mask: sequence.mask().clone() });
        let y = y.swap_dims(1, 2).reshape([b, l, config.heads * config.head_dim]);
        (self.o_proj.forward(y), cache)
    }

    pub(crate) fn for_each_linear(&mut self, path: &str, f: &mut dyn FnMut(&str, &mut Linear<B>)) {
        f(&format!("{path}.q_proj"), &mut self.q_proj);
        f(&format!("{path}.k_proj"), &mut self.k_proj);
        f(&format!("{path}.v_proj"), &mut self.v_proj);
        f(&format!("{path}.o_proj"), &mut self.o_proj);
    }
}
