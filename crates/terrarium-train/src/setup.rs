//! From options to a trainer: resume point, tokenizer, data, model, optimiser.

mod resume;
mod tokenizer;

use std::fmt;
use std::path::PathBuf;

use burn::tensor::DType;
use serde::Serialize;
use serde_json::{Map, Value};
use terrarium_kernels::backend::DeviceError;
use terrarium_kernels::{KernelBackend, TrainBackend};
use terrarium_models::{Decoder, DecoderConfig, LoraConfig};
use terrarium_runtime::{Checkpoint, Files, HubOptions, LoadOptions, Precision, Tokenizer, resolve};

use crate::TrainError;
use crate::checkpoint::RunState;
use crate::config::{Compute, ConfigError, LoraSection, RunConfig, new_model};
use crate::data::{Corpus, Cursor, PackStats};
use crate::event::{Event, Observers};
use crate::memory::{Estimate, Load};
use crate::optim::{AdamW, AdamWConfig, Groups, count};
use crate::run::RunOptions;
use crate::trainer::{Parts, Trainer};
use crate::{host, loss, params};

/// What is known before any weight is touched.
pub(crate) struct Outline {
    /// The configuration with every default filled in.
    pub config: RunConfig,
    /// The model's dimensions.
    pub model: DecoderConfig,
    /// Packed rows.
    pub corpus: Corpus,
    /// The checkpoint to go on from.
    pub resumed: Option<crate::checkpoint::Checkpoint>,
    /// Directory of the base model.
    pub base_dir: Option<PathBuf>,
    /// Directory whose tokenizer files belong to the result.
    pub tokenizer_dir: Option<PathBuf>,
}

/// A run that is ready to start.
pub(crate) struct Ready<B: TrainBackend> {
    /// The loop.
    pub trainer: Trainer<B>,
    /// The model, adapters attached and weights restored.
    pub model: Decoder<B>,
    /// Its dimensions.
    pub model_config: DecoderConfig,
    /// The whole configuration.
    pub config: RunConfig,
    /// Adapters of the run.
    pub lora: Option<LoraConfig>,
    /// Directory of the base model.
    pub base_dir: Option<PathBuf>,
    /// Directory whose tokenizer files belong to the result.
    pub tokenizer_dir: Option<PathBuf>,
}

/// Reads everything but weights. With `write`, a tokenizer made here is kept in the run directory.
pub(crate) fn outline(options: &RunOptions, observers: &mut Observers, write: bool) -> Result<Outline, TrainError> {
    options.config.check()?;
    let devices = 1 + options.others.len();
    if options.config.train.batch < devices {
        let reason = format!(
            "{devices} devices share the rows of a micro-batch, so it needs at least as many; found {}",
            options.config.train.batch
        );
        return Err(ConfigError::Value { key: "train.batch".into(), reason }.into());
    }
    let resumed = resume::find(options, write)?;
    let mut config = options.config.clone();
    if let Some(checkpoint) = &resumed {
        resume::inherit(&mut config, &checkpoint.state.config);
    }
    let base_dir = base_dir(options)?;
    let (tokenizer, tokenizer_dir) = tokenizer::open(&config, base_dir.as_deref(), &options.out_dir, write)?;
    let model = match &base_dir {
        Some(dir) => Checkpoint::open_with(dir, &config.overrides())?.config,
        None => new_model(&config.model.clone().unwrap_or_default(), &tokens(&tokenizer))?,
    };
    let eos = tokenizer.eos().or(model.eos.first().copied());
    if eos.is_none() {
        observers.tell(Event::Note("no end-of-text token is known: documents will not be ended".to_string()));
    }
    let corpus = Corpus::load(&config.data, &config.train, &tokenizer, eos, model.vocab_size)?;
    if let Some(epochs) = config.train.epochs {
        let rows = (config.train.batch * config.train.accumulation) as f64;
        config.train.steps = ((epochs * corpus.train.len() as f64 / rows).ceil() as usize).max(1);
    }
    // From here on the derived values are fixed, so that raising the number of steps later changes nothing else.
    config.train.min_lr = Some(config.train.min_lr());
    config.train.warmup = Some(config.train.warmup());
    config.train.save_every = Some(config.train.save_every());
    if let Some(checkpoint) = &resumed {
        resume::compare(&config, &corpus, checkpoint)?;
    }
    corpus.notes.iter().for_each(|note| observers.tell(Event::Note(note.clone())));
    if model.max_positions.is_some_and(|most| most < config.train.sequence_length) {
        let most = model.max_positions.unwrap_or(0);
        observers.tell(Event::Note(format!(
            "train.sequence_length {} is beyond the {most} positions the model was made for",
            config.train.sequence_length
        )));
    }
    Ok(Outline { config, model, corpus, resumed, base_dir, tokenizer_dir })
}

fn base_dir(options: &RunOptions) -> Result<Option<PathBuf>, TrainError> {
    let Some(base) = &options.config.base else { return Ok(None) };
    match &options.base_dir {
        Some(dir) => Ok(Some(dir.clone())),
        None => Ok(Some(resolve(&base.model, Files::All, &HubOptions::from_env(), &mut ())?.dir)),
    }
}

/// What the tokenizer knows of a model's keys.
fn tokens(tokenizer: &Tokenizer) -> Map<String, Value> {
    let ids = [("eos_token_id", tokenizer.eos()), ("bos_token_id", tokenizer.bos()), ("pad_token_id", tokenizer.pad())];
    let mut tokens = Map::from_iter([("vocab_size".to_string(), tokenizer.vocab_size().into())]);
    tokens.extend(ids.into_iter().filter_map(|(key, id)| Some((key.to_string(), id?.into()))));
    tokens
}

/// Builds the model and restores what a checkpoint holds.
pub(crate) fn ready<B: TrainBackend>(
    options: &RunOptions,
    devices: &[B::Device],
    observers: &mut Observers,
) -> Result<Ready<B>, TrainError> {
    let Some((device, others)) = devices.split_first() else { return Err(DeviceError::Unknown(String::new()).into()) };
    let Outline { config, model: model_config, corpus, resumed, base_dir, tokenizer_dir } = outline(options, observers, true)?;
    let (model, model_config) = match &base_dir {
        Some(dir) => {
            // Master weights are float32 whatever the file holds: small updates would be rounded away otherwise.
            let options = LoadOptions { precision: Precision::F32, overrides: config.overrides() };
            let loaded = terrarium_runtime::load::<B>(dir, &options, device)?;
            loaded.notes.into_iter().for_each(|note| observers.tell(Event::Note(note)));
            (loaded.model, loaded.config)
        }
        None => (Decoder::init(&model_config, config.train.seed, device), model_config),
    };
    let lora = config.lora.as_ref().map(LoraSection::to_lora).transpose()?;
    let mut model = model;
    if let Some(lora) = &lora {
        let (adapted, report) = model.attach_lora(lora, config.train.seed, device)?;
        observers.tell(Event::Note(report.to_string()));
        model = adapted;
    }
    if let Some(dtype) = config.train.precision.on::<B>(device) {
        if !B::supports_dtype(device, dtype) {
            return Err(ConfigError::Value {
                key: "train.precision".into(),
                reason: "this device has no bf16: use \"f32\" or \"auto\"".into(),
            }
            .into());
        }
        observers.tell(Event::Note("products in bf16; weights, gradients and moments in float32 (train.precision)".to_string()));
        model = model.computing_in(dtype);
    }
    let compute = config.train.precision.on::<B>(device).unwrap_or(DType::F32);
    let slice = if host::is_host::<B>(device) { loss::SLICE.0 } else { loss::SLICE.1 };
    let needs = memory(&config, &model_config, compute, slice, devices.len());
    observers.tell(Event::Note(format!("memory of a step: {needs}")));
    if let Some(there) = B::capacity(device).filter(|there| *there < needs.total()) {
        observers.tell(Event::Note(format!(
            "this device has {:.2} GB: if it runs out, lower train.batch or train.sequence_length (and raise train.accumulation), or set train.gradient_checkpointing",
            there as f64 / 1e9
        )));
    }
    if !others.is_empty() {
        let by = if B::InnerBackend::collective(devices).is_some() { "NCCL" } else { "the host" };
        let most = config.train.batch.div_ceil(devices.len());
        observers.tell(Event::Note(format!(
            "{} devices, each with up to {most} of the {} rows of a micro-batch; gradients are summed by {by}",
            devices.len(),
            config.train.batch
        )));
    }
    let groups = Groups::of(&params::list(&model));
    observers.tell(Event::Note(format!("model: {} ({} parameters); {groups}", model_config.pattern(), count(model_config.parameters()))));
    let adamw = AdamWConfig::new(&config.train);
    let (model, optim, state) = match resumed {
        Some(checkpoint) => {
            let dir = checkpoint.dir;
            let fail = |reason: String| TrainError::Checkpoint { dir: dir.clone(), reason };
            let model = params::assign(model, checkpoint.model).map_err(fail)?;
            let optim = AdamW::restore(adamw, checkpoint.state.step, checkpoint.optimizer, device).map_err(fail)?;
            observers.tell(Event::Note(format!("resuming after step {} from {}", checkpoint.state.step, dir.display())));
            (model, optim, RunState { config: config.to_json(), ..checkpoint.state })
        }
        None => (model, AdamW::new(adamw), fresh_state(&config, &corpus)),
    };
    let path = options.out_dir.join("config.toml");
    terrarium_runtime::write_atomic(&path, config.to_toml().as_bytes())?;
    let Corpus { train, valid, .. } = corpus;
    let parts = Parts {
        config: config.train.clone(),
        train,
        valid,
        optim,
        state,
        run_dir: options.out_dir.clone(),
        stop: options.stop.clone(),
        device: device.clone(),
        others: others.to_vec(),
    };
    Ok(Ready { trainer: Trainer::new(parts), model, model_config, config, lora, base_dir, tokenizer_dir })
}

fn fresh_state(config: &RunConfig, corpus: &Corpus) -> RunState {
    RunState {
        format: 1,
        step: 0,
        cursor: Cursor::default(),
        tokens: 0,
        seconds: 0.0,
        train_loss: None,
        validated: None,
        best: None,
        best_saved: None,
        stale: 0,
        config: config.to_json(),
        data: resume::fingerprint(corpus),
    }
}

/// What a run would do, without doing it.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Layer pattern.
    pub pattern: String,
    /// Parameters of the model.
    pub parameters: usize,
    /// Those that are trained, adapters included.
    pub trained: usize,
    /// Optimiser steps.
    pub steps: usize,
    /// Tokens per step, padding included.
    pub tokens_per_step: usize,
    /// Passes over the data.
    pub epochs: f64,
    /// Packing of the training data.
    pub train: PackStats,
    /// Packing of the validation data.
    pub valid: Option<PackStats>,
    /// What a step takes on a CPU.
    pub memory: Estimate,
}

/// Reads configuration, tokenizer and data, and says what a run would do. Writes nothing.
///
/// # Errors
/// Whatever would stop the run before its first step, but for the weights.
pub fn plan(options: &RunOptions) -> Result<Plan, TrainError> {
    let Outline { config, model, corpus, .. } = outline(options, &mut Observers::default(), false)?;
    let parameters = model.parameters();
    let adapters = config.lora.as_ref().map(|lora| adapter_parameters(&model, lora));
    let trained = adapters.unwrap_or(parameters);
    let train = &config.train;
    let tokens_per_step = train.batch * train.sequence_length * train.accumulation;
    let compute = if train.precision == Compute::Bf16 { DType::BF16 } else { DType::F32 };
    Ok(Plan {
        pattern: model.pattern(),
        parameters,
        trained,
        steps: train.steps,
        tokens_per_step,
        epochs: (train.steps * train.batch * train.accumulation) as f64 / corpus.train.len() as f64,
        train: corpus.train.stats.clone(),
        valid: corpus.valid.map(|rows| rows.stats),
        memory: memory(&config, &model, compute, loss::SLICE.0, 1 + options.others.len()),
    })
}

/// What a step takes of each of `devices`, with products in `compute` and logits in slices of at most `slice` bytes.
fn memory(config: &RunConfig, model: &DecoderConfig, compute: DType, slice: usize, devices: usize) -> Estimate {
    let (train, parameters) = (&config.train, model.parameters());
    let adapters = config.lora.as_ref().map(|lora| adapter_parameters(model, lora));
    let trained = adapters.unwrap_or(parameters);
    let positions = train.batch.div_ceil(devices) * train.sequence_length;
    let rows = positions.min(loss::rows(slice, model.vocab_size, compute));
    let load = Load {
        positions,
        compute,
        segment: train.gradient_checkpointing,
        logits: (compute.size() * model.vocab_size * rows) as u64,
        states: 4 * (parameters + adapters.unwrap_or(0) + 3 * trained) as u64,
    };
    load.estimate(model)
}

fn adapter_parameters(model: &DecoderConfig, lora: &LoraSection) -> usize {
    let wanted = |name: &str| match lora.targets.as_str() {
        "all" => name.ends_with("_proj"),
        "attention" => matches!(name, "q_proj" | "k_proj" | "v_proj" | "o_proj"),
        "ssm" => matches!(name, "in_proj" | "out_proj"),
        "mlp" => matches!(name, "gate_proj" | "up_proj" | "down_proj"),
        names => names.split(',').any(|wanted| wanted.trim() == name),
    };
    let table = model.table();
    let matrices = table
        .entries
        .iter()
        .filter(|entry| entry.path.strip_suffix(".weight").and_then(|path| path.rsplit('.').next()).is_some_and(wanted));
    matrices.map(|entry| lora.rank * entry.shape.iter().sum::<usize>()).sum()
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "model       {} with {} parameters, {} trained", self.pattern, count(self.parameters), count(self.trained))?;
        writeln!(f, "training    {}", self.train)?;
        if let Some(valid) = &self.valid {
            writeln!(f, "validation  {valid}")?;
        }
        writeln!(f, "steps       {} of {} tokens, {:.2} passes over the data", self.steps, self.tokens_per_step, self.epochs)?;
        write!(f, "memory      {}", self.memory)
    }
}
