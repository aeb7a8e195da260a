//! Caches as values: a clone is a snapshot.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};

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
    }

    fn map(self, mut f: impl FnMut(Tensor<B, 4>) -> Tensor<B, 4>) -> Self {
        Self { context: self.context, layers: self.layers.into_iter().map(|layer| layer.map(&mut f)).collect() }
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
