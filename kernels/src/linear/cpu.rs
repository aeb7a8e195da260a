//! Few rows against a large weight: the time is that of reading the weight once.

use pulp::{Arch, Simd, WithSimd};

use crate::cpu::threads::{Shared, for_each};

/// Above this, reuse of the weight pays for Burn's matrix product.
pub(crate) const MOST_ROWS: usize = 16;

/// `x [rows, inputs]`, `weight [outputs, inputs]` -> `[rows, outputs]`.
pub(crate) fn forward(x: &[f32], weight: &[f32], rows: usize, inputs: usize, outputs: usize) -> Vec<f32> {
    let mut y = vec![0.0; rows * outputs];
    let shared = Shared::new(&mut y);
    // Enough of the weight for a task to run at memory speed, in whole groups of rows.
    let block = ((1 << 15) / inputs.max(1)).next_multiple_of(STRIP).max(STRIP);
    let arch = Arch::new();
    for_each(
        outputs.div_ceil(block),
        outputs * inputs * rows,
        || (),
        |(), task| {
            let first = task * block;
            let count = block.min(outputs - first);
            arch.dispatch(Block {
                x,
                weight: &weight[first * inputs..][..count * inputs],
                inputs,
                outputs,
                first,
                count,
                rows,
                y: &shared,
            });
        },
    );
    y
}

/// Weight rows that are read side by side.
const STRIP: usize = 4;

/// Columns `first..first + count` of the output.
struct Block<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    inputs: usize,
    outputs: usize,
    first: usize,
    count: usize,
    rows: usize,
    y: &'a Shared<'a>,
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut o = 0;
        while o < self.count {
            let strip = o + STRIP <= self.count;
            let mut row = 0;
            while row < self.rows {
                let four = row + 4 <= self.rows && S::REGISTER_COUNT >= 32;
                match (strip, four) {
                    (true, true) => self.dots::<S, STRIP, 4>(simd, o, row),
                    (true, false) => self.dots::<S, STRIP, 1>(simd, o, row),
                    (false, true) => self.dots::<S, 1, 4>(simd, o, row),
                    (false, false) => self.dots::<S, 1, 1>(simd, o, row),
                }
                row += if four { 4 } else { 1 };
            }
            o += if strip { STRIP } else { 1 };
        }
    }
}

impl Block<'_> {
    /// `W` weight rows from `o` on times `X` rows from `row` on.
    #[inline(always)]
    fn dots<S: Simd, const W: usize, const X: usize>(&self, simd: S, o: usize, row: usize) {
        let whole = self.inputs / S::F32_LANES;
        let mut columns: [(&[S::f32s], &[f32]); W] = [(&[], &[]); W];
        for (w, column) in columns.iter_mut().enumerate() {
            *column = S::as_simd_f32s(&self.weight[(o + w) * self.inputs..][..self.inputs]);
        }
        let mut rows: [(&[S::f32s], &[f32]); X] = [(&[], &[]); X];
        for (x, row_of_x) in rows.iter_mut().enumerate() {
            *row_of_x = S::as_simd_f32s(&self.x[(row + x) * self.inputs..][..self.inputs]);
        }
        let mut sums = [[simd.splat_f32s(0.0); X]; W];
        for k in 0..whole {
            let mut values = [simd.splat_f32s(0.0); X];
            for x in 0..X {
                values[x] = rows[x].0[k];
            }
            for w in 0..W {
                let weight = columns[w].0[k];
                for x in 0..X {
                    sums[w][x] = simd.mul_add_f32s(weight, values[x], sums[w][x]);
                }
            }
        }
        for w in 0..W {
            for x in 0..X {
                let (weight, value) = (simd.partial_load_f32s(columns[w].1), simd.partial_load_f32s(rows[x].1));
                let sum = simd.reduce_sum_f32s(simd.mul_add_f32s(weight, value, sums[w][x]));
                // SAFETY: each output column belongs to one task.
                unsafe { self.y.part((row + x) * self.outputs + self.first + o + w, 1)[0] = sum };
            }
        }
    }
}
