//! Sums over devices: what data parallel training does with gradients.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

/// Devices that add tensors up among themselves, without a trip through the host.
pub trait Collective<B: Backend>: Send + Sync {
    /// Adds to each of `tensors`, `[n]` each, those in the same place on all other devices. Enqueued, not waited for.
    ///
    /// Every device calls this from a thread of its own, with the same number of tensors of the same lengths and types; none is done before all
    /// have called. All devices get the same bits.
    fn sum(&self, tensors: Vec<Tensor<B, 1>>) -> Vec<Tensor<B, 1>>;
}
