//! On slices: a block of values at a time, blocks shared out among threads.

use std::ops::Range;

use pulp::Arch;

use super::Activation;
use crate::cpu::math::{gelu, gelu_tanh, gelu_tanh_with_slope, gelu_with_slope, silu, silu_with_slope, vectorized};
use crate::cpu::threads::{Shared, for_each};

/// Values of a task: with those beside them they stay in the first levels of cache.
const BLOCK: usize = 1 << 12;

#[inline(always)]
fn relu2(x: f32) -> f32 {
    let x = x.max(0.0);
    x * x
}

#[inline(always)]
fn relu2_with_slope(x: f32) -> (f32, f32) {
    let x = x.max(0.0);
    (x * x, 2.0 * x)
}

/// Calls a function with another one as its last argument, such that it becomes part of the loop there.
macro_rules! with {
    ($run:ident($($argument:expr),*), $function:ident) => {
        $run($($argument,)* #[inline(always)] |x| $function(x))
    };
}

/// `up` if it is given, else what `out` holds, activated or multiplied by the activated gate; in `out`.
pub(crate) fn forward(out: &mut [f32], up: Option<&[f32]>, gate: Option<&[f32]>, activation: Activation) {
    match activation {
        Activation::Gelu => with!(activate(out, up, gate), gelu),
        Activation::GeluTanh => with!(activate(out, up, gate), gelu_tanh),
        Activation::Relu2 => with!(activate(out, up, gate), relu2),
        Activation::Silu => with!(activate(out, up, gate), silu),
    }
}

/// `dout` if it is given, else what `grad` holds, is the gradient of the output; leaves that of `up` in `grad` and returns that of
/// the gate, which is empty without one.
pub(crate) fn backward(grad: &mut [f32], dout: Option<&[f32]>, up: &[f32], gate: Option<&[f32]>, activation: Activation) -> Vec<f32> {
    match activation {
        Activation::Gelu => with!(differentiate(grad, dout, up, gate), gelu_with_slope),
        Activation::GeluTanh => with!(differentiate(grad, dout, up, gate), gelu_tanh_with_slope),
        Activation::Relu2 => with!(differentiate(grad, dout, up, gate), relu2_with_slope),
        Activation::Silu => with!(differentiate(grad, dout, up, gate), silu_with_slope),
    }
}

fn activate(out: &mut [f32], up: Option<&[f32]>, gate: Option<&[f32]>, f: impl Fn(f32) -> f32 + Sync + Send) {
    let arch = Arch::new();
    in_blocks(out, |out, range| {
        if let Some(up) = up {
            out.copy_from_slice(&up[range.clone()]);
        }
        match gate.map(|gate| &gate[range]) {
            Some(gate) => vectorized!(arch, out.iter_mut().zip(gate).for_each(|(out, &gate)| *out *= f(gate))),
            None => vectorized!(arch, out.iter_mut().for_each(|out| *out = f(*out))),
        }
    });
}

/// `f` gives the activation and its slope.
fn differentiate(
    grad: &mut [f32],
    dout: Option<&[f32]>,
    up: &[f32],
    gate: Option<&[f32]>,
    f: impl Fn(f32) -> (f32, f32) + Sync + Send,
) -> Vec<f32> {
    let arch = Arch::new();
    let mut dgate = vec![0.0; gate.map_or(0, <[f32]>::len)];
    let shared = Shared::new(&mut dgate);
    in_blocks(grad, |grad, range| {
        if let Some(dout) = dout {
            grad.copy_from_slice(&dout[range.clone()]);
        }
        let up = &up[range.clone()];
        let Some(gate) = gate else {
            vectorized!(arch, grad.iter_mut().zip(up).for_each(|(grad, &up)| *grad *= f(up).1));
            return;
        };
        // SAFETY: each block belongs to one task.
        let dgate = unsafe { shared.part(range.start, range.len()) };
        let gate = &gate[range];
        vectorized!(arch, {
            for (((grad, dgate), &up), &gate) in grad.iter_mut().zip(dgate.iter_mut()).zip(up).zip(gate) {
                let (value, slope) = f(gate);
                *dgate = *grad * up * slope;
                *grad *= value;
            }
        });
    });
    dgate
}

/// Runs `f` on each block of `values` and the range it covers.
fn in_blocks(values: &mut [f32], f: impl Fn(&mut [f32], Range<usize>) + Sync + Send) {
    let count = values.len();
    let shared = Shared::new(values);
    for_each(
        count.div_ceil(BLOCK),
        count * 16,
        || (),
        |(), block| {
            let range = block * BLOCK..count.min((block + 1) * BLOCK);
            // SAFETY: each block belongs to one task.
            f(unsafe { shared.part(range.start, range.len()) }, range);
        },
    );
}
