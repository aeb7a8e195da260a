//! Starting a run, and what is left at its end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use burn::module::AutodiffModule;
use serde::Serialize;
use terrarium_kernels::TrainBackend;
use terrarium_kernels::backend::{DeviceSpec, DevicesTask, with_backends};
use terrarium_models::Decoder;
use terrarium_runtime::SaveOptions;

use crate::TrainError;
use crate::checkpoint::Checkpoint;
use crate::config::{OutputDtype, RunConfig, Weights};
use crate::dashboard::{self, terminal};
use crate::event::{Event, Observer, Observers, Outcome};
use crate::interrupt::StopFlag;
use crate::log::JsonLog;
use crate::params;
use crate::setup::{self, Ready};
use crate::trainer::Trainer;

/// A run and its surroundings.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// What to train, on what, how.
    pub config: RunConfig,
    /// The run directory.
    pub out_dir: PathBuf,
    /// Where to compute.
    pub device: DeviceSpec,
    /// Devices of the same backend that share each step with it: every micro-batch is split among all.
    pub others: Vec<DeviceSpec>,
    /// Whether to go on from a checkpoint.
    pub resume: Resume,
    /// What to show.
    pub display: Display,
    /// Directory of the base model, when the caller has resolved it already.
    pub base_dir: Option<PathBuf>,
    /// Raised by the caller to save and leave.
    pub stop: StopFlag,
}

impl RunOptions {
    /// A new run on any device, with the dashboard if there is a terminal.
    pub fn new(config: RunConfig, out_dir: impl Into<PathBuf>) -> Self {
        Self {
            config,
            out_dir: out_dir.into(),
            device: DeviceSpec::Auto,
            others: Vec::new(),
            resume: Resume::No,
            display: Display::Auto,
            base_dir: None,
            stop: StopFlag::new(),
        }
    }
}

/// Whether to go on from a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Resume {
    /// A new run; an error when the directory holds one.
    #[default]
    No,
    /// From the newest checkpoint of the run directory; a new run where there is none.
    Auto,
    /// From a run directory's newest checkpoint, or from one checkpoint directory.
    From(PathBuf),
}

/// What to show while training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Display {
    /// The dashboard on a terminal, else lines.
    #[default]
    Auto,
    /// burn-train's dashboard.
    Dashboard,
    /// Lines on stderr.
    Plain,
    /// Nothing.
    Silent,
}

/// What a run came to.
#[derive(Debug, Clone, Serialize)]
pub struct RunReport {
    /// How it ended.
    pub outcome: Outcome,
    /// Steps made, earlier runs included.
    pub step: usize,
    /// Loss of the last step.
    pub train_loss: Option<f64>,
    /// Last validation loss.
    pub valid_loss: Option<f64>,
    /// Step and loss of the best validation.
    pub best: Option<(usize, f64)>,
    /// Step whose weights became the result.
    pub exported: Option<usize>,
    /// Tokens seen.
    pub tokens: u64,
    /// Seconds of training.
    pub seconds: f64,
    /// The run directory.
    pub run_dir: PathBuf,
    /// The result in Hugging Face layout; absent after an interruption.
    pub model_dir: Option<PathBuf>,
    /// The adapter in PEFT layout, for LoRA.
    pub adapter_dir: Option<PathBuf>,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
}

/// Trains or fine-tunes on the device that `options` name.
///
/// # Errors
/// [`TrainError`]; whatever was saved before stays.
pub fn run(options: RunOptions, observers: Vec<Box<dyn Observer>>) -> Result<RunReport, TrainError> {
    struct Task(RunOptions, Vec<Box<dyn Observer>>);
    impl DevicesTask for Task {
        type Output = Result<RunReport, TrainError>;
        fn run<B: TrainBackend>(self, devices: &[B::Device]) -> Self::Output {
            run_on::<B>(self.0, self.1, devices)
        }
    }
    let devices: Vec<DeviceSpec> = std::iter::once(&options.device).chain(&options.others).cloned().collect();
    with_backends(&devices, Task(options, observers))?
}

/// As [`run`], on given devices, the first of which validates and saves.
///
/// # Errors
/// As [`run`].
pub fn run_on<B: TrainBackend>(
    options: RunOptions,
    observers: Vec<Box<dyn Observer>>,
    devices: &[B::Device],
) -> Result<RunReport, TrainError> {
    let mut observers = Observers::new(observers);
    observers.push(Box::new(Narrator { silent: options.display == Display::Silent }));
    let Ready { trainer, model, model_config, config, lora, base_dir, tokenizer_dir } =
        setup::ready::<B>(&options, devices, &mut observers)?;
    observers.push(Box::new(JsonLog::open(&options.out_dir, trainer.state.step)?));
    let launched = catch_unwind(AssertUnwindSafe(|| dashboard::launch(trainer, model, observers, options.display)));
    let (trainer, mut observers, model, result) = launched.map_err(|panic| {
        terminal::restore();
        TrainError::Panicked(message(panic))
    })?;
    let outcome = result?;
    let mut report = report(&trainer, outcome);
    if outcome == Outcome::Interrupted {
        return Ok(report);
    }
    let (model, exported) = chosen(model, &trainer, config.output.weights)?;
    report.exported = Some(exported);
    let model = model.valid();
    if let (Some(lora), Some(base)) = (&lora, &config.base) {
        let dir = options.out_dir.join("adapter");
        terrarium_runtime::save_adapter(&dir, &model, &model_config, lora, &base.model)?;
        report.adapter_dir = Some(dir);
    }
    let dir = options.out_dir.join("model");
    let save = SaveOptions {
        dtype: output_dtype(&config, base_dir.as_deref())?,
        files_from: tokenizer_dir,
        base_model: config.base.as_ref().map(|base| base.model.clone()),
        ..SaveOptions::default()
    };
    terrarium_runtime::save(&dir, &model.merge_lora(), &model_config, &save)?;
    observers.tell(Event::Note(format!("wrote {} with the weights of step {exported}", dir.display())));
    report.model_dir = Some(dir);
    Ok(report)
}

fn report<B: TrainBackend>(trainer: &Trainer<B>, outcome: Outcome) -> RunReport {
    let state = &trainer.state;
    RunReport {
        outcome,
        step: state.step,
        train_loss: state.train_loss,
        valid_loss: state.validated.map(|(_, loss)| loss),
        best: state.best,
        exported: None,
        tokens: state.tokens,
        seconds: state.seconds,
        run_dir: trainer.run_dir.clone(),
        model_dir: None,
        adapter_dir: None,
        checkpoint: trainer.store.latest(),
    }
}

/// The weights that become the result, and their step.
fn chosen<B: TrainBackend>(model: Decoder<B>, trainer: &Trainer<B>, weights: Weights) -> Result<(Decoder<B>, usize), TrainError> {
    let last = trainer.state.step;
    let Some((best, _)) = trainer.state.best_saved.filter(|(best, _)| weights == Weights::Best && *best != last) else {
        return Ok((model, last));
    };
    let dir = trainer.store.dir(best);
    let values = Checkpoint::read_model(&dir)?;
    let model = params::assign(model, values).map_err(|reason| TrainError::Checkpoint { dir, reason })?;
    Ok((model, best))
}

/// As configured, else as the base checkpoint has it.
fn output_dtype(config: &RunConfig, base_dir: Option<&Path>) -> Result<Option<burn::tensor::DType>, TrainError> {
    match (config.output.dtype, base_dir) {
        (Some(dtype), _) => Ok(Some(OutputDtype::to_burn(dtype))),
        (None, Some(dir)) => Ok(Some(terrarium_runtime::Checkpoint::open_with(dir, &config.overrides())?.dtype())),
        (None, None) => Ok(None),
    }
}

pub(crate) fn message(panic: Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_string()));
    text.unwrap_or_else(|| "no reason was given".to_string())
}

/// Prints decisions and checkpoints while the dashboard does not have the screen.
struct Narrator {
    silent: bool,
}

impl Observer for Narrator {
    fn event(&mut self, event: &Event) {
        match event {
            _ if self.silent => {}
            Event::Note(note) => terminal::say(note),
            Event::Saved { step, path } => terminal::say(&format!("saved step {step} to {}", path.display())),
            _ => {}
        }
    }
}
