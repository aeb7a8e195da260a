//! The node of the graph: a trunk that joins gradients, and a leaf for each part (see [`crate::autodiff`]).

use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Tensor, TensorPrimitive};

use crate::KernelBackend;

type Slot<B> = Arc<Mutex<Option<FloatTensor<B>>>>;

#[derive(Clone, Debug)]
struct Kept<B: Backend> {
    rows: [usize; 2],
    widths: Vec<usize>,
    dtype: DType,
    device: B::Device,
    slots: Vec<Slot<B>>,
}

#[derive(Debug)]
struct Join;

impl<B: KernelBackend> Backward<B, 1> for Join {
    type State = Kept<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let Kept { rows: [b, l], widths, dtype, device, slots } = ops.state;
        let [Some(parent)] = ops.parents else { return };
        let parts = slots.iter().zip(widths).map(|(slot, width)| match slot.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(grad) => Tensor::<B, 3>::from_primitive(TensorPrimitive::Float(grad)),
            None => Tensor::zeros([b, l, width], (&device, dtype)),
        });
        grads.register::<B>(parent.id, B::join(parts.collect()).into_primitive().tensor());
    }
}

#[derive(Debug)]
struct Leaf;

impl<B: Backend> Backward<B, 1> for Leaf {
    type State = Slot<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        *ops.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(grad);
    }
}

/// Splits `x` as one node.
pub(crate) fn record<B: KernelBackend, C: CheckpointStrategy>(
    x: Tensor<Autodiff<B, C>, 3>,
    widths: &[usize],
) -> Vec<Tensor<Autodiff<B, C>, 3>> {
    let [b, l, _] = x.dims();
    let (dtype, device) = (x.dtype(), x.device());
    let outer = x.into_primitive().tensor();
    let inner = Tensor::<B, 3>::from_primitive(TensorPrimitive::Float(outer.primitive.clone()));
    let parts = B::split(inner, widths).into_iter().map(|part| part.into_primitive().tensor());
    let slots: Vec<Slot<B>> = widths.iter().map(|_| Slot::<B>::default()).collect();
    let kept = Kept::<B> { rows: [b, l], widths: widths.to_vec(), dtype, device, slots: slots.clone() };
    let up = |primitive| Tensor::from_primitive(TensorPrimitive::Float(primitive));
    match Join.prepare::<C>([outer.node.clone()]).compute_bound().stateful() {
        OpsKind::UnTracked(_) => parts.map(|part| Tensor::from_inner(Tensor::from_primitive(TensorPrimitive::Float(part)))).collect(),
        OpsKind::Tracked(prep) => {
            // Nobody reads the trunk's own value.
            let trunk = prep.finish(kept, outer.primitive);
            let leaf = |(slot, part): (Slot<B>, FloatTensor<B>)| match Leaf.prepare::<C>([trunk.node.clone()]).compute_bound().stateful() {
                OpsKind::Tracked(prep) => up(prep.finish(slot, part)),
                OpsKind::UnTracked(_) => unreachable!("the trunk is tracked"),
            };
            slots.into_iter().zip(parts).map(leaf).collect()
        }
    }
}
