//! One pass.

use cubecl::prelude::*;

/// Sizes of a head in vectors, and the direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Layout {
    /// Of the first of each pair.
    pub half: usize,
    /// Of a head.
    pub p: usize,
    /// By the negative angles, into `[b, l, h, p]` instead of `[b, h, l, p]`.
    pub back: bool,
}

impl Layout {
    /// Units of one token of a head: pairs, then what passes through.
    pub(super) fn units(self) -> usize {
        self.p - self.half
    }
}

/// `outer`, `middle` and `inner` are the distances of `x` between rows of the batch, heads and tokens, `again` that of the tables
/// between rows of the batch, in tokens.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
pub(super) fn rotate<F: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    cos: &Array<Vector<f32, N>>,
    sin: &Array<Vector<f32, N>>,
    out: &mut Array<Vector<F, N>>,
    units: u32,
    h: u32,
    l: u32,
    outer: u32,
    middle: u32,
    inner: u32,
    again: u32,
    #[comptime] layout: Layout,
    #[define(F)] _dtype: StorageType,
) {
    let at = ABSOLUTE_POS;
    if at < units as usize {
        let (h, l) = (h as usize, l as usize);
        let each = comptime!(layout.units());
        let half = comptime!(layout.half);
        let (row, i) = (at / each, at % each);
        // In the order of the output.
        let mut head = row / l % h;
        let mut token = row % l;
        if comptime!(layout.back) {
            head = row % h;
            token = row / h % l;
        }
        let batch = row / (h * l);
        let from = batch * outer as usize + head * middle as usize + token * inner as usize;
        let to = row * comptime!(layout.p);
        if i < half {
            let angle = (batch * again as usize + token) * half + i;
            let c = cos[angle];
            let mut s = sin[angle];
            if comptime!(layout.back) {
                s = Vector::new(0.0f32) - s;
            }
            let first = Vector::<f32, N>::cast_from(x[from + i]);
            let second = Vector::<f32, N>::cast_from(x[from + half + i]);
            out[to + i] = Vector::cast_from(first * c - second * s);
            out[to + half + i] = Vector::cast_from(second * c + first * s);
        } else {
            out[to + half + i] = x[from + half + i];
        }
    }
}
