//! The operations under Burn's autodiff decorator.
//!
//! Where the backend below has a fast path, the operation becomes one node of the graph with a hand-written backward;
//! elsewhere the reference runs on autodiff tensors and Burn differentiates it.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;

use crate::KernelBackend;

impl<B: KernelBackend, C: CheckpointStrategy> KernelBackend for Autodiff<B, C> {}
