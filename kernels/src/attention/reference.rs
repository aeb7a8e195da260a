//! Plain tensor operations; scores are materialised.

use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};

use super::AttentionArgs;

/// Stands for minus infinity: finite, so that a row with nothing to see gives numbers (blanked below), not NaN.
const HIDDEN: f32 = -1e30;

/// See [`super::attention`].
pub fn attention<B: Backend>(args: AttentionArgs<B>) -> Tensor<B, 4> {
    let [b, h, l, p] = args.q.dims();
    let [_, g, s, _] = args.k.dims();
    let out = weights(&args).cast(args.v.dtype()).reshape([b, g, h / g * l, s]).matmul(args.v.clone()).reshape([b, h, l, p]);
    blank(out, &args)
}

/// Softmax of the scores, `[b, h, l, s]` in float32.
pub(super) fn weights<B: Backend>(args: &AttentionArgs<B>) -> Tensor<B, 4> {
    let [b, h, l, p] = args.q.dims();
    let [_, g, s, _] = args.k.dims();
    // Query heads of a group share its keys: fold them into the rows instead of repeating the keys.
    let q = (args.q.clone() * args.scale).reshape([b, g, h / g * l, p]);
    let scores = q.matmul(args.k.clone().swap_dims(2, 3)).cast(DType::F32).reshape([b, h, l, s]);
    let hidden = args.mask.hidden(&args.q.device()).expand([b, h, l, s]);
    softmax(scores.mask_fill(hidden, HIDDEN), 3)
}

/// Zero at padding queries.
pub(super) fn blank<B: Backend>(out: Tensor<B, 4>, args: &AttentionArgs<B>) -> Tensor<B, 4> {
    let [b, h, l, p] = out.dims();
    match args.mask.ids() {
        Some(ids) if ids.queries.contains(&-1) => {
            let queries = Tensor::<B, 4, Int>::from_data(TensorData::new(ids.queries.clone(), [b, 1, l, 1]), &out.device());
            out.mask_fill(queries.equal_elem(-1).expand([b, h, l, p]), 0.0)
        }
        _ => out,
    }
}
