//! The step loop: accumulate, clip, update, validate, save. It tells observers what happens and knows no terminal.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use burn::module::AutodiffModule;
use serde_json::json;
use terrarium_kernels::TrainBackend;
use terrarium_models::Decoder;

use crate::TrainError;
use crate::checkpoint::{RunState, Store};
use crate::config::TrainConfig;
use crate::data::{Batch, PackedRows, Sampler, permutation};
use crate::event::{Event, Observers, Outcome, Started, StepReport, ValidReport, resident_memory};
use crate::gradients::{Norm, clip_factor};
use crate::interrupt::StopFlag;
use crate::optim::AdamW;
use crate::schedule::Schedule;
use crate::team::{Team, split};
use crate::{finite, loss, params};

/// Everything a run needs but the model itself.
pub struct Trainer<B: TrainBackend> {
    /// Numbers of the run.
    pub config: TrainConfig,
    /// Rows to learn from.
    pub train: PackedRows,
    /// Rows to validate on.
    pub valid: Option<PackedRows>,
    /// The optimiser.
    pub optim: AdamW<B::InnerBackend>,
    /// Counters, positions, bests.
    pub state: RunState,
    /// Where checkpoints go.
    pub store: Store,
    /// Where the batch of a failed step goes.
    pub run_dir: PathBuf,
    /// Raised to save and leave.
    pub stop: StopFlag,
    /// Where the model is.
    pub device: B::Device,
    /// Devices that share each step with it.
    pub others: Vec<B::Device>,
    sampler: Sampler,
    schedule: Schedule,
    /// Seconds per step, smoothed.
    pace: Option<f64>,
    saved: Option<usize>,
}

/// What a trainer is made of.
pub struct Parts<B: TrainBackend> {
    /// Numbers of the run.
    pub config: TrainConfig,
    /// Rows to learn from.
    pub train: PackedRows,
    /// Rows to validate on.
    pub valid: Option<PackedRows>,
    /// The optimiser, restored or new.
    pub optim: AdamW<B::InnerBackend>,
    /// Counters, restored or new.
    pub state: RunState,
    /// The run directory.
    pub run_dir: PathBuf,
    /// Raised to save and leave.
    pub stop: StopFlag,
    /// Where the model is.
    pub device: B::Device,
    /// Devices that share each step with it.
    pub others: Vec<B::Device>,
}

impl<B: TrainBackend> Trainer<B> {
    /// A trainer that goes on where `parts.state` says.
    pub fn new(parts: Parts<B>) -> Self {
        let Parts { config, train, valid, optim, state, run_dir, stop, device, others } = parts;
        Self {
            sampler: Sampler::new(train.len(), config.seed, state.cursor),
            schedule: Schedule::new(&config),
            store: Store::new(&run_dir, config.keep),
            saved: (state.step > 0).then_some(state.step),
            pace: None,
            config,
            train,
            valid,
            optim,
            state,
            run_dir,
            stop,
            device,
            others,
        }
    }

    /// Trains to the end, to a stop, or to an error. The model comes back in every case.
    pub fn fit(&mut self, mut model: Decoder<B>, observers: &mut Observers) -> (Decoder<B>, Result<Outcome, TrainError>) {
        let TrainConfig { steps, eval_every, .. } = self.config;
        let interval = if eval_every == 0 { steps } else { eval_every.min(steps) };
        observers.tell(Event::Started(Started { step: self.state.step, steps, interval }));
        let mut team = match Team::gather(&model, &self.optim, &self.device, &self.others, self.config.gradient_checkpointing) {
            Ok(team) => team,
            Err(error) => return (model, Err(error)),
        };
        loop {
            let result = match self.between_steps(&model, observers) {
                Ok(None) => {
                    let (next, result) = self.step(model, &mut team);
                    model = next;
                    result.map(|report| observers.tell(Event::Step(report))).map(|()| None)
                }
                other => other,
            };
            match result {
                Ok(None) => {}
                Ok(Some(outcome)) => {
                    observers.tell(Event::Finished { outcome, step: self.state.step });
                    return (model, Ok(outcome));
                }
                Err(error) => return (model, Err(error)),
            }
        }
    }

    /// Validates and saves where that is due; says whether the run is over.
    fn between_steps(&mut self, model: &Decoder<B>, observers: &mut Observers) -> Result<Option<Outcome>, TrainError> {
        let TrainConfig { steps, eval_every, patience, .. } = self.config;
        let step = self.state.step;
        let last = step >= steps;
        let every = |period: usize| step > 0 && period > 0 && step.is_multiple_of(period);
        let validated = self.state.validated.is_some_and(|(at, _)| at == step);
        if (last || every(eval_every)) && step > 0 && !validated {
            self.validate(model, observers)?;
        }
        let stale = patience > 0 && self.state.stale >= patience;
        let stop = self.stopping(observers);
        if step > 0 && self.saved != Some(step) && (last || stale || stop || every(self.config.save_every())) {
            self.save(model, observers)?;
        }
        Ok(match (last, stale, stop) {
            (true, ..) => Some(Outcome::Finished),
            (_, true, _) => Some(Outcome::EarlyStopped),
            (_, _, true) => Some(Outcome::Interrupted),
            _ => None,
        })
    }

    fn stopping(&self, observers: &Observers) -> bool {
        self.stop.requested() || observers.want_stop()
    }

    /// One optimiser step over `accumulation` micro-batches. Each token weighs the same whichever micro-batch it is in.
    fn step(&mut self, model: Decoder<B>, team: &mut Team<B>) -> (Decoder<B>, Result<StepReport, TrainError>) {
        let start = Instant::now();
        let step = self.state.step + 1;
        let mut sampler = self.sampler.clone();
        // By device, then by micro-batch.
        let mut shares: Vec<Vec<Batch>> = vec![Vec::new(); team.size()];
        for _ in 0..self.config.accumulation {
            let rows = sampler.take(self.config.batch);
            shares.iter_mut().zip(split(&rows, team.size())).for_each(|(share, rows)| share.push(self.train.batch(rows)));
        }
        let batches: Vec<Batch> = shares.concat();
        let labelled = batches.iter().map(Batch::labelled).sum::<usize>().max(1);
        let (grads, losses) = match team.gradients(&model, shares, (labelled as f64).recip()) {
            Ok(found) => found,
            Err(error) => return (model, Err(error)),
        };
        let mean = losses.iter().sum::<f64>() / labelled as f64;
        if let Some(bad) = losses.iter().position(|loss| !loss.is_finite()) {
            let tensor = finite::locate(&model.valid(), &batches[bad], &self.device);
            return (model, Err(self.not_finite(step, "the loss", tensor, &batches)));
        }
        let norm = match grads.norm() {
            Norm::Finite(norm) => norm,
            Norm::NotFinite(path) => return (model, Err(self.not_finite(step, "the gradient", format!("parameter {path}"), &batches))),
        };
        let lr = self.schedule.lr(step);
        let factor = clip_factor(norm, self.config.clip);
        if let Err(error) = team.update(lr, factor) {
            return (model, Err(error));
        }
        let model = self.optim.step(model, grads, lr, factor);

        let tokens: usize = batches.iter().map(Batch::tokens).sum();
        let seconds = start.elapsed().as_secs_f64();
        self.sampler = sampler;
        self.state.step = step;
        self.state.cursor = self.sampler.cursor();
        self.state.tokens += tokens as u64;
        self.state.seconds += seconds;
        self.state.train_loss = Some(mean);
        let pace = self.pace.map_or(seconds, |pace| 0.9 * pace + 0.1 * seconds);
        self.pace = Some(pace);
        let report = StepReport {
            step,
            steps: self.config.steps,
            epoch: self.sampler.epochs(),
            loss: mean,
            perplexity: mean.exp(),
            lr,
            grad_norm: norm,
            tokens: self.state.tokens,
            tokens_per_s: tokens as f64 / seconds.max(1e-9),
            memory: resident_memory(),
            seconds: self.state.seconds,
            eta: Duration::from_secs_f64(pace * self.config.steps.saturating_sub(step) as f64),
        };
        (model, Ok(report))
    }

    /// Mean loss over the validation rows. Given up when someone wants to stop; it is then made again after resuming.
    fn validate(&mut self, model: &Decoder<B>, observers: &mut Observers) -> Result<(), TrainError> {
        let Some(valid) = &self.valid else { return Ok(()) };
        let step = self.state.step;
        let order = permutation(valid.len(), self.config.seed, u64::MAX - 1);
        let all = order.len().div_ceil(self.config.batch);
        let total = if self.config.eval_batches == 0 { all } else { all.min(self.config.eval_batches) };
        let model = model.valid();
        let (mut sum, mut tokens) = (0.0, 0);
        for (done, rows) in order.chunks(self.config.batch).take(total).enumerate() {
            if self.stopping(observers) {
                return Ok(());
            }
            let batch = valid.batch(rows);
            sum += loss::scalar(loss::evaluate(&model, &batch, &self.device));
            tokens += batch.labelled();
            if !sum.is_finite() {
                let tensor = finite::locate(&model, &batch, &self.device);
                return Err(self.not_finite(step, "the validation loss", tensor, &[batch]));
            }
            observers.tell(Event::ValidBatch { step, done: done + 1, total, loss: sum / tokens.max(1) as f64 });
        }
        if tokens == 0 {
            return Ok(());
        }
        let loss = sum / tokens as f64;
        let best = self.state.best.is_none_or(|(_, best)| loss < best - self.config.min_delta);
        if best {
            self.state.best = Some((step, loss));
            self.state.stale = 0;
        } else {
            self.state.stale += 1;
        }
        self.state.validated = Some((step, loss));
        observers.tell(Event::Valid(ValidReport { step, loss, perplexity: loss.exp(), tokens: tokens as u64, best }));
        Ok(())
    }

    fn save(&mut self, model: &Decoder<B>, observers: &mut Observers) -> Result<(), TrainError> {
        let step = self.state.step;
        let values = params::trained_values(model);
        if let Some((path, _)) = values.iter().find(|(_, data)| !data.iter::<f32>().all(f32::is_finite)) {
            return Err(self.not_finite(step, "a weight", format!("parameter {path}"), &[]));
        }
        if let Some((at, loss)) = self.state.validated
            && at == step
            && self.state.best_saved.is_none_or(|(_, best)| loss < best)
        {
            self.state.best_saved = Some((step, loss));
        }
        let path = self.store.save(&self.state, values, self.optim.state())?;
        self.saved = Some(step);
        self.store.prune(self.state.best_saved.map(|(step, _)| step))?;
        observers.tell(Event::Saved { step, path });
        Ok(())
    }

    /// Keeps the batches of a failed step, so that it can be looked at.
    fn not_finite(&self, step: usize, what: &'static str, tensor: String, batches: &[Batch]) -> TrainError {
        let batch = self.run_dir.join(format!("nonfinite-step-{step:06}.json"));
        let content = json!({ "step": step, "what": what, "tensor": tensor, "micro_batches": batches });
        if let Err(error) = terrarium_runtime::write_atomic(&batch, content.to_string().as_bytes()) {
            log::warn!("cannot keep the batch: {error}");
        }
        TrainError::NonFinite { step, what, tensor, batch }
    }
}
