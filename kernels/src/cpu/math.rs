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

/// Normal distribution function, to a few units in the last place on both sides of 0.
#[inline(always)]
pub(crate) fn normal_cdf(x: f32) -> f32 {
    // erfc(z) = t e^(-z^2 + p(t)), as a polynomial in t = 2 / (2 + z) (Numerical Recipes 6.2).
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 2.0 / (2.0 + z);
    let poly = 0.170_872_77;
    let poly = poly * t - 0.822_152_23;
    let poly = poly * t + 1.488_515_9;
    let poly = poly * t - 1.135_204;
    let poly = poly * t + 0.278_868_07;
    let poly = poly * t - 0.186_288_06;
    let poly = poly * t + 0.096_784_18;
    let poly = poly * t + 0.374_091_96;
    let poly = poly * t + 1.000_023_7;
    let poly = poly * t - 1.265_512_2;
    let tail = 0.5 * t * exp(poly - z * z);
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// `x` times the normal distribution function.
#[inline(always)]
pub(crate) fn gelu(x: f32) -> f32 {
    x * normal_cdf(x)
}

/// [`gelu`] and its derivative.
#[inline(always)]
pub(crate) fn gelu_with_slope(x: f32) -> (f32, f32) {
    // 1 / sqrt(2 pi)
    const DENSITY: f32 = 0.398_942_3;
    let cdf = normal_cdf(x);
    (x * cdf, cdf + x * DENSITY * exp(-0.5 * x * x))
}

/// `x (1 + tanh(y)) / 2 = x sigmoid(2 y)` with `y = sqrt(2 / pi) (x + 0.044715 x^3)`; `2 y` and its derivative. Beyond 10 nothing
/// changes any more.
#[inline(always)]
fn gelu_tanh_inner(x: f32) -> (f32, f32) {
    const SCALE: f32 = 1.595_769_2;
    const CUBE: f32 = 0.044_715 * SCALE;
    let x = x.clamp(-10.0, 10.0);
    let square = x * x;
    (x * (SCALE + CUBE * square), SCALE + 3.0 * CUBE * square)
}

/// The approximation of [`gelu`] by `tanh`.
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    x * sigmoid(gelu_tanh_inner(x).0)
}

/// [`gelu_tanh`] and its derivative.
#[inline(always)]
pub(crate) fn gelu_tanh_with_slope(x: f32) -> (f32, f32) {
    let (inner, slope) = gelu_tanh_inner(x);
    let s = sigmoid(inner);
    (x * s, s + x * s * (1.0 - s) * slope)
}

/// `ln(1 + e^x)` without overflow, to about two units in the last place.
#[inline(always)]
pub(crate) fn softplus(x: f32) -> f32 {
    // ln(1 + y) = 2 artanh(s), as a series in s <= 1/3.
    let y = exp(-x.abs());
    let s = y / (2.0 + y);
    let square = s * s;
    let series = 1.0 / 13.0;
    let series = series * square + 1.0 / 11.0;
    let series = series * square + 1.0 / 9.0;
    let series = series * square + 1.0 / 7.0;
    let series = series * square + 1.0 / 5.0;
    let series = series * square + 1.0 / 3.0;
    x.max(0.0) + 2.0 * (s + s * square * series)
}

/// `2^x` in every lane, to about two units in the last place and exact at 0; 0 below the range of normal numbers, about
/// `2^127` above it.
#[inline(always)]
pub(crate) fn exp2_lanes<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; 127 more make it a biased exponent.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    #[allow(clippy::approx_constant, reason = "fitted on -0.5..0.5")]
    const POLY: [f32; 4] = [9.671_513e-3, 5.550_733_6e-2, 2.402_224_2e-1, 6.931_47e-1];
    let splat = |value: f32| simd.splat_f32s(value);
    let bounded = simd.min_f32s(splat(127.0), simd.max_f32s(splat(-127.0), x));
    let shifted = simd.add_f32s(bounded, splat(ROUND));
    let r = simd.sub_f32s(bounded, simd.sub_f32s(shifted, splat(ROUND)));
    let mut poly = splat(1.326_472_7e-3);
    for coefficient in POLY {
        poly = simd.mul_add_f32s(poly, r, splat(coefficient));
    }
    let value = simd.mul_add_f32s(poly, r, splat(1.0));
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.mul_f32s(value, simd.transmute_f32s_u32s(exponent))
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
    fn softplus_is_accurate_over_its_whole_range() {
        for i in -8_600..=8_830 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp().ln_1p();
            assert!((f64::from(softplus(x)) / want - 1.0).abs() < 4e-7, "softplus({x}) = {}, expected {want}", softplus(x));
        }
        assert_eq!((softplus(-200.0), softplus(200.0), softplus(f32::NEG_INFINITY)), (0.0, 200.0, 0.0));
        assert!(softplus(f32::NAN).is_nan());
    }

    /// By Simpson's rule from far out.
    fn cdf_by_integration(x: f64) -> f64 {
        let density = |t: f64| (-0.5 * t * t).exp() / std::f64::consts::TAU.sqrt();
        let (from, steps) = (-12.0, 20_000);
        let h = (x - from) / f64::from(steps);
        let inner: f64 = (1..steps).map(|i| density(from + f64::from(i) * h) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
        (density(from) + inner + density(x)) * h / 3.0
    }

    #[test]
    fn the_normal_distribution_is_accurate_in_both_tails() {
        for i in -70..=70 {
            let x = i as f32 / 10.0 + 0.013;
            let want = cdf_by_integration(f64::from(x));
            let error = (f64::from(normal_cdf(x)) / want - 1.0).abs();
            assert!(error < if x > -2.0 { 1e-6 } else { 5e-6 }, "at {x}: {}, expected {want}", normal_cdf(x));
        }
        assert_eq!((normal_cdf(-100.0), normal_cdf(100.0)), (0.0, 1.0));
        assert!(normal_cdf(f32::NAN).is_nan());
    }

    #[test]
    fn activations_end_in_zero_and_in_themselves() {
        for with_slope in [gelu_with_slope, gelu_tanh_with_slope, silu_with_slope] {
            let (low, high) = (with_slope(-80.0), with_slope(80.0));
            assert!(low.0.abs() < 1e-30 && low.1.abs() < 1e-30, "{low:?}");
            assert_eq!(high, (80.0, 1.0));
        }
        for x in [-30.0_f32, -4.0, -0.5, 0.0, 0.7, 3.0, 50.0] {
            assert_eq!((gelu(x), gelu_tanh(x), silu(x)), (gelu_with_slope(x).0, gelu_tanh_with_slope(x).0, silu_with_slope(x).0));
        }
    }

    #[test]
    fn exp2_lanes_are_accurate_over_their_whole_range() {
        struct Each<'a>(&'a mut [f32]);
        impl WithSimd for Each<'_> {
            type Output = ();

            #[inline(always)]
            fn with_simd<S: Simd>(self, simd: S) {
                let (vectors, rest) = S::as_mut_simd_f32s(self.0);
                vectors.iter_mut().for_each(|x| *x = exp2_lanes(simd, *x));
                assert!(rest.is_empty());
            }
        }
        let inputs: Vec<f32> = (-12_600..=12_759).map(|i| i as f32 / 100.0).collect();
        let mut values = inputs.clone();
        values.truncate(inputs.len() / 16 * 16);
        Arch::new().dispatch(Each(&mut values));
        for (&x, value) in inputs.iter().zip(values) {
            let want = f64::from(x.min(127.0)).exp2();
            assert!((f64::from(value) / want - 1.0).abs() < 3e-7, "2^{x} = {value}, expected {want}");
        }
        let mut special = [0.0; 16];
        special[..3].copy_from_slice(&[f32::NEG_INFINITY, -1e30, -127.0]);
        Arch::new().dispatch(Each(&mut special));
        assert_eq!(special[..4], [0.0, 0.0, 0.0, 1.0]);
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
