//! State-space duality: the selective state-space scan of Mamba-2 with one scalar decay per head.
//!
//! With `delta_t = clamp(softplus(dt_t + dt_bias))`, `a_t = delta_t * a` and head `j` reading group `j / (h / g)`:
//!
//! ```text
//! S_t = rho_t * exp(a_t) * S_{t-1} + delta_t * x_t B_t^T      S: [p, n]
//! y_t = S_t C_t + d * x_t
//! ```
//!
//! `rho_t` is 0 where a new segment begins, else 1 (arXiv 2405.21060, equations 1 and 16, listing 1). Computed chunk by
//! chunk as matrix products; any length, any incoming state; `S` and everything that decays is float32.

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

/// What is done to `dt` before use, and the chunk length.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SsdOptions {
    /// Pass `dt + dt_bias` through softplus.
    pub dt_softplus: bool,
    /// Limits applied after softplus, in the scan and in the single step alike.
    pub dt_limit: (f32, f32),
    /// Chunk length of chunked paths; a path may take another one.
    pub chunk: usize,
}

impl Default for SsdOptions {
    fn default() -> Self {
        Self { dt_softplus: true, dt_limit: (0.0, f32::INFINITY), chunk: 64 }
    }
}

/// Arguments of [`ssd`].
#[derive(Debug, Clone)]
pub struct SsdArgs<B: Backend> {
    /// `[b, l, h, p]`.
    pub x: Tensor<B, 4>,
    /// Raw step sizes, `[b, l, h]`.
    pub dt: Tensor<B, 3>,
    /// Decay rates, negative, `[h]` (`-exp(A_log)`).
    pub a: Tensor<B, 1>,
    /// `[b, l, g, n]`.
    pub b: Tensor<B, 4>,
    /// `[b, l, g, n]`.
    pub c: Tensor<B, 4>,
    /// Skip connection, `[h]`.
    pub d: Option<Tensor<B, 1>>,
    /// `[h]`.
    pub dt_bias: Option<Tensor<B, 1>>,
    /// Incoming state, float32 `[b, h, p, n]`; zeros when absent.
    pub state: Option<Tensor<B, 4>>,
    /// Document boundaries and padding.
    pub segments: Option<Segments<B>>,
    /// Treatment of `dt`.
    pub options: SsdOptions,
}

/// Results of [`ssd`].
#[derive(Debug, Clone)]
pub struct SsdOut<B: Backend> {
    /// `[b, l, h, p]`, dtype of `x`; zero at padding.
    pub y: Tensor<B, 4>,
    /// State after each row's last real token, float32 `[b, h, p, n]`.
    pub state: Tensor<B, 4>,
}

/// Gradients of [`SsdArgs`]; `None` where the argument was absent.
#[derive(Debug, Clone)]
pub struct SsdGrads<B: Backend> {
    /// `[b, l, h, p]`.
    pub x: Tensor<B, 4>,
    /// `[b, l, h]`.
    pub dt: Tensor<B, 3>,
    /// `[h]`.
    pub a: Tensor<B, 1>,
    /// `[b, l, g, n]`.
    pub b: Tensor<B, 4>,
    /// `[b, l, g, n]`.
    pub c: Tensor<B, 4>,
    /// `[h]`.
    pub d: Option<Tensor<B, 1>>,
    /// `[h]`.
    pub dt_bias: Option<Tensor<B, 1>>,
    /// `[b, h, p, n]`.
    pub state: Option<Tensor<B, 4>>,
}

/// Sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SsdDims {
    /// Batch.
    pub b: usize,
    /// Length.
    pub l: usize,
    /// Heads.
    pub h: usize,
    /// Head width.
    pub p: usize,
    /// Groups.
    pub g: usize,
    /// State width.
    pub n: usize,
}

impl<B: Backend> SsdArgs<B> {
    /// Checks that the shapes agree.
    ///
    /// # Errors
    /// The first disagreement found.
    pub fn check(&self) -> Result<SsdDims, ArgumentError> {
        const OP: &str = "ssd";
        let [b, l, h, p] = self.x.dims();
        let [_, _, g, n] = self.b.dims();
        expect_shape(OP, "dt", &self.dt.dims(), &[b, l, h])?;
        expect_shape(OP, "a", &self.a.dims(), &[h])?;
        expect_shape(OP, "b", &self.b.dims(), &[b, l, g, n])?;
        expect_shape(OP, "c", &self.c.dims(), &[b, l, g, n])?;
        if g == 0 || !h.is_multiple_of(g) {
            return Err(ArgumentError::NotDivisible { op: OP, what: "heads", value: h, by: "groups", divisor: g });
        }
        for (name, tensor) in [("d", &self.d), ("dt_bias", &self.dt_bias)] {
            if let Some(tensor) = tensor {
                expect_shape(OP, name, &tensor.dims(), &[h])?;
            }
        }
        if let Some(state) = &self.state {
            expect_shape(OP, "state", &state.dims(), &[b, h, p, n])?;
        }
        if let Some(segments) = &self.segments {
            expect_shape(OP, "segments", &segments.dims(), &[b, l])?;
        }
        Ok(SsdDims { b, l, h, p, g, n })
    }
}

/// Runs the scan; differentiable in every tensor, states included. A single token (`l == 1`) is the decoding step.
///
/// # Panics
/// When [`SsdArgs::check`] fails.
pub fn ssd<B: KernelBackend>(args: SsdArgs<B>) -> SsdOut<B> {
    if let Err(error) = args.check() {
        panic!("{error}");
    }
    announce::<B>(Op::Ssd, args.x.dtype());
    B::ssd(args)
}
