//! Small matrix products: panels of a few vectors, operands that stay in the first levels of cache.

use pulp::{Arch, Simd, WithSimd};

/// Widths of scratch matrices are multiples of this, the largest vector width.
pub(crate) const ALIGN: usize = 16;

/// `size` rounded up to a multiple of [`ALIGN`].
pub(crate) fn aligned(size: usize) -> usize {
    size.next_multiple_of(ALIGN)
}

/// Left operand: element `(i, k)` is `values[i * row + k * column]`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub values: &'a [f32],
    pub row: usize,
    pub column: usize,
}

impl<'a> Left<'a> {
    /// Row-major.
    pub(crate) fn rows(values: &'a [f32], stride: usize) -> Self {
        Self { values, row: stride, column: 1 }
    }

    /// The transpose of a row-major matrix.
    pub(crate) fn columns(values: &'a [f32], stride: usize) -> Self {
        Self { values, row: 1, column: stride }
    }

    /// The same matrix without its first `rows` rows and `columns` columns.
    pub(crate) fn from(self, rows: usize, columns: usize) -> Self {
        Self { values: &self.values[rows * self.row + columns * self.column..], ..self }
    }
}

/// What the product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Nothing.
    Zero,
    /// The output's old values.
    Old,
    /// The output's old values times a number.
    Scaled(f32),
    /// The output's old values, row `i` times element `i`.
    Rows(&'a [f32]),
}

/// `out[i, j] = start[i, j] + sum_{k < depth} left[i, k] * right[k, j]`.
pub(crate) struct Product<'a> {
    pub out: &'a mut [f32],
    pub out_stride: usize,
    pub left: Left<'a>,
    pub right: &'a [f32],
    pub right_stride: usize,
    /// Rows of the output.
    pub rows: usize,
    /// Columns of the output, a multiple of [`ALIGN`].
    pub columns: usize,
    pub depth: usize,
    pub start: Start<'a>,
}

impl Product<'_> {
    pub(crate) fn run(self, arch: Arch) {
        if self.rows == 0 || self.columns == 0 {
            return;
        }
        assert!(self.columns.is_multiple_of(ALIGN));
        assert!((self.rows - 1) * self.out_stride + self.columns <= self.out.len());
        if self.depth > 0 {
            assert!((self.rows - 1) * self.left.row + (self.depth - 1) * self.left.column < self.left.values.len());
            assert!((self.depth - 1) * self.right_stride + self.columns <= self.right.len());
        }
        if let Start::Rows(scales) = self.start {
            assert!(scales.len() >= self.rows);
        }
        arch.dispatch(self);
    }
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        // Accumulators, a row of `right` and one broadcast value have to fit the registers.
        if S::REGISTER_COUNT >= 32 {
            panels::<S, 8>(simd, &mut self);
        } else {
            panels::<S, 4>(simd, &mut self);
        }
    }
}

#[inline(always)]
fn panels<S: Simd, const R: usize>(simd: S, product: &mut Product) {
    let width = S::F32_LANES;
    let mut j = 0;
    while j < product.columns {
        let two = j + 2 * width <= product.columns;
        let mut i = 0;
        while i < product.rows {
            // SAFETY: `Product::run` checked the extents; `i + R <= rows` and the columns are inside in each call.
            unsafe {
                match (i + R <= product.rows, two) {
                    (true, true) => tile::<S, R, 2>(simd, product, i, j),
                    (true, false) => tile::<S, R, 1>(simd, product, i, j),
                    (false, true) => tile::<S, 1, 2>(simd, product, i, j),
                    (false, false) => tile::<S, 1, 1>(simd, product, i, j),
                }
            }
            i += if i + R <= product.rows { R } else { 1 };
        }
        j += if two { 2 * width } else { width };
    }
}

/// Rows `i..i + R`, columns `j..j + C * lanes`.
///
/// # Safety
/// These lie inside the output, and the operands reach as far as the product's sizes say.
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize, const C: usize>(simd: S, product: &mut Product, i: usize, j: usize) {
    let width = S::F32_LANES;
    let out = product.out.as_mut_ptr().wrapping_add(i * product.out_stride + j);
    let left = product.left.values.as_ptr().wrapping_add(i * product.left.row);
    let right = product.right.as_ptr().wrapping_add(j);
    let mut sums = [[simd.splat_f32s(0.0); C]; R];
    for (r, row) in sums.iter_mut().enumerate() {
        let scale = match product.start {
            Start::Zero => break,
            Start::Old => 1.0,
            Start::Scaled(scale) => scale,
            Start::Rows(scales) => scales[i + r],
        };
        for (c, sum) in row.iter_mut().enumerate() {
            // SAFETY: inside the output by this function's contract.
            let old = unsafe { load(simd, out.wrapping_add(r * product.out_stride + c * width)) };
            *sum = simd.mul_f32s(old, simd.splat_f32s(scale));
        }
    }
    for k in 0..product.depth {
        let mut values = [simd.splat_f32s(0.0); C];
        for (c, value) in values.iter_mut().enumerate() {
            // SAFETY: row `k` of the right operand has these columns.
            *value = unsafe { load(simd, right.wrapping_add(k * product.right_stride + c * width)) };
        }
        for (r, row) in sums.iter_mut().enumerate() {
            // SAFETY: element `(i + r, k)` of the left operand.
            let factor = simd.splat_f32s(unsafe { *left.wrapping_add(r * product.left.row + k * product.left.column) });
            for c in 0..C {
                row[c] = simd.mul_add_f32s(factor, values[c], row[c]);
            }
        }
    }
    for (r, row) in sums.iter().enumerate() {
        for (c, sum) in row.iter().enumerate() {
            let target = out.wrapping_add(r * product.out_stride + c * width).cast::<S::f32s>();
            // SAFETY: inside the output by this function's contract.
            unsafe { target.write_unaligned(*sum) };
        }
    }
}

/// # Safety
/// One vector of floats is readable at `from`.
#[inline(always)]
unsafe fn load<S: Simd>(_simd: S, from: *const f32) -> S::f32s {
    // SAFETY: readable by contract; any bit pattern is a vector of floats.
    unsafe { from.cast::<S::f32s>().read_unaligned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn product_matches_the_definition() {
        for (rows, columns, depth) in [(1, 16, 1), (8, 32, 5), (13, 48, 9), (16, 64, 0), (3, 16, 20)] {
            let value = |seed: usize| move |i: usize| ((i * 37 + seed * 11) % 19) as f32 - 9.0;
            let left: Vec<f32> = (0..rows * depth).map(value(1)).collect();
            let right: Vec<f32> = (0..depth * columns).map(value(2)).collect();
            let old: Vec<f32> = (0..rows * columns).map(value(3)).collect();
            let scales: Vec<f32> = (0..rows).map(value(4)).collect();
            for turned in [false, true] {
                for start in [Start::Zero, Start::Old, Start::Scaled(0.5), Start::Rows(&scales)] {
                    let left = if turned { Left::columns(&left, rows) } else { Left::rows(&left, depth) };
                    let mut out = old.clone();
                    let product = Product {
                        out: &mut out,
                        out_stride: columns,
                        left,
                        right: &right,
                        right_stride: columns,
                        rows,
                        columns,
                        depth,
                        start,
                    };
                    product.run(Arch::new());
                    for i in 0..rows {
                        for j in 0..columns {
                            let before = match start {
                                Start::Zero => 0.0,
                                Start::Old => old[i * columns + j],
                                Start::Scaled(scale) => old[i * columns + j] * scale,
                                Start::Rows(scales) => old[i * columns + j] * scales[i],
                            };
                            let sum: f32 = (0..depth).map(|k| left.values[i * left.row + k * left.column] * right[k * columns + j]).sum();
                            assert_eq!(out[i * columns + j], before + sum);
                        }
                    }
                }
            }
        }
    }
}
