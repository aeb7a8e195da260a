//! Plain tensor operations; scores are materialised.

use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};

use super::AttentionArgs;

/// Stands for minus infinity: finite, so that a row with nothing to see gives numbers (blanked below), not NaN.
const HIDDEN: f32 = -1e30;

/// See [`super::attention`].
pub fn attention<B: Backend>(args: AttentionArgs<B>) -> Tensor<B, 4> {
    let AttentionArgs { q, k, v, scale, mask } = args;
    let [b, h, l, p] = q.dims();
    let [_, g, s, _] = k.dims();
    let r = h / g;
    let device = q.device();
    let dtype = q.dtype();
    // Query heads of a group share its keys: fold them into the rows instead of repeating the keys.
    let q = (q * scale).reshape([b, g, r * l, p]);
    let scores = q.matmul(k.swap_dims(2, 3)).cast(DType::F32).reshape([b, h, l, s]);
    let hidden = mask.hidden(&device).expand([b, h, l, s]);
    let weights = softmax(scores.mask_fill(hidden, HIDDEN), 3).cast(dtype);
    let out = weights.reshape([b, g, r * l, s]).matmul(v).reshape([b, h, l, p]);
    match mask.ids() {
        Some(ids) if ids.queries.contains(&-1) => {
            let queries = Tensor::<B, 4, Int>::from_data(TensorData::new(ids.queries.clone(), [b, 1, l, 1]), &device);
            out.mask_fill(queries.equal_elem(-1).expand([b, h, l, p]), 0.0)
        }
        _ => out,
    }
}
