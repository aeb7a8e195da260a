//! The operations as the harness sees them: how to make arguments, to run, to check, and what must move and be computed.

mod attention;
mod causal_conv1d;
mod cross_entropy;
mod cumsum;
mod embedding;
mod glu;
mod linear;
mod norm_residual;
mod rms_norm_gated;
mod rotary;
mod selective_scan;
mod ssd;

use burn::tensor::DType;

use super::data::{Deviation, Source};
use crate::{KernelBackend, Op};

pub(super) use attention::Attention;
pub(super) use causal_conv1d::Conv;
pub(super) use cross_entropy::CrossEntropy;
pub(super) use cumsum::RunningSum;
pub(super) use embedding::EmbeddingBackward;
pub(super) use glu::Glu;
pub(super) use linear::Linear;
pub(super) use norm_residual::ResidualNorm;
pub(super) use rms_norm_gated::Norm;
pub(super) use rotary::Rotary;
pub(super) use selective_scan::Scan;
pub(super) use ssd::Ssd;

/// What one direction of a call must do at least; see [`super`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Work {
    pub bytes: f64,
    pub flop: f64,
}

/// Both directions; no backward for what is never differentiated.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cost {
    pub forward: Work,
    pub backward: Option<Work>,
}

/// An operation at one shape.
pub(super) trait Subject<B: KernelBackend> {
    /// Arguments, and gradients of the outputs.
    type Set;

    /// Name in reports and in `--op`.
    fn op(&self) -> &'static str;
    /// The operation whose path runs.
    fn kernel(&self) -> Op;
    /// Shape and variant, the same text for every implementation.
    fn shape(&self) -> String;
    /// What [`KernelBackend::takes`] asks for; nothing where kernels take all sizes.
    fn sizes(&self) -> Vec<usize> {
        Vec::new()
    }
    /// Type of activations.
    fn dtype(&self) -> DType;
    fn cost(&self) -> Cost;
    fn set(&self, source: &Source<B>) -> Self::Set;
    /// Runs the operation; the outputs are dropped, or carried on where a step updates a state.
    fn forward(&self, set: &mut Self::Set);
    /// Runs the backward, if there is one.
    fn backward(&self, set: &mut Self::Set) -> bool;
    /// Runs on this shape and compares a part with float64 arithmetic that takes about `work` multiply-adds. The gradients
    /// of the outputs are zero outside of that part, so that it depends on nothing else.
    fn check(&self, source: &Source<B>, backward: bool, work: usize) -> Vec<Deviation>;
}
