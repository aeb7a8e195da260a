//! The operations in scalar float64 arithmetic on the host, with gradients: what measured results are held against.
//!
//! Each takes a part of a call (one row, some heads or channels or queries) as plain vectors. Loops run over threads,
//! since a part may be a whole sequence of 64K tokens.

pub(super) mod attention;
pub(super) mod causal_conv1d;
pub(super) mod linear;
pub(super) mod rms_norm;
pub(super) mod selective_scan;
pub(super) mod ssd;

use crate::glu::Activation;

/// Document ids of one row: of its tokens (`-1` is padding), and of the state that comes in.
#[derive(Debug, Clone, Default)]
pub(super) struct RowIds {
    pub ids: Vec<i32>,
    pub prev: i32,
}

impl RowIds {
    /// Per token: a real one, and in the document of what came before.
    pub(super) fn marks(&self, l: usize) -> Vec<(bool, bool)> {
        let mut last = self.prev;
        (0..l)
            .map(|t| {
                let id = self.ids.get(t).copied().unwrap_or(last);
                let real = id >= 0;
                let joined = !real || id == last;
                if real {
                    last = id;
                }
                (real, joined)
            })
            .collect()
    }
}

pub(super) fn sigmoid(v: f64) -> f64 {
    1.0 / (1.0 + (-v).exp())
}

pub(super) fn softplus(v: f64) -> f64 {
    if v > 30.0 { v } else { v.exp().ln_1p() }
}

/// `v * sigmoid(v)` and its slope.
pub(super) fn silu(v: f64) -> (f64, f64) {
    let s = sigmoid(v);
    (v * s, s * (1.0 + v * (1.0 - s)))
}

/// Normal distribution function, by the series of the error function.
fn normal_cdf(v: f64) -> f64 {
    let x = v * std::f64::consts::FRAC_1_SQRT_2;
    // What is left out beyond is 2e-8 and less.
    if x.abs() > 4.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..100 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    0.5 + 0.5 * sum * std::f64::consts::FRAC_2_SQRT_PI
}

/// An activation of feed-forward blocks and its slope.
pub(super) fn activate(activation: Activation, v: f64) -> (f64, f64) {
    match activation {
        Activation::Silu => silu(v),
        Activation::Relu2 => (v.max(0.0).powi(2), 2.0 * v.max(0.0)),
        Activation::Gelu => {
            let cdf = normal_cdf(v);
            (v * cdf, cdf + v * (-0.5 * v * v).exp() / std::f64::consts::TAU.sqrt())
        }
        Activation::GeluTanh => {
            let scale = (2.0 / std::f64::consts::PI).sqrt();
            let tanh = (scale * (v + 0.044715 * v.powi(3))).tanh();
            let slope = scale * (1.0 + 3.0 * 0.044715 * v * v);
            (0.5 * v * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * v * (1.0 - tanh * tanh) * slope)
        }
    }
}

/// `to += from`, element by element.
pub(super) fn add(to: &mut [f64], from: &[f64]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
