//! The one decoder: embed, a list of layers, norm, head.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use terrarium_kernels::KernelBackend;

use crate::cache::{Cache, LayerCache};
use crate::config::{DecoderConfig, MixerConfig};
use crate::init::RandomSource;
use crate::layers::{Embedding, Linear, RmsNorm};
use crate::mixers::{Attention, Mamba2, Mlp};
use crate::params::{Bag, ParamSource, PathTracker};
use crate::sequence::{Context, Layout, Sequence};

/// A decoder language model.
#[derive(Module, Debug)]
pub struct Decoder<B: Backend> {
    /// Token vectors; the head too when there is no `lm_head`.
    pub embeddings: Embedding<B>,
    /// Norm, mixer, residual.
    pub layers: Vec<Layer<B>>,
    /// Final norm.
    pub norm_f: RmsNorm<B>,
    /// `[v, d]`.
    pub lm_head: Option<Linear<B>>,
}

/// One residual branch: `x + mixer(norm(x))`.
#[derive(Module, Debug)]
pub struct Layer<B: Backend> {
    /// Norm before the mixer.
    pub norm: RmsNorm<B>,
    /// What the layer does.
    pub mixer: Mixer<B>,
}

/// A layer's mixer.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "modules hold handles to tensors; there are few of them")]
pub enum Mixer<B: Backend> {
    /// Mamba-2.
    Mamba2(Mamba2<B>),
    /// Attention.
    Attention(Attention<B>),
    /// MLP.
    Mlp(Mlp<B>),
}

impl<B: KernelBackend> Layer<B> {
    /// `[b, l, d]` -> `[b, l, d]`.
    ///
    /// # Panics
    /// When the cache is of another kind of layer.
    pub fn forward(&self, x: Tensor<B, 3>, cache: Option<LayerCache<B>>, sequence: &Sequence<B>) -> (Tensor<B, 3>, LayerCache<B>) {
        let normed = self.norm.forward(x.clone());
        let (y, cache) = match (&self.mixer, cache) {
            (Mixer::Mamba2(mixer), cache @ (None | Some(LayerCache::Mamba2(_)))) => {
                let cache = cache.map(|cache| match cache {
                    LayerCache::Mamba2(cache) => cache,
                    _ => unreachable!("matched above"),
                });
                let (y, cache) = mixer.forward(normed, cache, sequence);
                (y, LayerCache::Mamba2(cache))
            }
            (Mixer::Attention(mixer), cache @ (None | Some(LayerCache::Attention(_)))) => {
                let cache = cache.map(|cache| match cache {
                    LayerCache::Attention(cache) => cache,
                    _ => unreachable!("matched above"),
                });
                let (y, cache) = mixer.forward(normed, cache, sequence);
                (y, LayerCache::Attention(cache))
            }
            (Mixer::Mlp(mixer), None | Some(LayerCache::Stateless)) => (mixer.forward(normed), LayerCache::Stateless),
            _ => panic!("the cache was made by another model: its layers are of other kinds"),
        };
        (x + y, cache)
    }
}

impl<B: KernelBackend> Decoder<B> {
    /// A model with the starting values of its family; the same on every backend.
    pub fn init(config: &DecoderConfig, seed: u64, device: &B::Device) -> Self {
        Self::build(config, &mut RandomSource::new(seed), DType::F32, device)
    }

    /// A model with the parameters of `source`, kept in `dtype` (those marked so in float32).
    pub fn build(config: &DecoderConfig, source: &mut dyn ParamSource, dtype: DType, device: &B::Device) -> Self {
        let specs = config.specs();
        let mut bag = |specs: &[crate::ParamSpec], prefix: &str| Bag::<B>::fill(specs, prefix, source, dtype, device);
        let embeddings = Embedding::take(&mut bag(&specs.embeddings, "embeddings"));
        let layers = config
            .layers
            .iter()
            .zip(&specs.layers)
            .enumerate()
            .map(|(i, (mixer, specs))| {
                let norm = RmsNorm::take(&mut bag(&specs.norm, &format!("layers.{i}.norm")), "weight", config.norm_eps);
                let mut bag = bag(&specs.mixer, &format!("layers.{i}.mixer"));
                let mixer = match mixer {
                    MixerConfig::Mamba2(config) => Mixer::Mamba2(Mamba2::take(config, &mut bag)),
                    MixerConfig::Attention(config) => Mixer::Attention(Attention::take(config, &mut bag)),
                    MixerConfig::Mlp(config) => Mixer::Mlp(Mlp::take(config, &mut bag)),
                };
                Layer { norm, mixer }
            })
            .collect();
        let norm_f = RmsNorm::take(&mut bag(&specs.norm_f, "norm_f"), "weight", config.norm_eps);
        let lm_head = (!config.tie_embeddings).then(|| Linear::take(&mut bag(&specs.lm_head, ""), "lm_head"));
        Self { embeddings, layers, norm_f, lm_head }
    }

    /// Ids `[b, l]` -> hidden states after the final norm `[b, l, d]`, and the cache for what follows. States at padding
    /// mean nothing.
    ///
    /// # Panics
    /// When `ids` and `layout` differ in shape, or the cache is of another model or batch size.
    pub fn hidden(&self, ids: Tensor<B, 2, Int>, cache: Option<Cache<B>>, layout: &Layout) -> (Tensor<B, 3>, Cache<B>) {
        assert_eq!(ids.dims(), layout.dims(), "ids and layout differ in shape");
        let device = ids.device();
        let (context, caches) = match cache {
            Some(cache) => (cache.context, cache.layers.into_iter().map(Some).collect()),
            None => (Context::start(ids.dims()[0]), vec![None; self.layers.len()]),
        };
        assert_eq!(caches.len(), self.layers.len(), "the cache was made by another model");
        let (sequence, context) = context.advance(layout, &device);

        let ids = sequence.order().map_or(ids.clone(), |order| order.ids(ids));
        let mut x = self.embeddings.forward(ids);
        let mut layers = Vec::with_capacity(self.layers.len());
        for (layer, cache) in self.layers.iter().zip(caches) {
            let (y, cache) = layer.forward(x, cache, &sequence);
            x = y;
            layers.push(cache);
        }
        let x = self.norm_f.forward(x);
        let x = sequence.order().map_or(x.clone(), |order| order.restore(x));
        (x, Cache { context, layers })
    }

    /// The head: hidden states `[.., d]` -> logits `[.., v]`.
    pub fn logits<const D: usize>(&self, hidden: Tensor<B, D>) -> Tensor<B, D> {
        match &self.lm_head {
            Some(head) => head.forward(hidden),
            None => terrarium_kernels::linear::linear(hidden, self.embeddings.weight.val(), None),
        }
    }

    /// Ids `[b, l]` -> logits `[b, l, v]`, and the cache for what follows. See [`Decoder::hidden`].
    ///
    /// # Panics
    /// As [`Decoder::hidden`].
    pub fn forward(&self, ids: Tensor<B, 2, Int>, cache: Option<Cache<B>>, layout: &Layout) -> (Tensor<B, 3>, Cache<B>) {
        let (hidden, cache) = self.hidden(ids, cache, layout);
        (self.logits(hidden), cache)
    }

    /// Calls `f` with every projection of every mixer and its path, such as `layers.3.mixer.in_proj`.
    pub fn for_each_linear(&mut self, f: &mut dyn FnMut(&str, &mut Linear<B>)) {
        for (i, layer) in self.layers.iter_mut().enumerate() {
            let path = format!("layers.{i}.mixer");
            match &mut layer.mixer {
                Mixer::Mamba2(mixer) => mixer.for_each_linear(&path, f),
                Mixer::Attention(mixer) => mixer.for_each_linear(&path, f),
                Mixer::Mlp(mixer) => mixer.for_each_linear(&path, f),
            }
        }
    }
}

impl<B: Backend> Decoder<B> {
    /// Every parameter with its path, adapters included.
    pub fn tensors(&self) -> Vec<(String, TensorData)> {
        struct Collect(PathTracker, Vec<(String, TensorData)>);
        impl<B: Backend> ModuleVisitor<B> for Collect {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                self.1.push((self.0.path(), param.val().into_data()));
            }
            fn enter_module(&mut self, name: &str, container_type: &str) {
                self.0.enter(name, container_type);
            }
            fn exit_module(&mut self, _name: &str, _container_type: &str) {
                self.0.exit();
            }
        }
        let mut collect = Collect(PathTracker::default(), Vec::new());
        self.visit(&mut collect);
        collect.1
    }
}
