//! Few rows against a large weight: the time is that of reading the weight once. Many rows: tiles that stay in cache.
//!
//! The backward's products take their operands as they lie, which is what the `gemm` crate is best at.

use std::ops::Range;

use burn::tensor::bf16;
use pulp::{Arch, Simd, WithSimd};

use crate::cpu::math::{transposed, vectorized};
use crate::cpu::product::{Left, Product, Start, aligned};
use crate::cpu::threads::{Shared, for_each};

/// Above this, turning the weight pays.
const MOST_ROWS: usize = 64;

/// Outputs and rows of one task where there are many rows.
const WIDE: [usize; 2] = [64, 512];

/// Up to this many rows, inner products along the weight as it lies.
const FEW: usize = 4;

/// A weight as it lies in memory.
#[derive(Clone, Copy)]
pub(crate) enum Weight<'a> {
    F32(&'a [f32]),
    /// Half the memory, and so half the time where few rows are multiplied.
    Bf16(&'a [bf16]),
}

impl Weight<'_> {
    /// Floats that [`Weight::part`] needs for a part of `count`.
    fn scratch(self, count: usize) -> Vec<f32> {
        match self {
            Self::F32(_) => Vec::new(),
            Self::Bf16(_) => vec![0.0; count],
        }
    }

    /// A part in float32, in `wide` where it is not already.
    fn part<'a>(&'a self, arch: Arch, range: Range<usize>, wide: &'a mut [f32]) -> &'a [f32] {
        match self {
            Self::F32(values) => &values[range],
            Self::Bf16(values) => {
                let (values, wide) = (&values[range.clone()], &mut wide[..range.len()]);
                vectorized!(arch, {
                    wide.iter_mut().zip(values).for_each(|(wide, value)| *wide = f32::from_bits(u32::from(value.to_bits()) << 16))
                });
                wide
            }
        }
    }
}

/// `x [rows, inputs]`, `weight [outputs, inputs]` -> `[rows, outputs]`.
pub(crate) fn forward(x: &[f32], weight: Weight<'_>, rows: usize, inputs: usize, outputs: usize) -> Vec<f32> {
    if rows > MOST_ROWS {
        return many_rows(x, weight, rows, inputs, outputs);
    }
    let mut y = vec![0.0; rows * outputs];
    let shared = Shared::new(&mut y);
    // Enough of the weight for a task to run at memory speed, in whole groups of rows; what is widened stays in the first cache.
    let most = if matches!(weight, Weight::F32(_)) || rows <= FEW { 1 << 15 } else { 1 << 13 };
    let block = (most / inputs.max(1)).next_multiple_of(8).max(8);
    let arch = Arch::new();
    let columns = aligned(rows);
    let x_turned = (rows > FEW).then(|| {
        let mut turned = vec![0.0; inputs * columns];
        transposed(arch, &mut turned, columns, x, inputs, rows, inputs);
        turned
    });
    // Nothing is widened into memory for a few rows.
    let halves = match weight {
        Weight::Bf16(weight) if rows <= FEW && inputs.is_multiple_of(2) && cfg!(target_endian = "little") => {
            Some((weight, parted(x, inputs)))
        }
        _ => None,
    };
    let wide = if halves.is_some() { 0 } else { block * inputs };
    let scratch = || (vec![0.0; if rows > FEW { block * columns } else { 0 }], weight.scratch(wide));
    for_each(outputs.div_ceil(block), outputs * inputs * rows, scratch, |(scratch, wide), task| {
        let first = task * block;
        let count = block.min(outputs - first);
        if let Some((weight, x)) = &halves {
            arch.dispatch(Halves { x, weight: &weight[first * inputs..][..count * inputs], inputs, outputs, first, rows, y: &shared });
            return;
        }
        let weight = weight.part(arch, first * inputs..(first + count) * inputs, wide);
        let Some(right) = &x_turned else {
            arch.dispatch(Block { x, weight, inputs, outputs, first, count, rows, y: &shared });
            return;
        };
        let left = Left::rows(weight, inputs);
        let (out, start) = (&mut scratch[..], Start::Zero);
        Product { out, out_stride: columns, left, right, right_stride: columns, rows: count, columns, depth: inputs, start }.run(arch);
        for row in 0..rows {
            // SAFETY: each output column belongs to one task.
            let y = unsafe { shared.part(row * outputs + first, count) };
            y.iter_mut().zip(scratch[row..].iter().step_by(columns)).for_each(|(y, value)| *y = *value);
        }
    });
    y
}

/// Each task turns a few weight rows, so that the product's inner loop runs along outputs, and copies its tile into place.
fn many_rows(x: &[f32], weight: Weight<'_>, rows: usize, inputs: usize, outputs: usize) -> Vec<f32> {
    let mut y = vec![0.0; rows * outputs];
    let shared = Shared::new(&mut y);
    let [width, height] = WIDE;
    let across = outputs.div_ceil(width);
    let arch = Arch::new();
    let scratch = || (vec![0.0; inputs * width], vec![0.0; height.min(rows) * width], weight.scratch(inputs * width));
    for_each(across * rows.div_ceil(height), outputs * inputs * rows, scratch, |(turned, tile, wide), task| {
        let (first, top) = (task % across * width, task / across * height);
        let (count, rows) = (width.min(outputs - first), height.min(rows - top));
        let weight = weight.part(arch, first * inputs..(first + count) * inputs, wide);
        transposed(arch, turned, width, weight, inputs, count, inputs);
        Product {
            out: tile,
            out_stride: width,
            left: Left::rows(&x[top * inputs..][..rows * inputs], inputs),
            right: turned,
            right_stride: width,
            rows,
            columns: aligned(count),
            depth: inputs,
            start: Start::Zero,
        }
        .run(arch);
        for (row, tile) in tile.chunks(width).take(rows).enumerate() {
            // SAFETY: rows and outputs of a tile belong to one task.
            unsafe { shared.part((top + row) * outputs + first, count) }.copy_from_slice(&tile[..count]);
        }
    });
    y
}

/// `dy weight`, `[rows, inputs]`.
pub(crate) fn input_gradient(dy: &[f32], weight: &[f32], [rows, inputs, outputs]: [usize; 3]) -> Vec<f32> {
    multiply((dy, [outputs, 1]), weight, [rows, inputs, outputs])
}

/// `dy^T x`, `[outputs, inputs]`.
pub(crate) fn weight_gradient(dy: &[f32], x: &[f32], [rows, inputs, outputs]: [usize; 3]) -> Vec<f32> {
    multiply((dy, [1, outputs]), x, [outputs, inputs, rows])
}

/// Sums of the columns of `dy`, `[outputs]`.
pub(crate) fn bias_gradient(dy: &[f32], outputs: usize) -> Vec<f32> {
    let mut sums = vec![0.0; outputs];
    for row in dy.chunks_exact(outputs.max(1)) {
        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    }
    sums
}

/// `left [m, k]`, whose rows and columns are that far apart, times `right [k, n]`, packed. Burn's own product zeroes its output,
/// copies that to where it is aligned, and only then begins: for gradients of weights that took longer than the product.
fn multiply((left, [row, column]): (&[f32], [usize; 2]), right: &[f32], [m, n, k]: [usize; 3]) -> Vec<f32> {
    assert_eq!((left.len(), right.len()), (m * k, k * n));
    if k == 0 {
        return vec![0.0; m * n];
    }
    let mut out = Vec::with_capacity(m * n);
    // SAFETY: the lengths are those that the strides reach; all of the output is written, and not read.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            left.as_ptr(),
            column as isize,
            row as isize,
            right.as_ptr(),
            1,
            n as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
        out.set_len(m * n);
    }
    out
}

/// Weight rows that are read side by side.
const STRIP: usize = 4;
/// Sums that one weight row is added up in.
const AT_ONCE: usize = 4;

#[inline(always)]
fn total<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; AT_ONCE]) -> S::f32s {
    simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d))
}

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
        if self.rows == 1 {
            for o in 0..self.count {
                self.dot(simd, o);
            }
            return;
        }
        let mut o = 0;
        while o < self.count {
            let strip = o + STRIP <= self.count;
            let mut row = 0;
            while row < self.rows {
                let few = if row + 4 <= self.rows && S::REGISTER_COUNT >= 32 { 4 } else { 1 + usize::from(row + 2 <= self.rows) };
                match (strip, few) {
                    (true, 4) => self.dots::<S, STRIP, 4>(simd, o, row),
                    (true, 2) => self.dots::<S, STRIP, 2>(simd, o, row),
                    (true, _) => self.dots::<S, STRIP, 1>(simd, o, row),
                    (false, 4) => self.dots::<S, 1, 4>(simd, o, row),
                    (false, 2) => self.dots::<S, 1, 2>(simd, o, row),
                    (false, _) => self.dots::<S, 1, 1>(simd, o, row),
                }
                row += few;
            }
            o += if strip { STRIP } else { 1 };
        }
    }
}

impl Block<'_> {
    /// Weight row `o` times the only row: one weight row at a time is one stream, which processors fetch ahead.
    #[inline(always)]
    fn dot<S: Simd>(&self, simd: S, o: usize) {
        let inputs = self.inputs;
        let (weight, x) = (&self.weight[o * inputs..][..inputs], &self.x[..inputs]);
        let step = |k: usize, sum: S::f32s| {
            // SAFETY: `k + lanes <= inputs`, the length of both.
            let [weight, x] = [weight, x].map(|part| unsafe { part.as_ptr().add(k).cast::<S::f32s>().read_unaligned() });
            simd.mul_add_f32s(weight, x, sum)
        };
        let mut sums = [simd.splat_f32s(0.0); AT_ONCE];
        let mut k = 0;
        while k + AT_ONCE * S::F32_LANES <= inputs {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = step(k + i * S::F32_LANES, *sum);
            }
            k += AT_ONCE * S::F32_LANES;
        }
        while k + S::F32_LANES <= inputs {
            sums[0] = step(k, sums[0]);
            k += S::F32_LANES;
        }
        let (weight, x) = (simd.partial_load_f32s(&weight[k..]), simd.partial_load_f32s(&x[k..]));
        // SAFETY: each output column belongs to one task.
        let y = unsafe { self.y.part(self.first + o, 1) };
        y[0] = simd.reduce_sum_f32s(simd.mul_add_f32s(weight, x, total(simd, sums)));
    }

    /// `W` weight rows from `o` on times `X` rows from `row` on.
    #[inline(always)]
    fn dots<S: Simd, const W: usize, const X: usize>(&self, simd: S, o: usize, row: usize) {
        let inputs = self.inputs;
        let weight = &self.weight[o * inputs..][..W * inputs];
        let x = &self.x[row * inputs..][..X * inputs];
        let mut sums = [[simd.splat_f32s(0.0); X]; W];
        let whole = inputs / S::F32_LANES * S::F32_LANES;
        let mut k = 0;
        while k < whole {
            let mut values = [simd.splat_f32s(0.0); X];
            for (i, value) in values.iter_mut().enumerate() {
                // SAFETY: `k + lanes <= inputs`, and `x` has `X` rows of `inputs`.
                *value = unsafe { x.as_ptr().add(i * inputs + k).cast::<S::f32s>().read_unaligned() };
            }
            for (w, sums) in sums.iter_mut().enumerate() {
                // SAFETY: as above, with `W` rows.
                let weight = unsafe { weight.as_ptr().add(w * inputs + k).cast::<S::f32s>().read_unaligned() };
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = simd.mul_add_f32s(weight, value, *sum);
                }
            }
            k += S::F32_LANES;
        }
        for (w, sums) in sums.iter().enumerate() {
            for (i, sum) in sums.iter().enumerate() {
                let weight = simd.partial_load_f32s(&weight[w * inputs + whole..][..inputs - whole]);
                let value = simd.partial_load_f32s(&x[i * inputs + whole..][..inputs - whole]);
                // SAFETY: each output column belongs to one task.
                let y = unsafe { self.y.part((row + i) * self.outputs + self.first + o + w, 1) };
                y[0] = simd.reduce_sum_f32s(simd.mul_add_f32s(weight, value, *sum));
            }
        }
    }
}

/// Each row's values at even places, then those at odd ones.
fn parted(x: &[f32], inputs: usize) -> Vec<f32> {
    let mut parted = Vec::with_capacity(x.len());
    for row in x.chunks_exact(inputs.max(1)) {
        parted.extend(row.iter().step_by(2));
        parted.extend(row.iter().skip(1).step_by(2));
    }
    parted
}

/// Columns from `first` on of the output, with a bfloat16 weight: two values that lie beside one another are the halves of one number
/// of 32 bits, and each becomes a float32 by a shift or a mask.
struct Halves<'a> {
    /// As [`parted`] gives it.
    x: &'a [f32],
    weight: &'a [bf16],
    /// Even.
    inputs: usize,
    outputs: usize,
    first: usize,
    rows: usize,
    y: &'a Shared<'a>,
}

impl WithSimd for Halves<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let count = self.weight.len() / self.inputs.max(1);
        for row in 0..self.rows {
            for o in 0..count {
                self.dot(simd, o, row);
            }
        }
    }
}

impl Halves<'_> {
    /// Weight row `o` times row `row`. One weight row at a time: what is read is then one stream, which processors fetch ahead.
    #[inline(always)]
    fn dot<S: Simd>(&self, simd: S, o: usize, row: usize) {
        let (inputs, half) = (self.inputs, self.inputs / 2);
        let weight = &self.weight[o * inputs..][..inputs];
        let (even, odd) = self.x[row * inputs..][..inputs].split_at(half);
        let (by, high) = (simd.splat_u32s(16), simd.splat_u32s(0xffff_0000));
        let step = |k: usize, sum: S::f32s| {
            // SAFETY: `k + lanes <= half`, the length of both; the weight row has `2 half` values of 16 bits.
            let [even, odd] = [even, odd].map(|part| unsafe { part.as_ptr().add(k).cast::<S::f32s>().read_unaligned() });
            let bits = unsafe { weight.as_ptr().add(2 * k).cast::<S::u32s>().read_unaligned() };
            let first = simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(bits, by));
            let second = simd.transmute_f32s_u32s(simd.and_u32s(bits, high));
            simd.mul_add_f32s(second, odd, simd.mul_add_f32s(first, even, sum))
        };
        let mut sums = [simd.splat_f32s(0.0); AT_ONCE];
        let mut k = 0;
        while k + AT_ONCE * S::F32_LANES <= half {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = step(k + i * S::F32_LANES, *sum);
            }
            k += AT_ONCE * S::F32_LANES;
        }
        while k + S::F32_LANES <= half {
            sums[0] = step(k, sums[0]);
            k += S::F32_LANES;
        }
        let sum = total(simd, sums);
        let rest = (k..half).map(|k| {
            let [first, second] = [0, 1].map(|i| weight[2 * k + i].to_f32());
            first * even[k] + second * odd[k]
        });
        // SAFETY: each output column belongs to one task.
        let y = unsafe { self.y.part(row * self.outputs + self.first + o, 1) };
        y[0] = simd.reduce_sum_f32s(sum) + rest.sum::<f32>();
    }
}
