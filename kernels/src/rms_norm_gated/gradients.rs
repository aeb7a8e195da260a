//! Gradients in plain tensor operations, for what no kernel takes.

use burn::tensor::activation::{sigmoid, silu};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use super::{NormArgs, NormGrads};

/// Gradients of [`super::rms_norm_gated`] from that of its output.
pub fn gradients<B: Backend>(args: NormArgs<B>, dout: Tensor<B, 3>) -> NormGrads<B> {
    let [b, l, e] = args.y.dims();
    let g = args.groups;
    let (dtype, weight_dtype) = (args.y.dtype(), args.weight.dtype());
    let (y, dout) = (args.y.cast(DType::F32), dout.cast(DType::F32));
    let gate = args.z.map(|z| (z.dtype(), z.cast(DType::F32)));
    let v = match &gate {
        Some((_, z)) => y.clone() * silu(z.clone()),
        None => y.clone(),
    };
    let grouped = |t: Tensor<B, 3>| t.reshape([b, l, g, e / g]);
    let scale = (grouped(v.clone()).powi_scalar(2).mean_dim(3) + args.eps).sqrt().recip(); // [b, l, g, 1]
    let u = grouped(v) * scale.clone();
    let inward = grouped(dout.clone() * args.weight.cast(DType::F32).reshape([1, 1, e]));
    let dv = ((inward.clone() - u.clone() * (inward * u.clone()).mean_dim(3)) * scale).reshape([b, l, e]);
    let weight = (dout * u.reshape([b, l, e])).sum_dim(0).sum_dim(1).reshape([e]).cast(weight_dtype);
    match gate {
        None => NormGrads { y: dv.cast(dtype), z: None, weight },
        Some((gate_dtype, z)) => {
            let s = sigmoid(z.clone());
            let slope = s.clone() * (z.clone() * (s.clone().neg() + 1.0) + 1.0);
            NormGrads { y: (dv.clone() * z * s).cast(dtype), z: Some((dv * y * slope).cast(gate_dtype)), weight }
        }
    }
}
