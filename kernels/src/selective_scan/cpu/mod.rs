//! On slices. Few tokens: the recurrence as written, lanes across states. Many: lanes across channels, which lie side by
//! side in every argument but `a` and the states; a task takes a block of channels through its row, chunk by chunk.
//!
//! Padding only follows a row's real tokens, so rows simply end early. A chunk ends where a new document begins, which
//! then starts from no state.

mod backward;
mod chunks;
mod forward;
mod steps;

use super::ScanDims;
use crate::cpu::Documents;
use crate::cpu::math::{silu, softplus};

pub(crate) use backward::backward;
pub(crate) use forward::forward;
pub(crate) use steps::steps;

/// Up to this many tokens the recurrence over states is quicker than turning states and rates around.
pub(crate) const FEW: usize = 4;

/// Values `[b, l, width]`, contiguous inside a row.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub values: &'a [f32],
    /// Distances along `b` and `l`.
    pub strides: [usize; 2],
    pub width: usize,
}

impl<'a> Rows<'a> {
    /// A token's values.
    #[inline(always)]
    fn at(&self, row: usize, t: usize) -> &'a [f32] {
        &self.values[row * self.strides[0] + t * self.strides[1]..][..self.width]
    }
}

/// Arguments as slices; shapes as in [`super::ScanArgs`].
pub(crate) struct ScanInput<'a> {
    pub dims: ScanDims,
    pub u: Rows<'a>,
    pub delta: Rows<'a>,
    pub a: &'a [f32],
    pub b: Rows<'a>,
    pub c: Rows<'a>,
    pub d: Option<&'a [f32]>,
    pub z: Option<Rows<'a>>,
    pub delta_bias: Option<&'a [f32]>,
    pub state: Option<&'a [f32]>,
    pub documents: Documents<'a>,
    pub delta_softplus: bool,
}

impl ScanInput<'_> {
    /// What the threads are told of the work, in multiply-adds.
    fn work(&self) -> usize {
        const OF_A_STATE: usize = 8;
        let ScanDims { b, l, e, n } = self.dims;
        b * l * e * (n + 4) * OF_A_STATE
    }

    /// Step sizes of some channels, and what they multiply `b` with.
    #[inline(always)]
    fn steps(&self, row: usize, t: usize, first: usize, step: &mut [f32], fed: &mut [f32]) {
        let count = step.len();
        step.copy_from_slice(&self.delta.at(row, t)[first..][..count]);
        if let Some(bias) = self.delta_bias {
            step.iter_mut().zip(&bias[first..]).for_each(|(step, bias)| *step += bias);
        }
        if self.delta_softplus {
            step.iter_mut().for_each(|step| *step = softplus(*step));
        }
        for ((fed, step), u) in fed.iter_mut().zip(step).zip(&self.u.at(row, t)[first..]) {
            *fed = *step * u;
        }
    }

    /// Outputs of some channels from what they read from their states.
    #[inline(always)]
    fn finish(&self, row: usize, t: usize, first: usize, y: &mut [f32], read: &[f32]) {
        y.copy_from_slice(read);
        if let Some(d) = self.d {
            for ((y, d), u) in y.iter_mut().zip(&d[first..]).zip(&self.u.at(row, t)[first..]) {
                *y += d * u;
            }
        }
        if let Some(z) = &self.z {
            y.iter_mut().zip(&z.at(row, t)[first..]).for_each(|(y, z)| *y *= silu(*z));
        }
    }
}
