//! Linear projection with the weight as in Hugging Face files, and an optional low-rank adapter.

use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use terrarium_kernels::{KernelBackend, linear::linear};

use crate::params::Bag;

/// `y = x weight^T + bias (+ scale * x a^T b^T)`.
#[derive(Module, Debug)]
pub struct Linear<B: Backend> {
    /// `[out, in]`.
    pub weight: Param<Tensor<B, 2>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    /// Low-rank adapter.
    pub lora: Option<Lora<B>>,
}

/// A low-rank adapter (arXiv 2106.09685): adds `scale * b a` to the weight.
#[derive(Module, Debug)]
pub struct Lora<B: Backend> {
    /// `[rank, in]`.
    pub a: Param<Tensor<B, 2>>,
    /// `[out, rank]`.
    pub b: Param<Tensor<B, 2>>,
    /// `alpha / rank`.
    pub scale: f32,
}

impl<B: Backend> Linear<B> {
    /// Takes `<name>.weight` and, where the list has one, `<name>.bias`.
    pub(crate) fn take(bag: &mut Bag<B>, name: &str) -> Self {
        Self { weight: bag.take(&format!("{name}.weight")), bias: bag.optional(&format!("{name}.bias")), lora: None }
    }

    /// `[out, in]`.
    pub fn dims(&self) -> [usize; 2] {
        self.weight.dims()
    }
}

/// `x weight^T + bias` in the dtype of `x`: parameters kept in another one, as masters are in training, are rounded to it.
pub(crate) fn project<B: KernelBackend, const D: usize>(x: Tensor<B, D>, weight: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Tensor<B, D> {
    let dtype = x.dtype();
    linear(x, in_dtype(weight, dtype), bias.map(|bias| in_dtype(bias, dtype)))
}

/// `tensor` in `dtype`, as it is where it has it.
pub(crate) fn in_dtype<B: Backend, const D: usize>(tensor: Tensor<B, D>, dtype: DType) -> Tensor<B, D> {
    if tensor.dtype() == dtype { tensor } else { tensor.cast(dtype) }
}

impl<B: KernelBackend> Linear<B> {
    /// `[.., in]` -> `[.., out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        self.project(x, self.bias.as_ref().map(Param::val))
    }

    /// [`Linear::forward`] without the bias, for those who add it themselves.
    pub fn forward_unbiased<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        self.project(x, None)
    }

    fn project<const D: usize>(&self, x: Tensor<B, D>, bias: Option<Tensor<B, 1>>) -> Tensor<B, D> {
        let y = project(x.clone(), self.weight.val(), bias);
        match &self.lora {
            None => y,
            Some(lora) => y + project(project(x, lora.a.val(), None), lora.b.val(), None) * lora.scale,
        }
    }

    /// Adds the adapter into the weight and drops it.
    pub(crate) fn merge(&mut self) {
        let Some(lora) = self.lora.take() else { return };
        let weight = self.weight.val();
        let dtype = weight.dtype();
        let added = lora.b.val().matmul(lora.a.val()) * lora.scale;
        let merged = (weight.cast(DType::F32) + added.cast(DType::F32)).cast(dtype);
        self.weight = Param::from_tensor(merged.detach());
    }
}
