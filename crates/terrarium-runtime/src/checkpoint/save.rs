//! Writing a model directory, whole or not at all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::DType;
use serde_json::Value;
use terrarium_kernels::KernelBackend;
use terrarium_models::{Decoder, DecoderConfig};

use super::card::card;
use super::generation::{GENERATION, GenerationConfig};
use super::plan::{FromCheckpoint, FromModel, Parameters, Plan};
use super::{Checkpoint, ShardIndex};
use crate::atomic::{StagedDir, write_atomic};
use crate::error::AdapterError;
use crate::hub::{INDEX, WEIGHTS};
use crate::tensors::write_safetensors_lazily;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// The layout of a saved directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Layout {
    /// What transformers opens where there is such a layout for the model, else mamba_ssm's.
    #[default]
    Auto,
    /// What transformers opens; an error where it has no such model.
    HuggingFace,
    /// The one the model came in; as `Auto` for one that has no configuration file (Megatron's).
    Own,
    /// The keys of the mamba_ssm package, the papers' own.
    Native,
}

impl Layout {
    /// The model's configuration in this layout.
    fn of(self, config: &DecoderConfig) -> Result<DecoderConfig> {
        let target = match self {
            Self::Own if config.family.writable() => Ok(config.clone()),
            Self::Own | Self::Auto => config.in_transformers().or_else(|_| config.in_native()),
            Self::HuggingFace => config.in_transformers(),
            Self::Native => config.in_native(),
        };
        target.map_err(|error| AdapterError::Model(format!("cannot save the model: {error}; --layout chooses another")).into())
    }
}

/// How to save.
#[derive(Debug, Clone)]
pub struct SaveOptions {
    /// Layout of keys and configuration.
    pub layout: Layout,
    /// Element type of the weights; as in the model if there is none. Parameters that the model keeps in float32 for
    /// their precision follow as well.
    pub dtype: Option<DType>,
    /// Largest weights file; more is split into shards with an index.
    pub max_shard_bytes: u64,
    /// A model directory whose tokenizer and generation files are copied; a SentencePiece tokenizer is written as
    /// tokenizer.json too.
    pub files_from: Option<PathBuf>,
    /// A directory whose tokenizer is copied in place of the one in `files_from`.
    pub tokenizer_from: Option<PathBuf>,
    /// Text of README.md; a generated one if there is none.
    pub card: Option<String>,
    /// The model that this one was made from, named in the generated card.
    pub base_model: Option<String>,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self {
            layout: Layout::Auto,
            dtype: None,
            max_shard_bytes: 5_000_000_000,
            files_from: None,
            tokenizer_from: None,
            card: None,
            base_model: None,
        }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// Names of all files.
    pub files: Vec<String>,
    /// Bytes of the weights.
    pub bytes: u64,
    /// Family whose layout was written.
    pub family: &'static str,
}

/// Files of a tokenizer, copied as they are.
const TOKENIZER: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

/// Saves a model so that [`super::load`] and transformers open it. Written beside `dir` and renamed: an error, a full
/// disk or a kill leaves what was there before.
pub fn save<B: KernelBackend>(dir: &Path, model: &Decoder<B>, config: &DecoderConfig, options: &SaveOptions) -> Result<Saved> {
    if model.has_lora() {
        let reason = "the model has adapters: merge them (merge_lora) before saving a model, or save the adapter";
        return Err(AdapterError::Model(reason.into()).into());
    }
    write(dir, &mut FromModel::new(model), config, options)
}

/// Writes a checkpoint that is not loaded in another layout, tensor by tensor: the memory it takes is that of the largest.
pub fn convert(dir: &Path, checkpoint: &Checkpoint, options: &SaveOptions) -> Result<Saved> {
    checkpoint.check()?;
    let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same(dir, &checkpoint.dir) {
        let reason = "this is the directory that is read: choose another".to_string();
        return Err(Error::Target { path: dir.to_path_buf(), reason });
    }
    write(dir, &mut FromCheckpoint::new(checkpoint), &checkpoint.config, options)
}

fn write(dir: &Path, source: &mut dyn Parameters, config: &DecoderConfig, options: &SaveOptions) -> Result<Saved> {
    let config = &options.layout.of(config)?;
    let plan = Plan::new(config, source, options.dtype)?;
    let staged = StagedDir::new(dir)?;
    let mut files = Vec::new();
    let bytes = write_weights(staged.path(), &plan, source, options.max_shard_bytes, &mut files)?;
    write_text(&staged, "config.json", &pretty(&with_dtype(config.to_json(), plan.dtype())), &mut files)?;
    if let Some(from) = options.tokenizer_from.as_ref().or(options.files_from.as_ref()) {
        copy_tokenizer(from, staged.path(), &mut files)?;
    }
    if let Some(from) = &options.files_from {
        copy(from, GENERATION, staged.path(), &mut files)?;
    }
    if !files.iter().any(|name| name == GENERATION) {
        // A configuration that knows no end of text (mamba_ssm's) leaves it to the tokenizer.
        let tokenizer = if config.eos.is_empty() { Tokenizer::from_dir(staged.path()).ok().flatten() } else { None };
        let eos = tokenizer.and_then(|tokenizer| tokenizer.eos());
        let config = DecoderConfig { eos: eos.map_or(config.eos.clone(), |id| vec![id]), ..config.clone() };
        write_text(&staged, GENERATION, &pretty(&GenerationConfig::minimal(&config)), &mut files)?;
    }
    let readme = options.card.clone().unwrap_or_else(|| card(dir, config, options.base_model.as_deref()));
    write_text(&staged, "README.md", &readme, &mut files)?;
    staged.commit()?;
    Ok(Saved { files, bytes, family: config.family.name() })
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn write_text(staged: &StagedDir, name: &str, text: &str, files: &mut Vec<String>) -> Result<()> {
    files.push(name.to_string());
    write_atomic(&staged.path().join(name), text.as_bytes())
}

/// Writes one file, or shards and an index; returns the bytes of all tensors.
fn write_weights(dir: &Path, plan: &Plan, source: &mut dyn Parameters, limit: u64, files: &mut Vec<String>) -> Result<u64> {
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let shards = plan.shards(limit);
    let total = plan.specs().map(|spec| spec.bytes()).sum();
    let mut shard_of = BTreeMap::new();
    let mut start = 0;
    for (i, &length) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => WEIGHTS.to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let specs: Vec<_> = plan.specs().skip(start).take(length).cloned().collect();
        shard_of.extend(specs.iter().map(|spec| (spec.key.clone(), name.clone())));
        write_safetensors_lazily(&dir.join(&name), &specs, &metadata, &mut |n| plan.make(start + n, source))?;
        start += length;
        files.push(name);
    }
    if shards.len() > 1 {
        files.push(INDEX.into());
        write_atomic(&dir.join(INDEX), ShardIndex::text(&shard_of, total).as_bytes())?;
    }
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

fn copy(from: &Path, name: &str, to: &Path, files: &mut Vec<String>) -> Result<()> {
    let source = from.join(name);
    if source.is_file() {
        let bytes = std::fs::read(&source).map_err(Error::io("read", &source))?;
        write_atomic(&to.join(name), &bytes)?;
        files.push(name.to_string());
    }
    Ok(())
}

fn copy_tokenizer(from: &Path, to: &Path, files: &mut Vec<String>) -> Result<()> {
    for name in TOKENIZER {
        copy(from, name, to, files)?;
    }
    // A tokenizer that no other program finds under this name, or in this format.
    if !files.iter().any(|name| name == "tokenizer.json")
        && let Some(tokenizer) = Tokenizer::from_dir(from)?
    {
        tokenizer.save(to)?;
        files.push("tokenizer.json".into());
        if !files.iter().any(|name| name == "tokenizer_config.json") {
            files.push("tokenizer_config.json".into());
        }
    }
    Ok(())
}
