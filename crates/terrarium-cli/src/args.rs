//! The command line: the list of commands, and the groups of flags that several of them share.

use std::num::NonZeroUsize;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::{Map, Value};
use terrarium::kernels::KernelChoice;
use terrarium::kernels::backend::DeviceSpec;
use terrarium::runtime::{HubOptions, Precision};

use crate::commands::{bench, doctor, download, eval, experiment, export, finetune, generate, inspect, merge, models, plot, score, train};

/// A portable zoo of language models: Transformer, Mamba, Mamba-2 and hybrids.
#[derive(Debug, Parser)]
#[command(
    name = "terrarium",
    version,
    max_term_width = 120,
    after_help = "Start with `terrarium finetune` (no files needed), or `terrarium help COMMAND` for an example of each command."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Say more on standard error (twice: debugging).
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Messages")]
    pub verbose: u8,
    /// Say nothing on standard error but errors.
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Messages")]
    pub quiet: bool,
}

/// The commands. What each is for stands with its arguments.
#[derive(Debug, Subcommand)]
pub enum Command {
    Models(models::Arguments),
    Download(download::Arguments),
    Inspect(inspect::Arguments),
    Generate(generate::Arguments),
    Score(score::Arguments),
    Train(train::Arguments),
    Finetune(Box<finetune::Arguments>),
    Merge(merge::Arguments),
    #[command(visible_alias = "convert")]
    Export(export::Arguments),
    Plot(plot::Arguments),
    Eval(eval::Arguments),
    Experiment(experiment::Arguments),
    Doctor(doctor::Arguments),
    Bench(bench::Arguments),
}

/// Where downloads come from.
#[derive(Debug, Clone, Args)]
pub struct HubArgs {
    /// Never open a connection: use the cache alone.
    #[arg(long)]
    pub offline: bool,
}

impl HubArgs {
    /// The environment's settings, and the flag.
    pub fn options(&self) -> HubOptions {
        let environment = HubOptions::from_env();
        HubOptions { offline: environment.offline || self.offline, ..environment }
    }
}

/// Changes to a model's configuration.
#[derive(Debug, Clone, Args)]
pub struct SetArgs {
    /// Override one key of the model's configuration, as in mamba_num_groups=2; may be given several times.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_assignment)]
    pub set: Vec<(String, Value)>,
}

impl SetArgs {
    /// All keys; the last of a name counts.
    pub fn overrides(&self) -> Map<String, Value> {
        self.set.iter().cloned().collect()
    }
}

/// `KEY=VALUE`, where the value is JSON or else a string.
pub fn parse_assignment(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE, as in mamba_num_groups=2")?;
    let key = key.trim();
    if key.is_empty() {
        return Err("no key before the `=`".to_string());
    }
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_string()));
    Ok((key.to_string(), value))
}

/// A tokenizer that does not come with the model.
#[derive(Debug, Clone, Default, Args)]
pub struct TokenizerArgs {
    /// Take the tokenizer from there [default: the model's own].
    #[arg(long, value_name = "ORG/NAME[@REV]|DIR")]
    pub tokenizer: Option<String>,
}

/// Where and how to compute.
#[derive(Debug, Clone, Args)]
pub struct ComputeArgs {
    /// auto, cpu, or a backend of this build with an optional index: cuda:0, vulkan, wgpu, metal, rocm, flex, ndarray.
    #[arg(long, default_value = "auto", help_heading = "Computation")]
    pub device: DeviceSpec,
    /// Fast paths where there are some (auto), plain tensor operations, or fast paths and an error where there is none.
    #[arg(long, value_enum, default_value_t = Kernel::Auto, help_heading = "Computation")]
    pub kernel: Kernel,
    /// Threads of the CPU [default: all].
    #[arg(long, value_name = "N", help_heading = "Computation")]
    pub threads: Option<NonZeroUsize>,
}

/// Precision of the weights.
#[derive(Debug, Clone, Args)]
pub struct DtypeArgs {
    /// Precision of the weights; auto: as in the checkpoint.
    #[arg(long, value_enum, default_value_t = Dtype::Auto, help_heading = "Computation")]
    pub dtype: Dtype,
}

/// Spelling of [`KernelChoice`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kernel {
    Auto,
    Reference,
    Fused,
}

impl From<Kernel> for KernelChoice {
    fn from(kernel: Kernel) -> Self {
        match kernel {
            Kernel::Auto => Self::Auto,
            Kernel::Reference => Self::Reference,
            Kernel::Fused => Self::Fused,
        }
    }
}

/// Spelling of [`Precision`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    Auto,
    F32,
    Bf16,
    F16,
}

impl From<Dtype> for Precision {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Auto => Self::Auto,
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
            Dtype::F16 => Self::F16,
        }
    }
}
