//! `terrarium inspect`

use std::path::Path;

use clap::Args;
use serde::Serialize;
use terrarium::runtime::{self, AdapterConfig, Checkpoint, CheckpointError, Files};

use crate::args::HubArgs;
use crate::console::Console;
use crate::failure::Failure;
use crate::{interrupt, model, output};

/// Look at a model without running it.
///
/// Family, layers, sizes, and what config.json and the weights disagree about. Of a model on the hub only the configuration is fetched, not the weights.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  terrarium inspect HuggingFaceTB/SmolLM2-135M --tokens 8192")]
pub struct Arguments {
    /// A directory, or a model of the hub [default: the bundled model].
    #[arg(value_name = "ORG/NAME[@REV]|DIR")]
    name: Option<String>,
    /// The same as a flag.
    #[arg(short, long, value_name = "ORG/NAME[@REV]|DIR", conflicts_with = "name")]
    model: Option<String>,
    /// Length for which the size of the state is computed.
    #[arg(long, default_value_t = 4096, value_name = "N")]
    tokens: usize,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    #[command(flatten)]
    hub: HubArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What is known of a model.
#[derive(Debug, Serialize)]
struct Report {
    dir: String,
    commit: Option<String>,
    family: &'static str,
    pattern: String,
    layers: usize,
    hidden_size: usize,
    vocab_size: usize,
    tied_embeddings: bool,
    max_positions: Option<usize>,
    parameters: usize,
    /// Of the weights; absent while they are not here.
    dtype: Option<String>,
    /// Of the weights; absent while they are not here.
    bytes: Option<u64>,
    state_tokens: usize,
    state_bytes: usize,
    tokenizer: bool,
    notes: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<Tensor>,
}

#[derive(Debug, Serialize)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: u64,
}

/// Reads, prints.
pub fn run(arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    interrupt::immediate();
    let name = arguments.name.as_deref().or(arguments.model.as_deref());
    let resolved = model::resolve(name, Files::Metadata, &arguments.hub, console)?;
    if let Some(adapter) = AdapterConfig::open(&resolved.dir)?.filter(|_| !resolved.dir.join("config.json").is_file()) {
        return print_adapter(&adapter, arguments.json);
    }
    let mut report = report(&resolved.dir, resolved.repo.is_some(), arguments)?;
    report.commit = resolved.commit;
    if arguments.json { output::json(&report) } else { print(&report) }
}

fn report(dir: &Path, hub: bool, arguments: &Arguments) -> Result<Report, Failure> {
    let mut notes = Vec::new();
    let (config, checkpoint) = match Checkpoint::open(dir) {
        Ok(checkpoint) => {
            notes.extend(checkpoint.notes.iter().cloned());
            // What does not fit is worth a look too; it is said, and not the end.
            notes.extend(checkpoint.check().err().map(|error| error.to_string()));
            (checkpoint.config.clone(), Some(checkpoint))
        }
        Err(error) if !without_weights(&error, hub) => return Err(error.into()),
        Err(_) => {
            notes.push("the weights are not here: dtype and bytes are unknown, and config.json is taken at its word".to_string());
            (runtime::read_config(dir)?, None)
        }
    };
    let tensors = checkpoint.as_ref().filter(|_| arguments.tensors).map(|checkpoint| {
        let tensor = |info: &runtime::TensorInfo| Tensor {
            name: info.name.clone(),
            dtype: info.dtype.clone(),
            shape: info.shape.clone(),
            bytes: info.bytes,
        };
        checkpoint.tensors().iter().map(tensor).collect()
    });
    Ok(Report {
        dir: dir.display().to_string(),
        commit: None,
        family: config.family.name(),
        pattern: config.pattern(),
        layers: config.layers.len(),
        hidden_size: config.hidden_size,
        vocab_size: config.vocab_size,
        tied_embeddings: config.tie_embeddings,
        max_positions: config.max_positions,
        parameters: config.parameters(),
        dtype: checkpoint.as_ref().map(|checkpoint| format!("{:?}", checkpoint.dtype()).to_lowercase()),
        bytes: checkpoint.as_ref().map(Checkpoint::bytes),
        state_tokens: arguments.tokens,
        state_bytes: config.state_bytes(arguments.tokens, 4),
        tokenizer: dir.join("tokenizer.json").is_file(),
        notes,
        tensors: tensors.unwrap_or_default(),
    })
}

/// The weights are not here, as of a hub model whose metadata alone was fetched.
fn without_weights(error: &runtime::Error, hub: bool) -> bool {
    match error {
        runtime::Error::Checkpoint(CheckpointError::NoWeights { .. }) => true,
        // An index without its shards.
        runtime::Error::Checkpoint(CheckpointError::Index { .. }) => hub,
        _ => false,
    }
}

fn print(report: &Report) -> Result<(), Failure> {
    let unknown = || "unknown".to_string();
    let rows = [
        ("directory", report.dir.clone()),
        ("family", report.family.to_string()),
        ("pattern", format!("{} ({} layers; M Mamba-2, * attention, - MLP)", report.pattern, report.layers)),
        ("width", report.hidden_size.to_string()),
        ("vocabulary", format!("{}{}", report.vocab_size, if report.tied_embeddings { ", head tied to the embedding" } else { "" })),
        ("positions", report.max_positions.map_or_else(|| "not limited".to_string(), |n| format!("made for up to {n}"))),
        ("parameters", format!("{} ({})", report.parameters, output::count(report.parameters))),
        ("dtype", report.dtype.clone().unwrap_or_else(unknown)),
        ("weights", report.bytes.map_or_else(unknown, output::bytes)),
        ("state", format!("{} per sequence after {} tokens (f32)", output::bytes(report.state_bytes as u64), report.state_tokens)),
        ("tokenizer", if report.tokenizer { "tokenizer.json" } else { "none: token ids only" }.to_string()),
    ];
    for (name, value) in rows {
        output::line(format_args!("{name:<11} {value}"))?;
    }
    for note in &report.notes {
        output::line(format_args!("note        {note}"))?;
    }
    for tensor in &report.tensors {
        output::line(format_args!("{:<64} {:<5} {:?}", tensor.name, tensor.dtype, tensor.shape))?;
    }
    Ok(())
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
