//! What can go wrong with a run.

use std::path::PathBuf;

use terrarium_kernels::backend::DeviceError;
use terrarium_models::lora::LoraError;

use crate::config::ConfigError;
use crate::data::DataError;

/// Why a run could not start or go on. The text is for the user.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The training data are wrong.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The `[model]` section does not describe a model.
    #[error("section [model]: {0}")]
    Model(#[from] terrarium_models::ConfigError),
    /// A checkpoint, tokenizer or hub problem.
    #[error(transparent)]
    Runtime(#[from] terrarium_runtime::Error),
    /// The LoRA targets do not fit the model.
    #[error("section [lora]: {0}")]
    Lora(#[from] LoraError),
    /// No such device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The output directory holds another run.
    #[error("{dir} already holds a run; continue it with --resume auto, or choose another --out-dir", dir = dir.display())]
    RunExists {
        /// The output directory.
        dir: PathBuf,
    },
    /// There is nothing to resume from.
    #[error("no complete checkpoint in {dir}", dir = dir.display())]
    NoCheckpoint {
        /// Where one was looked for.
        dir: PathBuf,
    },
    /// The configuration differs from the one that the checkpoint was made with.
    #[error("cannot resume: the configuration changed in {keys}; only train.steps may be raised (start a new run for anything else)", keys = keys.join(", "))]
    ConfigChanged {
        /// Keys with their old and new values.
        keys: Vec<String>,
    },
    /// The data differ from those that the checkpoint was made with.
    #[error("cannot resume: the training data changed since the checkpoint was made (fingerprint {found}, expected {expected})")]
    DataChanged {
        /// Of the data now.
        found: String,
        /// Of the data then.
        expected: String,
    },
    /// A loss or gradient stopped being a number.
    #[error(
        "step {step}: {what} is not finite, first in {tensor}; the batch is in {batch}, the last good checkpoint is untouched. \
         Lower train.lr, raise train.warmup, or look at that batch",
        batch = batch.display()
    )]
    NonFinite {
        /// The step that failed.
        step: usize,
        /// `the loss` or `the gradient`.
        what: &'static str,
        /// Parameter path or layer.
        tensor: String,
        /// File with the offending batch.
        batch: PathBuf,
    },
    /// A checkpoint does not fit the model or is damaged.
    #[error("checkpoint {dir}: {reason}", dir = dir.display())]
    Checkpoint {
        /// The checkpoint's directory.
        dir: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file system refused.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A log could not be drawn.
    #[error("cannot plot {path}: {reason}", path = path.display())]
    Plot {
        /// The log or the picture.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Signals cannot be caught.
    #[error("cannot catch Ctrl-C: {0}")]
    Signal(String),
    /// One of several devices no longer answers.
    #[error("device {number} of those that share the step stopped: {reason}; resume from the last checkpoint with --resume auto")]
    DeviceLost {
        /// Its place among the devices, from 1.
        number: usize,
        /// What its thread said last.
        reason: String,
    },
    /// Training stopped with a panic, for example when a device ran out of memory.
    #[error("training stopped unexpectedly: {0}; resume from the last checkpoint with --resume auto")]
    Panicked(String),
}

impl TrainError {
    /// True where the user's request is at fault rather than the run.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Config(_) | Self::RunExists { .. } | Self::ConfigChanged { .. } | Self::Lora(_) | Self::Device(_))
    }

    /// For `map_err` on file operations.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
