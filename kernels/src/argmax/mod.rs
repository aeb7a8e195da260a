//! The likeliest token of each row, chosen on the device.

#[cfg(feature = "_cube")]
pub(crate) mod cube;
pub(crate) mod reference;

use burn::tensor::{Int, Tensor};

use crate::KernelBackend;

/// Number of the largest of the first `known` columns of each row of `logits [b, v]`, the first of equal ones: `[b, 1]`; -1 where
/// one of them is NaN or plus infinity. The ids are written over those of `into` where the backend can and nobody else holds them: a recorded step
/// then reads at the next replay what it chose at this one.
///
/// # Panics
/// When `known` is 0 or above `v`, or `into` is not `[b, 1]`.
pub fn argmax<B: KernelBackend>(logits: Tensor<B, 2>, known: usize, into: Option<Tensor<B, 2, Int>>) -> Tensor<B, 2, Int> {
    let [b, v] = logits.dims();
    assert!((1..=v).contains(&known), "argmax: {known} of {v} columns");
    assert!(into.as_ref().is_none_or(|into| into.dims() == [b, 1]), "argmax: the ids to overwrite are not [{b}, 1]");
    B::argmax(logits, known, into)
}
