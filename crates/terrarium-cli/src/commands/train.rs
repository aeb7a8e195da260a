//! `terrarium train`, and what it shares with `finetune`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Map;
use terrarium::burn::tensor::DType;
use terrarium::kernels::backend::{BackendTask, DeviceSpec, with_backend};
use terrarium::kernels::{KernelChoice, TrainBackend};
use terrarium::models::DecoderConfig;
use terrarium::runtime::{self, Files};
use terrarium::train::{self, Display, Outcome, Resume, RunConfig, RunOptions, RunReport};

use crate::args::{ComputeArgs, HubArgs, Kernel, parse_assignment};
use crate::console::Console;
use crate::failure::Failure;
use crate::{interrupt, model, output};

/// Train a model as a configuration file says.
///
/// The TOML file has sections model (a new model: its keys, or preset = "NAME" and what differs) or base (a checkpoint), data, train, lora and output. Everything of the run goes to its directory: the full configuration, a log, checkpoints, and at the end the model in
/// Hugging Face layout. On a terminal a dashboard shows the curves. Ctrl-C (or q) saves and leaves; --resume goes on.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  terrarium train --config tiny.toml --set train.lr=1e-3 --out-dir runs/tiny\n  \
    terrarium train --config data.toml --preset mamba2-130m --set vocab_size=1024\n  \
    terrarium train --config tiny.toml --out-dir runs/tiny --resume")]
pub struct Arguments {
    /// The run's configuration.
    #[arg(short, long, value_name = "FILE.toml")]
    config: PathBuf,
    /// The shape of a published model for a new one, as model.preset in FILE; `terrarium models` lists them.
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Where the run goes [default: runs/NAME, from FILE's name].
    #[arg(short, long, value_name = "DIR")]
    out_dir: Option<PathBuf>,
    #[command(flatten)]
    launch: LaunchArgs,
}

/// Flags of every run.
#[derive(Debug, Clone, Args)]
pub struct LaunchArgs {
    /// Override one key of the run's configuration, as in train.lr=1e-3, or of the model's, as in vocab_size=512; may be
    /// given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Go on from the last checkpoint of the run (auto), or from a run's or checkpoint's directory.
    #[arg(long, value_name = "auto|DIR", num_args = 0..=1, default_missing_value = "auto")]
    pub resume: Option<PathBuf>,
    /// Steps of the whole run, in place of train.steps and train.epochs.
    #[arg(long, value_name = "N")]
    pub max_steps: Option<usize>,
    /// Seed of starting values, data order and the validation split.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Plain lines instead of the dashboard.
    #[arg(long)]
    pub no_tui: bool,
    /// Say what the run would do and need, and stop.
    #[arg(long, visible_alias = "estimate")]
    pub dry_run: bool,
    /// Devices that share each step, as in cuda:0,cuda:1: the rows of a micro-batch are split among them.
    #[arg(long, value_name = "LIST", value_delimiter = ',', conflicts_with = "device", help_heading = "Computation")]
    pub devices: Vec<DeviceSpec>,
    #[command(flatten)]
    pub hub: HubArgs,
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// Trains.
pub fn run(arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    model::prepare(&arguments.launch.compute)?;
    let (mut run, of_model) = arguments.launch.assignments();
    if let Some(preset) = &arguments.preset {
        run.insert(0, format!("model.preset={preset:?}"));
    }
    let mut config = RunConfig::from_file(&arguments.config, &run).map_err(train::TrainError::from)?;
    set_model_keys(&mut config, &of_model)?;
    arguments.launch.apply(&mut config);
    let out_dir = arguments.out_dir.clone().unwrap_or_else(|| default_dir(&arguments.config));
    let options = options(config, out_dir, &arguments.launch, console)?;
    let Some(report) = launch(options, &arguments.launch, console)? else { return Ok(()) };
    summary(&report, console)?;
    if let Some(dir) = &report.model_dir {
        console.note(format_args!("try it: terrarium generate --model {} --prompt 'Once upon a time'", quoted(dir)));
    }
    Ok(())
}

fn default_dir(config: &Path) -> PathBuf {
    Path::new("runs").join(config.file_stem().unwrap_or("train".as_ref()))
}

impl LaunchArgs {
    /// Puts the flags that have a key of their own into `config`.
    pub fn apply(&self, config: &mut RunConfig) {
        if let Some(steps) = self.max_steps {
            config.train.steps = steps;
            config.train.epochs = None;
        }
        if let Some(seed) = self.seed {
            config.train.seed = seed;
        }
    }

    /// What --set says of the run, as it stands, and of the model: keys without a section.
    pub fn assignments(&self) -> (Vec<String>, Vec<String>) {
        const SECTIONS: [&str; 6] = ["model", "base", "data", "train", "lora", "output"];
        self.set.iter().cloned().partition(|assignment| {
            let key = assignment.split('=').next().unwrap_or_default().trim();
            key.contains('.') || SECTIONS.contains(&key) || !assignment.contains('=')
        })
    }

    fn resume(&self) -> Resume {
        match self.resume.as_deref() {
            None => Resume::No,
            Some(dir) if dir == Path::new("auto") => Resume::Auto,
            Some(dir) => Resume::From(dir.to_path_buf()),
        }
    }

    fn display(&self, console: &Console) -> Display {
        match (console.quiet(), self.no_tui) {
            (true, _) => Display::Silent,
            (false, true) => Display::Plain,
            (false, false) => Display::Auto,
        }
    }
}

/// Puts keys of a model's configuration where the run keeps them.
pub fn set_model_keys(config: &mut RunConfig, assignments: &[String]) -> Result<(), Failure> {
    for assignment in assignments {
        let (key, value) = parse_assignment(assignment).map_err(|reason| Failure::usage(format!("--set {assignment}: {reason}")))?;
        if value.is_null() {
            return Err(Failure::usage(format!("--set {assignment}: the file of a run's configuration cannot hold null")));
        }
        match &mut config.base {
            Some(base) => base.set.insert(key, value),
            None => config.model.get_or_insert_default().insert(key, value),
        };
    }
    Ok(())
}

/// A run that can be started: its base model is on this computer, and the kernels that were asked for exist.
pub fn options(config: RunConfig, out_dir: PathBuf, arguments: &LaunchArgs, console: &Console) -> Result<RunOptions, Failure> {
    let base = config.base.as_ref().map(|base| model::resolve(Some(&base.model), Files::All, &arguments.hub, console)).transpose()?;
    let mut options = RunOptions::new(config, &out_dir);
    (options.device, options.others) = match arguments.devices.split_first() {
        Some((first, others)) => (first.clone(), others.to_vec()),
        None => (arguments.compute.device.clone(), Vec::new()),
    };
    options.resume = arguments.resume();
    options.display = arguments.display(console);
    options.base_dir = base.map(|base| base.dir);
    check_fused(&options, arguments.compute.kernel)?;
    Ok(options)
}

/// Runs, or with --dry-run prints the plan and gives nothing. An interrupted run is a failure, after it was saved.
pub fn launch(mut options: RunOptions, arguments: &LaunchArgs, console: &Console) -> Result<Option<RunReport>, Failure> {
    if arguments.dry_run {
        output::line(train::plan(&options)?)?;
        return Ok(None);
    }
    options.stop = interrupt::graceful()?;
    let level = log::max_level();
    if options.display == Display::Auto && std::io::stdout().is_terminal() {
        // The dashboard has the screen to itself.
        log::set_max_level(log::LevelFilter::Off);
    }
    let report = train::run(options, vec![]);
    log::set_max_level(level);
    let report = report?;
    if report.outcome == Outcome::Interrupted {
        console.note(format_args!(
            "stopped after step {}; the same command with --out-dir {} --resume goes on",
            report.step,
            quoted(&report.run_dir)
        ));
        return Err(Failure::Interrupted);
    }
    Ok(Some(report))
}

/// Under `--kernel fused`, looks at the model of the run before anything is started.
fn check_fused(options: &RunOptions, kernel: Kernel) -> Result<(), Failure> {
    struct Check(DecoderConfig);
    impl BackendTask for Check {
        type Output = Result<(), Failure>;
        fn run<B: TrainBackend>(self, _device: &B::Device) -> Self::Output {
            model::require_fused::<B>(&self.0, DType::F32)
        }
    }
    if KernelChoice::from(kernel) != KernelChoice::Fused {
        return Ok(());
    }
    let config = match (&options.base_dir, &options.config.model) {
        (Some(dir), _) => runtime::Checkpoint::open_with(dir, &options.config.overrides())?.config,
        // Which operations there are does not depend on the vocabulary, which the tokenizer settles.
        (None, Some(keys)) => train::config::new_model(keys, &Map::from_iter([("vocab_size".to_string(), 1.into())]))?,
        (None, None) => return Ok(()),
    };
    with_backend(&options.device, Check(config))?
}

/// The result of a run: where it is on standard output, how it went on standard error.
pub fn summary(report: &RunReport, console: &Console) -> Result<(), Failure> {
    let loss = |name: &str, loss: Option<f64>| loss.map_or(String::new(), |loss| format!(", {name} {loss:.4}"));
    let how = if report.outcome == Outcome::EarlyStopped { "stopped early" } else { "finished" };
    console.note(format_args!(
        "{how} after step {}: {} tokens in {:.0} s{}{}{}",
        report.step,
        report.tokens,
        report.seconds,
        loss("loss", report.train_loss),
        loss("validation loss", report.valid_loss),
        report.best.map_or(String::new(), |(step, best)| format!(" (best {best:.4} at step {step})")),
    ));
    for (name, dir) in [("model", &report.model_dir), ("adapter", &report.adapter_dir)] {
        if let Some(dir) = dir {
            output::line(format_args!("{name}: {}", dir.display()))?;
        }
    }
    Ok(())
}

/// A path as a shell reads it back.
pub fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+@%:,=".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}
