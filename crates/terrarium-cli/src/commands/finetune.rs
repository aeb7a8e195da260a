//! `terrarium finetune`

use std::path::{Path, PathBuf};

use clap::Args;
use terrarium::train::{self, RunConfig, TrainError};

use super::train::{LaunchArgs, launch, options, quoted, set_model_keys, summary};
use crate::args::TokenizerArgs;
use crate::bundled;
use crate::console::Console;
use crate::failure::Failure;
use crate::model::{self, Source};
use crate::{output, samples};

/// Fine-tune a model on your data; without arguments, the bundled one on the bundled set.
///
/// Data are plain text, or lines of {"prompt", "completion"}, {"instruction", "output"} or {"messages"}. Without --model
/// and --data this fine-tunes the bundled hybrid on the bundled set, in a few minutes on a CPU. By default only small adapters on every projection are trained (LoRA); --full trains all weights.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  terrarium finetune\n  \
    terrarium finetune --model HuggingFaceTB/SmolLM2-135M --data mine.jsonl --lora-rank 16 --out-dir runs/mine")]
pub struct Arguments {
    /// The model to start from [default: the bundled model].
    #[arg(short, long, value_name = "ORG/NAME[@REV]|DIR")]
    model: Option<String>,
    #[command(flatten)]
    tokenizer: TokenizerArgs,
    /// Files or directories to learn from (.jsonl, .json, .txt, .md); may be given several times.
    #[arg(short, long, value_name = "PATH", num_args = 1..)]
    data: Vec<PathBuf>,
    /// The same for validation [default: a part of the data].
    #[arg(long, value_name = "PATH", num_args = 1..)]
    valid: Vec<PathBuf>,
    /// Train all weights instead of adapters.
    #[arg(long, conflicts_with_all = ["lora_rank", "lora_alpha", "lora_targets"])]
    full: bool,
    /// Rank of the adapters.
    #[arg(long, value_name = "R")]
    lora_rank: Option<usize>,
    /// Their scale times the rank.
    #[arg(long, value_name = "A")]
    lora_alpha: Option<f32>,
    /// all, attention, ssm, mlp, or names of projections: q_proj,in_proj.
    #[arg(long, value_name = "LIST")]
    lora_targets: Option<String>,
    /// Optimiser steps, in place of --epochs.
    #[arg(long, value_name = "N", conflicts_with_all = ["epochs", "max_steps"])]
    steps: Option<usize>,
    /// Passes over the data.
    #[arg(long, value_name = "X")]
    epochs: Option<f64>,
    /// Highest learning rate.
    #[arg(long, value_name = "LR")]
    lr: Option<f64>,
    /// Rows per micro-batch.
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Tokens per row.
    #[arg(long, value_name = "N")]
    sequence_length: Option<usize>,
    /// Micro-batches per step.
    #[arg(long, value_name = "N")]
    accumulation: Option<usize>,
    /// Keep only what enters every N layers, and compute the rest again: less memory for one more forward pass.
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "1")]
    gradient_checkpointing: Option<usize>,
    /// How examples become text: auto, plain, alpaca or chat.
    #[arg(long, value_name = "NAME")]
    template: Option<String>,
    /// Prompts to try before and after.
    #[arg(long, default_value_t = 3, value_name = "N")]
    samples: usize,
    /// Where the run goes [default: runs/finetune, or runs/finetune-2 and so on where that exists].
    #[arg(short, long, value_name = "DIR")]
    out_dir: Option<PathBuf>,
    #[command(flatten)]
    launch: LaunchArgs,
}

/// Fine-tunes, with samples before and after.
pub fn run(arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    model::prepare(&arguments.launch.compute)?;
    let job = Job::new(arguments, console)?;
    let out_dir = arguments.out_dir.clone().unwrap_or_else(|| default_dir(arguments.launch.resume.is_some()));
    let prompts = if arguments.launch.dry_run { Vec::new() } else { job.prompts(arguments.samples) };
    let before = samples::Sampling { title: "before", prompts: &prompts, launch: &arguments.launch, console };
    let options = options(job.config, out_dir, &arguments.launch, console)?;
    if let Some(base) = options.base_dir.as_ref().filter(|_| !prompts.is_empty() && arguments.launch.resume.is_none()) {
        // What is wrong with the directory or the data shows before any time is spent.
        if options.out_dir.join(train::log::FILE).exists() {
            return Err(TrainError::RunExists { dir: options.out_dir }.into());
        }
        train::plan(&options)?;
        let tokenizer = options.config.data.tokenizer.as_ref().map(PathBuf::from).filter(|dir| dir.is_dir());
        before.print(&Source { dir: base.clone(), overrides: options.config.overrides(), tokenizer })?;
    }
    let Some(report) = launch(options, &arguments.launch, console)? else { return Ok(()) };
    summary(&report, console)?;
    let Some(dir) = report.model_dir.as_deref().or(report.adapter_dir.as_deref()) else { return Ok(()) };
    if !prompts.is_empty() {
        samples::Sampling { title: "after", ..before }.print(&Source::of(dir))?;
    }
    let prompt = prompts.first().and_then(samples::Prompt::as_text).unwrap_or("Once upon a time");
    output::line(format_args!("generate from it:\n  terrarium generate --model {} --prompt {}", quoted(dir), quoted(Path::new(prompt))))
}

/// A configuration, and whether it is the bundled one.
struct Job {
    config: RunConfig,
    bundled_data: bool,
}

impl Job {
    fn new(arguments: &Arguments, console: &Console) -> Result<Self, Failure> {
        let bundled_data = arguments.data.is_empty();
        if bundled_data && arguments.model.is_some() {
            return Err(Failure::usage_hint(
                "--model without --data: what should it learn?",
                "give --data FILE.jsonl; the bundled set is made for the bundled model",
            ));
        }
        let mut config = match (&arguments.model, bundled_data) {
            (None, true) => bundled::job()?,
            (None, false) => RunConfig::finetune(&bundled::unpack()?.model.to_string_lossy(), absolute(&arguments.data)?),
            (Some(model), _) => RunConfig::finetune(&base(model)?, absolute(&arguments.data)?),
        };
        config.data.valid.extend(absolute(&arguments.valid)?);
        if let Some(dir) = arguments.tokenizer.dir(&arguments.launch.hub, console)? {
            let dir = std::path::absolute(&dir).map_err(Failure::io("find", &dir))?;
            config.data.tokenizer = Some(dir.to_string_lossy().into_owned());
        }
        let (run, of_model) = arguments.launch.assignments();
        for assignment in arguments.assignments().iter().chain(&run) {
            config.set(assignment).map_err(TrainError::from)?;
        }
        set_model_keys(&mut config, &of_model)?;
        if arguments.full {
            config.lora = None;
        }
        if arguments.steps.is_some() {
            config.train.epochs = None;
        }
        arguments.launch.apply(&mut config);
        Ok(Self { config, bundled_data })
    }

    fn prompts(&self, n: usize) -> Vec<samples::Prompt> {
        if self.bundled_data {
            return bundled::prompts().into_iter().take(n).map(samples::Prompt::Text).collect();
        }
        samples::from_data(&self.config.data, n)
    }
}

impl Arguments {
    /// Flags with a key of their own.
    fn assignments(&self) -> Vec<String> {
        fn key(name: &str, value: Option<impl std::fmt::Display>) -> Option<String> {
            value.map(|value| format!("{name}={value}"))
        }
        let all = [
            key("lora.rank", self.lora_rank),
            key("lora.alpha", self.lora_alpha.map(decimal)),
            key("lora.targets", self.lora_targets.as_ref()),
            key("train.steps", self.steps),
            key("train.epochs", self.epochs.map(decimal)),
            key("train.lr", self.lr.map(decimal)),
            key("train.batch", self.batch),
            key("train.sequence_length", self.sequence_length),
            key("train.accumulation", self.accumulation),
            key("train.gradient_checkpointing", self.gradient_checkpointing),
            key("data.template", self.template.as_ref()),
        ];
        all.into_iter().flatten().collect()
    }
}

/// Paths that mean the same when the run's configuration is read from another folder.
fn absolute(paths: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    paths.iter().map(|path| std::path::absolute(path).map_err(Failure::io("find", path))).collect()
}

/// A directory by its full path, a name on the hub as it is.
fn base(model: &str) -> Result<String, Failure> {
    let path = Path::new(model);
    if !path.is_dir() {
        return Ok(model.to_string());
    }
    let path = std::path::absolute(path).map_err(Failure::io("find", path))?;
    Ok(path.to_string_lossy().into_owned())
}

/// A number that TOML reads as a float: with a point or an exponent.
fn decimal(number: impl std::fmt::Debug) -> String {
    format!("{number:?}")
}

/// The first of runs/finetune, runs/finetune-2, ... that is free; to resume, the last that is not.
fn default_dir(resume: bool) -> PathBuf {
    let name = |n: usize| Path::new("runs").join(if n == 1 { "finetune".to_string() } else { format!("finetune-{n}") });
    let free = (1..).find(|n| !name(*n).exists()).unwrap_or(1);
    name(if resume { (free - 1).max(1) } else { free })
}
