//! Scalar functions and small loops in a form that the compiler turns into vector code.
//!
//! Everything here is `inline(always)`: the code must end up inside a function compiled for the machine's instruction
//! set, see [`vectorized`].

use pulp::{Arch, Simd, WithSimd};

/// Runs an expression compiled for the best instruction set of this machine. What it calls must be `inline(always)`.
macro_rules! vectorized {
    ($arch:expr, $body:expr) => {
        $arch.dispatch($crate::cpu::math::Compiled(
            #[inline(always)]
            || $body,
        ))
    };
}
pub(crate) use vectorized;

/// Work for [`vectorized`]. `FnMut`, since calling a closure by value goes through a function of the compiler's own that
/// is not inlined, and the body would stay behind in it with the plainest instruction set.
pub(crate) struct Compiled<F>(pub F);

impl<R, F: FnMut() -> R> WithSimd for Compiled<F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _simd: S) -> R {
        (self.0)()
    }
}

/// `e^x`, to about one unit in the last place; 0 below the range of normal numbers, about 2e38 above 88.3.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let bounded = x.clamp(-87.0, 88.3);
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let r = bounded - whole * 0.693_359_4 + whole * 2.121_944_4e-4;
    let poly = 1.987_569_1e-4;
    let poly = poly * r + 1.398_199_9e-3;
    let poly = poly * r + 8.333_452e-3;
    let poly = poly * r + 4.166_579_6e-2;
    let poly = poly * r + 1.666_666_5e-1;
    let poly = poly * r + 0.5;
    let value = poly * (r * r) + r + 1.0;
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { value * scale }
}

/// Logistic function.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// `silu` and its derivative.
#[inline(always)]
pub(crate) fn silu_with_slope(x: f32) -> (f32, f32) {
    let s = sigmoid(x);
    (x * s, s * (1.0 + x * (1.0 - s)))
}

/// `ln(1 + e^x)` without overflow.
pub(crate) fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

const LANES: usize = 16;

/// `sum a[i] * b[i]`, in an order that does not depend on the machine's vector width.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    fold(a, b, |x, y| x * y)
}

/// `sum f(a[i], b[i])` in a fixed order.
#[inline(always)]
pub(crate) fn fold(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a, b) = (&a[..a.len().min(b.len())], &b[..a.len().min(b.len())]);
    let (mut left, mut right) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (x, y) in left.by_ref().zip(right.by_ref()) {
        for i in 0..LANES {
            lanes[i] += f(x[i], y[i]);
        }
    }
    let tail: f32 = left.remainder().iter().zip(right.remainder()).map(|(&x, &y)| f(x, y)).sum();
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0] + tail
}

/// `out[j * out_stride + i] = values[i * stride + j]` for `rows` by `columns` values.
#[inline(always)]
pub(crate) fn transpose(out: &mut [f32], out_stride: usize, values: &[f32], stride: usize, rows: usize, columns: usize) {
    const TILE: usize = 8;
    for i0 in (0..rows).step_by(TILE) {
        for j0 in (0..columns).step_by(TILE) {
            if i0 + TILE <= rows && j0 + TILE <= columns {
                let mut tile = [[0.0f32; TILE]; TILE];
                for (i, row) in tile.iter_mut().enumerate() {
                    row.copy_from_slice(&values[(i0 + i) * stride + j0..][..TILE]);
                }
                for j in 0..TILE {
                    let column: [f32; TILE] = std::array::from_fn(|i| tile[i][j]);
                    out[(j0 + j) * out_stride + i0..][..TILE].copy_from_slice(&column);
                }
                continue;
            }
            for i in i0..rows.min(i0 + TILE) {
                for j in j0..columns.min(j0 + TILE) {
                    out[j * out_stride + i] = values[i * stride + j];
                }
            }
        }
    }
}

/// [`transpose`] compiled for the machine.
pub(crate) fn transposed(arch: Arch, out: &mut [f32], out_stride: usize, values: &[f32], stride: usize, rows: usize, columns: usize) {
    vectorized!(arch, transpose(out, out_stride, values, stride, rows, columns));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_over_its_whole_range() {
        for i in -8_700..=8_830 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) / want - 1.0).abs() < 3e-7, "exp({x}) = {}, expected {want}", exp(x));
        }
        assert_eq!((exp(-100.0), exp(f32::NEG_INFINITY)), (0.0, 0.0));
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn transpose_moves_every_element() {
        let values: Vec<f32> = (0..13 * 21).map(|i| i as f32).collect();
        let mut out = vec![-1.0; 21 * 16];
        transpose(&mut out, 16, &values, 21, 13, 21);
        for i in 0..13 {
            for j in 0..21 {
                assert_eq!(out[j * 16 + i], values[i * 21 + j]);
            }
        }
    }
}
