//! What can go wrong with an experiment.

use std::path::PathBuf;

use terrarium_kernels::backend::DeviceError;
use terrarium_models::ConfigError;
use terrarium_train::TrainError;

use crate::tasks::TaskError;

/// Why an experiment could not start or go on. The text is for the user.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// Neither a recipe of that name nor a file.
    #[error("there is no experiment `{name}` and no such file; experiments: {known}")]
    UnknownExperiment {
        /// What was asked for.
        name: String,
        /// Those that come along.
        known: String,
    },
    /// A file of the user's has no smaller version.
    #[error("{path} is a recipe of your own: --smoke goes with the name of an experiment", path = path.display())]
    NoSmoke {
        /// The file.
        path: PathBuf,
    },
    /// Not JSON, or a key or value that is not known.
    #[error("recipe {name}: {reason}")]
    Recipe {
        /// Name or path of the recipe.
        name: String,
        /// What the parser said.
        reason: String,
    },
    /// An assignment without `=`, or to a place that a recipe does not have.
    #[error("--set {assignment}: {reason}")]
    Override {
        /// The assignment.
        assignment: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A value that breaks a rule.
    #[error("recipe key {key}: {reason}")]
    Value {
        /// The key.
        key: String,
        /// The rule.
        reason: String,
    },
    /// The output directory holds an experiment.
    #[error("{dir} already holds results; go on with --resume, or choose another --out", dir = dir.display())]
    FolderTaken {
        /// The directory.
        dir: PathBuf,
    },
    /// The recipe differs from that of the directory.
    #[error("cannot resume {dir}: what was asked for changed in {keys}; choose another --out", dir = dir.display(), keys = keys.join(", "))]
    RecipeChanged {
        /// The directory.
        dir: PathBuf,
        /// Keys with both values.
        keys: Vec<String>,
    },
    /// A file of the report folder is not what was written.
    #[error("{path} is damaged: {reason}; remove it, and --resume makes it again", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
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
    /// An architecture that makes no model.
    #[error("architecture {name}: {source}")]
    Architecture {
        /// Its name.
        name: String,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// A standard task.
    #[error(transparent)]
    Task(#[from] TaskError),
    /// Drawing, or the optimiser's numbers.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// Writing files.
    #[error(transparent)]
    Runtime(#[from] terrarium_runtime::Error),
    /// No such device.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl EvalError {
    /// True where the user's request is at fault rather than the run.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::UnknownExperiment { .. }
                | Self::NoSmoke { .. }
                | Self::Recipe { .. }
                | Self::Override { .. }
                | Self::Value { .. }
                | Self::FolderTaken { .. }
                | Self::RecipeChanged { .. }
                | Self::Architecture { .. }
                | Self::Task(
                    TaskError::Unknown { .. }
                        | TaskError::NoData { .. }
                        | TaskError::OneFile { .. }
                        | TaskError::Shots { .. }
                        | TaskError::NoRoom { .. }
                )
        )
    }

    /// For `map_err` on file operations.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// A value that breaks a rule.
    pub(crate) fn value(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Value { key: key.into(), reason: reason.into() }
    }
}
