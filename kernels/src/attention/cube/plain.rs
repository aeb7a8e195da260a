//! Gradients in plain tensor operations, where a kernel declines inside a backward pass.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::attention::reference::{blank, weights};
use crate::attention::{AttentionArgs, AttentionGrads};

/// Gradients of the reference, for shapes that a kernel declines inside a backward pass.
pub(crate) fn attention_backward<B: Backend>(args: AttentionArgs<B>, dout: Tensor<B, 4>) -> AttentionGrads<B> {
    let [b, h, l, p] = args.q.dims();
    let [_, g, s, _] = args.k.dims();
    let dtype = args.q.dtype();
    let rows = |tensor: Tensor<B, 4>, width| tensor.cast(DType::F32).reshape([b, g, h / g * l, width]);
    let weights = rows(weights(&args), s);
    let dout = rows(blank(dout, &args), p);
    let [q, k, v] = [rows(args.q, p), args.k.cast(DType::F32), args.v.cast(DType::F32)];
    let dv = weights.clone().swap_dims(2, 3).matmul(dout.clone());
    let dweights = dout.matmul(v.swap_dims(2, 3));
    let mean = (dweights.clone() * weights.clone()).sum_dim(3);
    let dscores = weights * (dweights - mean) * args.scale;
    let dq = dscores.clone().matmul(k).reshape([b, h, l, p]);
    let dk = dscores.swap_dims(2, 3).matmul(q);
    AttentionGrads { q: dq.cast(dtype), k: dk.cast(dtype), v: dv.cast(dtype) }
}
