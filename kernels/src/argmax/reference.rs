//! Plain tensor operations.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};

/// See [`super::argmax`].
pub(crate) fn argmax<B: Backend>(logits: Tensor<B, 2>, known: usize) -> Tensor<B, 2, Int> {
    let [b, _] = logits.dims();
    let logits = logits.slice([0..b, 0..known]);
    let broken = logits.clone().is_nan().bool_or(logits.clone().equal_elem(f32::INFINITY)).any_dim(1);
    // Burn does not say which of equals it takes: the smallest number among them.
    let numbers = Tensor::<B, 1, Int>::arange(0..known as i64, &logits.device()).unsqueeze::<2>().expand([b, known]);
    let below = logits.clone().max_dim(1).expand([b, known]).equal(logits).bool_not();
    numbers.mask_fill(below, known as i64).min_dim(1).mask_fill(broken, -1)
}
