//! Token embedding, also used as the head of tied models.

use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::embedding::embedding;

use crate::params::Bag;

/// A table of token vectors.
#[derive(Module, Debug)]
pub struct Embedding<B: Backend> {
    /// `[v, d]`.
    pub weight: Param<Tensor<B, 2>>,
}

impl<B: Backend> Embedding<B> {
    pub(crate) fn take(bag: &mut Bag<B>) -> Self {
        Self { weight: bag.take("weight") }
    }
}

impl<B: KernelBackend> Embedding<B> {
    /// `[b, l]` ids -> `[b, l, d]`.
    pub fn forward(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        embedding(self.weight.val(), ids)
    }
}
