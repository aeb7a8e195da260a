//! Activation of a feed-forward block, with or without a gate (arXiv 2002.05202), in one pass each way.
//!
//! `out = act(gate) * up`, or `act(up)` where there is no gate; in float32, whatever the tensors are in. The backward computes
//! the activation again from its inputs, which alone are kept.

#[cfg(any(feature = "flex", feature = "ndarray"))]
pub(crate) mod cpu;
#[cfg(feature = "_cube")]
pub(crate) mod cube;
pub mod reference;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::error::expect_shape;
use crate::path::announce;
use crate::{ArgumentError, KernelBackend, Op};

/// Nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x` times the normal distribution function at `x`: GELU, exact (arXiv 1606.08415).
    Gelu,
    /// GELU in its approximation by `tanh`.
    GeluTanh,
    /// `max(x, 0)^2`: squared ReLU (arXiv 2109.08668).
    Relu2,
    /// `x` times the logistic function of `x`: SiLU, Swish.
    Silu,
}

impl Activation {
    /// All of them.
    pub const ALL: [Activation; 4] = [Activation::Gelu, Activation::GeluTanh, Activation::Relu2, Activation::Silu];
}

/// Arguments of [`glu`].
#[derive(Debug, Clone)]
pub struct GluArgs<B: Backend> {
    /// What is multiplied by the activated gate, or activated itself, `[b, l, f]`.
    pub up: Tensor<B, 3>,
    /// What is activated, `[b, l, f]`, in the dtype of `up`.
    pub gate: Option<Tensor<B, 3>>,
    /// The nonlinearity.
    pub activation: Activation,
}

/// Gradients of [`GluArgs`].
#[derive(Debug, Clone)]
pub struct GluGrads<B: Backend> {
    /// `[b, l, f]`.
    pub up: Tensor<B, 3>,
    /// `[b, l, f]`.
    pub gate: Option<Tensor<B, 3>>,
}

impl<B: Backend> GluArgs<B> {
    /// Checks that shapes and dtypes agree.
    ///
    /// # Errors
    /// The first disagreement found.
    pub fn check(&self) -> Result<(), ArgumentError> {
        const OP: &str = "glu";
        let Some(gate) = &self.gate else { return Ok(()) };
        expect_shape(OP, "gate", &gate.dims(), &self.up.dims())?;
        if gate.dtype() == self.up.dtype() {
            return Ok(());
        }
        let [expected, found] = [&self.up, gate].map(|tensor| format!("{:?}", tensor.dtype()));
        Err(ArgumentError::Dtype { op: OP, tensor: "gate", expected, found })
    }

    /// What [`KernelBackend::takes`] asks for.
    pub(crate) fn sizes(&self) -> [usize; 1] {
        [self.up.shape().num_elements()]
    }
}

/// Activates, and multiplies where there is a gate; differentiable in both tensors. `[b, l, f]`, in the dtype of `up`.
///
/// # Panics
/// When [`GluArgs::check`] fails.
pub fn glu<B: KernelBackend>(args: GluArgs<B>) -> Tensor<B, 3> {
    if let Err(error) = args.check() {
        panic!("{error}");
    }
    if args.up.dims().contains(&0) {
        return args.up;
    }
    announce::<B>(Op::Glu, args.up.dtype());
    B::glu(args)
}
