//! Why a saved state could not be used.

use std::path::PathBuf;

/// Why a state could not be saved, read or gone on from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// A safetensors file of something else.
    #[error("{}: not a saved state: {problem}; states are written by `terrarium generate --save-state`", file.display())]
    NotAState {
        /// The file.
        file: PathBuf,
        /// What about it is otherwise.
        problem: String,
    },
    /// Written by another version of this program.
    #[error("{}: a state of format version {found}, and this program reads version {expected}: save it again", file.display())]
    Version {
        /// The file.
        file: PathBuf,
        /// Its version.
        found: String,
        /// The one that is read.
        expected: &'static str,
    },
    /// The file is not what was written.
    #[error("{}: damaged: {problem}; copy it again, or save the state again", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The state of another model.
    #[error(
        "the state is that of {found}, and the model here is {expected}, of {differs}: load the model that the state was saved with, or go without the state"
    )]
    OtherModel {
        /// What differs: `another configuration`, `other weights`.
        differs: &'static str,
        /// The model at hand.
        expected: String,
        /// That of the state.
        found: String,
    },
    /// The state of the same model in other numbers.
    #[error("the state was saved in {found}, and the model is loaded in {expected}: load it with --dtype {found}, or go without the state")]
    Dtype {
        /// Type of the model's weights.
        expected: String,
        /// That of the state's.
        found: String,
    },
    /// A state that cannot be kept.
    #[error("the state of {0} cannot be saved: only that of a single row, without padding, that is one document")]
    Rows(String),
}
