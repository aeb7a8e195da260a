//! Gradient checkpointing: what is inside the layers is computed again when it is needed (arXiv 1604.06174).
//!
//! Forward, a model keeps what enters every segment of some layers, and nothing of what is inside. Backward, each segment is run again, now
//! with its operations recorded, and differentiated from the gradient of what leaves it. So memory holds the activations of one segment
//! and the entries of all, for one more forward pass.

use burn::module::AutodiffModule;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Int, Tensor};
use terrarium_kernels::{KernelBackend, TrainBackend};
use terrarium_models::{Context, Decoder, Layout, Sequence, Stream};

use crate::gradients::Gradients;

/// Tensors of a stream, in the same order for streams of the same place.
fn tensors<B: Backend>(stream: &Stream<B>) -> Vec<Tensor<B, 3>> {
    [Some(&stream.x), stream.branch.as_ref(), stream.before.as_ref()].into_iter().flatten().cloned().collect()
}

fn sequence<B: KernelBackend>(layout: &Layout, device: &B::Device) -> Sequence<B> {
    Context::start(layout.dims()[0]).advance(layout, device).0
}

/// A model that has read a batch.
pub(crate) struct Passed<B: TrainBackend> {
    /// What enters each segment but the first, and at last what leaves the layers.
    entries: Vec<Stream<B::InnerBackend>>,
    ids: Tensor<B, 2, Int>,
    sequence: Sequence<B>,
    segment: usize,
}

impl<B: TrainBackend> Passed<B> {
    /// Reads a batch, `segment` layers at a time.
    pub fn forward(model: &Decoder<B>, ids: Tensor<B, 2, Int>, layout: &Layout, segment: usize, device: &B::Device) -> Self {
        let inner = model.valid();
        let plainly = sequence::<B::InnerBackend>(layout, device);
        let mut stream = inner.enter(ids.clone().inner(), &plainly);
        let mut entries = Vec::new();
        for start in (0..inner.layers.len()).step_by(segment) {
            let layers = start..(start + segment).min(inner.layers.len());
            let none = vec![None; layers.len()];
            (stream, _) = inner.pass(layers, stream, none, &plainly);
            entries.push(stream.clone());
        }
        Self { entries, ids, sequence: sequence(layout, device), segment }
    }

    /// Hidden states, to be differentiated down to what the layers gave, which comes with them.
    pub fn hidden(&self, model: &Decoder<B>) -> (Tensor<B, 3>, Vec<Tensor<B, 3>>) {
        match self.entries.last() {
            Some(last) => {
                let stream = leaves::<B>(last);
                let leaves = tensors(&stream);
                (model.leave(stream, &self.sequence), leaves)
            }
            // A model without layers.
            None => (model.leave(model.enter(self.ids.clone(), &self.sequence), &self.sequence), Vec::new()),
        }
    }

    /// Goes back through the layers, from the gradients `found` for `leaves`, which are those of [`Passed::hidden`].
    pub fn backward(
        self,
        model: &Decoder<B>,
        leaves_of_last: Vec<Tensor<B, 3>>,
        found: B::Gradients,
        grads: &mut Gradients<B::InnerBackend>,
    ) {
        let Self { mut entries, ids, sequence, segment } = self;
        let (mut leaves_above, mut found) = (leaves_of_last, found);
        while let Some(left) = entries.pop() {
            let upstream: Vec<Option<Tensor<B::InnerBackend, 3>>> = leaves_above.iter().map(|leaf| leaf.grad_remove(&mut found)).collect();
            grads.add(model, found);
            drop(left);
            let start = entries.len() * segment;
            let layers = start..(start + segment).min(model.layers.len());
            let none = vec![None; layers.len()];
            let (entered, own) = match entries.last() {
                Some(entry) => {
                    let stream = leaves::<B>(entry);
                    let own = tensors(&stream);
                    (stream, own)
                }
                None => (model.enter(ids.clone(), &sequence), Vec::new()),
            };
            let (out, _) = model.pass(layers, entered, none, &sequence);
            let pulls = tensors(&out).into_iter().zip(upstream);
            let pulls = pulls.filter_map(|(out, grad)| Some((out * Tensor::from_inner(grad?)).cast(burn::tensor::DType::F32).sum()));
            let Some(pull) = pulls.reduce(|a, b| a + b) else { return };
            (leaves_above, found) = (own, pull.backward());
        }
        grads.add(model, found);
    }
}

/// Tensors of an entry as the ends of a graph of their own.
fn leaves<B: AutodiffBackend>(entry: &Stream<B::InnerBackend>) -> Stream<B> {
    let leaf = |tensor: Tensor<B::InnerBackend, 3>| Tensor::<B, 3>::from_inner(tensor).require_grad();
    let Stream { x, branch, before } = entry.clone();
    Stream { x: leaf(x), branch: branch.map(leaf), before: before.map(leaf) }
}
