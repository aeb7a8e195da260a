//! Recipes, cells, reports.

mod arch;
mod copying;
mod curriculum;
mod fit;
mod folder;
mod generation;
mod layer_mix;
mod long_context;
mod mqar;
mod phonebook;
mod precision;
mod recipe;
mod report;
mod scaling;
mod speed;
mod stats;
mod sweep;
mod text;
mod timed;

use std::any::Any;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::tensor::DType;
use burn::tensor::backend::Backend;
use serde::Serialize;
use serde::de::DeserializeOwned;
use terrarium_kernels::TrainBackend;
use terrarium_kernels::backend::{BackendTask, DeviceSpec, with_backend};
use terrarium_kernels::measure::{self, Machine, MeasureError};
use terrarium_models::DecoderConfig;
use terrarium_train::StopFlag;

use crate::EvalError;
use crate::timing::{Load, Part, Step, time_beside};

pub(crate) use arch::forward_flop;
pub use arch::{Architecture, Kind};
pub use copying::{CopyTask, Copying};
pub use curriculum::Curriculum;
pub use fit::{Learned, Pace, Training};
pub use generation::{Generation, Shape};
pub use layer_mix::LayerMix;
pub use long_context::{Continuation, LongContext, LongTask, Rows};
pub use mqar::{Mqar, MqarTask};
pub use phonebook::{Phonebook, PhonebookTask, Variant};
pub use precision::Precision;
pub use recipe::{Recipe, recipe_names};
pub use report::{Check, Report, Table, Verdict};
pub use scaling::{ModelSize, Scaling};
pub use speed::{Operations, Speed, Timings};
pub use sweep::Models;
pub use text::TextTask;
pub use timed::Timed;

use folder::{CellLog, Folder};

/// An experiment and its surroundings.
#[derive(Debug, Clone)]
pub struct Options {
    /// What to do.
    pub recipe: Recipe,
    /// The report folder.
    pub out_dir: PathBuf,
    /// Whether the folder may hold finished cells of the same recipe.
    pub resume: bool,
    /// Where to compute.
    pub device: DeviceSpec,
    /// Raised by the caller to leave after the running step.
    pub stop: StopFlag,
}

/// What an experiment says as it goes.
#[derive(Debug, Clone)]
pub enum Event {
    /// The cells are known: how many, how many of them are finished, how long the rest may take.
    Plan {
        /// All cells.
        cells: usize,
        /// Those whose results were read back.
        finished: usize,
        /// A guess before the first step.
        estimate: Duration,
        /// Backend and device in words.
        device: String,
    },
    /// Something between the cells.
    Note(String),
    /// A cell begins.
    Begin {
        /// Its number, from 1.
        number: usize,
        /// Its name.
        label: String,
    },
    /// A cell goes on.
    Step {
        /// Steps made.
        step: usize,
        /// Steps in all.
        steps: usize,
        /// In a few words.
        text: String,
        /// Time left for all cells.
        left: Duration,
    },
    /// A cell is done.
    Done {
        /// Its name.
        label: String,
        /// Its result in a few words.
        text: String,
    },
}

/// Someone who is told.
pub trait Watch {
    /// Takes note of `event`.
    fn event(&mut self, event: Event);
}

impl Watch for () {
    fn event(&mut self, _event: Event) {}
}

/// How an experiment ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// All cells are finished and the report is written.
    Finished(Box<Summary>),
    /// Someone asked to stop; finished cells are kept.
    Interrupted {
        /// Finished cells.
        finished: usize,
        /// All cells.
        cells: usize,
    },
    /// Other processes are at what is left; the last of them writes the report.
    Shared {
        /// Finished cells.
        finished: usize,
        /// All cells.
        cells: usize,
    },
}

/// What a finished experiment came to.
#[derive(Debug, Clone)]
pub struct Summary {
    /// The report's page; its other files lie beside it.
    pub page: PathBuf,
    /// The verdict in one line.
    pub verdict: String,
    /// The table as Markdown.
    pub table: String,
    /// The report itself.
    pub report: Report,
}

/// What a cell is called.
pub(crate) struct CellName {
    /// File name of its result.
    pub id: String,
    /// What the user reads.
    pub label: String,
}

/// One combination of what a recipe varies.
pub(crate) trait Combination: Sync {
    /// What to call it.
    fn name(&self) -> CellName;
}

/// The result of a cell.
pub(crate) trait Finding: Serialize + DeserializeOwned {
    /// In a few words.
    fn words(&self) -> String;

    /// Told what the folder's device reaches.
    fn judge(&mut self, _machine: Option<&Machine>) {}
}

/// A training step to be taken apart.
pub(crate) struct Subject {
    /// File name of what is found.
    pub id: String,
    /// What the user reads.
    pub label: String,
    pub config: DecoderConfig,
    /// Rows of a step and their tokens.
    pub rows: usize,
    pub length: usize,
    /// Positions of a row that are predicted.
    pub labelled: usize,
}

/// What was measured besides the cells.
#[derive(Default)]
pub(crate) struct Surroundings {
    /// Backend and device in words.
    pub device: String,
    /// What it reaches.
    pub machine: Option<Machine>,
    /// Training steps under their labels.
    pub steps: Vec<(String, Step)>,
}

/// A recipe that can be run: a list of cells, and a report made of their results.
pub(crate) trait Experiment: Sync {
    /// One combination.
    type Cell: Combination;
    /// Its result.
    type Found: Finding;

    /// Refuses values that make no sense, those of [`Experiment::training`] and of [`Experiment::cells`] aside.
    fn check(&self) -> Result<(), EvalError>;

    /// How its models learn, where there are any.
    fn training(&self) -> Option<&Training> {
        None
    }

    /// In what type of numbers it is to be known what the device reaches, if that is to be known.
    fn judged_in<B: TrainBackend>(&self, device: &B::Device) -> Option<DType> {
        self.training().map(|training| training.precision.on::<B>(device).unwrap_or(DType::F32))
    }

    /// Training steps that the report takes apart, one per kind of model.
    fn subjects(&self, _cells: &[Self::Cell]) -> Vec<Subject> {
        Vec::new()
    }

    /// Refuses what the surroundings lack, such as a data file.
    fn ready(&self) -> Result<(), EvalError> {
        Ok(())
    }

    /// All combinations, in the order in which they are run. Refuses what no model can be made of.
    fn cells(&self) -> Result<Vec<Self::Cell>, EvalError>;

    /// A guess at the seconds that one takes on a GPU or a CPU. Only the proportions matter once the first is under way.
    fn seconds(&self, cell: &Self::Cell, gpu: bool) -> f64;

    /// Runs one. Gives `None` when it was asked to stop.
    fn run<B: TrainBackend>(
        &self,
        cell: &Self::Cell,
        running: &mut Running<'_>,
        device: &B::Device,
    ) -> Result<Option<Self::Found>, EvalError>;

    /// The report, from all results.
    fn report(&self, found: &[(Self::Cell, Self::Found)]) -> Report;
}

/// What a running cell may use.
pub(crate) struct Running<'a> {
    /// Its own log.
    pub log: CellLog,
    /// Raised to leave.
    pub stop: &'a StopFlag,
    watch: &'a mut dyn Watch,
    guessed: &'a Guessed,
    /// What a cell left to those after it, and its name.
    left: &'a mut Option<(String, Box<dyn Any>)>,
    /// Guessed seconds of this cell.
    guess: f64,
    begun: Instant,
}

impl Running<'_> {
    /// What `make` gives, or what it gave under this name to the last cell that asked. One such thing is kept at a time.
    pub fn shared<T: Clone + 'static>(&mut self, name: &str, make: impl FnOnce() -> T) -> T {
        let kept = self.left.as_ref().filter(|(known, _)| known == name).and_then(|(_, kept)| kept.downcast_ref::<T>().cloned());
        kept.unwrap_or_else(|| {
            // Two of them may not fit the device.
            drop(self.left.take());
            let made = make();
            *self.left = Some((name.to_string(), Box::new(made.clone())));
            made
        })
    }

    /// Tells how far the cell is.
    pub fn step(&mut self, step: usize, steps: usize, text: String) {
        let share = step as f64 / steps.max(1) as f64;
        let left = self.guessed.left(self.guess, share, self.begun.elapsed());
        self.watch.event(Event::Step { step, steps, text, left });
    }
}

/// Guesses and what they turned out to be.
struct Guessed {
    /// Guessed seconds of the cells after the running one.
    later: f64,
    /// Guessed and real seconds of the cells run so far.
    guessed: f64,
    real: f64,
}

impl Guessed {
    /// Time left when `share` of a cell of `guess` seconds took `elapsed`.
    fn left(&self, guess: f64, share: f64, elapsed: Duration) -> Duration {
        let guessed = self.guessed + share * guess;
        let real = self.real + elapsed.as_secs_f64();
        let factor = if guessed > 0.0 && real > 0.0 { real / guessed } else { 1.0 };
        let left = factor * ((1.0 - share) * guess + self.later);
        Duration::try_from_secs_f64(left.max(0.0)).unwrap_or_default()
    }
}

/// Runs the cells that have no result yet, and writes the report.
///
/// Several processes may go on with one folder at once, on one device or on several: each takes cells that no other is at.
///
/// # Errors
/// [`EvalError`]; finished cells stay.
pub fn run(options: &Options, watch: &mut dyn Watch) -> Result<Outcome, EvalError> {
    match &options.recipe {
        Recipe::Mqar(experiment) => launch(experiment, options, watch),
        Recipe::Copy(experiment) => launch(experiment, options, watch),
        Recipe::Phonebook(experiment) => launch(experiment, options, watch),
        Recipe::LayerMix(experiment) => launch(experiment, options, watch),
        Recipe::Scaling(experiment) => launch(experiment, options, watch),
        Recipe::Precision(experiment) => launch(experiment, options, watch),
        Recipe::LongContext(experiment) => launch(experiment, options, watch),
        Recipe::Speed(experiment) => launch(experiment, options, watch),
    }
}

fn launch<E: Experiment>(experiment: &E, options: &Options, watch: &mut dyn Watch) -> Result<Outcome, EvalError> {
    struct Task<'a, E>(&'a E, &'a Options, &'a mut dyn Watch);
    impl<E: Experiment> BackendTask for Task<'_, E> {
        type Output = Result<Outcome, EvalError>;
        fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
            run_on::<B, E>(self.0, self.1, self.2, device)
        }
    }
    options.recipe.check()?;
    experiment.ready()?;
    with_backend(&options.device, Task(experiment, options, watch))?
}

fn run_on<B: TrainBackend, E: Experiment>(
    experiment: &E,
    options: &Options,
    watch: &mut dyn Watch,
    device: &B::Device,
) -> Result<Outcome, EvalError> {
    let cells = experiment.cells()?;
    let name = <B::InnerBackend as Backend>::name(device);
    let gpu = !matches!(name.as_str(), "flex" | "ndarray");
    let folder = Folder::open(&options.out_dir, &options.recipe, options.resume)?;
    let mut found = Vec::new();
    for cell in &cells {
        found.push(folder.finished::<E::Found>(&cell.name().id)?);
    }
    let guess = |cell: &E::Cell| experiment.seconds(cell, gpu).max(1e-3);
    let mut later: f64 = cells.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(cell, _)| guess(cell)).sum();
    let finished = found.iter().flatten().count();
    let estimate = Duration::try_from_secs_f64(later).unwrap_or_default();
    watch.event(Event::Plan { cells: cells.len(), finished, estimate, device: name.clone() });
    let dtype = experiment.judged_in::<B>(device);
    // Of what was all done on another device this one writes the report, and measures nothing.
    let elsewhere = folder.machine()?.filter(|known| finished == cells.len() && known.device != name);
    let name = elsewhere.as_ref().map_or(name, |known| known.device.clone());
    let (mut guessed, mut real, mut left) = (0.0, 0.0, None);
    for (number, (cell, slot)) in cells.iter().zip(&mut found).enumerate() {
        if slot.is_some() {
            continue;
        }
        let CellName { id, label } = cell.name();
        later -= guess(cell);
        let Some(claim) = folder.claim(&id)? else { continue };
        // Another process may have been quicker.
        *slot = folder.finished(&id)?;
        if slot.is_some() {
            continue;
        }
        watch.event(Event::Begin { number: number + 1, label: label.clone() });
        let guesses = Guessed { later, guessed, real };
        let begun = Instant::now();
        let log = claim.begin()?;
        let mut running = Running { log, stop: &options.stop, watch, guessed: &guesses, left: &mut left, guess: guess(cell), begun };
        let result = if options.stop.requested() { None } else { experiment.run::<B>(cell, &mut running, device)? };
        guessed += guess(cell);
        real += begun.elapsed().as_secs_f64();
        let Some(result) = result else {
            folder.forget(&id)?;
            let finished = found.iter().flatten().count();
            return Ok(Outcome::Interrupted { finished, cells: cells.len() });
        };
        folder.finish(&id, &result)?;
        watch.event(Event::Done { label, text: result.words() });
        *slot = Some(result);
        // What one model leaves in the memory pools is of no use to the next.
        <B::InnerBackend as Backend>::memory_cleanup(device);
    }
    drop(left);
    for (cell, slot) in cells.iter().zip(&mut found).filter(|(_, slot)| slot.is_none()) {
        *slot = folder.finished(&cell.name().id)?;
    }
    let finished = found.iter().flatten().count();
    if finished < cells.len() {
        return Ok(Outcome::Shared { finished, cells: cells.len() });
    }
    let here = elsewhere.is_none();
    // Measured last, when no other process is at work on the device for this folder.
    let machine = match (elsewhere, dtype) {
        (Some(known), _) => Some(known),
        (None, Some(dtype)) => Some(machine::<B>(&folder, dtype, device)?),
        (None, None) => None,
    };
    let mut surroundings = Surroundings { device: name, machine, steps: Vec::new() };
    let subjects = experiment.subjects(&cells);
    if here && !subjects.is_empty() {
        watch.event(Event::Note(format!("taking {} training steps apart", subjects.len())));
    }
    for subject in subjects {
        if options.stop.requested() {
            return Ok(Outcome::Interrupted { finished: cells.len(), cells: cells.len() });
        }
        let step = match folder.step(&subject.id)? {
            Some(step) => Some(step),
            None if !here => None,
            None => {
                let others: Vec<&Step> = surroundings.steps.iter().map(|(_, step)| step).collect();
                step::<B>(&subject, dtype.unwrap_or(DType::F32), &others, &folder, device)?
            }
        };
        surroundings.steps.extend(step.map(|step| (subject.label, step)));
    }
    // Cells may come from folders of other runs: one device has one ceiling.
    found.iter_mut().flatten().for_each(|found| found.judge(surroundings.machine.as_ref()));
    let all: Vec<(E::Cell, E::Found)> = cells.into_iter().zip(found.into_iter().flatten()).collect();
    let report = experiment.report(&all);
    Ok(Outcome::Finished(Box::new(folder.report(report, &options.recipe, &surroundings)?)))
}

/// What the device reaches, from the folder if it was this one.
fn machine<B: TrainBackend>(folder: &Folder, dtype: DType, device: &B::Device) -> Result<Machine, EvalError> {
    let (name, type_name) = (<B::InnerBackend as Backend>::name(device), format!("{dtype:?}"));
    if let Some(known) = folder.machine()?.filter(|known| known.device == name && known.dtype == type_name) {
        return Ok(known);
    }
    let refused = |error: MeasureError| EvalError::value("training.precision", error.to_string());
    let found = measure::ceilings::<B>(device, dtype).map_err(refused)?;
    folder.keep_machine(&found)?;
    <B::InnerBackend as Backend>::memory_cleanup(device);
    Ok(found)
}

/// Takes a training step apart, and keeps what was found.
fn step<B: TrainBackend>(
    subject: &Subject,
    dtype: DType,
    others: &[&Step],
    folder: &Folder,
    device: &B::Device,
) -> Result<Option<Step>, EvalError> {
    let Subject { config, rows, length, labelled, .. } = subject;
    let (batch, tokens, labelled) = (*rows, *length, *labelled);
    let load = Load { part: Part::Train, batch, tokens, new_tokens: 0, repeats: 3, seed: 0, labelled, in_parts: true };
    let found = time_beside::<B>(config, &load, dtype, others, device)?.step;
    if let Some(step) = &found {
        folder.keep_step(&subject.id, step)?;
    }
    <B::InnerBackend as Backend>::memory_cleanup(device);
    Ok(found)
}

/// Where the report of a recipe goes by default.
pub fn default_dir(name: &str, smoke: bool) -> PathBuf {
    let name = Path::new(name).file_stem().unwrap_or(name.as_ref()).to_string_lossy();
    Path::new("runs").join(format!("{name}{}", if smoke { "-smoke" } else { "" }))
}
