//! Caches as values: a clone is a snapshot.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::mixers::{KvCache, Mamba2Cache, MambaCache};
use crate::sequence::Context;

/// Everything a decoder carries from one call to the next.
#[derive(Debug, Clone)]
pub struct Cache<B: Backend> {
    /// Where each row stands.
    pub context: Context,
    /// One entry per layer.
    pub layers: Vec<LayerCache<B>>,
}

/// What one layer carries.
#[derive(Debug, Clone)]
pub enum LayerCache<B: Backend> {
    /// Keys and values.
    Attention(KvCache<B>),
    /// Convolution inputs and scan state.
    Mamba(MambaCache<B>),
    /// Convolution inputs and SSM state.
    Mamba2(Mamba2Cache<B>),
    /// Nothing (MLP).
    Stateless,
}

/// Something that holds tensors with the batch in dimension 0.
pub(crate) trait Carried<B: Backend>: Sized {
    /// Applies `f` to every tensor.
    fn map(self, f: &mut impl FnMut(Tensor<B, 4>) -> Tensor<B, 4>) -> Self;
}

impl<B: Backend> Carried<B> for LayerCache<B> {
    fn map(self, f: &mut impl FnMut(Tensor<B, 4>) -> Tensor<B, 4>) -> Self {
        match self {
            Self::Attention(cache) => Self::Attention(cache.map(f)),
            Self::Mamba(cache) => Self::Mamba(cache.map(f)),
            Self::Mamba2(cache) => Self::Mamba2(cache.map(f)),
            Self::Stateless => Self::Stateless,
        }
    }
}

impl<B: Backend> Cache<B> {
    /// Rows.
    pub fn batch(&self) -> usize {
        self.context.batch()
    }

    /// Tokens seen by each row, padding included.
    pub fn len(&self) -> usize {
        self.context.slots()
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes note that every row went on by `tokens` tokens of its document, which were read into these very tensors without this cache
    /// being told.
    pub fn advance(&mut self, tokens: usize) {
        self.context.skip(tokens);
        self.settle();
    }

    /// Takes note that rows stand where `context` says, although steps were told otherwise: they were recorded, not taken.
    pub fn rewind(&mut self, context: Context) {
        self.context = context;
        self.settle();
    }

    /// Slots in use are those that rows have seen.
    fn settle(&mut self) {
        let used = self.context.slots();
        for layer in &mut self.layers {
            if let LayerCache::Attention(cache) = layer {
                cache.set_used(used);
            }
        }
    }

    /// Tokens for whose keys and values there is room without moving them; `None` where none are kept.
    pub fn capacity(&self) -> Option<usize> {
        let capacity = |layer: &LayerCache<B>| match layer {
            LayerCache::Attention(cache) => Some(cache.capacity()),
            _ => None,
        };
        self.layers.iter().filter_map(capacity).min()
    }

    /// Makes room for the keys and values of exactly `capacity` tokens.
    ///
    /// # Panics
    /// When these are fewer than there are.
    pub fn with_capacity(self, capacity: usize) -> Self {
        assert!(capacity >= self.len(), "room for {capacity} tokens is less than the {} there are", self.len());
        let sized = |layer| match layer {
            LayerCache::Attention(cache) => LayerCache::Attention(cache.with_capacity(capacity)),
            other => other,
        };
        Self { context: self.context, layers: self.layers.into_iter().map(sized).collect() }
    }

    /// Every tensor as it lies, room for more included.
    pub fn buffers(&self) -> Vec<Tensor<B, 4>> {
        let mut all = Vec::new();
        let _ = self.clone().map(|tensor| {
            all.push(tensor.clone());
            tensor
        });
        all
    }

    fn map(self, mut f: impl FnMut(Tensor<B, 4>) -> Tensor<B, 4>) -> Self {
        Self { context: self.context, layers: self.layers.into_iter().map(|layer| layer.map(&mut f)).collect() }
    }

    /// Has room for `slots` tokens of every row, padding included: up to there keys and values are not copied to larger buffers when
    /// tokens are read, and take no more memory than these.
    pub fn reserve(self, slots: usize) -> Self {
        let room = |layer| match layer {
            LayerCache::Attention(cache) => LayerCache::Attention(cache.reserve(slots)),
            other => other,
        };
        Self { context: self.context, layers: self.layers.into_iter().map(room).collect() }
    }

    /// As large as after `slots` tokens of every row, with room for `room`: keys and values are those of the tokens read, over and over,
    /// and states of constant size stay as they are. For measuring what long contexts cost without reading one; what a model makes of it
    /// means nothing.
    pub fn stretched(mut self, slots: usize, room: usize) -> Self {
        self.context.skip(slots.saturating_sub(self.len()));
        let stretched = |layer| match layer {
            LayerCache::Attention(cache) => LayerCache::Attention(cache.repeat(slots, room)),
            other => other,
        };
        Self { context: self.context, layers: self.layers.into_iter().map(stretched).collect() }
    }

    /// As it was after the first `tokens` tokens of every row; `None` where states were carried on, which know no way back, and where a row
    /// holds padding or several documents.
    pub fn cut(self, tokens: usize) -> Option<Self> {
        let (rows, len) = (self.batch(), self.len());
        if tokens > len || self.context != Context::plain(rows, len) {
            return None;
        }
        let cut = |layer| match layer {
            LayerCache::Attention(cache) => cache.cut(tokens).map(LayerCache::Attention),
            LayerCache::Stateless => Some(LayerCache::Stateless),
            LayerCache::Mamba(_) | LayerCache::Mamba2(_) => None,
        };
        let layers = self.layers.into_iter().map(cut).collect::<Option<Vec<_>>>()?;
        Some(Self { context: Context::plain(rows, tokens), layers })
    }

    /// A cache of the same model with other contents. `give` is asked for each tensor by the name that [`Cache::tensors`] gives it, with its
    /// shape and element type.
    ///
    /// # Errors
    /// Those of `give`.
    pub fn refilled<E>(
        &self,
        context: Context,
        mut give: impl FnMut(String, [usize; 4], DType) -> Result<Tensor<B, 4>, E>,
    ) -> Result<Self, E> {
        let (rows, slots) = (context.batch(), context.slots());
        let mut layers = Vec::with_capacity(self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            let mut ask = |name: &str, like: Tensor<B, 4>| {
                let [_, x, y, z] = like.dims();
                let dims = [rows, x, if matches!(name, "k" | "v") { slots } else { y }, z];
                give(format!("layers.{i}.{name}"), dims, like.dtype())
            };
            layers.push(match layer {
                LayerCache::Attention(cache) => {
                    let (k, v) = cache.used();
                    let (k, v) = (ask("k", k)?, ask("v", v)?);
                    let conv = cache.conv.clone().map(|conv| ask("conv", conv.unsqueeze_dim(1))).transpose()?;
                    LayerCache::Attention(KvCache::restored(k, v, conv.map(|conv| conv.squeeze_dim(1))))
                }
                LayerCache::Mamba(cache) => LayerCache::Mamba(MambaCache {
                    conv: ask("conv", cache.conv.clone().unsqueeze_dim(1))?.squeeze_dim(1),
                    ssm: ask("ssm", cache.ssm.clone().unsqueeze_dim(1))?.squeeze_dim(1),
                }),
                LayerCache::Mamba2(cache) => LayerCache::Mamba2(Mamba2Cache {
                    conv: ask("conv", cache.conv.clone().unsqueeze_dim(1))?.squeeze_dim(1),
                    ssm: ask("ssm", cache.ssm.clone())?,
                }),
                LayerCache::Stateless => LayerCache::Stateless,
            });
        }
        Ok(Self { context, layers })
    }

    /// Keeps the given rows, in the given order.
    ///
    /// # Panics
    /// When a row does not exist.
    pub fn select_rows(self, rows: &[usize]) -> Self {
        let context = self.context.select_rows(rows);
        let index: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
        let selected = self.map(|tensor| {
            let index = Tensor::<B, 1, Int>::from_data(TensorData::new(index.clone(), [index.len()]), &tensor.device());
            tensor.select(0, index)
        });
        Self { context, ..selected }
    }

    /// Cuts the gradient: what comes after does not reach what came before (truncated back-propagation).
    pub fn detach(self) -> Self {
        self.map(Tensor::detach)
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        let mut bytes = 0;
        let _ = self.clone().map(|tensor| {
            bytes += tensor.dims().iter().product::<usize>() * tensor.dtype().size();
            tensor
        });
        bytes
    }

    /// Every tensor with its name, such as `layers.0.ssm`.
    pub fn tensors(&self) -> Vec<(String, Tensor<B, 4>)> {
        let mut tensors = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            match layer {
                LayerCache::Attention(cache) => {
                    let (k, v) = cache.used();
                    tensors.extend([(format!("layers.{i}.k"), k), (format!("layers.{i}.v"), v)]);
                    tensors.extend(cache.conv.clone().map(|conv| (format!("layers.{i}.conv"), conv.unsqueeze_dim(1))));
                }
                LayerCache::Mamba(cache) => {
                    tensors.push((format!("layers.{i}.conv"), cache.conv.clone().unsqueeze_dim(1)));
                    tensors.push((format!("layers.{i}.ssm"), cache.ssm.clone().unsqueeze_dim(1)));
                }
                LayerCache::Mamba2(cache) => {
                    tensors.push((format!("layers.{i}.conv"), cache.conv.clone().unsqueeze_dim(1)));
                    tensors.push((format!("layers.{i}.ssm"), cache.ssm.clone()));
                }
                LayerCache::Stateless => {}
            }
        }
        tensors
    }
}
