//! Running a batch of ragged rows through a model in slices of time.

use burn::tensor::{DType, Int, Tensor, TensorData};
use terrarium_kernels::KernelBackend;
use terrarium_models::{Cache, Decoder, DecoderConfig, Layout};

use crate::Result;
use crate::error::{InputError, SamplingError};
use crate::tensors::cast;

/// One slice of a pass: hidden states `[b, l, d]` of the positions `start..start + l` of every row.
pub(crate) struct Slice<B: KernelBackend> {
    pub(crate) start: usize,
    pub(crate) hidden: Tensor<B, 3>,
}

impl<B: KernelBackend> Slice<B> {
    /// Hidden states `[n, d]` of the given `(row, position)`s, which must lie in this slice.
    pub(crate) fn pick(&self, places: &[(usize, usize)]) -> Tensor<B, 2> {
        let [b, l, d] = self.hidden.dims();
        let flat: Vec<i32> = places.iter().map(|&(row, position)| (row * l + position - self.start) as i32).collect();
        let index = Tensor::<B, 1, Int>::from_data(TensorData::new(flat, [places.len()]), &self.hidden.device());
        self.hidden.clone().reshape([b * l, d]).select(0, index)
    }
}

/// Passes `rows` through the model, at most `chunk` positions at a time (0: all), and hands each slice to `visit`.
///
/// Rows are padded at the end: what a row computes does not depend on the length of its neighbours, and padding never
/// reaches a state.
pub(crate) fn prefill<B: KernelBackend>(
    model: &Decoder<B>,
    rows: &[&[u32]],
    chunk: usize,
    device: &B::Device,
    visit: &mut dyn FnMut(Slice<B>) -> Result<()>,
) -> Result<Option<Cache<B>>> {
    let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let step = if chunk == 0 { longest.max(1) } else { chunk };
    let mut cache = None;
    for start in (0..longest).step_by(step) {
        let len = step.min(longest - start);
        let parts: Vec<&[u32]> = rows.iter().map(|row| &row[start.min(row.len())..(start + len).min(row.len())]).collect();
        let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
        let (hidden, next) = model.hidden(ids_tensor(&parts, len, device), cache.take(), &Layout::ragged(&lengths, len));
        cache = Some(next);
        visit(Slice { start, hidden })?;
    }
    Ok(cache)
}

/// `[b, len]`, padded with id 0 at the end.
pub(crate) fn ids_tensor<B: KernelBackend>(rows: &[&[u32]], len: usize, device: &B::Device) -> Tensor<B, 2, Int> {
    let mut ids = vec![0i32; rows.len() * len];
    for (out, row) in ids.chunks_mut(len.max(1)).zip(rows) {
        for (slot, id) in out.iter_mut().zip(*row) {
            *slot = *id as i32;
        }
    }
    Tensor::from_data(TensorData::new(ids, [rows.len(), len]), device)
}

/// Logits `[n, v]` on the host, in f32, row after row.
pub(crate) fn host_logits<B: KernelBackend>(model: &Decoder<B>, hidden: Tensor<B, 2>) -> Result<Vec<f32>> {
    host_values(model.logits(hidden).into_data())
}

/// Values as f32.
pub(crate) fn host_values(data: TensorData) -> Result<Vec<f32>> {
    let data = cast(data, DType::F32);
    let total = data.num_elements();
    // Only a backend that gives other data than it was asked for gets here.
    data.into_vec().map_err(|_| SamplingError::NotFinite { step: 0, count: total, total, id: 0 }.into())
}

/// Refuses ids that the embedding has no row for.
pub(crate) fn check_ids(row: usize, ids: &[u32], config: &DecoderConfig) -> Result<(), InputError> {
    match ids.iter().position(|&id| id as usize >= config.vocab_size) {
        Some(position) => Err(InputError::IdRange { row, id: ids[position], position, vocab: config.vocab_size }),
        None => Ok(()),
    }
}
