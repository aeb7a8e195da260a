//! Training one model of a cell: a light loop over the trainer's own loss, gradients, schedule and optimiser.

use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

use burn::module::AutodiffModule;
use burn::tensor::{DType, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use serde_json::json;
use terrarium_kernels::measure::Machine;
use terrarium_kernels::{KernelBackend, TrainBackend};
use terrarium_models::{Decoder, DecoderConfig};
use terrarium_train::config::{Compute, Shape};
use terrarium_train::data::{Batch, IGNORED};
use terrarium_train::gradients::{Gradients, Norm, clip_factor};
use terrarium_train::loss;
use terrarium_train::optim::{AdamW, AdamWConfig};
use terrarium_train::schedule::Schedule;

use super::arch::forward_flop;
use super::stats::short;
use super::{Finding, Running};
use crate::EvalError;
use crate::timing::memory;

/// How the models of an experiment learn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Training {
    /// Optimiser steps of a model.
    pub steps: usize,
    /// Rows per step.
    pub batch: usize,
    /// Highest learning rates to try; with several, the best one of each model counts.
    pub learning_rates: Vec<f64>,
    /// Part of the steps with a rising learning rate; a cosine down to a hundredth follows.
    pub warmup: f64,
    /// Decay rates of AdamW's moments.
    pub betas: [f64; 2],
    /// Decoupled weight decay, on matrices only.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 for no clipping.
    pub clip: f64,
    /// What matrices are multiplied in: `auto`, `f32` or `bf16`.
    pub precision: Compute,
    /// Steps between measurements on held-out data; 0 for one at the end.
    pub eval_every: usize,
    /// Stop a model whose measurement is this good.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_at: Option<f64>,
    /// Steps between lines of the log.
    pub log_every: usize,
}

impl Default for Training {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch: 64,
            learning_rates: vec![1e-3],
            warmup: 0.1,
            betas: [0.9, 0.95],
            weight_decay: 0.1,
            clip: 1.0,
            precision: Compute::Auto,
            eval_every: 0,
            stop_at: None,
            log_every: 20,
        }
    }
}

impl Training {
    /// Refuses values that make no sense.
    pub(crate) fn check(&self) -> Result<(), EvalError> {
        let fail = |key: &str, reason: &str| Err(EvalError::value(format!("training.{key}"), reason));
        match self {
            _ if self.steps == 0 => fail("steps", "at least 1"),
            _ if self.batch == 0 => fail("batch", "at least 1"),
            _ if self.log_every == 0 => fail("log_every", "at least 1"),
            _ if self.learning_rates.is_empty() => fail("learning_rates", "at least one"),
            _ if !self.learning_rates.iter().all(|lr| lr.is_finite() && *lr > 0.0) => fail("learning_rates", "more than 0"),
            _ if !(0.0..1.0).contains(&self.warmup) => fail("warmup", "a share of the steps, from 0 to below 1"),
            _ if !self.betas.iter().all(|beta| (0.0..1.0).contains(beta)) => fail("betas", "from 0 to below 1"),
            _ if self.weight_decay.is_nan() || self.weight_decay < 0.0 => fail("weight_decay", "0 or more"),
            _ if self.clip.is_nan() || self.clip < 0.0 => fail("clip", "0 or more"),
            _ => Ok(()),
        }
    }
}

/// What is learnt. Batches are pure functions of their numbers.
pub(crate) trait Task: Sync {
    /// The batch of a step, counted from 0.
    fn batch(&self, seed: u64, step: usize, steps: usize, rows: usize) -> Batch;

    /// Measurements on held-out data, by name; the first decides.
    fn measure<B: KernelBackend>(&self, model: &Decoder<B>, device: &B::Device) -> Vec<(String, f64)>;

    /// Whether larger measurements are better.
    fn larger_is_better(&self) -> bool {
        true
    }

    /// What `stop_at` is compared with: the measurement that decides, unless others have to be as good.
    fn reached(&self, scores: &[(String, f64)]) -> f64 {
        scores.first().map_or(f64::NAN, |(_, value)| *value)
    }
}

impl<T: Task> Task for &T {
    fn batch(&self, seed: u64, step: usize, steps: usize, rows: usize) -> Batch {
        (**self).batch(seed, step, steps, rows)
    }

    fn measure<B: KernelBackend>(&self, model: &Decoder<B>, device: &B::Device) -> Vec<(String, f64)> {
        (**self).measure(model, device)
    }

    fn larger_is_better(&self) -> bool {
        (**self).larger_is_better()
    }

    fn reached(&self, scores: &[(String, f64)]) -> f64 {
        (**self).reached(scores)
    }
}

/// One model to train.
#[derive(Clone, Copy)]
pub(crate) struct Student<'a> {
    pub config: &'a DecoderConfig,
    pub training: &'a Training,
    pub seed: u64,
}

/// A stretch of training with a schedule of its own; held-out data is measured at its end.
pub(crate) struct Stage<T> {
    pub task: T,
    pub steps: usize,
    /// Rows that the task is asked for per step.
    pub rows: usize,
    /// Highest learning rate.
    pub lr: f64,
    /// Base of the rotary positions from here on; as it was where absent.
    pub rotary_base: Option<f64>,
}

/// What a model learnt, and what that took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    /// Parameters; the tied head counts once.
    pub parameters: usize,
    /// Steps made.
    pub steps: usize,
    /// Tokens read.
    pub tokens: u64,
    /// Arithmetic of training: three times that of reading, by the textbook algorithms.
    pub flop: f64,
    /// Seconds of training, without measurements.
    pub seconds: f64,
    /// Tokens per second, the first tenth of the steps left out.
    pub tokens_per_s: f64,
    /// Loss of the last logged step, natural logarithm.
    pub loss: f64,
    /// Loss of the first step.
    pub first_loss: f64,
    /// A gradient or the loss stopped being a number, and training ended there.
    pub diverged: bool,
    /// Measurements at the end.
    pub scores: Vec<(String, f64)>,
    /// Step, tokens, arithmetic, seconds and first measurement, each time it was made.
    pub curve: Vec<(usize, u64, f64, f64, f64)>,
    /// What products were computed in.
    pub precision: String,
    /// One per stage of training.
    #[serde(default)]
    pub pace: Vec<Pace>,
    /// What a matrix product reaches on the device, FLOP per second.
    #[serde(skip)]
    pub ceiling: Option<f64>,
    /// The most memory taken at once; see [`crate::timing::memory`].
    #[serde(default)]
    pub memory: Option<u64>,
}

/// How fast a stage went, its first tenth left out: kernels are compiled there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Pace {
    /// Tokens read.
    pub tokens: u64,
    /// Arithmetic, as in [`Learned::flop`].
    pub flop: f64,
    /// Seconds.
    pub seconds: f64,
}

impl Pace {
    /// Tokens per second.
    pub fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / self.seconds.max(1e-9)
    }

    /// Arithmetic per second.
    pub fn flop_per_s(&self) -> f64 {
        self.flop / self.seconds.max(1e-9)
    }

    /// Of several stages together.
    pub fn sum(paces: &[Self]) -> Self {
        paces.iter().fold(Self::default(), |sum, pace| Self {
            tokens: sum.tokens + pace.tokens,
            flop: sum.flop + pace.flop,
            seconds: sum.seconds + pace.seconds,
        })
    }
}

impl Finding for Learned {
    fn words(&self) -> String {
        // Of many, the last stage has the last.
        let shown = if self.scores.len() > 12 { &self.scores[self.scores.len() - 4..] } else { &self.scores };
        let scores = shown.iter().map(|(name, value)| format!("{name} {value:.3}")).collect::<Vec<_>>().join(", ");
        let end = if self.diverged { ", diverged" } else { "" };
        format!("{scores}; {} steps in {:.1} s, {} tokens/s{end}", self.steps, self.seconds, short(self.tokens_per_s))
    }

    fn judge(&mut self, machine: Option<&Machine>) {
        self.ceiling = machine.and_then(|machine| machine.matmul_tflops).map(|tflops| 1e12 * tflops);
    }
}

impl Learned {
    /// The pace of all stages together.
    pub fn total(&self) -> Pace {
        if self.pace.is_empty() {
            // Of a folder from before stages were told apart: the arithmetic of a token is that of all.
            return Pace { tokens: self.tokens, flop: self.flop, seconds: self.tokens as f64 / self.tokens_per_s.max(1e-9) };
        }
        Pace::sum(&self.pace)
    }

    /// Arithmetic per second as a share of what a matrix product reached.
    pub fn utilisation(&self) -> Option<f64> {
        self.ceiling.map(|ceiling| self.total().flop_per_s() / ceiling)
    }

    /// A measurement by its name.
    pub fn score(&self, name: &str) -> Option<f64> {
        self.scores.iter().find(|(found, _)| found == name).map(|(_, value)| *value)
    }
}

/// Trains a model, stage after stage; the scores are those of all stages. Gives `None` when asked to stop.
pub(crate) fn fit<B: TrainBackend, T: Task>(
    student: Student<'_>,
    stages: &[Stage<T>],
    running: &mut Running<'_>,
    device: &B::Device,
) -> Result<Option<Learned>, EvalError> {
    let all = stages.iter().map(|stage| stage.steps).sum();
    let mut learner = Learner::<B>::new(student, device)?;
    let mut scores = Vec::new();
    for stage in stages {
        learner.begin(stage);
        // The next batches are made while the device works on this one.
        let whole = std::thread::scope(|scope| {
            let (sender, batches) = sync_channel(2);
            scope.spawn(move || {
                // It fails when the loop has left: nobody wants more.
                (0..stage.steps).all(|step| sender.send(stage.task.batch(student.seed, step, stage.steps, stage.rows)).is_ok());
            });
            learner.learn(stage, all, batches, running)
        });
        if !whole {
            return Ok(None);
        }
        scores.append(&mut learner.found.scores);
        if learner.found.diverged {
            break;
        }
    }
    let mut found = learner.found;
    found.scores = scores;
    found.memory = memory::<B>(device);
    finite(&mut found);
    Ok(Some(found))
}

/// A model in training, and what is known of it.
struct Learner<'a, B: TrainBackend> {
    student: Student<'a>,
    device: &'a B::Device,
    /// Absent only while a step changes it.
    model: Option<Decoder<B>>,
    optim: AdamW<B::InnerBackend>,
    schedule: Schedule,
    found: Learned,
    /// Steps made before this stage, and those of it that say nothing about speed.
    before: usize,
    warm: usize,
}

impl<'a, B: TrainBackend> Learner<'a, B> {
    fn new(student: Student<'a>, device: &'a B::Device) -> Result<Self, EvalError> {
        let Student { config, training, seed } = student;
        let mut model = Decoder::<B>::init(config, seed, device);
        let precision = training.precision.on::<B>(device);
        if let Some(dtype) = precision {
            if !B::supports_dtype(device, dtype) {
                return Err(EvalError::value("training.precision", "this device has no bf16: use \"f32\" or \"auto\""));
            }
            model = model.computing_in(dtype);
        }
        let adamw = AdamWConfig { betas: training.betas, eps: 1e-8, weight_decay: training.weight_decay };
        Ok(Self {
            student,
            device,
            model: Some(model),
            optim: AdamW::new(adamw),
            schedule: Schedule { peak: 0.0, min: 0.0, warmup: 0, steps: 0, shape: Shape::Cosine },
            found: Learned {
                parameters: config.parameters(),
                steps: 0,
                tokens: 0,
                flop: 0.0,
                seconds: 0.0,
                tokens_per_s: 0.0,
                loss: f64::NAN,
                first_loss: f64::NAN,
                diverged: false,
                scores: Vec::new(),
                curve: Vec::new(),
                precision: format!("{:?}", precision.unwrap_or(DType::F32)).to_lowercase(),
                pace: Vec::new(),
                ceiling: None,
                memory: None,
            },
            before: 0,
            warm: 0,
        })
    }

    /// Takes up a stage: its schedule, its positions.
    fn begin<T>(&mut self, stage: &Stage<T>) {
        let warmup = (self.student.training.warmup * stage.steps as f64).round() as usize;
        self.schedule = Schedule { peak: stage.lr, min: 0.01 * stage.lr, warmup, steps: stage.steps, shape: Shape::Cosine };
        self.before = self.found.steps;
        self.warm = stage.steps / 10;
        self.found.pace.push(Pace::default());
        if let Some(base) = stage.rotary_base {
            self.model = self.model.take().map(|model| model.rotating(base));
        }
    }

    /// The steps of a stage, of `all` steps; the batches end with it. Gives whether it was not asked to stop.
    fn learn<T: Task>(&mut self, stage: &Stage<T>, all: usize, batches: Receiver<Batch>, running: &mut Running<'_>) -> bool {
        let training = self.student.training;
        for (step, batch) in batches.into_iter().enumerate() {
            if running.stop.requested() {
                return false;
            }
            let due = |every: usize| every > 0 && (step + 1).is_multiple_of(every);
            let logged = step == 0 || step + 1 == stage.steps || due(training.log_every);
            self.step(&batch, logged);
            let found = &self.found;
            if logged {
                let line = json!({ "step": found.steps, "loss": found.loss, "lr": self.schedule.lr(step + 1), "tokens": found.tokens,
                                   "seconds": found.seconds, "tokens_per_s": found.tokens_per_s });
                running.log.line(&line);
                running.step(found.steps, all, format!("loss {:.3}", found.loss));
            }
            let last = step + 1 == stage.steps || found.diverged;
            if last || due(training.eval_every) {
                let reached = self.measure(&stage.task, running);
                let good = |limit: f64| if stage.task.larger_is_better() { reached >= limit } else { reached <= limit };
                if last || training.stop_at.is_some_and(good) {
                    break;
                }
            }
        }
        true
    }

    /// One step of the optimiser, unless the loss or a gradient stopped being a number. The loss is read if it is `wanted`.
    fn step(&mut self, batch: &Batch, wanted: bool) {
        let Some(model) = self.model.take() else { return };
        let Student { config, training, .. } = self.student;
        let begun = Instant::now();
        let labelled = batch.labelled().max(1);
        let mut grads = Gradients::default();
        let sum = loss::backward(&model, batch, (labelled as f64).recip(), 0, &mut grads, self.device);
        let factor = match training.clip {
            clip if clip > 0.0 => match grads.norm() {
                Norm::Finite(norm) => clip_factor(norm, clip),
                Norm::NotFinite(_) => f64::NAN,
            },
            _ => 1.0,
        };
        let found = &mut self.found;
        found.diverged = factor.is_nan();
        if wanted || found.diverged {
            found.loss = sum.into_data().iter::<f64>().sum::<f64>() / labelled as f64;
            found.diverged |= !found.loss.is_finite();
            if found.steps == 0 {
                found.first_loss = found.loss;
            }
        }
        found.steps += 1;
        let lr = self.schedule.lr(found.steps - self.before);
        self.model = Some(if found.diverged { model } else { self.optim.step(model, grads, lr, factor) });
        let share = labelled as f64 / batch.ids.len().max(1) as f64;
        let (tokens, flop) = (batch.tokens() as u64, 3.0 * forward_flop(config, batch.length, share) * batch.ids.len() as f64);
        found.tokens += tokens;
        found.flop += flop;
        let counts = found.steps - self.before > self.warm;
        self.passed(begun, counts.then_some((tokens, flop)));
    }

    /// Adds the time since `begun` to that of training, and to the pace with what was done in it.
    fn passed(&mut self, begun: Instant, done: Option<(u64, f64)>) {
        let (found, seconds) = (&mut self.found, begun.elapsed().as_secs_f64());
        found.seconds += seconds;
        if let (Some(pace), Some((tokens, flop))) = (found.pace.last_mut(), done) {
            *pace = Pace { tokens: pace.tokens + tokens, flop: pace.flop + flop, seconds: pace.seconds + seconds };
        }
        found.tokens_per_s = Pace::sum(&found.pace).tokens_per_s();
    }

    /// Measures on held-out data; gives what `stop_at` is compared with.
    fn measure(&mut self, task: &impl Task, running: &mut Running<'_>) -> f64 {
        let begun = Instant::now();
        // Queued steps are part of training, not of the measurement.
        let _ = self.model.as_ref().map(|model| model.norm_f.weight.val().into_data());
        self.passed(begun, Some((0, 0.0)));
        let (Some(model), found) = (&self.model, &mut self.found) else { return f64::NAN };
        found.scores = task.measure(&model.valid(), self.device);
        let first = found.scores.first().map_or(f64::NAN, |(_, value)| *value);
        found.curve.push((found.steps, found.tokens, found.flop, found.seconds, first));
        let scores: serde_json::Map<String, serde_json::Value> =
            found.scores.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
        running.log.line(&json!({ "step": found.steps, "scores": scores }));
        task.reached(&found.scores)
    }
}

/// JSON has no word for what is not a number.
fn finite(found: &mut Learned) {
    let fix = |value: &mut f64| {
        if !value.is_finite() {
            *value = f64::MAX;
        }
    };
    fix(&mut found.loss);
    fix(&mut found.first_loss);
    found.scores.iter_mut().for_each(|(_, value)| fix(value));
    found.curve.iter_mut().for_each(|point| fix(&mut point.4));
}

/// Per row of a batch: labelled positions at which the likeliest token is the label, and labelled positions.
pub(crate) fn right<B: KernelBackend>(model: &Decoder<B>, batch: &Batch, device: &B::Device) -> Vec<(usize, usize)> {
    let ids = Tensor::<B, 2, Int>::from_data(TensorData::new(batch.ids.clone(), [batch.rows, batch.length]), device);
    let (hidden, _) = model.hidden(ids, None, &batch.layout());
    let [b, l, d] = hidden.dims();
    let places: Vec<usize> = (0..b * l).filter(|at| batch.labels[*at] != IGNORED).collect();
    let mut counts = vec![(0, 0); b];
    // Logits of a slice take a quarter of a gigabyte.
    let rows = ((1usize << 26) / model.embeddings.weight.dims()[0].max(1)).max(1);
    let hidden = hidden.reshape([b * l, d]);
    for places in places.chunks(rows) {
        let index: Vec<i32> = places.iter().map(|at| *at as i32).collect();
        let index = Tensor::<B, 1, Int>::from_data(TensorData::new(index, [places.len()]), device);
        // In float32, where equals are rare.
        let likeliest = model.logits(hidden.clone().select(0, index).cast(DType::F32)).argmax(1).into_data();
        for (at, id) in places.iter().zip(likeliest.iter::<i64>()) {
            let row = &mut counts[at / l];
            row.0 += usize::from(id == i64::from(batch.labels[*at]));
            row.1 += 1;
        }
    }
    counts
}

/// A guess at the seconds of a training run, from what was seen on one H100 and on two cores.
pub(crate) fn guess(config: &DecoderConfig, steps: usize, rows: usize, length: usize, labelled: f64, gpu: bool) -> f64 {
    let flop = 3.0 * forward_flop(config, length, labelled) * (rows * length) as f64;
    // Small models wait for launches, and for memory: a layer reads and writes its activations a few dozen times.
    let bytes = 3.0 * 60.0 * (config.layers.len() * rows * length * config.hidden_size) as f64;
    let step = if gpu { (2e-3 + 3e-3 * config.layers.len() as f64).max(flop / 60e12 + bytes / 2e12) } else { flop / 2e10 };
    steps as f64 * step
}
