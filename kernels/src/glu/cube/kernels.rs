//! One pass over the inputs in each direction.

use cubecl::prelude::*;

use crate::cube::math::{gelu, gelu_tanh, relu2, silu, silu_slope};
use crate::glu::Activation;

/// The activation and its derivative; what is not used is never computed.
#[cube]
fn both<N: Size>(x: Vector<f32, N>, #[comptime] activation: Activation) -> (Vector<f32, N>, Vector<f32, N>) {
    if comptime!(activation == Activation::Gelu) {
        gelu::<N>(x)
    } else if comptime!(activation == Activation::GeluTanh) {
        gelu_tanh::<N>(x)
    } else if comptime!(activation == Activation::Relu2) {
        relu2::<N>(x)
    } else {
        (silu::<N>(x), silu_slope::<N>(x))
    }
}

/// `out = act(gate) * up`, or `act(up)` without a gate.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
pub(super) fn forward<F: Float, N: Size>(
    up: &Array<Vector<F, N>>,
    gate: &Array<Vector<F, N>>,
    out: &mut Array<Vector<F, N>>,
    vectors: u32,
    #[comptime] activation: Activation,
    #[comptime] gated: bool,
    #[define(F)] _dtype: StorageType,
) {
    let at = ABSOLUTE_POS;
    if at < vectors as usize {
        let x = Vector::<f32, N>::cast_from(up[at]);
        if comptime!(gated) {
            let (value, _) = both::<N>(Vector::<f32, N>::cast_from(gate[at]), activation);
            out[at] = Vector::cast_from(value * x);
        } else {
            let (value, _) = both::<N>(x, activation);
            out[at] = Vector::cast_from(value);
        }
    }
}

/// Gradients of `up` and, where there is one, of the gate.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
pub(super) fn backward<F: Float, N: Size>(
    up: &Array<Vector<F, N>>,
    gate: &Array<Vector<F, N>>,
    dout: &Array<Vector<F, N>>,
    dup: &mut Array<Vector<F, N>>,
    dgate: &mut Array<Vector<F, N>>,
    vectors: u32,
    #[comptime] activation: Activation,
    #[comptime] gated: bool,
    #[define(F)] _dtype: StorageType,
) {
    let at = ABSOLUTE_POS;
    if at < vectors as usize {
        let x = Vector::<f32, N>::cast_from(up[at]);
        let grad = Vector::<f32, N>::cast_from(dout[at]);
        if comptime!(gated) {
            let (value, slope) = both::<N>(Vector::<f32, N>::cast_from(gate[at]), activation);
            dup[at] = Vector::cast_from(grad * value);
            dgate[at] = Vector::cast_from(grad * x * slope);
        } else {
            let (_, slope) = both::<N>(x, activation);
            dup[at] = Vector::cast_from(grad * slope);
        }
    }
}
