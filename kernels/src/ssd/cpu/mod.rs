//! On slices. Few tokens: the recurrence as written. Many: chunk by chunk as small matrix products.
//!
//! Inside a chunk everything that decays is a running product of the decays, `L[i, j] = prod(j < t <= i) rho_t e^{a_t}`:
//! no cumulative sums, hence nothing to overflow and nothing that cancels, and a new document is a factor of zero.
//! Padding only follows a row's real tokens, so rows simply end early.

mod backward;
mod chunks;
mod forward;
mod steps;

use super::{SsdDims, SsdOptions};
use crate::cpu::Documents;
use crate::cpu::math::softplus;

pub(crate) use backward::backward;
pub(crate) use forward::forward;
pub(crate) use steps::steps;

/// Arguments as slices; shapes as in [`super::SsdArgs`].
pub(crate) struct SsdInput<'a> {
    pub dims: SsdDims,
    pub x: &'a [f32],
    pub dt: &'a [f32],
    pub a: &'a [f32],
    pub b: &'a [f32],
    pub c: &'a [f32],
    pub d: Option<&'a [f32]>,
    pub dt_bias: Option<&'a [f32]>,
    pub state: Option<&'a [f32]>,
    pub documents: Documents<'a>,
    pub options: SsdOptions,
}

/// Up to this many tokens the recurrence is quicker than chunks.
pub(crate) const FEW: usize = 4;

impl SsdInput<'_> {
    /// `dt` after the bias.
    fn raw_step(&self, row: usize, t: usize, head: usize) -> f32 {
        self.dt[(row * self.dims.l + t) * self.dims.h + head] + self.dt_bias.map_or(0.0, |bias| bias[head])
    }

    /// Step size, `delta`.
    fn step(&self, row: usize, t: usize, head: usize) -> f32 {
        let raw = self.raw_step(row, t, head);
        let step = if self.options.dt_softplus { softplus(raw) } else { raw };
        let (min, max) = self.options.dt_limit;
        // NaN stays NaN.
        if step < min {
            min
        } else if step > max {
            max
        } else {
            step
        }
    }

    /// Derivative of [`SsdInput::step`].
    fn step_slope(&self, row: usize, t: usize, head: usize) -> f32 {
        let raw = self.raw_step(row, t, head);
        let (step, slope) = if self.options.dt_softplus { (softplus(raw), 1.0 / (1.0 + (-raw).exp())) } else { (raw, 1.0) };
        let (min, max) = self.options.dt_limit;
        if step < min || step > max { 0.0 } else { slope }
    }

    /// Factor on the state before a token: `rho e^{delta a}`.
    fn decay(&self, row: usize, t: usize, head: usize, step: f32) -> f32 {
        if self.documents.begins(row, t) { 0.0 } else { (step * self.a[head]).exp() }
    }

    /// Offset of a token's head in `x`.
    fn at_x(&self, row: usize, t: usize, head: usize) -> usize {
        ((row * self.dims.l + t) * self.dims.h + head) * self.dims.p
    }

    /// Offset of a token's group in `b` and `c`.
    fn at_b(&self, row: usize, t: usize, group: usize) -> usize {
        ((row * self.dims.l + t) * self.dims.g + group) * self.dims.n
    }
}
