//! Causal depthwise convolution over time, with an optional SiLU.
//!
//! `y[t] = act(bias + sum_j weight[:, j] * u[t - (k - 1) + j])`, `j < k`, where inputs before the row come from `state`
//! and inputs of another segment count as zero (Mamba-2, arXiv 2405.21060, section 7; the causal-conv1d package).

#[cfg(any(feature = "flex", feature = "ndarray"))]
pub(crate) mod cpu;
#[cfg(feature = "_cube")]
pub(crate) mod cube;
pub mod reference;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::error::expect_shape;
use crate::path::announce;
use crate::{ArgumentError, KernelBackend, Op, Segments};

/// Arguments of [`causal_conv1d`].
#[derive(Debug, Clone)]
pub struct ConvArgs<B: Backend> {
    /// Input, `[b, l, e]`.
    pub x: Tensor<B, 3>,
    /// Taps, oldest first, `[e, k]`.
    pub weight: Tensor<B, 2>,
    /// `[e]`.
    pub bias: Option<Tensor<B, 1>>,
    /// The last `k - 1` inputs before this row, oldest first, `[b, k - 1, e]`; zeros when absent.
    pub state: Option<Tensor<B, 3>>,
    /// Document boundaries and padding.
    pub segments: Option<Segments<B>>,
    /// Apply SiLU to the result.
    pub silu: bool,
}

/// Results of [`causal_conv1d`].
#[derive(Debug, Clone)]
pub struct ConvOut<B: Backend> {
    /// `[b, l, e]`.
    pub y: Tensor<B, 3>,
    /// The last `k - 1` inputs, zero where they belong to an earlier segment than the last, `[b, k - 1, e]`.
    pub state: Tensor<B, 3>,
}

/// Gradients of [`ConvArgs`]; `None` where the argument was absent.
#[derive(Debug, Clone)]
pub struct ConvGrads<B: Backend> {
    /// `[b, l, e]`.
    pub x: Tensor<B, 3>,
    /// `[e, k]`.
    pub weight: Tensor<B, 2>,
    /// `[e]`.
    pub bias: Option<Tensor<B, 1>>,
    /// `[b, k - 1, e]`.
    pub state: Option<Tensor<B, 3>>,
}

impl<B: Backend> ConvArgs<B> {
    /// For [`KernelBackend::takes`].
    pub(crate) fn sizes(&self) -> [usize; 1] {
        [self.weight.dims()[1]]
    }

    /// Checks that the shapes agree.
    ///
    /// # Errors
    /// The first disagreement found.
    pub fn check(&self) -> Result<(), ArgumentError> {
        const OP: &str = "causal_conv1d";
        let [b, l, e] = self.x.dims();
        let [we, k] = self.weight.dims();
        expect_shape(OP, "weight", &[we, k.max(1)], &[e, k])?;
        if let Some(bias) = &self.bias {
            expect_shape(OP, "bias", &bias.dims(), &[e])?;
        }
        if let Some(state) = &self.state {
            expect_shape(OP, "state", &state.dims(), &[b, k - 1, e])?;
        }
        if let Some(segments) = &self.segments {
            expect_shape(OP, "segments", &segments.dims(), &[b, l])?;
        }
        Ok(())
    }
}

/// Runs the convolution; differentiable in every tensor, states included.
///
/// # Panics
/// When [`ConvArgs::check`] fails.
pub fn causal_conv1d<B: KernelBackend>(args: ConvArgs<B>) -> ConvOut<B> {
    if let Err(error) = args.check() {
        panic!("{error}");
    }
    announce::<B>(Op::CausalConv1d, args.x.dtype());
    B::causal_conv1d(args)
}
