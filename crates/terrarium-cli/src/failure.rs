//! Every way a command can end badly: its message, its hint, its exit code.

use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use terrarium::eval::{EvalError, TaskError};
use terrarium::kernels::backend::DeviceError;
use terrarium::models::ConfigError;
use terrarium::runtime;
use terrarium::train::{self, TrainError};

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The request makes no sense.
    #[error("{message}")]
    Usage {
        /// What is wrong with it.
        message: String,
        /// What to write instead.
        hint: Option<String>,
    },
    /// Checkpoints, the hub, tokenizers, generation, scoring.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// Training.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// Experiments.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A model's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file given by the user, or a file to be written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line of an input file.
    #[error("{file}, line {line}: {reason}")]
    Line {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Standard output.
    #[error("cannot write to standard output: {0}")]
    Output(std::io::Error),
    /// A self-check did not pass.
    #[error("{0}")]
    Check(String),
    /// Ctrl-C; whatever could be saved is saved.
    #[error("interrupted")]
    Interrupted,
}

impl Failure {
    /// A usage error without a hint.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: None }
    }

    /// A usage error with advice.
    pub fn usage_hint(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: Some(hint.into()) }
    }

    /// For `map_err` on file operations.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    fn code(&self) -> u8 {
        match self {
            Self::Usage { .. } | Self::Device(DeviceError::Unknown(_) | DeviceError::NotCompiled { .. } | DeviceError::Mixed { .. }) => 2,
            Self::Train(TrainError::Device(DeviceError::Unavailable { .. })) => 1,
            Self::Train(error) if error.is_usage() => 2,
            Self::Eval(EvalError::Device(DeviceError::Unknown(_) | DeviceError::NotCompiled { .. })) => 2,
            Self::Eval(error) if error.is_usage() => 2,
            Self::Interrupted => 130,
            _ => 1,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Usage { hint, .. } => return hint.clone(),
            Self::Device(_) | Self::Train(TrainError::Device(_)) | Self::Eval(EvalError::Device(_)) => {
                "`terrarium doctor` shows the devices of this build"
            }
            Self::Config(ConfigError::UnknownModelType { .. }) => "`terrarium inspect` reads the same families that `generate` runs",
            Self::Train(TrainError::Config(train::ConfigError::Toml(_))) => "`terrarium help train` shows an example",
            Self::Eval(EvalError::Task(TaskError::NoData { .. })) => {
                "without --data the data sets are taken from the hub; `terrarium help eval` names the files"
            }
            Self::Eval(EvalError::Task(TaskError::Parquet { .. })) => {
                "a file of the hub's cache is fetched again once it is removed; one of your own has to be written or copied again"
            }
            Self::Eval(EvalError::Task(TaskError::Codec { .. })) => {
                "write it again: in Python, pyarrow.parquet.write_table(pyarrow.parquet.read_table(FILE), OUT)"
            }
            Self::Eval(EvalError::Task(TaskError::NoTokenizer))
            | Self::Runtime(runtime::Error::Tokenizer(runtime::TokenizerError::None)) => {
                "--tokenizer DIR|ORG/NAME takes one from elsewhere; the models of state-spaces were trained with EleutherAI/gpt-neox-20b"
            }
            Self::Train(TrainError::Data(train::data::DataError::NoTokenizer)) => {
                "`finetune --tokenizer DIR|ORG/NAME` or data.tokenizer takes one from elsewhere; the models of state-spaces were trained with EleutherAI/gpt-neox-20b"
            }
            Self::Runtime(runtime::Error::Config { source: ConfigError::Missing { key, .. }, .. })
            | Self::Train(TrainError::Runtime(runtime::Error::Config { source: ConfigError::Missing { key, .. }, .. }))
                if !key.contains('.') =>
            {
                return Some(format!("if you know it, give it with --set {key}=VALUE"));
            }
            Self::Io { source, .. } if source.kind() == ErrorKind::StorageFull => "free some space, or choose another folder",
            _ => return None,
        };
        Some(hint.to_string())
    }

    /// Says what went wrong and turns it into an exit code. A reader that went away is no news to anybody.
    pub fn report(&self) -> ExitCode {
        if let Self::Output(error) = self
            && error.kind() == ErrorKind::BrokenPipe
        {
            return ExitCode::SUCCESS;
        }
        let mut text = if matches!(self, Self::Interrupted) { format!("{self}\n") } else { format!("error: {self}\n") };
        if let Some(hint) = self.hint() {
            text.push_str(&format!("hint: {hint}\n"));
        }
        let _ = std::io::stderr().write_all(text.as_bytes());
        ExitCode::from(self.code())
    }
}
