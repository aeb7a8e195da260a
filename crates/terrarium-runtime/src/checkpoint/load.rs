//! From a model directory to a model on a device.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use serde_json::{Map, Value};
use terrarium_kernels::KernelBackend;
use terrarium_models::decoder::Layer;
use terrarium_models::{Decoder, DecoderConfig, ParamSource, ParamSpec, WeightEntry, WeightTable};

use super::{Checkpoint, GenerationConfig};
use crate::error::{CheckpointError, InputError, Mismatch};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// The element type of a loaded model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// float32 on a CPU; elsewhere what the checkpoint says, where the device can.
    #[default]
    Auto,
    /// float32.
    F32,
    /// bfloat16.
    Bf16,
    /// float16.
    F16,
}

impl std::str::FromStr for Precision {
    type Err = InputError;

    fn from_str(text: &str) -> Result<Self, InputError> {
        match text.to_ascii_lowercase().as_str() {
            "auto" => Ok(Self::Auto),
            "f32" | "float32" => Ok(Self::F32),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            "f16" | "float16" => Ok(Self::F16),
            other => Err(InputError::Option(format!("`{other}` is no dtype: use auto, f32, bf16 or f16"))),
        }
    }
}

/// How to load.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Element type of the model.
    pub precision: Precision,
    /// Keys that replace or complete those of the configuration.
    pub overrides: Map<String, Value>,
}

/// A model and what came with it.
#[derive(Debug)]
pub struct Loaded<B: KernelBackend> {
    /// The model.
    pub model: Decoder<B>,
    /// Its configuration, corrected by the weights' shapes.
    pub config: DecoderConfig,
    /// Its tokenizer, where there is a tokenizer.json.
    pub tokenizer: Option<Tokenizer>,
    /// Its authors' defaults for generation.
    pub generation: GenerationConfig,
    /// Its element type.
    pub dtype: DType,
    /// Where it came from.
    pub dir: PathBuf,
    /// Decisions worth printing.
    pub notes: Vec<String>,
}

/// Loads a model directory. Missing, unused and mis-shaped keys are one error that lists them all.
pub fn load<B: KernelBackend>(dir: &Path, options: &LoadOptions, device: &B::Device) -> Result<Loaded<B>> {
    let checkpoint = Checkpoint::open_with(dir, &options.overrides)?;
    checkpoint.check()?;
    let mut notes = checkpoint.notes.clone();
    let dtype = choose_dtype::<B>(&checkpoint, options.precision, device, &mut notes)?;
    let mut source = FileSource::new(&checkpoint, dtype);
    let model = Decoder::<B>::build(&checkpoint.config, &mut source, dtype, device);
    source.finish()?;
    let tokenizer = Tokenizer::from_dir(dir)?;
    let generation = GenerationConfig::open(dir, &checkpoint.config)?;
    if let Some(tokenizer) = &tokenizer
        && tokenizer.vocab_size() > checkpoint.config.vocab_size
    {
        let (more, less) = (tokenizer.vocab_size(), checkpoint.config.vocab_size);
        notes.push(format!("the tokenizer has {more} ids, the model {less}: text that needs the ids beyond is refused"));
    }
    Ok(Loaded { model, config: checkpoint.config.clone(), tokenizer, generation, dtype, dir: dir.to_path_buf(), notes })
}

fn choose_dtype<B: KernelBackend>(
    checkpoint: &Checkpoint,
    precision: Precision,
    device: &B::Device,
    notes: &mut Vec<String>,
) -> Result<DType> {
    let wanted = match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::F16 => DType::F16,
        Precision::Auto => {
            let stored = match checkpoint.dtype() {
                DType::F64 => DType::F32,
                other => other,
            };
            let backend = B::name(device);
            let on_cpu = ["flex", "ndarray"].iter().any(|name| backend.contains(name));
            if stored != DType::F32 && (on_cpu || !B::supports_dtype(device, stored)) {
                let reason = if on_cpu { "a CPU is fastest in it" } else { "the device does not compute in it" };
                notes.push(format!("weights are stored as {}, computing in f32: {reason} (--dtype chooses)", name(stored)));
                return Ok(DType::F32);
            }
            return Ok(stored);
        }
    };
    if B::supports_dtype(device, wanted) {
        Ok(wanted)
    } else {
        Err(InputError::Option(format!("{} does not compute in {}: use --dtype f32", B::name(device), name(wanted))).into())
    }
}

fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        DType::F32 => "f32",
        _ => "another type",
    }
}

/// Parameters from the mapped files. The keys were checked before; what still does not fit is collected.
struct FileSource<'a> {
    checkpoint: &'a Checkpoint,
    entry_of: HashMap<String, WeightEntry>,
    dtype: DType,
    missing: Vec<String>,
    failed: Option<Error>,
}

impl<'a> FileSource<'a> {
    fn new(checkpoint: &'a Checkpoint, dtype: DType) -> Self {
        let WeightTable { entries, .. } = checkpoint.config.table();
        let entry_of = entries.into_iter().map(|entry| (entry.path.clone(), entry)).collect();
        Self { checkpoint, entry_of, dtype, missing: Vec::new(), failed: None }
    }

    fn read(&mut self, spec: &ParamSpec) -> Option<TensorData> {
        let entry = self.entry_of.get(&spec.path).filter(|entry| entry.len() == spec.len())?;
        let dtype = if spec.float32 { DType::F32 } else { self.dtype };
        match self.checkpoint.parameter(entry, dtype) {
            Ok(data) => data,
            Err(error) => {
                self.failed.get_or_insert(error);
                Some(TensorData::zeros::<f32, _>(spec.shape.clone()))
            }
        }
    }

    fn finish(self) -> Result<()> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        if self.missing.is_empty() {
            return Ok(());
        }
        let dir = self.checkpoint.dir.clone();
        Err(CheckpointError::Mismatch(Box::new(Mismatch { dir, missing: self.missing, ..Mismatch::default() })).into())
    }
}

impl ParamSource for FileSource<'_> {
    fn param(&mut self, spec: &ParamSpec) -> TensorData {
        self.read(spec).unwrap_or_else(|| {
            self.missing.push(format!("{} {:?}", spec.path, spec.shape));
            TensorData::zeros::<f32, _>(spec.shape.clone())
        })
    }
}

/// Layer `i` alone, with its parameters in `dtype` (those kept in float32 for their precision in that): no other tensor of
/// the checkpoint is read.
pub fn load_layer<B: KernelBackend>(checkpoint: &Checkpoint, i: usize, dtype: DType, device: &B::Device) -> Result<Layer<B>> {
    if i >= checkpoint.config.layers.len() {
        let layers = checkpoint.config.layers.len();
        return Err(InputError::Option(format!("there is no layer {i}: the model has {layers}")).into());
    }
    let mut source = FileSource::new(checkpoint, dtype);
    let layer = Layer::build(&checkpoint.config, i, &mut source, dtype, device);
    source.finish().map(|()| layer)
}
