//! Running a batch of ragged rows through a model in slices of time.

use burn::tensor::backend::Backend;
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

/// Tokens of a pass, all rows together, where nothing else is said: enough to keep the device busy, and few enough that what a long
/// prompt takes besides its cache is little.
pub fn prefill_chunk<B: Backend>(device: &B::Device) -> usize {
    let cpu = matches!(B::name(device).as_str(), "flex" | "ndarray");
    if cpu { 2048 } else { 8192 }
}

/// Tokens that scans take together, or a multiple of these.
const SCANNED: usize = 256;

/// How prompts are read.
pub(crate) struct Reading<B: KernelBackend> {
    /// Tokens of a pass, all rows together; 0 for one pass.
    pub(crate) chunk: usize,
    /// Tokens of each row that will follow the prompts: the cache has room for them.
    pub(crate) spare: usize,
    /// What was read before.
    pub(crate) cache: Option<Cache<B>>,
}

/// Passes `rows` through the model in slices, and hands each to `visit`.
///
/// Rows are padded at the end: what a row computes does not depend on the length of its neighbours, and padding never
/// reaches a state.
pub(crate) fn prefill<B: KernelBackend>(
    model: &Decoder<B>,
    rows: &[&[u32]],
    reading: Reading<B>,
    device: &B::Device,
    visit: &mut dyn FnMut(Slice<B>) -> Result<()>,
) -> Result<Option<Cache<B>>> {
    let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let Reading { chunk, spare, mut cache } = reading;
    let step = match chunk / rows.len().max(1) {
        _ if chunk == 0 => longest.max(1),
        // Whole chunks of the scans.
        step if step > SCANNED => step / SCANNED * SCANNED,
        step => step.max(1),
    };
    let all = cache.as_ref().map_or(0, Cache::len) + longest + spare;
    for start in (0..longest).step_by(step) {
        let len = step.min(longest - start);
        let parts: Vec<&[u32]> = rows.iter().map(|row| &row[start.min(row.len())..(start + len).min(row.len())]).collect();
        let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
        let (hidden, next) = model.hidden(ids_tensor(&parts, len, device), cache.take(), &Layout::ragged(&lengths, len));
        // After the first slice, of which there is little to copy.
        cache = Some(next.reserve(all));
        visit(Slice { start, hidden })?;
    }
    Ok(cache)
}

/// Reads prompts of any lengths, none of them empty, `chunk` tokens at a time (all rows together; 0: at once): hidden states `[b, d]`
/// after each one's last token, and the cache, with room for `spare` tokens more of each row.
///
/// # Errors
/// [`InputError::Empty`] for a prompt without tokens.
pub fn read_prompts<B: KernelBackend>(
    model: &Decoder<B>,
    rows: &[&[u32]],
    chunk: usize,
    spare: usize,
    device: &B::Device,
) -> Result<(Tensor<B, 2>, Cache<B>)> {
    read_after(model, rows, Reading { chunk, spare, cache: None }, device)
}

/// As [`read_prompts`], after what was read before.
pub(crate) fn read_after<B: KernelBackend>(
    model: &Decoder<B>,
    rows: &[&[u32]],
    reading: Reading<B>,
    device: &B::Device,
) -> Result<(Tensor<B, 2>, Cache<B>)> {
    if let Some(row) = rows.iter().position(|row| row.is_empty()) {
        return Err(InputError::Empty { row }.into());
    }
    let mut last: Vec<Option<Tensor<B, 2>>> = vec![None; rows.len()];
    let cache = prefill(model, rows, reading, device, &mut |slice| {
        let end = slice.start + slice.hidden.dims()[1];
        for (i, row) in rows.iter().enumerate() {
            if (slice.start..end).contains(&(row.len() - 1)) {
                last[i] = Some(slice.pick(&[(i, row.len() - 1)]));
            }
        }
        Ok(())
    })?;
    let cache = cache.ok_or(InputError::Empty { row: 0 })?;
    Ok((Tensor::cat(last.into_iter().flatten().collect(), 0), cache))
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
