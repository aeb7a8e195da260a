//! Checkpoints, the Hugging Face hub, tokenizers, sampling and generation.
//!
//! From a name to text: [`resolve`] finds the files, [`load`] makes a model of them, [`generate()`] continues prompts and
//! [`score()`] weighs given text; a [`Snapshot`] keeps what was read. [`save`] writes a directory that transformers opens;
//! what it and the helpers in [`atomic`] write appears whole or not at all.

pub mod atomic;
pub mod checkpoint;
pub mod error;
mod forward;
pub mod generate;
pub mod hub;
mod pickle;
pub mod sampling;
pub mod score;
pub mod snapshot;
pub mod tensors;
pub mod tokenizer;

pub use atomic::{StagedDir, write_atomic, write_atomic_with};
pub use checkpoint::{
    AdapterConfig, Checkpoint, GenerationConfig, Layout, LoadOptions, Loaded, Precision, SaveOptions, Saved, TensorInfo, compare, convert,
    load, load_adapter, load_layer, read_config, read_config_with, save, save_adapter,
};
pub use error::{
    AdapterError, CheckpointError, Error, HubError, InputError, MegatronError, Mismatch, PickleError, Result, SamplingError, SnapshotError,
    TokenizerError, TorchError,
};
pub use forward::{prefill_chunk, read_prompts};
pub use generate::{Finish, GenerateOptions, Generated, Piece, Row, Timings, generate, prompt_ids};
pub use hub::{DataSet, Files, HubOptions, Progress, RemoteFile, RepoId, RepoKind, Resolved, SplitFiles, remote_headers, resolve};
pub use sampling::{Sampler, Sampling};
pub use score::{Score, ScoreInput, ScoreOptions, score};
pub use snapshot::Snapshot;
pub use tensors::{read_safetensors, write_safetensors};
pub use tokenizer::{Message, TextStream, Tokenizer};
