//! Memory-mapped files of tensors: safetensors and PyTorch, told apart by content.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use memmap2::Mmap;
use serde_json::{Map, Value};

use super::convert::{as_stored, to_dtype_in_blocks};
use super::header::{Entry, Header, MAX_HEADER_BYTES, parse_header};
use super::torch::{self, Archive};
use crate::error::{CheckpointError, TorchError};
use crate::{Error, Result};

/// A file of tensors whose header was checked; tensors are read from the map on demand.
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
    data_start: usize,
    /// What the file holds.
    pub header: Header,
}

impl MappedFile {
    /// Opens and checks a safetensors file, or a `torch.save` archive of a flat dict of tensors, whatever its name is.
    /// Nothing but the header is read.
    pub fn open(path: &Path) -> Result<Self> {
        let map = map_file(path)?;
        let (data_start, header) = if is_zip(&map) {
            let archive = Archive::open(path, &map)?;
            (0, archive.tensors(archive.pickle.root())?)
        } else {
            safetensors_header(path, &map)?
        };
        Ok(Self { path: path.to_path_buf(), map, data_start, header })
    }

    /// Opens a training checkpoint of Megatron: the tensors of its `model` and the plain values of its `args`.
    pub(crate) fn open_megatron(path: &Path) -> Result<(Self, Map<String, Value>)> {
        let map = map_file(path)?;
        if !is_zip(&map) {
            // No Megatron file is a safetensors file: whatever this is, the other reader says what is wrong.
            safetensors_header(path, &map)?;
            return Err(format_error(path, "a safetensors file", "a Megatron folder holds model_optim_rng.pt files of torch.save"));
        }
        let (header, args) = torch::megatron_parts(&Archive::open(path, &map)?)?;
        Ok((Self { path: path.to_path_buf(), map, data_start: 0, header }, args))
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of a tensor of this file, little endian, row by row; copied only where the file has another order.
    pub fn bytes(&self, entry: &Entry) -> Cow<'_, [u8]> {
        let stored = self.stored(entry);
        match &entry.strides {
            None => Cow::Borrowed(stored),
            Some(strides) => Cow::Owned(gather(stored, &entry.shape, strides, (entry.element.bits() / 8) as usize)),
        }
    }

    /// The bytes from a tensor's first element to its last.
    fn stored(&self, entry: &Entry) -> &[u8] {
        &self.map[self.data_start + entry.begin as usize..self.data_start + entry.end as usize]
    }

    /// A float tensor in another float type. The file's pages leave the memory while it is read, so that a model and its
    /// file are never both there.
    pub(crate) fn read(&self, entry: &Entry, dtype: DType) -> Result<TensorData> {
        let shape = &entry.shape;
        let data = match &entry.strides {
            None => to_dtype_in_blocks(self.stored(entry), entry.element, shape, dtype, &mut |done| self.release(entry, done)),
            Some(_) => {
                let bytes = self.bytes(entry);
                self.release(entry, usize::MAX);
                to_dtype_in_blocks(&bytes, entry.element, shape, dtype, &mut |_| {})
            }
        };
        data.ok_or_else(|| self.tensor_error(entry, format!("is {} {shape:?}, which cannot be read as {dtype:?}", entry.element.name())))
    }

    /// A tensor as it is in the file.
    pub fn tensor(&self, entry: &Entry) -> Result<TensorData> {
        let data = match &entry.strides {
            None => as_stored(self.stored(entry), entry.element, &entry.shape, &mut |done| self.release(entry, done)),
            Some(_) => {
                let bytes = self.bytes(entry);
                self.release(entry, usize::MAX);
                as_stored(&bytes, entry.element, &entry.shape, &mut |_| {})
            }
        };
        data.map_err(|problem| self.tensor_error(entry, problem))
    }

    fn tensor_error(&self, entry: &Entry, problem: String) -> Error {
        CheckpointError::Tensor { file: self.path.clone(), key: entry.key.clone(), problem }.into()
    }

    /// Lets the first `done` bytes of a tensor leave the memory (whole pages of them); they are read again on demand.
    pub(crate) fn release(&self, entry: &Entry, done: usize) {
        const PAGE: usize = 1 << 16;
        let start = self.data_start + entry.begin as usize;
        let end = start.saturating_add(done).min(self.data_start + entry.end as usize);
        // Pages before the tensor's were read for the tensor before it; the last one may hold the next.
        let (from, to) = (start / PAGE * PAGE, end / PAGE * PAGE);
        #[cfg(unix)]
        if to > from {
            // SAFETY: the map is a shared one of a file and read-only: dropped pages come back with the same bytes. What
            // goes wrong here costs memory and nothing else.
            let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from, to - from) };
        }
        #[cfg(not(unix))]
        let _ = (from, to);
    }
}

fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    if file.metadata().map_err(Error::io("read", path))?.len() < 8 {
        let problem = "fewer than 8 bytes are too few for a header".to_string();
        return Err(CheckpointError::Corrupt { file: path.to_path_buf(), problem }.into());
    }
    // SAFETY: a map of a file that another process shortens faults on access, which no reader can prevent. Files
    // of this program and of the hub cache are replaced by renames and never changed in place.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}

/// A safetensors header of at most [`MAX_HEADER_BYTES`] starts with a brace after a length whose upper half is 0, which no
/// other format does.
fn is_safetensors(map: &[u8]) -> bool {
    map.get(4..9) == Some(b"\0\0\0\0{")
}

fn is_zip(map: &[u8]) -> bool {
    !is_safetensors(map) && (map.starts_with(b"PK\x03\x04") || map.starts_with(b"PK\x05\x06"))
}

fn format_error(path: &Path, found: &'static str, advice: &'static str) -> Error {
    CheckpointError::from(TorchError::Format { file: path.to_path_buf(), found, advice }).into()
}

/// Where the data starts, and the checked header.
fn safetensors_header(path: &Path, map: &[u8]) -> Result<(usize, Header)> {
    let corrupt = |problem: String| Error::from(CheckpointError::Corrupt { file: path.to_path_buf(), problem });
    if let Some((found, advice)) = torch::other_format(map).filter(|_| !is_safetensors(map)) {
        return Err(format_error(path, found, advice));
    }
    let length = map.len() as u64;
    let mut head = [0; 8];
    head.copy_from_slice(&map[..8]);
    let header_bytes = u64::from_le_bytes(head);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(corrupt(format!(
            "its header claims {header_bytes} bytes, more than the format's {MAX_HEADER_BYTES}; is it a safetensors file?"
        )));
    }
    let data_start = 8 + header_bytes;
    if data_start > length {
        return Err(CheckpointError::Truncated { file: path.to_path_buf(), expected: data_start, found: length }.into());
    }
    let header = parse_header(&map[8..data_start as usize]).map_err(corrupt)?;
    // Cannot overflow the check: both are far below 2^64 or the header would not describe the data.
    let expected = data_start.saturating_add(header.data_bytes);
    if expected > length {
        return Err(CheckpointError::Truncated { file: path.to_path_buf(), expected, found: length }.into());
    }
    if expected < length {
        return Err(corrupt(format!("{} bytes after the last tensor that no key describes", length - expected)));
    }
    Ok((data_start as usize, header))
}

/// The elements of a strided view, row by row. `stored` holds every element the strides lead to.
fn gather(stored: &[u8], shape: &[usize], strides: &[usize], width: usize) -> Vec<u8> {
    let elements: usize = shape.iter().product();
    let mut out = Vec::with_capacity(elements * width);
    let (&inner, &step) = match (shape.last(), strides.last()) {
        (Some(inner), Some(step)) if elements > 0 => (inner, step),
        _ => return out,
    };
    let outer = shape.len() - 1;
    let mut index = vec![0; outer];
    for _ in 0..elements / inner {
        let row: usize = index.iter().zip(strides).map(|(i, s)| i * s).sum();
        for i in 0..inner {
            let at = (row + i * step) * width;
            out.extend_from_slice(&stored[at..at + width]);
        }
        for d in (0..outer).rev() {
            index[d] += 1;
            if index[d] < shape[d] {
                break;
            }
            index[d] = 0;
        }
    }
    out
}

/// Every tensor of a file, in the order of their bytes, and the file's metadata.
#[allow(clippy::type_complexity)]
pub fn read_safetensors(path: &Path) -> Result<(Vec<(String, TensorData)>, BTreeMap<String, String>)> {
    let file = MappedFile::open(path)?;
    let tensors = file.header.entries.iter().map(|entry| Ok((entry.key.clone(), file.tensor(entry)?))).collect::<Result<_>>()?;
    Ok((tensors, file.header.metadata.clone()))
}
