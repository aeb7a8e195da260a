//! Model directories: opening, checking, loading and saving them.

mod adapter;
mod card;
mod files;
mod generation;
mod index;
mod load;
mod megatron;
mod plan;
mod save;
mod stored;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use serde_json::{Map, Value};
use terrarium_models::{DecoderConfig, Rows, WeightEntry};

pub use adapter::{AdapterConfig, load_adapter, save_adapter};
pub use generation::GenerationConfig;
pub(crate) use index::ShardIndex;
pub use load::{LoadOptions, Loaded, Precision, load, load_layer};
pub use save::{Layout, SaveOptions, Saved, convert, save};
pub(crate) use stored::Stored;

use crate::error::{AdapterError, CheckpointError, Mismatch};
use crate::tensors::to_dtype;
use crate::{Error, Result};
use files::Files;
pub(crate) use megatron::is_megatron;
use megatron::{MegatronFolder, open_megatron};

const CONFIG: &str = "config.json";
/// The configuration in Mistral's own distribution of Codestral-Mamba.
const PARAMS: &str = "params.json";

/// A model directory that was opened: its configuration and the headers of its weights, which are memory-mapped.
pub struct Checkpoint {
    /// The directory.
    pub dir: PathBuf,
    /// The configuration, corrected by the weights' shapes.
    pub config: DecoderConfig,
    /// What was corrected and other decisions worth printing.
    pub notes: Vec<String>,
    weights: Weights,
    tensors: Vec<TensorInfo>,
}

/// Where the tensors are.
enum Weights {
    Files(Files),
    Megatron(MegatronFolder),
}

impl Weights {
    fn find(&self, key: &str) -> Option<Stored<'_>> {
        match self {
            Self::Files(files) => files.find(key),
            Self::Megatron(folder) => folder.find(key),
        }
    }

    fn entries(&self) -> Vec<(&str, Stored<'_>)> {
        match self {
            Self::Files(files) => files.entries().collect(),
            Self::Megatron(folder) => folder.entries().collect(),
        }
    }
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

impl TensorInfo {
    /// Whether a model can be built from it.
    pub fn is_float(&self) -> bool {
        ["F64", "F32", "F16", "BF16"].contains(&self.dtype.as_str())
    }
}

impl Checkpoint {
    /// Opens a model directory: config.json and weights, or a Megatron folder. Reads configuration and headers only.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_with(dir, &Map::new())
    }

    /// [`Checkpoint::open`] with keys that replace or complete those of the configuration, such as the
    /// `mamba_num_groups` that the arguments of an old Megatron run lack.
    pub fn open_with(dir: &Path, overrides: &Map<String, Value>) -> Result<Self> {
        if !dir.join(CONFIG).is_file()
            && let Some(folder) = open_megatron(dir)?
        {
            return Self::of_megatron(dir, folder, overrides);
        }
        let mut config = read_config_with(dir, overrides)?;
        let weights = Weights::Files(Files::open(dir)?);
        let notes = config.reconcile(&|key: &str| weights.find(key).map(|stored| stored.shape().to_vec()));
        Ok(Self { dir: dir.to_path_buf(), config, notes, tensors: list(&weights, dir), weights })
    }

    fn of_megatron(dir: &Path, folder: MegatronFolder, overrides: &Map<String, Value>) -> Result<Self> {
        let shape_of = |key: &str| folder.find(key).map(|stored| stored.shape().to_vec());
        let mut args = folder.args.clone();
        args.extend(overrides.clone());
        let config = DecoderConfig::from_megatron(&args, &shape_of).map_err(|source| Error::Config { file: dir.to_path_buf(), source })?;
        let weights = Weights::Megatron(folder);
        Ok(Self { dir: dir.to_path_buf(), config, notes: Vec::new(), tensors: list(&weights, dir), weights })
    }

    /// One tensor as it is stored (that of a Megatron folder merged).
    pub fn tensor(&self, name: &str) -> Result<TensorData> {
        let missing = || CheckpointError::Tensor { file: self.dir.clone(), key: name.into(), problem: "is not among its tensors".into() };
        self.find(name).ok_or_else(missing)?.tensor()
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
        let entries = self.weights.entries();
        let mut bytes: HashMap<&str, u64> = HashMap::new();
        for (_, stored) in entries.iter().filter(|(_, stored)| stored.element().is_float()) {
            *bytes.entry(stored.element().name()).or_default() += stored.bytes();
        }
        // By size, then by name, so that a tie has one answer.
        let most = bytes.into_iter().max_by_key(|&(name, size)| (size, name)).map(|(name, _)| name);
        let found =
            entries.iter().find(|(_, stored)| Some(stored.element().name()) == most).and_then(|(_, stored)| stored.element().dtype());
        found.unwrap_or(DType::F32)
    }

    /// A parameter as floats of type `dtype`: the rows of its tensor that its entry names. `None` when the tensor is not
    /// there or has another shape.
    pub(crate) fn parameter(&self, entry: &WeightEntry, dtype: DType) -> Result<Option<TensorData>> {
        let found = entry.keys().find_map(|key| self.find(key)).filter(|stored| stored.shape() == entry.shape);
        let Some(stored) = found else { return Ok(None) };
        let parts = entry.parts.as_deref();
        let Some(rows) = entry.rows else { return stored.data(dtype, parts).map(Some) };
        let mut shape = entry.shape.clone();
        shape[0] = rows.rows();
        let bytes = select(stored.raw(parts)?, rows);
        let data = to_dtype(&bytes, stored.element(), &shape, dtype);
        drop(bytes);
        stored.release();
        Ok(data)
    }

    pub(crate) fn find(&self, key: &str) -> Option<Stored<'_>> {
        self.weights.find(key)
    }

    /// Whether keys, shapes and types are those of the configuration: one error lists everything that is not.
    pub fn check(&self) -> Result<()> {
        let found = compare(&self.config, &self.tensors, &self.dir);
        if found.is_empty() { Ok(()) } else { Err(CheckpointError::Mismatch(Box::new(found)).into()) }
    }
}

/// What `tensors`, those of the files in `dir`, have that `config` does not ask for, and the other way round.
pub fn compare(config: &DecoderConfig, tensors: &[TensorInfo], dir: &Path) -> Mismatch {
    let table = config.table();
    let there: HashMap<&str, &TensorInfo> = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    let mut found = Mismatch { dir: dir.to_path_buf(), ..Mismatch::default() };
    let mut known = HashSet::new();
    for entry in &table.entries {
        known.extend(entry.keys());
        match entry.keys().find_map(|key| there.get(key)) {
            None => found.missing.push(format!("{} {:?}", entry.key, entry.shape)),
            Some(tensor) if !tensor.is_float() => found.dtypes.push(format!("{}: {}", entry.key, tensor.dtype)),
            Some(tensor) if tensor.shape != entry.shape => {
                found.shapes.push(format!("{}: expected {:?}, found {:?}", entry.key, entry.shape, tensor.shape));
            }
            Some(_) => {}
        }
    }
    known.extend(table.optional.iter().map(|key| &**key));
    for tensor in tensors {
        let ignored = table.ignore.iter().any(|suffix| tensor.name.ends_with(suffix));
        if !ignored && !known.contains(tensor.name.as_str()) {
            found.unused.push(format!("{} {:?}", tensor.name, tensor.shape));
        }
    }
    found
}

/// Reads the config.json of a model directory (Mistral's params.json where there is none).
pub fn read_config(dir: &Path) -> Result<DecoderConfig> {
    read_config_with(dir, &Map::new())
}

/// [`read_config`] with keys that replace or complete those of the file.
pub fn read_config_with(dir: &Path, overrides: &Map<String, Value>) -> Result<DecoderConfig> {
    let file = [CONFIG, PARAMS].map(|name| dir.join(name)).into_iter().find(|file| file.is_file()).unwrap_or_else(|| dir.join(CONFIG));
    if !file.is_file()
        && let Some(adapter) = AdapterConfig::open(dir)?
    {
        return Err(AdapterError::NotAModel { dir: dir.to_path_buf(), base: adapter.base_model }.into());
    }
    let text = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
    DecoderConfig::from_json_with(&text, overrides).map_err(|source| Error::Config { file, source })
}

/// The bytes of some rows.
fn select(bytes: Cow<'_, [u8]>, rows: Rows) -> Cow<'_, [u8]> {
    let width = bytes.len() / rows.total;
    let run = |start: usize| start * width..(start + rows.len) * width;
    match bytes {
        Cow::Borrowed(bytes) if rows.count == 1 => Cow::Borrowed(&bytes[run(rows.start)]),
        bytes => Cow::Owned(rows.starts().flat_map(|start| &bytes[run(start)]).copied().collect()),
    }
}

fn list(weights: &Weights, dir: &Path) -> Vec<TensorInfo> {
    let info = |(name, stored): (&str, Stored)| {
        let file = stored.file();
        TensorInfo {
            name: name.to_string(),
            dtype: stored.element().name().to_string(),
            shape: stored.shape().to_vec(),
            file: file.strip_prefix(dir).unwrap_or(file).to_string_lossy().into_owned(),
            bytes: stored.bytes(),
        }
    };
    weights.entries().into_iter().map(info).collect()
}
