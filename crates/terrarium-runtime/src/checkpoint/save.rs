//! Writing a Hugging Face model directory, whole or not at all.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use serde_json::Value;
use terrarium_kernels::KernelBackend;
use terrarium_models::{Decoder, DecoderConfig};

use super::ShardIndex;
use super::card::card;
use super::generation::{GENERATION, GenerationConfig};
use crate::atomic::{StagedDir, write_atomic};
use crate::error::AdapterError;
use crate::hub::{INDEX, WEIGHTS};
use crate::tensors::{cast, write_safetensors};
use crate::{Error, Result};

/// How to save.
#[derive(Debug, Clone)]
pub struct SaveOptions {
    /// Element type of the weights; as in the model if there is none. Parameters that the model keeps in float32 for
    /// their precision follow as well.
    pub dtype: Option<DType>,
    /// Largest weights file; more is split into shards with an index.
    pub max_shard_bytes: u64,
    /// A model directory whose tokenizer and generation files are copied.
    pub files_from: Option<PathBuf>,
    /// Text of README.md; a generated one if there is none.
    pub card: Option<String>,
    /// The model that this one was made from, named in the generated card.
    pub base_model: Option<String>,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self { dtype: None, max_shard_bytes: 5_000_000_000, files_from: None, card: None, base_model: None }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// Names of all files.
    pub files: Vec<String>,
    /// Bytes of the weights.
    pub bytes: u64,
}

/// Files copied as they are.
const COPIED: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    GENERATION,
];

/// Saves a model so that [`super::load`] and transformers open it. Written beside `dir` and renamed: an error, a full
/// disk or a kill leaves what was there before.
pub fn save<B: KernelBackend>(dir: &Path, model: &Decoder<B>, config: &DecoderConfig, options: &SaveOptions) -> Result<Saved> {
    if model.has_lora() {
        let reason = "the model has adapters: merge them (merge_lora) before saving a model, or save the adapter";
        return Err(AdapterError::Model(reason.into()).into());
    }
    let staged = StagedDir::new(dir)?;
    let tensors = keyed_tensors(model, config, options.dtype)?;
    let dtype = most_common(&tensors);
    let mut files = Vec::new();
    let bytes = write_weights(staged.path(), tensors, options.max_shard_bytes, &mut files)?;
    write_text(&staged, "config.json", &pretty(&with_dtype(config.to_json(), dtype)), &mut files)?;
    if let Some(from) = &options.files_from {
        copy_files(from, staged.path(), &mut files)?;
    }
    if !files.iter().any(|name| name == GENERATION) {
        write_text(&staged, GENERATION, &pretty(&GenerationConfig::minimal(config)), &mut files)?;
    }
    let readme = options.card.clone().unwrap_or_else(|| card(dir, config, options.base_model.as_deref()));
    write_text(&staged, "README.md", &readme, &mut files)?;
    staged.commit()?;
    Ok(Saved { files, bytes })
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn write_text(staged: &StagedDir, name: &str, text: &str, files: &mut Vec<String>) -> Result<()> {
    files.push(name.to_string());
    write_atomic(&staged.path().join(name), text.as_bytes())
}

/// The model's tensors under their checkpoint keys and shapes, in the order of the weight table.
fn keyed_tensors<B: KernelBackend>(model: &Decoder<B>, config: &DecoderConfig, dtype: Option<DType>) -> Result<Vec<(String, TensorData)>> {
    let mut by_path: HashMap<String, TensorData> = model.tensors().into_iter().collect();
    let mut tensors = Vec::new();
    let table = config.table();
    for entry in table.entries {
        let fits = |data: &TensorData| data.num_elements() == entry.shape.iter().product::<usize>();
        let Some(data) = by_path.remove(&entry.path).filter(fits) else {
            return Err(AdapterError::Model(format!(
                "the model has no {} of shape {:?}: it is not the one its configuration describes",
                entry.path, entry.shape
            ))
            .into());
        };
        let data = match dtype {
            Some(dtype) => cast(data, dtype),
            None => data,
        };
        if let Some(copy) = table.copies.iter().find(|copy| copy.path == entry.path) {
            tensors.push((copy.key.clone(), TensorData { shape: copy.shape.clone().into(), ..data.clone() }));
        }
        tensors.push((entry.key, TensorData { shape: entry.shape.into(), ..data }));
    }
    match by_path.keys().min() {
        None => Ok(tensors),
        Some(path) => Err(AdapterError::Model(format!("the model's {path} has no place in a checkpoint of its configuration")).into()),
    }
}

fn most_common(tensors: &[(String, TensorData)]) -> DType {
    let mut bytes: Vec<(DType, usize)> = Vec::new();
    for (_, data) in tensors {
        match bytes.iter_mut().find(|(dtype, _)| *dtype == data.dtype) {
            Some((_, size)) => *size += data.as_bytes().len(),
            None => bytes.push((data.dtype, data.as_bytes().len())),
        }
    }
    bytes.into_iter().max_by_key(|&(_, size)| size).map_or(DType::F32, |(dtype, _)| dtype)
}

/// Writes one file, or shards and an index; returns the bytes of all tensors.
fn write_weights(dir: &Path, tensors: Vec<(String, TensorData)>, limit: u64, files: &mut Vec<String>) -> Result<u64> {
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let size = |data: &TensorData| data.as_bytes().len() as u64;
    let total = tensors.iter().map(|(_, data)| size(data)).sum();
    let mut shards: Vec<Vec<(String, TensorData)>> = vec![vec![]];
    let mut filled = 0;
    for (key, data) in tensors {
        let next = size(&data);
        if filled > 0 && filled + next > limit {
            shards.push(vec![]);
            filled = 0;
        }
        filled += next;
        shards.last_mut().expect("there is always one").push((key, data));
    }
    if shards.len() == 1 {
        files.push(WEIGHTS.into());
        write_safetensors(&dir.join(WEIGHTS), shards.remove(0), &metadata)?;
        return Ok(total);
    }
    let count = shards.len();
    let mut shard_of = BTreeMap::new();
    for (i, shard) in shards.into_iter().enumerate() {
        let name = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        shard_of.extend(shard.iter().map(|(key, _)| (key.clone(), name.clone())));
        write_safetensors(&dir.join(&name), shard, &metadata)?;
        files.push(name);
    }
    files.push(INDEX.into());
    write_atomic(&dir.join(INDEX), ShardIndex::text(&shard_of, total).as_bytes())?;
    Ok(total)
}

/// Says in config.json what the weights are stored as, under the name it uses already (transformers 4 and 5 differ).
fn with_dtype(mut config: Value, dtype: DType) -> Value {
    let name = match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        DType::F64 => "float64",
        _ => "float32",
    };
    if let Value::Object(map) = &mut config {
        let keys: Vec<&str> = ["dtype", "torch_dtype"].into_iter().filter(|key| map.contains_key(*key)).collect();
        for key in if keys.is_empty() { vec!["torch_dtype"] } else { keys } {
            map.insert(key.into(), name.into());
        }
    }
    config
}

fn copy_files(from: &Path, to: &Path, files: &mut Vec<String>) -> Result<()> {
    for name in COPIED {
        let source = from.join(name);
        if source.is_file() {
            let bytes = std::fs::read(&source).map_err(Error::io("read", &source))?;
            write_atomic(&to.join(name), &bytes)?;
            files.push(name.to_string());
        }
    }
    Ok(())
}
