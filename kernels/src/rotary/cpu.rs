//! On slices: one token of one head at a time, these shared out among threads.

use pulp::Arch;

use crate::cpu::math::vectorized;
use crate::cpu::threads::{Shared, for_each};

/// What is rotated, and where it lies.
pub(crate) struct RotaryInput<'a> {
    /// `b`, `h`, `l`, `p`.
    pub dims: [usize; 4],
    /// Rows of `p` values; nothing where the output holds them already, packed.
    pub x: Option<&'a [f32]>,
    /// Distances between rows of the batch, heads and tokens of `x`.
    pub strides: [usize; 3],
    /// `[rows, l, half]`, `rows` being `b` or 1.
    pub cos: &'a [f32],
    /// As `cos`.
    pub sin: &'a [f32],
    /// Rotated pairs of a head.
    pub half: usize,
    /// By the negative angles, into `[b, l, h, p]` instead of `[b, h, l, p]`.
    pub back: bool,
}

/// Values of a task, about.
const BLOCK: usize = 1 << 12;

/// Fills `out`, `[b, h, l, p]`, or `[b, l, h, p]` on the way back.
pub(crate) fn rotate(out: &mut [f32], input: &RotaryInput) {
    let [b, h, l, p] = input.dims;
    let rows = b * h * l;
    let block = (BLOCK / p).max(1);
    let shared = Shared::new(out);
    let arch = Arch::new();
    for_each(
        rows.div_ceil(block),
        rows * p * 4,
        || (),
        |(), task| {
            let range = task * block..rows.min((task + 1) * block);
            // SAFETY: each row belongs to one task.
            let out = unsafe { shared.part(range.start * p, range.len() * p) };
            vectorized!(arch, input.rows(out, range.start));
        },
    );
}

impl RotaryInput<'_> {
    /// Fills the rows of the output from `first` on.
    #[inline(always)]
    fn rows(&self, out: &mut [f32], first: usize) {
        let &Self { dims: [_, h, l, p], half, .. } = self;
        let ([outer, middle, inner], repeated) = (self.strides, self.cos.len() == l * half);
        for (row, out) in (first..).zip(out.chunks_exact_mut(p)) {
            let (batch, head, token) = match self.back {
                true => (row / (l * h), row % h, row / h % l),
                false => (row / (h * l), row / l % h, row % l),
            };
            if let Some(x) = self.x {
                out.copy_from_slice(&x[batch * outer + head * middle + token * inner..][..p]);
            }
            let angle = (if repeated { token } else { batch * l + token }) * half;
            let (cos, sin) = (&self.cos[angle..][..half], &self.sin[angle..][..half]);
            let (left, right) = out[..2 * half].split_at_mut(half);
            let sign = if self.back { -1.0 } else { 1.0 };
            for (((left, right), cos), sin) in left.iter_mut().zip(right).zip(cos).zip(sin) {
                let (x, y, sin) = (*left, *right, sin * sign);
                *left = x * cos - y * sin;
                *right = y * cos + x * sin;
            }
        }
    }
}
