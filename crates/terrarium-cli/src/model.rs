//! From the flags to a model in memory.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value};
use terrarium::burn::tensor::DType;
use terrarium::kernels::{KernelBackend, KernelChoice, Op, path};
use terrarium::models::{DecoderConfig, MixerConfig};
use terrarium::runtime::{self, AdapterConfig, Files, LoadOptions, Loaded, Precision, Resolved, Tokenizer};

use crate::args::{ComputeArgs, HubArgs, SetArgs, TokenizerArgs};
use crate::bundled;
use crate::console::Console;
use crate::failure::Failure;
use crate::progress::Downloads;

/// Which model, how it may be fetched, and what about its configuration is to be changed.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// A directory, or a model of the Hugging Face hub [default: the bundled model].
    #[arg(short, long, value_name = "ORG/NAME[@REV]|DIR")]
    pub model: Option<String>,
    #[command(flatten)]
    pub set: SetArgs,
    #[command(flatten)]
    pub hub: HubArgs,
}

impl ModelArgs {
    /// The model's directory, fetched if need be; notes are printed.
    pub fn source(&self, tokenizer: &TokenizerArgs, console: &Console) -> Result<Source, Failure> {
        let tokenizer = tokenizer.dir(&self.hub, console)?;
        let dir = resolve(self.model.as_deref(), Files::All, &self.hub, console)?.dir;
        Ok(Source { dir, overrides: self.set.overrides(), tokenizer })
    }
}

impl TokenizerArgs {
    /// The directory of the tokenizer, fetched if need be.
    pub fn dir(&self, hub: &HubArgs, console: &Console) -> Result<Option<PathBuf>, Failure> {
        let Some(name) = &self.tokenizer else { return Ok(None) };
        let path = Path::new(name);
        let dir = match path.file_name() {
            _ if path.is_dir() => path.to_path_buf(),
            Some(file) if file == "tokenizer.json" && path.is_file() => path.parent().map(Path::to_path_buf).unwrap_or_default(),
            _ => resolve(Some(name), Files::Metadata, hub, console)?.dir,
        };
        match kind_of_tokenizer(&dir) {
            Some(_) => Ok(Some(dir)),
            None => Err(Failure::usage(format!("--tokenizer {name}: no tokenizer.json and no SentencePiece model there"))),
        }
    }
}

/// What a directory's tokenizer is read from: tokenizer.json, or the name of a SentencePiece model.
pub fn kind_of_tokenizer(dir: &Path) -> Option<String> {
    let usual = ["tokenizer.json", "tokenizer.model"];
    if let Some(name) = usual.into_iter().find(|name| dir.join(name).is_file()) {
        return Some(name.to_string());
    }
    let entries = std::fs::read_dir(dir).ok()?.flatten().filter(|entry| entry.path().is_file());
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| name.ends_with(".model"));
    names.into_iter().min()
}

/// A model's files, and how they are to be read.
#[derive(Debug, Clone)]
pub struct Source {
    /// The model's directory.
    pub dir: PathBuf,
    /// Keys in place of those of its configuration.
    pub overrides: Map<String, Value>,
    /// Another directory's tokenizer.
    pub tokenizer: Option<PathBuf>,
}

impl Source {
    /// A directory as it is.
    pub fn of(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf(), overrides: Map::new(), tokenizer: None }
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
    source: &Source,
    precision: Precision,
    hub: &HubArgs,
    console: &Console,
    device: &B::Device,
) -> Result<Loaded<B>, Failure> {
    let mut loaded = load_own(source, precision, hub, console, device)?;
    if let Some(dir) = &source.tokenizer {
        loaded.tokenizer = Tokenizer::from_dir(dir)?;
    }
    if let (Some(tokenizer), []) = (&loaded.tokenizer, loaded.generation.eos.as_slice()) {
        // A configuration that knows no end of text (mamba_ssm's) leaves it to the tokenizer.
        loaded.generation.eos = tokenizer.eos().into_iter().collect();
    }
    Ok(loaded)
}

fn load_own<B: KernelBackend>(
    source: &Source,
    precision: Precision,
    hub: &HubArgs,
    console: &Console,
    device: &B::Device,
) -> Result<Loaded<B>, Failure> {
    let dir = &source.dir;
    let adapter = AdapterConfig::open(dir)?.filter(|_| !dir.join("config.json").is_file());
    let Some(adapter) = adapter else {
        let options = LoadOptions { precision, overrides: source.overrides.clone() };
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
    let mut loaded = load_own::<B>(&Source { dir: base.dir.clone(), ..source.clone() }, precision, hub, console, device)?;
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
