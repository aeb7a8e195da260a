//! `terrarium export`

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::Value;
use terrarium::burn::tensor::DType;
use terrarium::kernels::TrainBackend;
use terrarium::kernels::backend::{BackendTask, DeviceSpec, with_backend};
use terrarium::models::DecoderConfig;
use terrarium::models::families::by_name;
use terrarium::runtime::{self, AdapterConfig, Checkpoint, Files, Layout, LoadOptions, Precision, SaveOptions, Saved};

use crate::args::{HubArgs, SetArgs, TokenizerArgs};
use crate::commands::merge::adapter_dir;
use crate::console::Console;
use crate::failure::Failure;
use crate::{interrupt, model, output};

/// Write a model in another layout, type or shard size.
///
/// From Hugging Face directories, native mamba_ssm checkpoints and Megatron folders to safetensors with config.json,
/// tokenizer, generation_config.json and a model card. Tensors are written one by one: no more than the largest of them is in memory (with --adapter: the
/// whole model).
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  terrarium export state-spaces/mamba2-130m mamba2-130m-hf --tokenizer EleutherAI/gpt-neox-20b\n  \
    terrarium export megatron-run/ out --set mamba_num_groups=8 --dtype bf16\n  \
    terrarium export base-model/ merged --adapter runs/finetune/adapter")]
pub struct Arguments {
    /// A directory, or a model of the hub.
    #[arg(value_name = "ORG/NAME[@REV]|DIR")]
    model: String,
    /// Where it goes.
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// Layout of keys and configuration.
    #[arg(long, value_enum, default_value_t = LayoutArg::Auto)]
    layout: LayoutArg,
    /// Element type of the weights.
    #[arg(long, value_enum, default_value_t = DtypeArg::Keep)]
    dtype: DtypeArg,
    /// Largest weights file: 5GB, 500MB, 2GiB.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    max_shard_size: u64,
    #[command(flatten)]
    tokenizer: TokenizerArgs,
    /// Fold this LoRA adapter (its directory, or the run that made it) into the model.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    set: SetArgs,
    /// Write into a directory that is not empty: files of the same names and earlier weights are replaced, others stay.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    hub: HubArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Spelling of [`Layout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LayoutArg {
    /// What transformers opens where there is such a layout, else native.
    Auto,
    /// What transformers opens.
    Hf,
    /// The keys of the mamba_ssm package.
    Native,
    /// The one it came in (native for Megatron).
    Own,
}

/// Element type of what is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    Keep,
    F32,
    Bf16,
    F16,
}

impl DtypeArg {
    fn to_burn(self) -> Option<DType> {
        match self {
            Self::Keep => None,
            Self::F32 => Some(DType::F32),
            Self::Bf16 => Some(DType::BF16),
            Self::F16 => Some(DType::F16),
        }
    }
}

/// Bytes of `5GB`, `2GiB`, `1000`.
fn parse_size(text: &str) -> Result<u64, String> {
    let expected = || format!("`{text}` is no size: expected something like 5GB, 500MB or 2GiB");
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let unit: u64 = match text[digits..].trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KIB" => 1 << 10,
        "MIB" => 1 << 20,
        "GIB" => 1 << 30,
        _ => return Err(expected()),
    };
    let number: f64 = text[..digits].parse().map_err(|_| expected())?;
    let bytes = number * unit as f64;
    if bytes >= 1.0 { Ok(bytes as u64) } else { Err(expected()) }
}

/// What was written.
#[derive(Debug, Serialize)]
struct Report {
    dir: String,
    family: &'static str,
    to_family: &'static str,
    /// Class of transformers that opens it.
    architecture: Option<String>,
    dtype: String,
    bytes: u64,
    files: Vec<String>,
    notes: Vec<String>,
}

/// Reads, writes, prints.
pub fn run(arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    interrupt::immediate();
    check_target(&arguments.out, arguments.force)?;
    let (resolved, adapter) = find(arguments, console)?;
    let tokenizer = arguments.tokenizer.dir(&arguments.hub, console)?;
    let checkpoint = Checkpoint::open_with(&resolved.dir, &arguments.set.overrides())?;
    check_layout(arguments.layout, &checkpoint.config)?;
    let options = SaveOptions {
        layout: match arguments.layout {
            LayoutArg::Auto => Layout::Auto,
            LayoutArg::Hf => Layout::HuggingFace,
            LayoutArg::Native => Layout::Native,
            LayoutArg::Own => Layout::Own,
        },
        dtype: arguments.dtype.to_burn(),
        max_shard_bytes: arguments.max_shard_size,
        files_from: Some(resolved.dir.clone()),
        tokenizer_from: tokenizer.clone(),
        base_model: Some(resolved.repo.as_ref().map_or_else(|| arguments.model.clone(), |repo| repo.to_string())),
        ..SaveOptions::default()
    };
    let mut notes = checkpoint.notes.clone();
    let saved = match &adapter {
        None => runtime::convert(&arguments.out, &checkpoint, &options)?,
        Some(adapter) => {
            // A merged weight is computed in f32: keeping the type means going back to it.
            let options = SaveOptions { dtype: options.dtype.or(Some(checkpoint.dtype())), ..options };
            let device: DeviceSpec = "auto".parse()?;
            with_backend(&device, Merge { arguments, dir: &resolved.dir, adapter, options: &options })??
        }
    };
    if tokenizer.is_none() && model::kind_of_tokenizer(&resolved.dir).is_none() {
        let config = &checkpoint.config;
        notes.push(match config.family.tokenizer(config) {
            Some(name) => format!("no tokenizer came with the model; its authors used --tokenizer {name}"),
            None => "no tokenizer came with the model; --tokenizer takes one from elsewhere".to_string(),
        });
    }
    report(arguments, checkpoint.config.family.name(), saved, notes)
}

/// The model, and the adapter to fold into it: the one given, or the model is one itself.
fn find(arguments: &Arguments, console: &Console) -> Result<(runtime::Resolved, Option<PathBuf>), Failure> {
    let resolved = model::resolve(Some(&arguments.model), Files::All, &arguments.hub, console)?;
    if let Some(given) = &arguments.adapter {
        let dir = adapter_dir(given);
        return match AdapterConfig::open(&dir)? {
            Some(_) => Ok((resolved, Some(dir))),
            None => Err(Failure::usage(format!("{}: no adapter_config.json here", dir.display()))),
        };
    }
    match AdapterConfig::open(&resolved.dir)?.filter(|_| !resolved.dir.join("config.json").is_file()) {
        None => Ok((resolved, None)),
        Some(AdapterConfig { base_model: Some(base), .. }) => {
            console.note(format_args!("note: {} is an adapter on {base}", arguments.model));
            Ok((model::resolve(Some(&base), Files::All, &arguments.hub, console)?, Some(resolved.dir)))
        }
        Some(_) => Err(Failure::usage_hint(
            format!("{} holds an adapter that does not name its base model", arguments.model),
            "terrarium export BASE OUT --adapter DIR",
        )),
    }
}

fn check_target(out: &Path, force: bool) -> Result<(), Failure> {
    let occupied = std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some());
    if occupied && !force {
        return Err(Failure::usage_hint(
            format!("{} is not empty", out.display()),
            "--force replaces files of the same names and earlier weights there, and leaves the others",
        ));
    }
    Ok(())
}

/// Whether the model can be written so, before anything is.
fn check_layout(layout: LayoutArg, config: &DecoderConfig) -> Result<(), Failure> {
    let native = || config.in_native();
    let error = match layout {
        LayoutArg::Hf => config.in_transformers().err(),
        LayoutArg::Native => native().err(),
        LayoutArg::Own if config.family.writable() => None,
        LayoutArg::Auto | LayoutArg::Own => config.in_transformers().err().filter(|_| native().is_err()),
    };
    let Some(error) = error else { return Ok(()) };
    let hint = match (config.in_transformers().is_ok(), native().is_ok()) {
        (true, _) => "--layout hf writes it for transformers",
        (false, true) => "transformers has no such model: --layout native writes it as mamba_ssm keeps it",
        (false, false) => "no layout here holds it",
    };
    Err(Failure::usage_hint(error.to_string(), hint))
}

struct Merge<'a> {
    arguments: &'a Arguments,
    dir: &'a Path,
    adapter: &'a Path,
    options: &'a SaveOptions,
}

impl BackendTask for Merge<'_> {
    type Output = Result<Saved, Failure>;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
        let Self { arguments, dir, adapter, options } = self;
        let load = LoadOptions { precision: Precision::F32, overrides: arguments.set.overrides() };
        let loaded = runtime::load::<B::InnerBackend>(dir, &load, device)?;
        let (model, _, _) = runtime::load_adapter(adapter, loaded.model, &loaded.config, device)?;
        Ok(runtime::save(&arguments.out, &model.merge_lora(), &loaded.config, options)?)
    }
}

fn report(arguments: &Arguments, family: &'static str, saved: Saved, notes: Vec<String>) -> Result<(), Failure> {
    let written =
        std::fs::read_to_string(arguments.out.join("config.json")).map_err(Failure::io("read", arguments.out.join("config.json")))?;
    let written: Value = serde_json::from_str(&written).unwrap_or_default();
    let text = |value: &Value| value.as_str().map(str::to_string);
    let in_transformers = by_name(saved.family).is_some_and(|family| family.in_transformers());
    let dtype = ["dtype", "torch_dtype"].iter().find_map(|key| text(&written[*key])).unwrap_or_default();
    let architecture = text(&written["architectures"][0]).filter(|_| in_transformers);
    let dir = arguments.out.display().to_string();
    let report = Report { dir, family, to_family: saved.family, architecture, dtype, bytes: saved.bytes, files: saved.files, notes };
    if arguments.json { output::json(&report) } else { print(&report) }
}

fn print(report: &Report) -> Result<(), Failure> {
    let opens = match &report.architecture {
        Some(class) => format!("transformers: AutoModelForCausalLM ({class}); terrarium"),
        None => "terrarium; transformers has no such model, and mamba_ssm itself reads only pytorch_model.bin".to_string(),
    };
    let rows = [
        ("directory", report.dir.clone()),
        (
            "family",
            if report.family == report.to_family {
                report.family.to_string()
            } else {
                format!("{} -> {}", report.family, report.to_family)
            },
        ),
        ("weights", format!("{} in {}", output::bytes(report.bytes), report.dtype)),
        ("files", report.files.join(", ")),
        ("opened by", opens),
    ];
    for (name, value) in rows {
        output::line(format_args!("{name:<11} {value}"))?;
    }
    for note in &report.notes {
        output::line(format_args!("note        {note}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes_have_decimal_and_binary_units() {
        assert_eq!(parse_size("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_size("1.5 kb"), Ok(1500));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert_eq!(parse_size("123"), Ok(123));
        for wrong in ["", "GB", "0", "5XB", "-3MB", "1.2.3MB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
