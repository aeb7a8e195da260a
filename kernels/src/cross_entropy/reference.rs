//! Plain tensor operations.

use burn::tensor::DType;
use burn::tensor::backend::Backend;

use super::{CrossEntropyArgs, CrossEntropyOut};

/// See [`super::cross_entropy()`].
pub fn cross_entropy<B: Backend>(args: CrossEntropyArgs<B>) -> CrossEntropyOut<B> {
    let [rows, _] = args.logits.dims();
    let logits = args.logits.cast(DType::F32);
    let ignored = args.targets.clone().lower_elem(0);
    let targets = args.targets.clamp_min(0).reshape([rows, 1]);
    let largest = logits.clone().detach().max_dim(1); // [rows, 1]
    let shifted = logits - largest.clone(); // [rows, v]
    let picked = shifted.clone().gather(1, targets);
    let log_sum = shifted.exp().sum_dim(1).log();
    let loss = (log_sum.clone() - picked).reshape([rows]).mask_fill(ignored, 0.0);
    CrossEntropyOut { loss, log_sum: (log_sum + largest).reshape([rows]).detach() }
}
