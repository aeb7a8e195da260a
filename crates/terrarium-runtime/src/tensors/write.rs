//! Writing safetensors files, the same bytes for the same tensors.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use burn::tensor::{DType, TensorData};
use serde_json::{Map, Value, json};

use super::header::ElementType;
use crate::atomic::write_atomic_with;
use crate::error::CheckpointError;
use crate::{Error, Result};

/// A tensor that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its key.
    pub key: String,
    /// Its element type.
    pub dtype: DType,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Bytes of its elements.
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size()) as u64
    }

    fn of(key: &str, data: &TensorData) -> Self {
        Self { key: key.to_string(), dtype: data.dtype, shape: data.shape.to_vec() }
    }
}

/// Writes tensors and metadata to `path`: a temporary file beside it, synced, then renamed.
pub fn write_safetensors(path: &Path, mut tensors: Vec<(String, TensorData)>, metadata: &BTreeMap<String, String>) -> Result<()> {
    order(&mut tensors);
    let header = header_of(&tensors, metadata).map_err(|problem| CheckpointError::Corrupt { file: path.to_path_buf(), problem })?;
    write_atomic_with(path, |out| write_parts(out, &header, &tensors))
}

/// As [`write_safetensors`], with tensors that are made when their turn comes: one is in memory at a time.
///
/// `make` gets the index of a spec and returns a tensor of its type and size.
pub fn write_safetensors_lazily(
    path: &Path,
    specs: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
    make: &mut dyn FnMut(usize) -> Result<TensorData>,
) -> Result<()> {
    let mut turns: Vec<usize> = (0..specs.len()).collect();
    turns.sort_by(|&a, &b| rank(&specs[a]).cmp(&rank(&specs[b])));
    let corrupt = |problem| CheckpointError::Corrupt { file: path.to_path_buf(), problem };
    let header = header_bytes(&mut turns.iter().map(|&i| specs[i].clone()), metadata).map_err(corrupt)?;
    let mut failed = None;
    let written = write_atomic_with(path, |out| {
        out.write_all(&header)?;
        for &i in &turns {
            match make(i) {
                Ok(data) if TensorSpec::of(&specs[i].key, &data) == specs[i] => out.write_all(data.as_bytes())?,
                Ok(data) => {
                    let problem = format!("`{}` was announced otherwise than {:?} {:?}", specs[i].key, data.dtype, data.shape.to_vec());
                    failed = Some(corrupt(problem).into());
                }
                Err(error) => failed = Some(error),
            }
            if failed.is_some() {
                return Err(std::io::Error::other("a tensor could not be made"));
            }
        }
        Ok(())
    });
    match failed {
        Some(error) => Err(error),
        None => written,
    }
}

/// Writes tensors and metadata to any sink, as [`write_safetensors`] does to a file.
pub fn write_tensors(out: &mut dyn Write, tensors: &mut [(String, TensorData)], metadata: &BTreeMap<String, String>) -> Result<()> {
    order(tensors);
    let path = Path::new("(stream)");
    let header = header_of(tensors, metadata).map_err(|problem| CheckpointError::Corrupt { file: path.to_path_buf(), problem })?;
    write_parts(out, &header, tensors).map_err(Error::io("write", path))
}

/// Wide elements first, so that every tensor starts at a multiple of its element size; then by key.
fn rank(spec: &TensorSpec) -> (Reverse<usize>, &str) {
    (Reverse(spec.dtype.size()), &spec.key)
}

fn order(tensors: &mut [(String, TensorData)]) {
    tensors.sort_by(|(a, x), (b, y)| y.dtype.size().cmp(&x.dtype.size()).then_with(|| a.cmp(b)));
}

fn header_of(tensors: &[(String, TensorData)], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, String> {
    header_bytes(&mut tensors.iter().map(|(key, data)| TensorSpec::of(key, data)), metadata)
}

/// The header of tensors that follow one another in this order: length and padded JSON.
fn header_bytes(specs: &mut dyn Iterator<Item = TensorSpec>, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, String> {
    let mut map = Map::new();
    if !metadata.is_empty() {
        map.insert("__metadata__".into(), json!(metadata));
    }
    let mut offset = 0u64;
    for spec in specs {
        let TensorSpec { key, dtype, shape } = &spec;
        let element = ElementType::of(*dtype).ok_or_else(|| format!("`{key}` is {dtype:?}, which the format has no name for"))?;
        let end = offset + spec.bytes();
        let entry = json!({ "dtype": element.name(), "shape": shape, "data_offsets": [offset, end] });
        let taken = map.insert(key.clone(), entry);
        if taken.is_some() || key == "__metadata__" {
            return Err(format!("the key `{key}` is given twice"));
        }
        offset = end;
    }
    let mut json = Value::Object(map).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(bytes)
}

fn write_parts(out: &mut dyn Write, header: &[u8], tensors: &[(String, TensorData)]) -> std::io::Result<()> {
    out.write_all(header)?;
    for (_, data) in tensors {
        out.write_all(data.as_bytes())?;
    }
    Ok(())
}
