//! Cross-entropy over labelled positions, in slices so that the logits of a whole batch never exist at once.

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use terrarium_kernels::cross_entropy::{CrossEntropyArgs, cross_entropy};
use terrarium_kernels::embedding::embedding;
use terrarium_kernels::{KernelBackend, TrainBackend};
use terrarium_models::Decoder;

use crate::data::{Batch, IGNORED};
use crate::gradients::Gradients;
use crate::host;
use crate::segments::Passed;

/// Held while gradients are recorded and computed. Take it before recording any beside this crate's in the same process.
///
/// At the end of every backward pass Burn 0.21 sweeps the graphs of all threads, and may free steps of one that another thread is
/// still building; gradients are then lost without a word (tracel-ai/burn#5573).
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    // It guards no data: a panic elsewhere has left nothing half-done.
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of logits that may exist at once, on a host and on a GPU; their gradient takes their place where the backend can arrange
/// that. The fewer the slices, the fewer gradients of the whole head are added up.
pub(crate) const SLICE: (usize, usize) = (1 << 28, 1 << 30);

/// Rows of logits that take at most `bytes`, but a few in any case.
pub(crate) fn rows(bytes: usize, vocab: usize, dtype: DType) -> usize {
    (bytes / dtype.size() / vocab.max(1)).max(32)
}

/// Positions with a label, and their labels.
struct Targets<B: Backend> {
    positions: Tensor<B, 1, Int>,
    labels: Vec<i32>,
}

impl<B: Backend> Targets<B> {
    fn of(batch: &Batch, device: &B::Device) -> Option<Self> {
        let labelled = || batch.labels.iter().enumerate().filter(|(_, label)| **label != IGNORED);
        let positions: Vec<i32> = labelled().map(|(at, _)| at as i32).collect();
        let labels: Vec<i32> = labelled().map(|(_, label)| *label).collect();
        let n = positions.len();
        (n > 0).then(|| Self { positions: Tensor::from_data(TensorData::new(positions, [n]), device), labels })
    }

    /// Labels `start..end`.
    fn slice(&self, start: usize, end: usize, device: &B::Device) -> Tensor<B, 1, Int> {
        Tensor::from_data(TensorData::new(self.labels[start..end].to_vec(), [end - start]), device)
    }
}

fn ids<B: Backend>(batch: &Batch, device: &B::Device) -> Tensor<B, 2, Int> {
    Tensor::from_data(TensorData::new(batch.ids.clone(), [batch.rows, batch.length]), device)
}

/// Ranges of rows whose logits take at most [`SLICE`].
fn slices<B: Backend>(count: usize, vocab: usize, dtype: DType, device: &B::Device) -> impl Iterator<Item = (usize, usize)> {
    let bytes = if host::is_host::<B>(device) { SLICE.0 } else { SLICE.1 };
    // Of about equal size.
    let each = count.div_ceil(count.div_ceil(rows(bytes, vocab, dtype)).max(1)).max(1);
    (0..count).step_by(each).map(move |start| (start, (start + each).min(count)))
}

/// How many labels of `count` the head is asked for at once.
pub fn at_once<B: Backend>(count: usize, vocab: usize, dtype: DType, device: &B::Device) -> usize {
    slices::<B>(count, vocab, dtype, device).next().map_or(0, |(start, end)| end - start)
}

/// Adds the gradients of `scale` times the summed cross-entropy of `batch` to `grads`; gives the sum itself, `[1]`.
///
/// The head is differentiated slice by slice on a detached copy of the hidden states, whose gradient then goes through the
/// rest of the model in one backward pass: the same gradients as all at once, without its memory. Where `segment` is not 0 the same is done
/// to every so many layers (gradient checkpointing, arXiv 1604.06174).
pub fn backward<B: TrainBackend>(
    model: &Decoder<B>,
    batch: &Batch,
    scale: f64,
    segment: usize,
    grads: &mut Gradients<B::InnerBackend>,
    device: &B::Device,
) -> Tensor<B::InnerBackend, 1> {
    let Some(targets) = Targets::<B>::of(batch, device) else {
        return Tensor::zeros([1], (device, DType::F32));
    };
    let _alone = one_at_a_time();
    if segment > 0 {
        let passed = Passed::forward(model, ids(batch, device), &batch.layout(), segment, device);
        // The head reads what the last norm gives.
        let (hidden, last) = passed.hidden(model);
        let labelled = labelled(hidden, &targets);
        let (losses, upstream) = head(model, labelled.clone().inner(), &targets, scale, grads, device);
        let found = (labelled * upstream).sum().backward();
        passed.backward(model, last, found, grads);
        return losses;
    }
    let (hidden, _) = model.hidden(ids(batch, device), None, &batch.layout());
    let labelled = labelled(hidden, &targets);
    let (losses, upstream) = head(model, labelled.clone().inner(), &targets, scale, grads, device);
    grads.add(model, (labelled * upstream).sum().backward());
    losses
}

/// Hidden states of the positions with a label, `[n, d]`.
fn labelled<B: KernelBackend>(hidden: Tensor<B, 3>, targets: &Targets<B>) -> Tensor<B, 2> {
    let [b, l, d] = hidden.dims();
    // A lookup, for its gradient: that of `select` walks the positions one by one on a GPU.
    let labelled = embedding(hidden.reshape([b * l, d]), targets.positions.clone().unsqueeze());
    labelled.reshape([targets.labels.len(), d])
}

/// Sum of the losses of hidden states `[n, d]`, `[1]`, and the gradient of `scale` times it; that of the head is added to `grads`.
fn head<B: TrainBackend>(
    model: &Decoder<B>,
    fixed: Tensor<B::InnerBackend, 2>,
    targets: &Targets<B>,
    scale: f64,
    grads: &mut Gradients<B::InnerBackend>,
    device: &B::Device,
) -> (Tensor<B::InnerBackend, 1>, Tensor<B, 2>) {
    let [_, d] = fixed.dims();
    let vocab = model.embeddings.weight.dims()[0];
    let (mut losses, mut upstream) = (Vec::new(), Vec::new());
    for (start, end) in slices::<B::InnerBackend>(targets.labels.len(), vocab, fixed.dtype(), device) {
        let part = Tensor::<B, 2>::from_inner(fixed.clone().narrow(0, start, end - start)).require_grad();
        let args = CrossEntropyArgs { logits: model.logits(part.clone()), targets: targets.slice(start, end, device) };
        let loss = cross_entropy(args).sum();
        losses.push(loss.clone().inner());
        let mut found = (loss * scale).backward();
        upstream.push(part.grad_remove(&mut found).unwrap_or_else(|| Tensor::zeros([end - start, d], (device, fixed.dtype()))));
        grads.add(model, found);
    }
    (Tensor::cat(losses, 0).sum(), Tensor::from_inner(Tensor::cat(upstream, 0)))
}

/// Sum of the cross-entropies of a batch, without gradients, `[1]`.
pub fn evaluate<B: KernelBackend>(model: &Decoder<B>, batch: &Batch, device: &B::Device) -> Tensor<B, 1> {
    let sums: Vec<_> = slices_of(model, batch, device, Tensor::sum);
    if sums.is_empty() { Tensor::zeros([1], (device, DType::F32)) } else { Tensor::cat(sums, 0).sum() }
}

/// Cross-entropy of each labelled position of a batch in the order of its tokens, without gradients, on the host.
pub fn evaluate_each<B: KernelBackend>(model: &Decoder<B>, batch: &Batch, device: &B::Device) -> Vec<f32> {
    slices_of(model, batch, device, |losses| losses)
        .into_iter()
        .flat_map(|losses| losses.into_data().iter::<f32>().collect::<Vec<_>>())
        .collect()
}

/// What `keep` leaves of the cross-entropies of the labelled positions, slice by slice.
fn slices_of<B: KernelBackend>(
    model: &Decoder<B>,
    batch: &Batch,
    device: &B::Device,
    keep: impl Fn(Tensor<B, 1>) -> Tensor<B, 1>,
) -> Vec<Tensor<B, 1>> {
    let Some(targets) = Targets::<B>::of(batch, device) else {
        return Vec::new();
    };
    let (hidden, _) = model.hidden(ids(batch, device), None, &batch.layout());
    let [b, l, d] = hidden.dims();
    let labelled = hidden.reshape([b * l, d]).select(0, targets.positions.clone()); // [n, d]
    let vocab = model.embeddings.weight.dims()[0];
    slices::<B>(targets.labels.len(), vocab, labelled.dtype(), device)
        .map(|(start, end)| {
            let logits = model.logits(labelled.clone().narrow(0, start, end - start));
            keep(cross_entropy(CrossEntropyArgs { logits, targets: targets.slice(start, end, device) }))
        })
        .collect()
}

/// Reads a one-element tensor.
pub(crate) fn scalar<B: Backend>(tensor: Tensor<B, 1>) -> f64 {
    tensor.into_data().iter::<f64>().next().unwrap_or(f64::NAN)
}
