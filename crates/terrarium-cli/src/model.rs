//! From the flags to a model in memory.

use std::path::Path;

use clap::Args;
use terrarium::burn::tensor::DType;
use terrarium::kernels::{KernelBackend, KernelChoice, Op, path};
use terrarium::models::{DecoderConfig, MixerConfig};
use terrarium::runtime::{self, AdapterConfig, Files, LoadOptions, Loaded, Precision, Resolved};

use crate::args::{ComputeArgs, HubArgs};
use crate::bundled;
use crate::console::Console;
use crate::failure::Failure;
use crate::progress::Downloads;

/// Which model, and how it may be fetched.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// A directory, or a model of the Hugging Face hub [default: the bundled model].
    #[arg(short, long, value_name = "ORG/NAME[@REV]|DIR")]
    pub model: Option<String>,
    #[command(flatten)]
    pub hub: HubArgs,
}

impl ModelArgs {
    /// The model's directory, fetched if need be; notes are printed.
    pub fn resolve(&self, files: Files, console: &Console) -> Result<Resolved, Failure> {
        resolve(self.model.as_deref(), files, &self.hub, console)
    }
}

/// The directory of `model` (`None`: the bundled one), fetched if need be; notes are printed.
pub fn resolve(model: Option<&str>, files: Files, hub: &HubArgs, console: &Console) -> Result<Resolved, Failure> {
    let Some(model) = model else {
        let dir = bundled::unpack()?.model;
        return Ok(Resolved { dir, repo: None, commit: None, downloaded: vec![], notes: vec![] });
    };
    let mut progress = Downloads::new(console);
    let resolved = runtime::resolve(model, files, &hub.options(), &mut progress)?;
    resolved.notes.iter().for_each(|note| console.detail(note));
    Ok(resolved)
}

/// Loads a model's directory. A PEFT adapter is folded into its base model.
pub fn load<B: KernelBackend>(
    dir: &Path,
    precision: Precision,
    hub: &HubArgs,
    console: &Console,
    device: &B::Device,
) -> Result<Loaded<B>, Failure> {
    let options = LoadOptions { precision, ..Default::default() };
    let adapter = AdapterConfig::open(dir)?.filter(|_| !dir.join("config.json").is_file());
    let Some(adapter) = adapter else {
        let loaded = runtime::load::<B>(dir, &options, device)?;
        loaded.notes.iter().for_each(|note| console.note(format_args!("note: {note}")));
        return Ok(loaded);
    };
    let base = adapter.base_model.ok_or_else(|| {
        Failure::usage_hint(
            format!("{} holds an adapter that does not name its base model", dir.display()),
            "`terrarium merge --model BASE --adapter DIR --out-dir OUT` makes a model of both",
        )
    })?;
    let base = resolve(Some(&base), Files::All, hub, console)?;
    let mut loaded = load::<B>(&base.dir, precision, hub, console, device)?;
    let (model, report, _) = runtime::load_adapter(dir, loaded.model, &loaded.config, device)?;
    console.note(format_args!("adapter on {}: {} projections", base.dir.display(), report.adapted.len()));
    loaded.model = model.merge_lora();
    Ok(loaded)
}

/// Sets up threads and the choice of kernels, once per process and before any computation.
pub fn prepare(compute: &ComputeArgs) -> Result<(), Failure> {
    path::set_choice(compute.kernel.into());
    if let Some(threads) = compute.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.get())
            .build_global()
            .map_err(|error| Failure::usage(format!("--threads {threads}: {error}")))?;
    }
    Ok(())
}

/// Under `--kernel fused`: every operation of the model must have a fast path on `B`.
pub fn require_fused<B: KernelBackend>(config: &DecoderConfig, dtype: DType) -> Result<(), Failure> {
    if path::choice() != KernelChoice::Fused {
        return Ok(());
    }
    let used = operations(config);
    match path::report::<B>(dtype).into_iter().find(|path| path.fused.is_none() && used.contains(&path.op)) {
        None => Ok(()),
        Some(path) => Err(Failure::usage_hint(
            format!("--kernel fused: {} has no fast path here ({})", path.op.name(), path.why),
            "--kernel auto takes the fast path where there is one; `terrarium doctor` lists them",
        )),
    }
}

/// Operations that a model runs.
pub fn operations(config: &DecoderConfig) -> Vec<Op> {
    let mut used = vec![Op::Linear];
    for layer in &config.layers {
        match layer {
            MixerConfig::Mamba(_) => used.extend([Op::CausalConv1d, Op::SelectiveScan]),
            MixerConfig::Mamba2(_) => used.extend([Op::CausalConv1d, Op::Ssd, Op::RmsNormGated]),
            MixerConfig::Attention(_) => used.push(Op::Attention),
            MixerConfig::Mlp(_) => {}
        }
    }
    used
}
