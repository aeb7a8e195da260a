//! What the step loop tells the outside. The loop knows neither files for curves nor terminals: observers do.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

/// Something that happened in a run.
#[derive(Debug, Clone)]
pub enum Event {
    /// A decision, in a sentence for the user.
    Note(String),
    /// The loop begins.
    Started(Started),
    /// An optimiser step was made.
    Step(StepReport),
    /// A part of a validation was done.
    ValidBatch {
        /// The step it belongs to.
        step: usize,
        /// Micro-batches done.
        done: usize,
        /// Micro-batches in all.
        total: usize,
        /// Mean loss so far.
        loss: f64,
    },
    /// A validation was done.
    Valid(ValidReport),
    /// A checkpoint was written.
    Saved {
        /// Its step.
        step: usize,
        /// Its directory.
        path: PathBuf,
    },
    /// The loop ended.
    Finished {
        /// How.
        outcome: Outcome,
        /// After which step.
        step: usize,
    },
}

/// How a run stands at its beginning.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Started {
    /// Steps made by earlier runs of the same directory.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
    /// Steps between validations.
    pub interval: usize,
}

/// One optimiser step.
#[derive(Debug, Clone, Serialize)]
pub struct StepReport {
    /// The step, from 1.
    pub step: usize,
    /// Steps in all.
    #[serde(skip)]
    pub steps: usize,
    /// Passes over the data.
    pub epoch: f64,
    /// Mean cross-entropy of the labelled tokens, natural logarithm.
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens seen since the start of training, padding excluded.
    pub tokens: u64,
    /// Speed of this step.
    pub tokens_per_s: f64,
    /// Resident memory in bytes, where the system tells.
    pub memory: Option<u64>,
    /// Seconds of training so far, earlier runs included.
    pub seconds: f64,
    /// Time left at the present speed.
    #[serde(skip)]
    pub eta: Duration,
}

/// One validation.
#[derive(Debug, Clone, Serialize)]
pub struct ValidReport {
    /// The step after which it was made.
    pub step: usize,
    /// Mean cross-entropy.
    #[serde(rename = "valid_loss")]
    pub loss: f64,
    /// Its exponential.
    #[serde(rename = "valid_perplexity")]
    pub perplexity: f64,
    /// Tokens predicted.
    #[serde(rename = "valid_tokens")]
    pub tokens: u64,
    /// Whether it is the lowest so far.
    pub best: bool,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// All steps were made.
    Finished,
    /// The validation loss stopped improving.
    EarlyStopped,
    /// Someone asked to stop; a checkpoint was saved.
    Interrupted,
}

/// Someone who is told.
pub trait Observer: Send {
    /// Takes note of `event`.
    fn event(&mut self, event: &Event);

    /// True when this observer wants the run to save and stop.
    fn wants_stop(&self) -> bool {
        false
    }
}

/// All observers of a run.
#[derive(Default)]
pub struct Observers(Vec<Box<dyn Observer>>);

impl Observers {
    /// Those of the caller.
    pub fn new(observers: Vec<Box<dyn Observer>>) -> Self {
        Self(observers)
    }

    /// Adds one.
    pub fn push(&mut self, observer: Box<dyn Observer>) {
        self.0.push(observer);
    }

    /// Takes the last one back.
    pub fn pop(&mut self) -> Option<Box<dyn Observer>> {
        self.0.pop()
    }

    /// Tells everyone.
    pub fn tell(&mut self, event: Event) {
        self.0.iter_mut().for_each(|observer| observer.event(&event));
    }

    /// True when anyone wants to stop.
    pub fn want_stop(&self) -> bool {
        self.0.iter().any(|observer| observer.wants_stop())
    }
}

/// Resident memory of this process in bytes; `None` where `/proc` is absent.
pub(crate) fn resident_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    // The kernel counts in pages, which are 4 KiB on every Linux this runs on but some ARM and POWER systems.
    Some(pages * 4096)
}
