//! Selective scan: the state-space recurrence of Mamba-1, one decay per channel and state.
//!
//! With `delta_t = softplus(delta_t + delta_bias)`, for every channel `i` of `e` and every state `j` of `n`:
//!
//! ```text
//! h_t[i, j] = rho_t * exp(delta_t[i] * a[i, j]) * h_{t-1}[i, j] + delta_t[i] * b_t[j] * u_t[i]
//! y_t[i] = (sum_j c_t[j] * h_t[i, j] + d[i] * u_t[i]) * silu(z_t[i])
//! ```
//!
//! `rho_t` is 0 where a new segment begins, else 1 (arXiv 2312.00752, algorithm 2). The decay is exact (zero-order hold),
//! the input matrix is `delta * b`. Any length, any incoming state; `h` and everything that decays is float32.

#[cfg(any(feature = "flex", feature = "ndarray"))]
pub(crate) mod cpu;
#[cfg(feature = "_cube")]
pub(crate) mod cube;
pub mod reference;

use burn::tensor::activation::silu;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::error::expect_shape;
use crate::path::announce;
use crate::{ArgumentError, KernelBackend, Op, Segments};

/// Arguments of [`selective_scan`].
#[derive(Debug, Clone)]
pub struct ScanArgs<B: Backend> {
    /// `[b, l, e]`.
    pub u: Tensor<B, 3>,
    /// Raw step sizes, `[b, l, e]`.
    pub delta: Tensor<B, 3>,
    /// Decay rates, negative, `[e, n]` (`-exp(A_log)`).
    pub a: Tensor<B, 2>,
    /// `[b, l, n]`.
    pub b: Tensor<B, 3>,
    /// `[b, l, n]`.
    pub c: Tensor<B, 3>,
    /// Skip connection, `[e]`.
    pub d: Option<Tensor<B, 1>>,
    /// Gate, `[b, l, e]`: the output is multiplied by `silu(z)`.
    pub z: Option<Tensor<B, 3>>,
    /// `[e]`.
    pub delta_bias: Option<Tensor<B, 1>>,
    /// Incoming state, float32 `[b, e, n]`; zeros when absent.
    pub state: Option<Tensor<B, 3>>,
    /// Document boundaries and padding.
    pub segments: Option<Segments<B>>,
    /// Pass `delta + delta_bias` through softplus.
    pub delta_softplus: bool,
}

/// Results of [`selective_scan`].
#[derive(Debug, Clone)]
pub struct ScanOut<B: Backend> {
    /// `[b, l, e]`, dtype of `u`; zero at padding.
    pub y: Tensor<B, 3>,
    /// State after each row's last real token, float32 `[b, e, n]`.
    pub state: Tensor<B, 3>,
}

/// Gradients of [`ScanArgs`]; `None` where the argument was absent.
#[derive(Debug, Clone)]
pub struct ScanGrads<B: Backend> {
    /// `[b, l, e]`.
    pub u: Tensor<B, 3>,
    /// `[b, l, e]`.
    pub delta: Tensor<B, 3>,
    /// `[e, n]`.
    pub a: Tensor<B, 2>,
    /// `[b, l, n]`.
    pub b: Tensor<B, 3>,
    /// `[b, l, n]`.
    pub c: Tensor<B, 3>,
    /// `[e]`.
    pub d: Option<Tensor<B, 1>>,
    /// `[b, l, e]`.
    pub z: Option<Tensor<B, 3>>,
    /// `[e]`.
    pub delta_bias: Option<Tensor<B, 1>>,
    /// `[b, e, n]`.
    pub state: Option<Tensor<B, 3>>,
}

/// Sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScanDims {
    /// Batch.
    pub b: usize,
    /// Length.
    pub l: usize,
    /// Channels.
    pub e: usize,
    /// State width.
    pub n: usize,
}

impl<B: Backend> ScanArgs<B> {
    /// For [`KernelBackend::takes`].
    pub(crate) fn sizes(&self) -> [usize; 4] {
        let [b, l, e] = self.u.dims();
        [b, l, e, self.a.dims()[1]]
    }

    /// Checks that the shapes agree.
    ///
    /// # Errors
    /// The first disagreement found.
    pub fn check(&self) -> Result<ScanDims, ArgumentError> {
        const OP: &str = "selective_scan";
        let [b, l, e] = self.u.dims();
        let [_, n] = self.a.dims();
        expect_shape(OP, "delta", &self.delta.dims(), &[b, l, e])?;
        expect_shape(OP, "a", &self.a.dims(), &[e, n])?;
        expect_shape(OP, "b", &self.b.dims(), &[b, l, n])?;
        expect_shape(OP, "c", &self.c.dims(), &[b, l, n])?;
        for (name, tensor) in [("d", &self.d), ("delta_bias", &self.delta_bias)] {
            if let Some(tensor) = tensor {
                expect_shape(OP, name, &tensor.dims(), &[e])?;
            }
        }
        if let Some(z) = &self.z {
            expect_shape(OP, "z", &z.dims(), &[b, l, e])?;
        }
        if let Some(state) = &self.state {
            expect_shape(OP, "state", &state.dims(), &[b, e, n])?;
        }
        if let Some(segments) = &self.segments {
            expect_shape(OP, "segments", &segments.dims(), &[b, l])?;
        }
        Ok(ScanDims { b, l, e, n })
    }
}

/// Runs the scan; differentiable in every tensor, states included. A single token (`l == 1`) is the decoding step.
///
/// # Panics
/// When [`ScanArgs::check`] fails.
pub fn selective_scan<B: KernelBackend>(args: ScanArgs<B>) -> ScanOut<B> {
    if let Err(error) = args.check() {
        panic!("{error}");
    }
    if args.sizes().contains(&0) {
        return stateless(args);
    }
    announce::<B>(Op::SelectiveScan, args.u.dtype());
    B::selective_scan(args)
}

/// The scan where nothing goes through a state: no rows, tokens, channels or states. GPUs launch nothing for no elements.
fn stateless<B: Backend>(args: ScanArgs<B>) -> ScanOut<B> {
    let [b, l, e, n] = args.sizes();
    let (device, dtype) = (args.u.device(), args.u.dtype());
    let state = args.state.map(|state| state.cast(DType::F32)).unwrap_or_else(|| match b * e * n {
        0 => Tensor::empty([b, e, n], (&device, DType::F32)),
        _ => Tensor::zeros([b, e, n], (&device, DType::F32)),
    });
    if b * l * e == 0 {
        return ScanOut { y: args.u, state };
    }
    let mut y = match args.d {
        Some(d) => args.u.cast(DType::F32) * d.cast(DType::F32).reshape([1, 1, e]),
        None => Tensor::zeros([b, l, e], (&device, DType::F32)),
    };
    if let Some(z) = args.z {
        y = y * silu(z.cast(DType::F32));
    }
    if let Some(segments) = args.segments {
        y = y.mask_fill(segments.valid().bool_not().unsqueeze_dim::<3>(2).expand([b, l, e]), 0.0);
    }
    ScanOut { y: y.cast(dtype), state }
}
