//! `terrarium merge`

use std::path::{Path, PathBuf};

use clap::Args;
use terrarium::runtime::{AdapterConfig, Files};

use crate::args::{ComputeArgs, HubArgs};
use crate::console::Console;
use crate::failure::Failure;
use crate::{interrupt, model, output};

/// Fold a LoRA adapter into its base model.
///
/// Writes a plain model directory that needs no adapter.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  terrarium merge --adapter runs/finetune/adapter --out-dir merged")]
pub struct Arguments {
    /// The adapter's directory, or the run that made it.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The base model [default: the one that the adapter names].
    #[arg(short, long, value_name = "ORG/NAME[@REV]|DIR")]
    model: Option<String>,
    /// Where the model goes; must not exist.
    #[arg(short, long, value_name = "DIR")]
    out_dir: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Merges, prints where.
pub fn run(arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    interrupt::immediate();
    model::prepare(&arguments.compute)?;
    let adapter_dir = adapter_dir(&arguments.adapter);
    let adapter = AdapterConfig::open(&adapter_dir)?
        .ok_or_else(|| Failure::usage(format!("{}: no adapter_config.json here", adapter_dir.display())))?;
    let Some(base) = arguments.model.clone().or(adapter.base_model) else {
        return Err(Failure::usage_hint("the adapter does not name its base model", "give it with --model"));
    };
    let base = model::resolve(Some(&base), Files::All, &arguments.hub, console)?;
    let report = terrarium::train::merge(&base.dir, &adapter_dir, &arguments.out_dir, &arguments.compute.device)?;
    if arguments.json {
        return output::json(&report);
    }
    report.notes.iter().for_each(|note| console.note(format_args!("note: {note}")));
    console.note(format_args!("merged {} adapted projections into {}", report.adapted.len(), base.dir.display()));
    output::line(report.dir.display())
}

/// A run keeps its adapter in a folder of its own.
pub fn adapter_dir(given: &Path) -> PathBuf {
    let inner = given.join("adapter");
    if inner.join("adapter_config.json").is_file() { inner } else { given.to_path_buf() }
}
