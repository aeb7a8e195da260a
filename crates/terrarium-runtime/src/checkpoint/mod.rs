//! Hugging Face model directories: opening, checking, loading and saving them.

mod adapter;
mod card;
mod generation;
mod index;
mod load;
mod save;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::tensor::DType;
use terrarium_models::DecoderConfig;

pub use adapter::{AdapterConfig, load_adapter, save_adapter};
pub use generation::GenerationConfig;
pub(crate) use index::ShardIndex;
pub use load::{LoadOptions, Loaded, Precision, load};
pub use save::{SaveOptions, Saved, save};

use crate::error::{AdapterError, CheckpointError, Mismatch};
use crate::hub::{INDEX, WEIGHTS};
use crate::tensors::{Entry, MappedFile};
use crate::{Error, Result};

/// A model directory that was opened: its configuration and the headers of its weights, which are memory-mapped.
pub struct Checkpoint {
    /// The directory.
    pub dir: PathBuf,
    /// The configuration, corrected by the weights' shapes.
    pub config: DecoderConfig,
    /// What was corrected and other decisions worth printing.
    pub notes: Vec<String>,
    files: Vec<MappedFile>,
    tensors: Vec<TensorInfo>,
    place: HashMap<String, (usize, usize)>,
}

/// One tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its key.
    pub name: String,
    /// Its element type, as safetensors calls it.
    pub dtype: String,
    /// Its shape in the file.
    pub shape: Vec<usize>,
    /// The file it is in.
    pub file: String,
    /// Its size.
    pub bytes: u64,
}

impl Checkpoint {
    /// Opens a model directory. Reads config.json and headers only.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = read_config(dir)?;
        let files = open_files(dir)?;
        let mut checkpoint = Self { dir: dir.to_path_buf(), config, notes: Vec::new(), files, tensors: Vec::new(), place: HashMap::new() };
        checkpoint.list_tensors()?;
        let Self { place, files, config, .. } = &mut checkpoint;
        let shape_of = |key: &str| place.get(key).map(|&(file, entry)| files[file].header.entries[entry].shape.clone());
        let notes = config.reconcile(&shape_of);
        checkpoint.notes = notes;
        Ok(checkpoint)
    }

    fn list_tensors(&mut self) -> Result<()> {
        for (f, file) in self.files.iter().enumerate() {
            let name = file.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
            for (e, entry) in file.header.entries.iter().enumerate() {
                if let Some((other, _)) = self.place.insert(entry.key.clone(), (f, e)) {
                    let other = self.files[other].path().display();
                    let problem = format!("`{}` is also in {other}", entry.key);
                    return Err(CheckpointError::Corrupt { file: file.path().to_path_buf(), problem }.into());
                }
                self.tensors.push(TensorInfo {
                    name: entry.key.clone(),
                    dtype: entry.element.name().to_string(),
                    shape: entry.shape.clone(),
                    file: name.clone(),
                    bytes: entry.end - entry.begin,
                });
            }
        }
        Ok(())
    }

    /// Every tensor, shard by shard, in the order of the bytes.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }

    /// The float type that holds most of the weights, float32 if there is none.
    pub fn dtype(&self) -> DType {
        let mut bytes: HashMap<&str, u64> = HashMap::new();
        for (_, entry) in self.entries().filter(|(_, e)| e.element.is_float()) {
            *bytes.entry(entry.element.name()).or_default() += entry.end - entry.begin;
        }
        // By size, then by name, so that a tie has one answer.
        let most = bytes.into_iter().max_by_key(|&(name, size)| (size, name)).map(|(name, _)| name);
        let found = self.entries().find(|(_, e)| Some(e.element.name()) == most).and_then(|(_, e)| e.element.dtype());
        found.unwrap_or(DType::F32)
    }

    fn entries(&self) -> impl Iterator<Item = (&MappedFile, &Entry)> {
        self.files.iter().flat_map(|file| file.header.entries.iter().map(move |entry| (file, entry)))
    }

    pub(crate) fn find(&self, key: &str) -> Option<(&MappedFile, &Entry)> {
        let &(file, entry) = self.place.get(key)?;
        let file = self.files.get(file)?;
        Some((file, file.header.entries.get(entry)?))
    }

    /// Whether keys, shapes and types are those of the configuration: one error lists everything that is not.
    pub fn check(&self) -> Result<()> {
        let table = self.config.table();
        let mut found = Mismatch { dir: self.dir.clone(), ..Mismatch::default() };
        let mut known = std::collections::HashSet::new();
        for entry in &table.entries {
            known.extend(entry.keys());
            match entry.keys().find_map(|key| self.find(key)) {
                None => found.missing.push(format!("{} {:?}", entry.key, entry.shape)),
                Some((_, there)) if !there.element.is_float() => found.dtypes.push(format!("{}: {}", entry.key, there.element.name())),
                Some((_, there)) if there.shape != entry.shape => {
                    found.shapes.push(format!("{}: expected {:?}, found {:?}", entry.key, entry.shape, there.shape));
                }
                Some(_) => {}
            }
        }
        known.extend(table.optional.iter().map(|key| &**key));
        for tensor in &self.tensors {
            let ignored = table.ignore.iter().any(|suffix| tensor.name.ends_with(suffix));
            if !ignored && !known.contains(tensor.name.as_str()) {
                found.unused.push(format!("{} {:?}", tensor.name, tensor.shape));
            }
        }
        if found.is_empty() { Ok(()) } else { Err(CheckpointError::Mismatch(Box::new(found)).into()) }
    }
}

/// Reads the config.json of a model directory.
pub fn read_config(dir: &Path) -> Result<DecoderConfig> {
    let file = dir.join("config.json");
    if !file.is_file()
        && let Some(adapter) = AdapterConfig::open(dir)?
    {
        return Err(AdapterError::NotAModel { dir: dir.to_path_buf(), base: adapter.base_model }.into());
    }
    let text = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
    DecoderConfig::from_json(&text).map_err(|source| Error::Config { file, source })
}

fn open_files(dir: &Path) -> Result<Vec<MappedFile>> {
    let single = dir.join(WEIGHTS);
    if single.is_file() {
        return Ok(vec![MappedFile::open(&single)?]);
    }
    let index = dir.join(INDEX);
    if index.is_file() { open_shards(dir, &ShardIndex::open(&index)?) } else { Err(no_weights(dir).into()) }
}

fn open_shards(dir: &Path, index: &ShardIndex) -> Result<Vec<MappedFile>> {
    let names = index.files();
    let missing: Vec<_> = names.iter().filter(|name| !dir.join(name).is_file()).cloned().collect();
    if !missing.is_empty() {
        return Err(index.error(format!("names shards that are not there: {}", missing.join(", "))));
    }
    let mut files = Vec::with_capacity(names.len());
    for name in &names {
        let file = MappedFile::open(&dir.join(name))?;
        let has: std::collections::HashSet<_> = file.header.entries.iter().map(|e| e.key.as_str()).collect();
        let absent: Vec<_> =
            index.shard_of.iter().filter(|(k, f)| *f == name && !has.contains(k.as_str())).map(|(k, _)| k.clone()).collect();
        if !absent.is_empty() {
            return Err(index.error(format!("{name} lacks keys that the index places there: {}", absent.join(", "))));
        }
        files.push(file);
    }
    Ok(files)
}

fn no_weights(dir: &Path) -> CheckpointError {
    let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"].iter().any(|name| dir.join(name).is_file());
    let hint = if pickled { "; its pickled weights (.bin) are not read: convert them to safetensors" } else { "" };
    CheckpointError::NoWeights { dir: dir.to_path_buf(), hint: hint.into() }
}
