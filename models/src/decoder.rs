//! The one decoder: embed, a list of layers, norm, head.

use std::ops::Range;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use terrarium_kernels::KernelBackend;

use crate::cache::{Cache, LayerCache};
use crate::config::{DecoderConfig, LayerSpecs, MixerConfig, Scaling};
use crate::init::RandomSource;
use crate::layers::linear::{in_dtype, project};
use crate::layers::{Embedding, Linear, Norm};
use crate::mixers::{Attention, Mamba, Mamba2, Mlp};
use crate::params::{Bag, ParamSource, PathTracker};
use crate::sequence::{Context, Layout, Sequence, StepPlace};

/// A decoder language model.
#[derive(Module, Debug)]
pub struct Decoder<B: Backend> {
    /// Token vectors; the head too when there is no `lm_head`.
    pub embeddings: Embedding<B>,
    /// Norm, mixer, residual.
    pub layers: Vec<Layer<B>>,
    /// Final norm.
    pub norm_f: Norm<B>,
    /// `[v, d]`.
    pub lm_head: Option<Linear<B>>,
    #[module(skip)]
    scaling: Scaling,
    #[module(skip)]
    compute: Option<DType>,
}

/// One residual branch: `mixer(norm(x))`, to be added to the residual stream.
#[derive(Module, Debug)]
pub struct Layer<B: Backend> {
    /// Norm before the mixer.
    pub norm: Norm<B>,
    /// What the layer does.
    pub mixer: Mixer<B>,
    /// Reads what the layer before it read.
    #[module(skip)]
    parallel: bool,
}

/// A layer's mixer.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "modules hold handles to tensors; there are few of them")]
pub enum Mixer<B: Backend> {
    /// Mamba.
    Mamba(Mamba<B>),
    /// Mamba-2.
    Mamba2(Mamba2<B>),
    /// Attention.
    Attention(Attention<B>),
    /// MLP.
    Mlp(Mlp<B>),
}

/// What goes from layer to layer.
#[derive(Debug, Clone)]
pub struct Stream<B: Backend> {
    /// The residual stream, `[b, l, d]`.
    pub x: Tensor<B, 3>,
    /// What the last layer gave: it is added to the stream in one pass with the norm that reads the sum.
    pub branch: Option<Tensor<B, 3>>,
    /// What the layer before read, where the next one runs beside it.
    pub before: Option<Tensor<B, 3>>,
}

const OTHER_MODEL: &str = "the cache was made by another model: its layers are of other kinds";

/// Runs a stateful mixer whose cache, if there is one, is of its own kind.
macro_rules! stateful {
    ($kind:ident, $mixer:expr, $x:expr, $cache:expr, $sequence:expr) => {{
        let cache = match $cache {
            None => None,
            Some(LayerCache::$kind(cache)) => Some(cache),
            Some(_) => panic!("{OTHER_MODEL}"),
        };
        let (y, cache) = $mixer.forward($x, cache, $sequence);
        (y, LayerCache::$kind(cache))
    }};
}

impl<B: KernelBackend> Layer<B> {
    /// The branch alone, without the residual: `[b, l, d]` -> `[b, l, d]`.
    ///
    /// # Panics
    /// When the cache is of another kind of layer.
    pub fn forward(&self, x: Tensor<B, 3>, cache: Option<LayerCache<B>>, sequence: &Sequence<B>) -> (Tensor<B, 3>, LayerCache<B>) {
        self.mix(self.norm.forward(x), cache, sequence)
    }

    /// The branch behind its norm.
    fn mix(&self, x: Tensor<B, 3>, cache: Option<LayerCache<B>>, sequence: &Sequence<B>) -> (Tensor<B, 3>, LayerCache<B>) {
        match &self.mixer {
            Mixer::Mamba(mixer) => stateful!(Mamba, mixer, x, cache, sequence),
            Mixer::Mamba2(mixer) => stateful!(Mamba2, mixer, x, cache, sequence),
            Mixer::Attention(mixer) => stateful!(Attention, mixer, x, cache, sequence),
            Mixer::Mlp(mixer) => match cache {
                None | Some(LayerCache::Stateless) => (mixer.forward(x), LayerCache::Stateless),
                Some(_) => panic!("{OTHER_MODEL}"),
            },
        }
    }

    /// Layer `i` of a model, with the parameters of `source`.
    ///
    /// # Panics
    /// When the model has no such layer.
    pub fn build(config: &DecoderConfig, i: usize, source: &mut dyn ParamSource, dtype: DType, device: &B::Device) -> Self {
        Self::from_specs(config, i, &config.specs().layers[i], source, dtype, device)
    }

    fn from_specs(
        config: &DecoderConfig,
        i: usize,
        specs: &LayerSpecs,
        source: &mut dyn ParamSource,
        dtype: DType,
        device: &B::Device,
    ) -> Self {
        let norm = Norm::take(&config.norm, &mut Bag::fill(&specs.norm, &format!("layers.{i}.norm"), source, dtype, device));
        let mut bag = Bag::<B>::fill(&specs.mixer, &format!("layers.{i}.mixer"), source, dtype, device);
        let mixer = match &config.layers[i] {
            MixerConfig::Mamba(config) => Mixer::Mamba(Mamba::take(config, &mut bag)),
            MixerConfig::Mamba2(config) => Mixer::Mamba2(Mamba2::take(config, &mut bag)),
            MixerConfig::Attention(config) => Mixer::Attention(Attention::take(config, &mut bag)),
            MixerConfig::Mlp(config) => Mixer::Mlp(Mlp::take(config, &mut bag)),
        };
        let parallel = config.parallel_mlp && i > 0 && matches!(config.layers[i], MixerConfig::Mlp(_));
        Self { norm, mixer, parallel }
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
        let embeddings = Embedding::take(&mut Bag::fill(&specs.embeddings, "embeddings", source, dtype, device));
        let layers = specs.layers.iter().enumerate().map(|(i, specs)| Layer::from_specs(config, i, specs, source, dtype, device)).collect();
        let norm_f = Norm::take(&config.norm, &mut Bag::fill(&specs.norm_f, "norm_f", source, dtype, device));
        let lm_head = (!config.tie_embeddings).then(|| Linear::take(&mut Bag::fill(&specs.lm_head, "", source, dtype, device), "lm_head"));
        Self { embeddings, layers, norm_f, lm_head, scaling: config.scaling, compute: None }
    }

    /// The same model whose layers and head compute in `dtype`, whatever the dtype of its parameters. Float32 parameters are then the
    /// masters of mixed precision: they are rounded where they enter a product, their gradients are float32, and so are norms, scan
    /// states and the residual stream, which has the dtype of the embeddings.
    pub fn computing_in(self, dtype: DType) -> Self {
        Self { compute: Some(dtype), ..self }
    }

    /// The same model whose rotary positions, where it has any, turn with frequencies of another base: a larger one for longer
    /// contexts (arXiv 2309.16039, section 4.1). Caches made before do not fit it.
    pub fn rotating(mut self, base: f64) -> Self {
        for layer in &mut self.layers {
            if let Mixer::Attention(mixer) = &mut layer.mixer {
                mixer.rotate_by(base);
            }
        }
        self
    }

    /// The same model with everything that depends on parameters alone computed ahead: the same results in fewer operations.
    /// For inference only: its parameters are no longer those of a checkpoint, so it is neither trained nor saved.
    pub fn frozen(mut self) -> Self {
        self.for_each_linear(&mut |_, linear| linear.merge());
        for layer in &mut self.layers {
            layer.norm.freeze();
            match &mut layer.mixer {
                Mixer::Mamba(mixer) => mixer.freeze(),
                Mixer::Mamba2(mixer) => mixer.freeze(),
                Mixer::Attention(_) | Mixer::Mlp(_) => {}
            }
        }
        self.norm_f.freeze();
        self
    }

    /// Whether what the model carries from token to token stays where it is: no layer keeps keys and values of all tokens.
    pub fn has_constant_state(&self) -> bool {
        !self.layers.iter().any(|layer| matches!(layer.mixer, Mixer::Attention(_)))
    }

    /// What a mixer reads.
    fn entering(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        match self.compute {
            Some(dtype) => in_dtype(x, dtype),
            None => x,
        }
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
        self.through(ids, caches, &sequence, context)
    }

    /// One token of each row, ids `[b, 1]` -> hidden states `[b, 1, d]`, for rows that stand at `place`: as [`Decoder::hidden`] behind
    /// `cache`, which has the place's room, but the same call for every token. The caller advances the place.
    ///
    /// # Panics
    /// When the cache is of another model or batch size, has other room, or none left.
    pub fn step(&self, ids: Tensor<B, 2, Int>, cache: Cache<B>, place: &StepPlace<B>) -> (Tensor<B, 3>, Cache<B>) {
        assert_eq!(cache.layers.len(), self.layers.len(), "the cache was made by another model");
        assert!(cache.len() < place.capacity(), "no room for another token");
        let mut context = cache.context;
        context.skip(1);
        self.through(ids, cache.layers.into_iter().map(Some).collect(), &Sequence::step(place), context)
    }

    fn through(
        &self,
        ids: Tensor<B, 2, Int>,
        caches: Vec<Option<LayerCache<B>>>,
        sequence: &Sequence<B>,
        context: Context,
    ) -> (Tensor<B, 3>, Cache<B>) {
        let (stream, layers) = self.pass(0..self.layers.len(), self.enter(ids, sequence), caches, sequence);
        (self.leave(stream, sequence), Cache { context, layers })
    }

    /// The embeddings: ids `[b, l]` -> what the first layer reads. [`Decoder::hidden`] is this, [`Decoder::pass`] through all layers, and
    /// [`Decoder::leave`].
    pub fn enter(&self, ids: Tensor<B, 2, Int>, sequence: &Sequence<B>) -> Stream<B> {
        let ids = sequence.order().map_or(ids.clone(), |order| order.ids(ids));
        Stream { x: scaled(self.embeddings.forward(ids), self.scaling.embeddings), branch: None, before: None }
    }

    /// Some of the layers, with the cache of each, if there is one: what the next layer reads, and the caches for what follows.
    ///
    /// # Panics
    /// When there is no such layer, or not a cache for each.
    pub fn pass(
        &self,
        layers: Range<usize>,
        stream: Stream<B>,
        caches: Vec<Option<LayerCache<B>>>,
        sequence: &Sequence<B>,
    ) -> (Stream<B>, Vec<LayerCache<B>>) {
        assert_eq!(layers.len(), caches.len(), "a cache for each layer");
        let Stream { mut x, mut branch, mut before } = stream;
        let mut after = Vec::with_capacity(layers.len());
        for (i, cache) in layers.zip(caches) {
            let layer = &self.layers[i];
            let beside = before.take().filter(|_| layer.parallel);
            let (normed, input) = match beside {
                Some(input) => {
                    if let Some(branch) = branch.take() {
                        let dtype = x.dtype();
                        x = x + in_dtype(branch, dtype);
                    }
                    (layer.norm.forward(input.clone()), input)
                }
                None => {
                    let (normed, sum) = layer.norm.forward_after(branch.take(), x);
                    x = sum;
                    (normed, x.clone())
                }
            };
            if self.layers.get(i + 1).is_some_and(|next| next.parallel) {
                before = Some(input);
            }
            let (y, cache) = layer.mix(self.entering(normed), cache, sequence);
            branch = Some(scaled(y, self.scaling.residual));
            after.push(cache);
        }
        (Stream { x, branch, before }, after)
    }

    /// The last norm: what the last layer gave -> hidden states `[b, l, d]`.
    pub fn leave(&self, stream: Stream<B>, sequence: &Sequence<B>) -> Tensor<B, 3> {
        let (x, _) = self.norm_f.forward_after(stream.branch, stream.x);
        let x = self.entering(x);
        sequence.order().map_or(x.clone(), |order| order.restore(x))
    }

    /// The head: hidden states `[.., d]` -> logits `[.., v]`.
    pub fn logits<const D: usize>(&self, hidden: Tensor<B, D>) -> Tensor<B, D> {
        let logits = match &self.lm_head {
            Some(head) => head.forward(hidden),
            None => project(hidden, self.embeddings.weight.val(), None),
        };
        scaled(logits, 1.0 / self.scaling.logits)
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
                Mixer::Mamba(mixer) => mixer.for_each_linear(&path, f),
                Mixer::Mamba2(mixer) => mixer.for_each_linear(&path, f),
                Mixer::Attention(mixer) => mixer.for_each_linear(&path, f),
                Mixer::Mlp(mixer) => mixer.for_each_linear(&path, f),
            }
        }
    }
}

/// Times a constant, which is one for most families.
fn scaled<B: Backend, const D: usize>(x: Tensor<B, D>, by: f32) -> Tensor<B, D> {
    if by == 1.0 { x } else { x * by }
}

/// One parameter of a model, to be read when it is wanted.
pub struct Reader {
    /// Its path.
    pub path: String,
    /// Its element type.
    pub dtype: DType,
    /// How many elements it has.
    pub elements: usize,
    read: Box<dyn Fn() -> TensorData>,
}

impl Reader {
    /// Its values, copied from the device.
    pub fn read(&self) -> TensorData {
        (self.read)()
    }
}

impl<B: Backend> Decoder<B> {
    /// Every parameter with its path, adapters included; values are read one by one.
    pub fn readers(&self) -> Vec<Reader> {
        struct Collect(PathTracker, Vec<Reader>);
        impl<B: Backend> ModuleVisitor<B> for Collect {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                let tensor = param.val();
                let (dtype, elements) = (tensor.dtype(), tensor.dims().iter().product());
                self.1.push(Reader { path: self.0.path(), dtype, elements, read: Box::new(move || tensor.clone().into_data()) });
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

    /// The first, middle and last rows of every parameter, with its path: enough to tell one model from another.
    pub fn samples(&self) -> Vec<(String, TensorData)> {
        struct Collect(PathTracker, Vec<(String, TensorData)>);
        impl<B: Backend> ModuleVisitor<B> for Collect {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                let tensor = param.val();
                let rows = tensor.dims()[0];
                let picked: Vec<i32> =
                    [0, rows / 2, rows.saturating_sub(1)].into_iter().filter(|&row| row < rows).map(|row| row as i32).collect();
                let index = Tensor::<B, 1, Int>::from_data(TensorData::new(picked.clone(), [picked.len()]), &tensor.device());
                self.1.push((self.0.path(), tensor.select(0, index).into_data()));
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

    /// Every parameter with its path, adapters included.
    pub fn tensors(&self) -> Vec<(String, TensorData)> {
        self.readers().into_iter().map(|reader| (reader.path.clone(), reader.read())).collect()
    }
}
