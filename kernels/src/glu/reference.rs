//! Plain tensor operations.

use burn::tensor::activation::{gelu_approximate, relu, silu};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use super::{Activation, GluArgs};

/// See [`super::glu()`].
pub fn glu<B: Backend>(args: GluArgs<B>) -> Tensor<B, 3> {
    let dtype = args.up.dtype();
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let up = args.up.cast(wide);
    let out = match args.gate {
        Some(gate) => activate(args.activation, gate.cast(wide)) * up,
        None => activate(args.activation, up),
    };
    out.cast(dtype)
}

fn activate<B: Backend>(activation: Activation, x: Tensor<B, 3>) -> Tensor<B, 3> {
    match activation {
        // Not Burn's `gelu`: its gradient is that of the tanh approximation on most backends.
        Activation::Gelu => x.clone() * ((x * std::f32::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5,
        Activation::GeluTanh => gelu_approximate(x),
        Activation::Relu2 => relu(x).powi_scalar(2),
        Activation::Silu => silu(x),
    }
}
