//! Memory-mapped safetensors files.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use memmap2::Mmap;

use super::header::{Entry, Header, MAX_HEADER_BYTES, parse_header};
use crate::error::CheckpointError;
use crate::{Error, Result};

/// A safetensors file whose header was checked; tensors are read from the map on demand.
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
    data_start: usize,
    /// What the file holds.
    pub header: Header,
}

impl MappedFile {
    /// Opens and checks a file. Nothing but the header is read.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let length = file.metadata().map_err(Error::io("read", path))?.len();
        let corrupt = |problem: String| Error::from(CheckpointError::Corrupt { file: path.to_path_buf(), problem });
        if length < 8 {
            return Err(corrupt(format!("{length} bytes are too few for a header")));
        }
        // SAFETY: a map of a file that another process shortens faults on access, which no reader can prevent. Files
        // of this program and of the hub cache are replaced by renames and never changed in place.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
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
        Ok(Self { path: path.to_path_buf(), map, data_start: data_start as usize, header })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of a tensor of this file, little endian.
    pub fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.map[self.data_start + entry.begin as usize..self.data_start + entry.end as usize]
    }

    /// A tensor as it is in the file; `None` for element types without a counterpart.
    pub fn tensor(&self, entry: &Entry) -> Option<TensorData> {
        let dtype = entry.element.dtype()?;
        let bytes = burn::tensor::Bytes::from_bytes_vec(self.bytes(entry).to_vec());
        Some(TensorData::from_bytes(bytes, entry.shape.clone(), dtype))
    }
}

/// Every tensor of a file, in the order of their bytes, and the file's metadata.
#[allow(clippy::type_complexity)]
pub fn read_safetensors(path: &Path) -> Result<(Vec<(String, TensorData)>, BTreeMap<String, String>)> {
    let file = MappedFile::open(path)?;
    let mut tensors = Vec::with_capacity(file.header.entries.len());
    for entry in &file.header.entries {
        let tensor = file.tensor(entry).ok_or_else(|| CheckpointError::Corrupt {
            file: path.to_path_buf(),
            problem: format!("`{}` has the dtype {}, which cannot be read here", entry.key, entry.element.name()),
        })?;
        tensors.push((entry.key.clone(), tensor));
    }
    Ok((tensors, file.header.metadata.clone()))
}
