//! burn-train's launcher, metrics and dashboard around this crate's own step loop.
//!
//! burn-train's stock loop checkpoints per epoch, clips each parameter alone and forgets its place in the data. A custom
//! strategy brings our [`Trainer`] instead; its events become burn-train's.

mod metrics;
mod plain;
pub(crate) mod terminal;

use std::io::IsTerminal;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::module::Module;
use burn::optim::SgdConfig;
use burn::tensor::backend::Backend;
use burn::train::logger::MetricLogger;
use burn::train::metric::store::{EpochSummary, MetricsUpdate, Split};
use burn::train::metric::{MetricDefinition, NumericEntry};
use burn::train::renderer::tui::TuiMetricsRendererWrapper;
use burn::train::{
    EventProcessorTraining, InferenceStep, Interrupter, Learner, LearnerEvent, LearningComponentsMarker, LearningComponentsTypes,
    SupervisedLearningStrategy, SupervisedTraining, SupervisedTrainingEventProcessor, TrainLoader, TrainOutput, TrainStep,
    TrainingComponents, TrainingItem, TrainingModel, TrainingStrategy, ValidLoader,
};
use terrarium_kernels::{KernelBackend, TrainBackend};
use terrarium_models::Decoder;

use crate::TrainError;
use crate::event::{Event, Observer, Observers, Outcome, Started};
use crate::run::Display;
use crate::trainer::Trainer;
use metrics::{Eta, Gauge, Shown};
use plain::PlainRenderer;

/// The model as burn-train wants it.
#[derive(Module, Debug)]
struct Trainee<B: Backend> {
    decoder: Decoder<B>,
}

impl<B: TrainBackend> TrainStep for Trainee<B> {
    type Input = ();
    type Output = Shown;

    fn step(&self, (): ()) -> TrainOutput<Shown> {
        unreachable!("the strategy has its own step loop")
    }
}

impl<B: KernelBackend> InferenceStep for Trainee<B> {
    type Input = ();
    type Output = Shown;

    fn step(&self, (): ()) -> Shown {
        unreachable!("the strategy has its own step loop")
    }
}

/// burn-train asks for loaders, an optimiser and a schedule; the strategy has its own, so these are never used.
#[derive(Clone)]
struct NoRows;

impl<B: Backend> DataLoader<B, ()> for NoRows {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<()> + 'a> {
        struct Nothing;
        impl Iterator for Nothing {
            type Item = ();
            fn next(&mut self) -> Option<()> {
                None
            }
        }
        impl DataLoaderIterator<()> for Nothing {
            fn progress(&self) -> Progress {
                Progress::new(0, 0)
            }
        }
        Box::new(Nothing)
    }

    fn num_items(&self) -> usize {
        0
    }

    fn to_device(&self, _device: &B::Device) -> Arc<dyn DataLoader<B, ()>> {
        Arc::new(Self)
    }

    fn slice(&self, _start: usize, _end: usize) -> Arc<dyn DataLoader<B, ()>> {
        Arc::new(Self)
    }
}

/// burn-train would write a file per metric and epoch; `log.jsonl` has it all.
struct NoFiles;

impl MetricLogger for NoFiles {
    fn log(&mut self, _update: MetricsUpdate, _epoch: usize, _split: &Split) {}

    fn read_numeric(&mut self, _name: &str, _epoch: usize, _split: &Split) -> Result<Vec<NumericEntry>, String> {
        Ok(Vec::new())
    }

    fn log_metric_definition(&mut self, _definition: MetricDefinition) {}

    fn log_epoch_summary(&mut self, _summary: EpochSummary) {}
}

/// What goes into the loop, and what comes out.
struct Task<B: TrainBackend> {
    trainer: Trainer<B>,
    observers: Observers,
    result: Option<(Decoder<B>, Result<Outcome, TrainError>)>,
}

type Shared<T> = Arc<Mutex<Option<T>>>;

fn take<T>(slot: &Mutex<Option<T>>) -> Option<T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}

fn put<T>(slot: &Mutex<Option<T>>, value: T) {
    *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
}

/// The strategy: runs the trainer and forwards its events.
struct StepLoop<B: TrainBackend> {
    task: Shared<Task<B>>,
}

impl<B, LC> SupervisedLearningStrategy<LC> for StepLoop<B>
where
    B: TrainBackend,
    LC: LearningComponentsTypes<Backend = B, TrainingModel = Trainee<B>, InferenceModel = Trainee<B::InnerBackend>>,
{
    fn fit(
        &self,
        components: TrainingComponents<LC>,
        learner: Learner<LC>,
        _train: TrainLoader<LC>,
        _valid: ValidLoader<LC>,
        _starting_epoch: usize,
    ) -> (TrainingModel<LC>, SupervisedTrainingEventProcessor<LC>) {
        let mut task = take(&self.task).expect("a strategy is launched once, with its task");
        let model = learner.model().decoder;
        // The learner must not keep a second copy of the weights alive.
        drop(learner);
        let processor = Arc::new(Mutex::new(Some(components.event_processor)));
        let feed = Feed { processor: processor.clone(), interrupter: components.interrupter, started: None };
        task.observers.push(Box::new(feed));
        let fitted = catch_unwind(AssertUnwindSafe(|| task.trainer.fit(model, &mut task.observers)));
        task.observers.pop();
        let processor = take(&processor);
        let (model, result) = match fitted {
            Ok(fitted) => fitted,
            Err(panic) => {
                // Closing the dashboard in good order gives the screen back before anyone prints. When that fails too, it was the
                // dashboard that ended: its popup offers to.
                if catch_unwind(AssertUnwindSafe(|| processor.map(EventProcessorTraining::renderer))).is_err() {
                    resume_unwind(Box::new("the dashboard was told to leave at once, without saving"));
                }
                resume_unwind(panic);
            }
        };
        task.result = Some((model.clone(), result));
        put(&self.task, task);
        (Trainee { decoder: model }, processor.expect("the feed gives the processor back"))
    }
}

/// Events of the trainer as events of burn-train. An "epoch" there is the stretch between two validations.
struct Feed<P> {
    processor: Shared<P>,
    interrupter: Interrupter,
    started: Option<Started>,
}

impl<P> Observer for Feed<P>
where
    P: EventProcessorTraining<LearnerEvent<Shown>, LearnerEvent<Shown>>,
{
    fn event(&mut self, event: &Event) {
        if let Event::Started(started) = event {
            self.started = Some(*started);
        }
        let Some(Started { steps, interval, .. }) = self.started else { return };
        let mut slot = self.processor.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(processor) = slot.as_mut() else { return };
        let epoch = |step: usize| Progress::new(step.saturating_sub(1) / interval + 1, steps.div_ceil(interval));
        match event {
            Event::Step(report) => {
                let within = Progress::new((report.step - 1) % interval + 1, interval);
                let item = TrainingItem::new(Shown::from(report), within, epoch(report.step), Some(report.step), Some(report.lr));
                processor.process_train(LearnerEvent::ProcessedItem(item));
            }
            Event::ValidBatch { step, done, total, loss } => {
                let shown = Shown { loss: *loss, ..Shown::default() };
                let item = TrainingItem::new(shown, Progress::new(*done, *total), epoch(*step), Some(*step), None);
                processor.process_valid(LearnerEvent::ProcessedItem(item));
            }
            Event::Valid(report) => {
                let epoch = epoch(report.step).items_processed;
                processor.process_valid(LearnerEvent::EndEpoch(epoch));
                processor.process_train(LearnerEvent::EndEpoch(epoch));
            }
            _ => {}
        }
    }

    fn wants_stop(&self) -> bool {
        self.interrupter.should_stop()
    }
}

/// Whether the dashboard is to be shown.
pub(crate) fn wanted(display: Display) -> bool {
    match display {
        // It draws on stdout and reads keys from stdin.
        Display::Auto => std::io::stdout().is_terminal() && std::io::stdin().is_terminal(),
        Display::Dashboard => true,
        Display::Plain | Display::Silent => false,
    }
}

type Types<B> = LearningComponentsMarker<
    B,
    f64,
    Trainee<B>,
    burn::optim::adaptor::OptimizerAdaptor<burn::optim::Sgd<<B as burn::tensor::backend::AutodiffBackend>::InnerBackend>, Trainee<B>, B>,
>;

/// Runs `trainer` under burn-train.
pub(crate) fn launch<B: TrainBackend>(
    trainer: Trainer<B>,
    model: Decoder<B>,
    observers: Observers,
    display: Display,
) -> (Trainer<B>, Observers, Decoder<B>, Result<Outcome, TrainError>) {
    let (every, steps, interval) = (trainer.config.log_every, trainer.config.steps, trainer.config.eval_every.max(1));
    let done = trainer.state.step;
    let run_dir = trainer.run_dir.clone();
    let task = Arc::new(Mutex::new(Some(Task { trainer, observers, result: None })));
    let interrupter = Interrupter::new();
    let training = SupervisedTraining::<Types<B>>::new(&run_dir, Arc::new(NoRows), Arc::new(NoRows))
        .metric_train_numeric(Gauge::loss())
        .metric_valid_numeric(Gauge::loss())
        .metric_train_numeric(Gauge::perplexity())
        .metric_valid_numeric(Gauge::perplexity())
        .metric_train_numeric(Gauge::tokens_per_s())
        .metric_train_numeric(Gauge::lr())
        .metric_train_numeric(Gauge::grad_norm())
        .metric_train_numeric(Gauge::memory())
        .metric_train(Eta)
        .with_metric_logger(NoFiles)
        .with_application_logger(None)
        .with_interrupter(interrupter.clone())
        .with_training_strategy(TrainingStrategy::Custom(Arc::new(StepLoop { task: task.clone() })));
    let dashboard = wanted(display);
    let training = if dashboard {
        terminal::remember();
        let renderer = TuiMetricsRendererWrapper::new(interrupter, Some(done / interval).filter(|epochs| *epochs > 0));
        terminal::adjust();
        training.renderer(renderer)
    } else {
        let out: Option<Box<dyn std::io::Write + Send + Sync>> =
            if display == Display::Silent { None } else { Some(Box::new(std::io::stderr())) };
        training.renderer(PlainRenderer::new(out, every, steps))
    };
    // The result drops here, and with it the renderer: the screen is the user's again.
    drop(training.launch(Learner::new(Trainee { decoder: model }, SgdConfig::new().init(), 0.0)));
    if dashboard {
        terminal::forget();
    }
    let Task { trainer, observers, result } = take(&task).expect("the strategy puts the task back");
    let (model, result) = result.expect("the strategy leaves a result");
    (trainer, observers, model, result)
}
