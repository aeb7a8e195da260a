//! The configuration of a run: TOML sections, defaults, overrides.

mod edit;
mod preset;

use std::path::{Path, PathBuf};

use burn::tensor::DType;
use burn::tensor::backend::{Backend, DTypeUsage};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use terrarium_models::lora::{LoraConfig, LoraTargets};

pub use edit::{ConfigError, changed_keys};
pub use preset::{near_presets, new_model};

/// A whole run. Every field of every section has a default, but for the model and the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// `[model]`: a new model, with the keys of a Hugging Face `config.json` (`model_type` and its dimensions), or `preset`
    /// and keys that differ from that published model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<Map<String, Value>>,
    /// `[base]`: a checkpoint to start from instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseConfig>,
    /// `[data]`: what to learn.
    pub data: DataConfig,
    /// `[train]`: how to learn it.
    #[serde(default)]
    pub train: TrainConfig,
    /// `[lora]`: train low-rank adapters instead of all weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSection>,
    /// `[output]`: what to write at the end.
    #[serde(default)]
    pub output: OutputConfig,
}

/// `[base]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseConfig {
    /// A directory in Hugging Face layout, or `org/name[@revision]` on the hub.
    pub model: String,
    /// Keys that replace or complete those of its configuration.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub set: Map<String, Value>,
}

impl BaseConfig {
    /// A checkpoint as it is.
    pub fn new(model: impl Into<String>) -> Self {
        Self { model: model.into(), set: Map::new() }
    }
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Files or directories (all `.txt`, `.md`, `.jsonl` and `.json` files below them, in order of their names).
    pub train: Vec<PathBuf>,
    /// The same for validation. Empty: a part of the training data is held out.
    pub valid: Vec<PathBuf>,
    /// `auto` (by the file's ending), `text`, `jsonl` or `json`.
    pub format: Format,
    /// Part of the training data held out when `valid` is empty; 0 for no validation.
    pub valid_fraction: f64,
    /// A directory with a tokenizer, a `tokenizer.json`, or `bpe:SIZE` to make one from the training text. Default: the base model's.
    pub tokenizer: Option<String>,
    /// Splits text files into documents at this string, which is itself dropped.
    pub separator: Option<String>,
    /// How examples become text: `auto` (chats by the tokenizer's template, instructions in the Alpaca wording, pairs as they are),
    /// `plain`, `alpaca` or `chat`.
    pub template: Template,
    /// Loss on completions and assistant turns only; false: on everything.
    pub completions_only: bool,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            valid: Vec::new(),
            format: Format::Auto,
            valid_fraction: 0.05,
            tokenizer: None,
            separator: None,
            template: Template::Auto,
            completions_only: true,
        }
    }
}

/// Format of data files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// By the file's ending.
    Auto,
    /// Plain text: language modelling.
    Text,
    /// One example per line.
    Jsonl,
    /// One array of examples.
    Json,
}

/// How an example becomes text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Template {
    /// By the example's kind.
    Auto,
    /// Prompt and completion as they are.
    Plain,
    /// The Alpaca wording.
    Alpaca,
    /// The tokenizer's chat template.
    Chat,
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimiser steps.
    pub steps: usize,
    /// Passes over the data; when given it decides `steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Rows per micro-batch.
    pub batch: usize,
    /// Tokens per row.
    pub sequence_length: usize,
    /// Micro-batches per step.
    pub accumulation: usize,
    /// Highest learning rate.
    pub lr: f64,
    /// Learning rate at the end of the cosine. Default: a tenth of `lr`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_lr: Option<f64>,
    /// Steps of linear warm-up. Default: a twentieth of `steps`, at most 1000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup: Option<usize>,
    /// `cosine` or `constant` after the warm-up.
    pub schedule: Shape,
    /// Decay rates of AdamW's moments.
    pub betas: [f64; 2],
    /// AdamW's epsilon.
    pub eps: f64,
    /// Decoupled weight decay, on matrices only.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 for no clipping.
    pub clip: f64,
    /// Of starting values, data order and the validation split.
    pub seed: u64,
    /// Steps between validations; 0 for the last step only.
    pub eval_every: usize,
    /// Micro-batches per validation; 0 for all.
    pub eval_batches: usize,
    /// Steps between checkpoints; 0 for the last step only. Default: `eval_every`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_every: Option<usize>,
    /// Checkpoints to keep, besides the best.
    pub keep: usize,
    /// Validations without improvement after which to stop; 0 for never.
    pub patience: usize,
    /// What counts as improvement of the validation loss.
    pub min_delta: f64,
    /// Steps between printed lines when there is no dashboard.
    pub log_every: usize,
    /// Layers of a segment of which only what enters is kept until the backward pass, which computes the rest again: less memory for one
    /// more forward pass. 0 keeps everything.
    pub gradient_checkpointing: usize,
    /// What matrices are multiplied in: `auto` (`bf16` where the device has units for it, else `f32`), `f32` or `bf16`. Weights,
    /// gradients and moments are float32 in every case.
    pub precision: Compute,
}

/// What a model computes in while its parameters are float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// bfloat16 where the device has units for it, else float32.
    Auto,
    /// float32.
    F32,
    /// bfloat16.
    Bf16,
}

impl Compute {
    /// The dtype on a device; `None` for that of the parameters.
    pub fn on<B: Backend>(self, device: &B::Device) -> Option<DType> {
        let fast = || B::dtype_usage(device, DType::BF16).is_superset(DTypeUsage::Accelerated | DTypeUsage::Arithmetic);
        match self {
            Self::Auto if !fast() => None,
            Self::F32 => None,
            Self::Auto | Self::Bf16 => Some(DType::BF16),
        }
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            epochs: None,
            batch: 8,
            sequence_length: 512,
            accumulation: 1,
            lr: 3e-4,
            min_lr: None,
            warmup: None,
            schedule: Shape::Cosine,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
            seed: 42,
            eval_every: 100,
            eval_batches: 20,
            save_every: None,
            keep: 2,
            patience: 0,
            min_delta: 0.0,
            log_every: 10,
            gradient_checkpointing: 0,
            precision: Compute::Auto,
        }
    }
}

/// Shape of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Half a cosine down to `min_lr`.
    Cosine,
    /// `lr` to the end.
    Constant,
}

/// `[lora]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSection {
    /// Rank of the adapters.
    pub rank: usize,
    /// Their scale times the rank.
    pub alpha: f32,
    /// `all`, `attention`, `ssm`, `mlp`, or projection names separated by commas.
    pub targets: String,
}

impl Default for LoraSection {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, targets: "all".to_string() }
    }
}

impl LoraSection {
    /// What the models crate wants.
    pub fn to_lora(&self) -> Result<LoraConfig, ConfigError> {
        let targets: LoraTargets =
            self.targets.parse().map_err(|error| ConfigError::Value { key: "lora.targets".into(), reason: format!("{error}") })?;
        Ok(LoraConfig { rank: self.rank, alpha: self.alpha, targets })
    }
}

/// `[output]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutputConfig {
    /// `best`: the checkpoint with the lowest validation loss becomes the result; `last`: the final weights.
    pub weights: Weights,
    /// `f32`, `bf16` or `f16`. Default: as the base checkpoint, else `f32`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<OutputDtype>,
}

impl Default for OutputConfig {
    fn default() -> Self {
        Self { weights: Weights::Best, dtype: None }
    }
}

/// Which weights become the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weights {
    /// Of the checkpoint with the lowest validation loss.
    Best,
    /// Of the last step.
    Last,
}

/// Dtype of the written model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputDtype {
    /// 32-bit float.
    F32,
    /// Brain float.
    Bf16,
    /// Half precision.
    F16,
}

impl OutputDtype {
    /// Burn's name for it.
    pub fn to_burn(self) -> burn::tensor::DType {
        match self {
            Self::F32 => burn::tensor::DType::F32,
            Self::Bf16 => burn::tensor::DType::BF16,
            Self::F16 => burn::tensor::DType::F16,
        }
    }
}

impl TrainConfig {
    /// Lowest learning rate of the schedule.
    pub fn min_lr(&self) -> f64 {
        self.min_lr.unwrap_or(self.lr / 10.0)
    }

    /// Steps of warm-up.
    pub fn warmup(&self) -> usize {
        self.warmup.unwrap_or((self.steps / 20).min(1000))
    }

    /// Steps between checkpoints, 0 for none but the last.
    pub fn save_every(&self) -> usize {
        self.save_every.unwrap_or(self.eval_every)
    }
}

impl RunConfig {
    /// The defaults of a fine-tuning run.
    pub fn finetune(base: &str, data: Vec<PathBuf>) -> Self {
        Self {
            model: None,
            base: Some(BaseConfig::new(base)),
            data: DataConfig { train: data, ..DataConfig::default() },
            train: TrainConfig { epochs: Some(3.0), lr: 2e-4, weight_decay: 0.0, batch: 4, eval_every: 50, ..TrainConfig::default() },
            lora: Some(LoraSection::default()),
            output: OutputConfig::default(),
        }
    }

    /// Keys of `[base]` that replace or complete those of the checkpoint's configuration.
    pub fn overrides(&self) -> Map<String, Value> {
        self.base.as_ref().map(|base| base.set.clone()).unwrap_or_default()
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// The first rule that is broken, with its key.
    pub fn check(&self) -> Result<(), ConfigError> {
        let fail = |key: &str, reason: &str| Err(ConfigError::Value { key: key.into(), reason: reason.into() });
        let train = &self.train;
        let positive = [
            ("train.steps", train.steps),
            ("train.batch", train.batch),
            ("train.sequence_length", train.sequence_length),
            ("train.accumulation", train.accumulation),
            ("train.keep", train.keep),
            ("train.log_every", train.log_every),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return fail(key, "must be at least 1");
        }
        let finite = [
            ("train.lr", train.lr),
            ("train.min_lr", train.min_lr()),
            ("train.eps", train.eps),
            ("train.weight_decay", train.weight_decay),
            ("train.clip", train.clip),
            ("train.min_delta", train.min_delta),
        ];
        if let Some((key, _)) = finite.iter().find(|(_, value)| !value.is_finite() || *value < 0.0) {
            return fail(key, "must be a number that is not negative");
        }
        if train.betas.iter().any(|beta| !(0.0..1.0).contains(beta)) {
            return fail("train.betas", "each must lie in [0, 1)");
        }
        if train.epochs.is_some_and(|epochs| !epochs.is_finite() || epochs <= 0.0) {
            return fail("train.epochs", "must be more than 0");
        }
        if !(0.0..1.0).contains(&self.data.valid_fraction) {
            return fail("data.valid_fraction", "must lie in [0, 1)");
        }
        if self.data.train.is_empty() {
            return fail("data.train", "name at least one file or directory");
        }
        if self.lora.as_ref().is_some_and(|lora| lora.rank == 0) {
            return fail("lora.rank", "must be at least 1");
        }
        match (&self.model, &self.base) {
            (Some(_), Some(_)) => fail("model", "give either [model] (a new model) or [base] (a checkpoint), not both"),
            (None, None) => fail("model", "give [model] (a new model) or [base] (a checkpoint)"),
            (Some(_), None) if self.lora.is_some() => fail("lora", "adapters need a trained model: give [base] instead of [model]"),
            (Some(model), None) => preset::named(model).map(drop),
            _ => Ok(()),
        }
    }

    /// Makes relative paths relative to `folder`.
    fn anchor(&mut self, folder: &Path) {
        let anchor = |path: &mut PathBuf| {
            if path.is_relative() {
                *path = folder.join(&*path);
            }
        };
        self.data.train.iter_mut().for_each(anchor);
        self.data.valid.iter_mut().for_each(anchor);
        if let Some(tokenizer) = &mut self.data.tokenizer
            && !tokenizer.starts_with("bpe:")
            && Path::new(tokenizer.as_str()).is_relative()
        {
            *tokenizer = folder.join(&*tokenizer).to_string_lossy().into_owned();
        }
        if let Some(base) = &mut self.base
            && folder.join(&base.model).is_dir()
        {
            base.model = folder.join(&base.model).to_string_lossy().into_owned();
        }
    }
}
