//! Functions of one or several values.

use cubecl::prelude::*;

/// `e^80` is near the end of float32's range: of anything more negative no gate differs from zero.
const LOWEST: f32 = -80.0;

/// `1 / (1 + e^-x)`
#[cube]
pub(crate) fn sigmoid<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(1.0f32);
    let bounded = max(x, Vector::<f32, N>::new(LOWEST));
    one / (one + (Vector::<f32, N>::new(0.0f32) - bounded).exp())
}

/// `x sigmoid(x)`
#[cube]
pub(crate) fn silu<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    x * sigmoid::<N>(x)
}

/// Derivative of [`silu`].
#[cube]
pub(crate) fn silu_slope<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let gate = sigmoid::<N>(x);
    gate + x * gate * (Vector::<f32, N>::new(1.0f32) - gate)
}

/// Normal distribution function; erfc(z) = t e^(-z^2 + p(t)) with t = 2 / (2 + z) (Numerical Recipes 6.2).
#[cube]
fn normal_cdf<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let zero = Vector::<f32, N>::new(0.0f32);
    let one = Vector::<f32, N>::new(1.0f32);
    let z = max(x, zero - x) * Vector::new(std::f32::consts::FRAC_1_SQRT_2);
    let t = Vector::<f32, N>::new(2.0f32) / (Vector::new(2.0f32) + z);
    let mut poly = Vector::<f32, N>::new(0.170_872_77f32);
    poly = poly * t - Vector::new(0.822_152_23f32);
    poly = poly * t + Vector::new(1.488_515_9f32);
    poly = poly * t - Vector::new(1.135_204f32);
    poly = poly * t + Vector::new(0.278_868_07f32);
    poly = poly * t - Vector::new(0.186_288_06f32);
    poly = poly * t + Vector::new(0.096_784_18f32);
    poly = poly * t + Vector::new(0.374_091_96f32);
    poly = poly * t + Vector::new(1.000_023_7f32);
    poly = poly * t - Vector::new(1.265_512_2f32);
    let tail = t * Vector::new(0.5f32) * max(poly - z * z, Vector::new(LOWEST)).exp();
    // 1 above zero and 0 below.
    let above = min(max(x * Vector::new(STEEP), zero), one);
    tail + above * (one - tail - tail)
}

/// Turns any float32 that counts into one beyond 1.
const STEEP: f32 = 1e30;

/// `x` times the normal distribution function, and the derivative of that.
#[cube]
pub(crate) fn gelu<N: Size>(x: Vector<f32, N>) -> (Vector<f32, N>, Vector<f32, N>) {
    let cdf = normal_cdf::<N>(x);
    // 1 / sqrt(2 pi)
    let density = max(x * x * Vector::new(-0.5f32), Vector::new(LOWEST)).exp() * Vector::new(0.398_942_3f32);
    (x * cdf, cdf + x * density)
}

/// Its approximation by `tanh`, `x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))`, and the derivative.
#[cube]
pub(crate) fn gelu_tanh<N: Size>(x: Vector<f32, N>) -> (Vector<f32, N>, Vector<f32, N>) {
    let scale = Vector::<f32, N>::new(1.595_769_2f32);
    let cube = Vector::<f32, N>::new(0.044_715f32 * 1.595_769_2f32);
    // Beyond 10 nothing changes any more.
    let bounded = min(max(x, Vector::new(-10.0f32)), Vector::new(10.0f32));
    let square = bounded * bounded;
    let gate = sigmoid::<N>(bounded * (scale + cube * square));
    let slope = scale + cube * square * Vector::new(3.0f32);
    (x * gate, gate + x * gate * (Vector::<f32, N>::new(1.0f32) - gate) * slope)
}

/// `max(x, 0)^2` and its derivative.
#[cube]
pub(crate) fn relu2<N: Size>(x: Vector<f32, N>) -> (Vector<f32, N>, Vector<f32, N>) {
    let positive = max(x, Vector::<f32, N>::new(0.0f32));
    (positive * positive, positive + positive)
}
