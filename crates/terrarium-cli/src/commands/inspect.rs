//! `terrarium inspect`

use std::path::Path;

use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value};
use terrarium::models::presets::{self, Preset};
use terrarium::models::{ConfigError, DecoderConfig};
use terrarium::runtime::{self, AdapterConfig, Checkpoint, CheckpointError, Files, RemoteFile, RepoId, Resolved, TensorInfo};

use crate::args::{HubArgs, SetArgs};
use crate::console::Console;
use crate::failure::Failure;
use crate::{interrupt, model, output};

/// Look at a model without running it.
///
/// Family, layers, sizes, memory, and what the configuration and the weights disagree about. Of a model on the hub the configuration and
/// the headers of the weights are fetched, not the weights. The name of a preset (`terrarium models`) shows that.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  terrarium inspect HuggingFaceTB/SmolLM2-135M --tokens 8192\n  terrarium inspect mamba2-130m")]
pub struct Arguments {
    /// A directory, a preset, or a model of the hub [default: the bundled model].
    #[arg(value_name = "ORG/NAME[@REV]|DIR|PRESET")]
    name: Option<String>,
    /// The same as a flag.
    #[arg(short, long, value_name = "ORG/NAME[@REV]|DIR|PRESET", conflicts_with = "name")]
    model: Option<String>,
    /// Length for which the size of the state is computed.
    #[arg(long, default_value_t = 4096, value_name = "N")]
    tokens: usize,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    #[command(flatten)]
    set: SetArgs,
    #[command(flatten)]
    hub: HubArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What is known of a model.
#[derive(Debug, Serialize)]
struct Report {
    /// Absent for a preset.
    dir: Option<String>,
    repository: Option<String>,
    commit: Option<String>,
    preset: Option<&'static str>,
    family: &'static str,
    pattern: String,
    layers: usize,
    hidden_size: usize,
    vocab_size: usize,
    tied_embeddings: bool,
    max_positions: Option<usize>,
    parameters: usize,
    /// Of the weights; absent while they are not known.
    dtype: Option<String>,
    /// Of the weights; absent while they are not known.
    bytes: Option<u64>,
    /// Of the weights in f32.
    f32_bytes: u64,
    state_tokens: usize,
    /// In f32.
    state_bytes: usize,
    state_bytes_bf16: usize,
    /// tokenizer.json, or the name of a SentencePiece model.
    tokenizer: Option<String>,
    /// The family of transformers that it is or converts to.
    exports_to: Option<&'static str>,
    /// The class of transformers that opens that.
    architecture: Option<&'static str>,
    notes: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<Tensor>,
    #[serde(skip)]
    without_tokenizer: String,
    /// Whether mamba_ssm's layout holds it.
    #[serde(skip)]
    native: bool,
}

#[derive(Debug, Serialize)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: u64,
}

/// A configuration and as much as is known of the weights.
struct Found {
    config: DecoderConfig,
    tensors: Vec<TensorInfo>,
    bytes: Option<u64>,
    notes: Vec<String>,
}

/// Reads, prints.
pub fn run(arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    interrupt::immediate();
    let name = arguments.name.as_deref().or(arguments.model.as_deref());
    let overrides = arguments.set.overrides();
    let preset = name.filter(|name| !Path::new(name).exists()).and_then(|name| presets::presets().into_iter().find(|p| p.name == name));
    if let Some(preset) = preset {
        let note = format!("a preset: what {} is published as; nothing was looked up there", preset.repository);
        let config = read_preset(&preset, &overrides)?;
        let mut report = report(arguments, Found { config, tensors: vec![], bytes: None, notes: vec![note] });
        report.preset = Some(preset.name);
        report.repository = Some(preset.repository.to_string());
        return show(arguments, &report);
    }
    let resolved = model::resolve(name, Files::Metadata, &arguments.hub, console)?;
    if let Some(adapter) = AdapterConfig::open(&resolved.dir)?.filter(|_| !resolved.dir.join("config.json").is_file()) {
        return print_adapter(&adapter, arguments.json);
    }
    let mut report = report(arguments, find(&resolved, &overrides, &arguments.hub)?);
    report.tokenizer = model::kind_of_tokenizer(&resolved.dir);
    report.dir = Some(resolved.dir.display().to_string());
    report.repository = resolved.repo.map(|repo| repo.to_string());
    report.commit = resolved.commit;
    show(arguments, &report)
}

fn read_preset(preset: &Preset, overrides: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
    let mut keys = preset.config.clone();
    if let Value::Object(keys) = &mut keys {
        keys.extend(overrides.clone());
    }
    DecoderConfig::from_value(keys)
}

/// From the files that are here; those that are not here yet are asked for their headers.
fn find(resolved: &Resolved, overrides: &Map<String, Value>, hub: &HubArgs) -> Result<Found, Failure> {
    match Checkpoint::open_with(&resolved.dir, overrides) {
        Ok(checkpoint) => {
            let mut notes = checkpoint.notes.clone();
            // What does not fit is worth a look too; it is said, and not the end.
            notes.extend(checkpoint.check().err().map(|error| error.to_string()));
            let (tensors, bytes) = (checkpoint.tensors().to_vec(), Some(checkpoint.bytes()));
            Ok(Found { config: checkpoint.config, tensors, bytes, notes })
        }
        Err(error) => match (&resolved.repo, without_weights(&error, resolved.repo.is_some())) {
            (_, false) => Err(error.into()),
            (Some(repo), true) => remote(repo, resolved, overrides, hub),
            (None, true) => {
                let note = "the weights are not here: dtype and bytes are unknown, and config.json is taken at its word";
                let config = runtime::read_config_with(&resolved.dir, overrides)?;
                Ok(Found { config, tensors: vec![], bytes: None, notes: vec![note.to_string()] })
            }
        },
    }
}

/// The weights are not here, as of a hub model whose metadata alone was fetched.
fn without_weights(error: &runtime::Error, hub: bool) -> bool {
    match error {
        runtime::Error::Checkpoint(CheckpointError::NoWeights { .. }) => true,
        // An index without its shards, a Megatron run without its folders.
        runtime::Error::Checkpoint(CheckpointError::Index { .. } | CheckpointError::Megatron(_)) => hub,
        _ => false,
    }
}

/// Of a model whose weights are on the hub alone: its configuration, settled by the headers.
fn remote(repo: &RepoId, resolved: &Resolved, overrides: &Map<String, Value>, hub: &HubArgs) -> Result<Found, Failure> {
    let mut notes = Vec::new();
    let dir = &resolved.dir;
    let options = hub.options();
    let own = ["config.json", "params.json"].iter().any(|file| dir.join(file).is_file());
    let mut config = if own {
        runtime::read_config_with(dir, overrides)?
    } else {
        let preset = presets::preset(&repo.id).ok_or_else(|| {
            Failure::usage_hint(
                format!("{repo} is a Megatron run: its sizes stand in its weights, which are not here"),
                format!("`terrarium download {repo}` fetches them"),
            )
        })?;
        notes.push(format!("the sizes of a Megatron run stand in its weights, which are not here: these are the preset {}", preset.name));
        read_preset(&preset, overrides)?
    };
    if options.offline {
        notes.push("offline, and the weights are not in the cache: the configuration is taken at its word".to_string());
        return Ok(Found { config, tensors: vec![], bytes: None, notes });
    }
    let files = match runtime::remote_headers(repo, &options) {
        Ok(files) => files,
        Err(error) => {
            notes.push(format!("the weights could not be looked at, and the configuration is taken at its word: {error}"));
            return Ok(Found { config, tensors: vec![], bytes: None, notes });
        }
    };
    let Some(tensors) = tensors(&files) else {
        let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
        let what = if own { "the configuration is taken at its word" } else { "dtype and shapes are unknown" };
        notes.push(format!("pickled weights ({}), whose tensors cannot be listed without a download: {what}", names.join(", ")));
        return Ok(Found { config, tensors: vec![], bytes: Some(files.iter().map(|file| file.bytes).sum()), notes });
    };
    notes.extend(config.reconcile(&|key| tensors.iter().find(|tensor| tensor.name == key).map(|tensor| tensor.shape.clone())));
    let mismatch = runtime::compare(&config, &tensors, Path::new(&repo.id));
    if !mismatch.is_empty() {
        notes.push(mismatch.to_string());
    }
    let bytes = Some(tensors.iter().map(|tensor| tensor.bytes).sum());
    Ok(Found { config, tensors, bytes, notes })
}

/// All tensors; `None` if some file does not say what it holds.
fn tensors(files: &[RemoteFile]) -> Option<Vec<TensorInfo>> {
    let mut found = Vec::new();
    for file in files {
        found.extend(file.header.as_ref()?.entries.iter().map(|entry| TensorInfo {
            name: entry.key.clone(),
            dtype: entry.element.name().to_string(),
            shape: entry.shape.clone(),
            file: file.name.clone(),
            bytes: entry.bytes(),
        }));
    }
    Some(found)
}

/// The float type that holds most bytes.
fn dtype(tensors: &[TensorInfo]) -> Option<String> {
    let mut bytes: Vec<(&str, u64)> = Vec::new();
    for tensor in tensors.iter().filter(|tensor| tensor.is_float()) {
        match bytes.iter_mut().find(|(name, _)| *name == tensor.dtype) {
            Some((_, size)) => *size += tensor.bytes,
            None => bytes.push((&tensor.dtype, tensor.bytes)),
        }
    }
    bytes.into_iter().max_by_key(|&(name, size)| (size, name)).map(|(name, _)| name.to_lowercase())
}

fn report(arguments: &Arguments, found: Found) -> Report {
    let Found { config, tensors, bytes, notes } = found;
    let exported = config.in_transformers().ok().map(|config| config.family);
    let dtype = dtype(&tensors);
    let tensor = |info: TensorInfo| Tensor { name: info.name, dtype: info.dtype, shape: info.shape, bytes: info.bytes };
    Report {
        dir: None,
        repository: None,
        commit: None,
        preset: None,
        family: config.family.name(),
        pattern: config.pattern(),
        layers: config.layers.len(),
        hidden_size: config.hidden_size,
        vocab_size: config.vocab_size,
        tied_embeddings: config.tie_embeddings,
        max_positions: config.max_positions,
        parameters: config.parameters(),
        dtype,
        bytes,
        f32_bytes: 4 * config.parameters() as u64,
        state_tokens: arguments.tokens,
        state_bytes: config.state_bytes(arguments.tokens, 4),
        state_bytes_bf16: config.state_bytes(arguments.tokens, 2),
        tokenizer: None,
        exports_to: exported.map(|family| family.name()),
        architecture: exported.map(|family| family.architecture()),
        notes,
        tensors: tensors.into_iter().filter(|_| arguments.tensors).map(tensor).collect(),
        without_tokenizer: match config.family.tokenizer(&config) {
            Some(name) => format!("none: its authors used --tokenizer {name}"),
            None => "none: token ids only, or --tokenizer".to_string(),
        },
        native: config.in_native().is_ok(),
    }
}

fn show(arguments: &Arguments, report: &Report) -> Result<(), Failure> {
    if arguments.json { output::json(report) } else { print(report) }
}

fn print(report: &Report) -> Result<(), Failure> {
    let unknown = || "unknown".to_string();
    let bytes = |n: usize| output::bytes(n as u64);
    let place = match (&report.preset, &report.repository, &report.dir) {
        (Some(preset), repository, _) => ("preset", format!("{preset} ({})", repository.as_deref().unwrap_or("no repository"))),
        (None, Some(repository), Some(dir)) => ("model", format!("{repository} in {dir}")),
        (None, _, dir) => ("directory", dir.clone().unwrap_or_default()),
    };
    let preset = report.preset.is_some();
    let stored = match report.bytes {
        _ if preset => format!("{} in bf16", output::bytes(report.f32_bytes / 2)),
        Some(bytes) => format!("{} as stored", output::bytes(bytes)),
        None => unknown(),
    };
    let weights = format!("{}, {} in f32", stored, output::bytes(report.f32_bytes));
    let state = format!(
        "{} in f32, {} in bf16, per sequence after {} tokens",
        bytes(report.state_bytes),
        bytes(report.state_bytes_bf16),
        report.state_tokens
    );
    let transformers = match (report.exports_to, report.architecture) {
        (Some(family), Some(class)) if family == report.family => format!("opened as it is ({class})"),
        (Some(family), Some(class)) => format!("opened after `terrarium export` as {family} ({class})"),
        _ if report.native => "has no such model; `terrarium export --layout native` writes mamba_ssm's layout".to_string(),
        _ => "has no such model".to_string(),
    };
    let rows = [
        place,
        ("family", report.family.to_string()),
        ("pattern", format!("{} ({} layers; M Mamba-2, m Mamba, * attention, - MLP)", report.pattern, report.layers)),
        ("width", report.hidden_size.to_string()),
        ("vocabulary", format!("{}{}", report.vocab_size, if report.tied_embeddings { ", head tied to the embedding" } else { "" })),
        ("positions", report.max_positions.map_or_else(|| "not limited".to_string(), |n| format!("made for up to {n}"))),
        ("parameters", format!("{} ({})", report.parameters, output::count(report.parameters))),
        ("dtype", report.dtype.clone().unwrap_or_else(unknown)),
        ("weights", weights),
        ("state", state),
        ("tokenizer", report.tokenizer.as_ref().map_or_else(|| report.without_tokenizer.clone(), |name| tokenizer(name))),
        ("transformers", transformers),
    ];
    // Nothing is known of a preset's files.
    let unknown =
        |name: &str| preset && (name == "dtype" || (name == "tokenizer" && !report.without_tokenizer.contains("its authors used")));
    for (name, value) in rows.into_iter().filter(|(name, _)| !unknown(name)) {
        output::line(format_args!("{name:<12} {value}"))?;
    }
    for note in &report.notes {
        output::line(format_args!("note         {note}"))?;
    }
    for tensor in &report.tensors {
        output::line(format_args!("{:<64} {:<5} {:?}", tensor.name, tensor.dtype, tensor.shape))?;
    }
    Ok(())
}

fn tokenizer(name: &str) -> String {
    if name.ends_with(".model") { format!("{name} (SentencePiece)") } else { name.to_string() }
}

fn print_adapter(adapter: &AdapterConfig, json: bool) -> Result<(), Failure> {
    let base = adapter.base_model.as_deref();
    if json {
        let AdapterConfig { rank, alpha, target_modules, .. } = adapter;
        return output::json(&serde_json::json!({
            "adapter": true, "rank": rank, "alpha": alpha, "target_modules": target_modules, "base_model": base,
        }));
    }
    output::line(format_args!("PEFT adapter: rank {}, alpha {}", adapter.rank, adapter.alpha))?;
    output::line(format_args!("targets      {}", adapter.target_modules.join(", ")))?;
    output::line(format_args!("base model   {}", base.unwrap_or("not named")))
}
