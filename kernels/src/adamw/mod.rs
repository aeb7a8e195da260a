//! One step of AdamW (arXiv 1711.05101), and the squared norms that clipping wants: a pass over each parameter.
//!
//! ```text
//! g      = clip grad
//! first  = b1 first + (1 - b1) g
//! second = b2 second + (1 - b2) g^2
//! value  = keep value - step first / (root sqrt(second) + eps)
//! ```
//!
//! `step` and `root` hold the learning rate and the corrections of the moments' bias, `keep` the decay of the value. Moments are float32; a
//! gradient may have another type. Fast paths change values and moments in place where nobody else holds them.

#[cfg(any(feature = "flex", feature = "ndarray"))]
pub(crate) mod cpu;
#[cfg(feature = "_cube")]
pub(crate) mod cube;
pub mod reference;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

/// Factors of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWFactors {
    /// Of the gradient (clipping).
    pub clip: f32,
    /// Decay rate of the first moment, and what is left to one.
    pub first: (f32, f32),
    /// Decay rate of the second moment, and what is left to one.
    pub second: (f32, f32),
    /// Of the root of the second moment.
    pub root: f32,
    /// Added to it.
    pub eps: f32,
    /// Of the quotient of the moments.
    pub step: f32,
    /// Of the value (weight decay).
    pub keep: f32,
}

/// One parameter, flattened: `[n]`.
#[derive(Debug, Clone)]
pub struct AdamWArgs<B: Backend> {
    /// The parameter.
    pub value: Tensor<B, 1>,
    /// Its gradient.
    pub grad: Tensor<B, 1>,
    /// First and second moment, float32; `None` before the first step.
    pub moments: Option<(Tensor<B, 1>, Tensor<B, 1>)>,
    /// Numbers of this step.
    pub factors: AdamWFactors,
}

/// What a step leaves, `[n]` each.
#[derive(Debug, Clone)]
pub struct AdamWOut<B: Backend> {
    /// The parameter, in its type.
    pub value: Tensor<B, 1>,
    /// Float32.
    pub first: Tensor<B, 1>,
    /// Float32.
    pub second: Tensor<B, 1>,
}
