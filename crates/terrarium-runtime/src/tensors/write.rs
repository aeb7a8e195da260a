//! Writing safetensors files, the same bytes for the same tensors.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use burn::tensor::TensorData;
use serde_json::{Map, Value, json};

use super::header::ElementType;
use crate::atomic::write_atomic_with;
use crate::error::CheckpointError;
use crate::{Error, Result};

/// Writes tensors and metadata to `path`: a temporary file beside it, synced, then renamed.
pub fn write_safetensors(path: &Path, mut tensors: Vec<(String, TensorData)>, metadata: &BTreeMap<String, String>) -> Result<()> {
    order(&mut tensors);
    let header = header_bytes(&tensors, metadata).map_err(|problem| CheckpointError::Corrupt { file: path.to_path_buf(), problem })?;
    write_atomic_with(path, |out| write_parts(out, &header, &tensors))
}

/// Writes tensors and metadata to any sink, as [`write_safetensors`] does to a file.
pub fn write_tensors(out: &mut dyn Write, tensors: &mut [(String, TensorData)], metadata: &BTreeMap<String, String>) -> Result<()> {
    order(tensors);
    let path = Path::new("(stream)");
    let header = header_bytes(tensors, metadata).map_err(|problem| CheckpointError::Corrupt { file: path.to_path_buf(), problem })?;
    write_parts(out, &header, tensors).map_err(Error::io("write", path))
}

/// Wide elements first, so that every tensor starts at a multiple of its element size; then by key.
fn order(tensors: &mut [(String, TensorData)]) {
    tensors.sort_by(|(a, x), (b, y)| y.dtype.size().cmp(&x.dtype.size()).then_with(|| a.cmp(b)));
}

/// The header of tensors that follow one another in this order: length and padded JSON.
fn header_bytes(tensors: &[(String, TensorData)], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, String> {
    let mut map = Map::new();
    if !metadata.is_empty() {
        map.insert("__metadata__".into(), json!(metadata));
    }
    let mut offset = 0u64;
    for (key, data) in tensors {
        let element =
            ElementType::of(data.dtype).ok_or_else(|| format!("`{key}` is {:?}, which the format has no name for", data.dtype))?;
        let end = offset + data.as_bytes().len() as u64;
        let entry = json!({ "dtype": element.name(), "shape": data.shape.to_vec(), "data_offsets": [offset, end] });
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
