//! Root-mean-square norm of a signal, gated or not, per group of channels.
//!
//! `v = y * silu(z)`, `out = v * rsqrt(mean(v^2) + eps) * weight`, the mean over each of `g` contiguous groups of
//! `e / g` channels; computed in float32. The gate comes first in every released Mamba-2 model. Without a gate `v = y`:
//! the norm before every mixer.

#[cfg(any(feature = "flex", feature = "ndarray"))]
pub(crate) mod cpu;
#[cfg(feature = "_cube")]
pub(crate) mod cube;
pub mod gradients;
pub mod reference;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::error::expect_shape;
use crate::path::announce;
use crate::{ArgumentError, KernelBackend, Op};

/// Arguments of [`rms_norm_gated`].
#[derive(Debug, Clone)]
pub struct NormArgs<B: Backend> {
    /// Signal, `[b, l, e]`.
    pub y: Tensor<B, 3>,
    /// Gate, `[b, l, e]`; none for the plain norm.
    pub z: Option<Tensor<B, 3>>,
    /// `[e]`.
    pub weight: Tensor<B, 1>,
    /// Groups that are normalised separately.
    pub groups: usize,
    /// Added to the mean square.
    pub eps: f32,
}

/// Gradients of [`NormArgs`].
#[derive(Debug, Clone)]
pub struct NormGrads<B: Backend> {
    /// `[b, l, e]`.
    pub y: Tensor<B, 3>,
    /// `[b, l, e]`, if there is a gate.
    pub z: Option<Tensor<B, 3>>,
    /// `[e]`.
    pub weight: Tensor<B, 1>,
}

impl<B: Backend> NormArgs<B> {
    /// Checks that the shapes agree.
    ///
    /// # Errors
    /// The first disagreement found.
    pub fn check(&self) -> Result<(), ArgumentError> {
        const OP: &str = "rms_norm_gated";
        let [b, l, e] = self.y.dims();
        if let Some(z) = &self.z {
            expect_shape(OP, "z", &z.dims(), &[b, l, e])?;
        }
        expect_shape(OP, "weight", &self.weight.dims(), &[e])?;
        if self.groups == 0 || !e.is_multiple_of(self.groups) {
            return Err(ArgumentError::NotDivisible { op: OP, what: "channels", value: e, by: "groups", divisor: self.groups });
        }
        Ok(())
    }
}

/// Runs the gated norm; differentiable in all three tensors. Returns `[b, l, e]` in the dtype of `y`.
///
/// # Panics
/// When [`NormArgs::check`] fails.
pub fn rms_norm_gated<B: KernelBackend>(args: NormArgs<B>) -> Tensor<B, 3> {
    if let Err(error) = args.check() {
        panic!("{error}");
    }
    if args.y.dims().contains(&0) {
        return args.y;
    }
    announce::<B>(Op::RmsNormGated, args.y.dtype());
    B::rms_norm_gated(args)
}
