//! On slices: blocks of keys with a running softmax (arXiv 2205.14135), so that scores are never all there at once.

mod backward;
mod forward;

use std::borrow::Cow;

use pulp::Arch;

use crate::cpu::math::transposed;
use crate::cpu::product::aligned;
use crate::cpu::threads::{Shared, for_each};

pub(crate) use backward::backward;
pub(crate) use forward::{Outcome, forward};

/// Arguments as slices; shapes as in [`super::AttentionArgs`].
pub(crate) struct AttentionInput<'a> {
    /// `b`, `h`, `g`, `l`, `s`, `p`.
    pub dims: [usize; 6],
    pub q: &'a [f32],
    pub k: Matrices<'a>,
    pub v: Matrices<'a>,
    pub scale: f32,
    pub ids: Option<&'a super::SlotIds>,
}

/// Row-major matrices of a batch's groups, at any distance from each other.
pub(crate) struct Matrices<'a> {
    pub values: Cow<'a, [f32]>,
    /// Distances between rows of the batch, and between groups.
    pub strides: [usize; 2],
    pub groups: usize,
}

impl Matrices<'_> {
    /// The buffer from a matrix on, by its index in row-major order.
    fn from(&self, index: usize) -> &[f32] {
        &self.values[index / self.groups * self.strides[0] + index % self.groups * self.strides[1]..]
    }

    /// Rows of `p` values with zeros behind, up to a whole number of vectors.
    fn padded(&self, count: usize, s: usize, p: usize) -> Matrices<'_> {
        let Self { strides, groups, .. } = *self;
        let stride = aligned(p);
        if stride == p {
            return Matrices { values: Cow::Borrowed(&self.values), strides, groups };
        }
        let values = (0..count).flat_map(|index| padded(&self.from(index)[..s * p], p).into_owned()).collect();
        Matrices { values: Cow::Owned(values), strides: [groups * s * stride, s * stride], groups }
    }

    /// `[.., s, p]` to `[.., p, s]`, with rows of `aligned(s)`.
    fn turned(&self, count: usize, s: usize, p: usize) -> Vec<f32> {
        let stride = aligned(s);
        let mut out = vec![0.0; count * p * stride];
        let (shared, arch) = (Shared::new(&mut out), Arch::new());
        for_each(
            count,
            count * s * p * 4,
            || (),
            |(), i| {
                // SAFETY: one matrix per task.
                let out = unsafe { shared.part(i * p * stride, p * stride) };
                transposed(arch, out, stride, &self.from(i)[..s * p], p, s, p);
            },
        );
        out
    }
}

/// Slots of a block.
const BLOCK: usize = 64;

impl AttentionInput<'_> {
    /// Slots that come into question for the query at `t`: those up to its own.
    fn end(&self, t: usize) -> usize {
        let [_, _, _, l, s, _] = self.dims;
        s - l + t + 1
    }

    /// Whether some query in `queries` may see some slot in `slots`.
    fn meet(&self, batch: usize, queries: std::ops::Range<usize>, slots: std::ops::Range<usize>) -> bool {
        let [_, _, _, l, s, _] = self.dims;
        let Some(ids) = self.ids else { return true };
        let queries = &ids.queries[batch * l + queries.start..batch * l + queries.end];
        let slots = &ids.slots[batch * s + slots.start..batch * s + slots.end];
        let bounds = |ids: &[i32]| (ids.iter().copied().min().unwrap_or(0), ids.iter().copied().max().unwrap_or(0));
        let ((low, high), (first, last)) = (bounds(queries), bounds(slots));
        low <= last && first <= high
    }

    /// Replaces the scores that the query at `t` must not see in a block that starts at `from`.
    fn hide(&self, scores: &mut [f32], batch: usize, t: usize, from: usize) {
        let [_, _, _, l, s, _] = self.dims;
        let visible = self.end(t).saturating_sub(from).min(scores.len());
        scores[visible..].fill(f32::NEG_INFINITY);
        if let Some(ids) = self.ids {
            let own = ids.queries[batch * l + t];
            for (score, &id) in scores[..visible].iter_mut().zip(&ids.slots[batch * s + from..]) {
                if id != own || own < 0 {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// Rows of `p` values with zeros behind, up to a whole number of vectors.
fn padded(values: &[f32], p: usize) -> Cow<'_, [f32]> {
    let stride = aligned(p);
    if stride == p {
        return Cow::Borrowed(values);
    }
    let mut out = vec![0.0; values.len() / p * stride];
    out.chunks_exact_mut(stride).zip(values.chunks_exact(p)).for_each(|(out, row)| out[..p].copy_from_slice(row));
    Cow::Owned(out)
}
