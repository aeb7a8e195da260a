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
