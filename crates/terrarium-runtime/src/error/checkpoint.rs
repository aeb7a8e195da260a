//! Why weights, their index or an adapter could not be read.

use std::path::PathBuf;

use super::{MegatronError, TorchError};

/// Why weights could not be read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A safetensors file that is damaged or not one at all.
    #[error("{}: not a valid safetensors file: {problem}", file.display())]
    Corrupt {
        /// The file.
        file: PathBuf,
        /// What is wrong, naming the key where there is one.
        problem: String,
    },
    /// The file is shorter than its header says.
    #[error("{}: truncated: the header describes {expected} bytes, the file has {found}; download or copy it again", file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// Bytes the header describes, itself included.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// A key that two files of one checkpoint hold.
    #[error("{}: `{key}` is also in {}: keep one of them", file.display(), other.display())]
    Duplicate {
        /// The later file.
        file: PathBuf,
        /// The key.
        key: String,
        /// The earlier file.
        other: PathBuf,
    },
    /// A key that was asked for and is not there, or whose element type cannot be had.
    #[error("{}: `{key}` {problem}", file.display())]
    Tensor {
        /// The file or directory.
        file: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A file of PyTorch.
    #[error(transparent)]
    Torch(#[from] TorchError),
    /// A folder of Megatron.
    #[error(transparent)]
    Megatron(#[from] MegatronError),
    /// The index of a sharded checkpoint is wrong.
    #[error("{}: {problem}", file.display())]
    Index {
        /// The index.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// There are no weights of a kind that can be read.
    #[error("{}: no model.safetensors, no pytorch_model.bin and no index of either{hint}", dir.display())]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// What is there instead.
        hint: String,
    },
    /// Keys and shapes do not match the configuration; everything wrong, at once.
    #[error("{0}")]
    Mismatch(Box<Mismatch>),
}

/// Everything about a checkpoint's keys that does not fit the configuration.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Where the weights were read.
    pub dir: PathBuf,
    /// Keys the model needs and the files lack, with the shape needed.
    pub missing: Vec<String>,
    /// Keys of the files that the model has no place for.
    pub unused: Vec<String>,
    /// Keys whose shape is another one.
    pub shapes: Vec<String>,
    /// Keys of tensors that hold no floating-point numbers.
    pub dtypes: Vec<String>,
}

impl Mismatch {
    /// Whether there is nothing to report.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unused.is_empty() && self.shapes.is_empty() && self.dtypes.is_empty()
    }
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: the weights do not fit config.json", self.dir.display())?;
        let groups = [
            ("missing", &self.missing),
            ("unused", &self.unused),
            ("of another shape", &self.shapes),
            ("of a dtype that cannot be read", &self.dtypes),
        ];
        for (name, keys) in groups {
            if !keys.is_empty() {
                write!(f, "\n  {} {name}:", keys.len())?;
                for key in keys {
                    write!(f, "\n    {key}")?;
                }
            }
        }
        write!(f, "\nis config.json the one these weights were written with?")
    }
}

/// Why a PEFT adapter could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The directory holds an adapter where a model is wanted.
    #[error("{} holds a PEFT adapter, not a model: load its base model{} and attach the adapter to it, or `terrarium merge` them first", dir.display(), base.as_ref().map(|b| format!(" ({b})")).unwrap_or_default())]
    NotAModel {
        /// The directory.
        dir: PathBuf,
        /// The model it was trained on, where adapter_config.json says.
        base: Option<String>,
    },
    /// adapter_config.json asks for something that is not supported.
    #[error("{}: {problem}", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// What is not supported.
        problem: String,
    },
    /// The adapter's keys do not fit the model.
    #[error("{}: the adapter does not fit the model:\n    {}", dir.display(), problems.join("\n    "))]
    Mismatch {
        /// The directory.
        dir: PathBuf,
        /// Every key that does not fit, and why.
        problems: Vec<String>,
    },
    /// The model has no adapter, or still has one.
    #[error("{0}")]
    Model(String),
    /// Attaching the adapter failed.
    #[error(transparent)]
    Lora(#[from] terrarium_models::lora::LoraError),
}
