//! The errors of this crate. Each says what was expected, what was found, and what to try.

mod checkpoint;
mod snapshot;
mod torch;

use std::path::{Path, PathBuf};

use terrarium_models::ConfigError;

pub use checkpoint::{AdapterError, CheckpointError, Mismatch};
pub use snapshot::SnapshotError;
pub use torch::{MegatronError, PickleError, TorchError};

/// What every function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any failure of this crate, by the part that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Finding or fetching the files of a model.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The weights and their index.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// tokenizer.json, tokenizer_config.json or a chat template.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A sampling option or the logits it was given.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The input of generation or scoring.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The device failed while decoding.
    #[error("the device failed while decoding: {0}")]
    Device(String),
    /// A saved state.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A PEFT adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// config.json describes no model this program knows.
    #[error("{}: {source}", file.display())]
    Config {
        /// The file that was read.
        file: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// A JSON file other than config.json does not parse.
    #[error("{}: not the JSON expected: {source}", file.display())]
    Json {
        /// The file that was read.
        file: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The operating system refused.
    #[error("cannot {action} {}: {source}{}", path.display(), io_advice(source))]
    Io {
        /// What was tried, as a verb: `read`, `write`.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The target of a save holds something that must not be replaced.
    #[error("{}: {reason}", path.display())]
    Target {
        /// The file or directory to be written.
        path: PathBuf,
        /// Why it is left alone.
        reason: String,
    },
}

impl Error {
    /// Wraps an I/O error with what was tried on which path; made for `map_err`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}

fn io_advice(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "; free some space or choose another folder: nothing was left half-written"
        }
        std::io::ErrorKind::FileTooLarge => "; the file size limit (ulimit -f) is too low: nothing was left half-written",
        _ => "",
    }
}

/// Why a model could not be found or fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The name is neither a directory nor `org/name[@revision]`.
    #[error("`{name}` is neither a directory with a config.json nor a model name of the form org/name[@revision]: {reason}")]
    Name {
        /// What was given.
        name: String,
        /// What about it is wrong.
        reason: String,
    },
    /// The directory exists and lacks a file.
    #[error("{}: no {file} here; a model directory holds config.json, model.safetensors (or its index and shards) and tokenizer.json", dir.display())]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// The missing file.
        file: String,
    },
    /// 401 or 403 on a file of a repository that exists: its terms have to be accepted.
    #[error(
        "{repo} is gated ({status} for {file}): accept its terms at {page} and {}",
        if *.token { "check that the token in HF_TOKEN belongs to the account that did" } else { "set HF_TOKEN to a token of that account (none is set)" }
    )]
    Gated {
        /// The repository.
        repo: String,
        /// The file that was refused.
        file: String,
        /// The HTTP status.
        status: u16,
        /// Where the terms are accepted.
        page: String,
        /// Whether a token was sent.
        token: bool,
    },
    /// 401 or 403 on the repository itself, which is how the hub also answers for names that do not exist.
    #[error(
        "{repo} does not exist or is private ({status} from {page}): check the spelling{}",
        if *.token { " and that the token in HF_TOKEN may read it" } else { ", or set HF_TOKEN if it is private or gated (none is set)" }
    )]
    Private {
        /// The repository.
        repo: String,
        /// The HTTP status.
        status: u16,
        /// The page of the repository.
        page: String,
        /// Whether a token was sent.
        token: bool,
    },
    /// 404 on the repository at this revision.
    #[error("{repo} has no revision `{revision}`, or there is no such repository (404): see {page}")]
    NotFound {
        /// The repository.
        repo: String,
        /// The branch, tag or commit.
        revision: String,
        /// The page of the repository.
        page: String,
    },
    /// The repository exists and lacks a needed file.
    #[error("{repo}@{revision} has no {file}; it has: {found}")]
    MissingFile {
        /// The repository.
        repo: String,
        /// The branch, tag or commit.
        revision: String,
        /// What was looked for.
        file: String,
        /// What is there.
        found: String,
    },
    /// The server sent fewer or more bytes than it had announced.
    #[error(
        "{repo}: {file} came with {found} of {expected} bytes; nothing incomplete was kept as a finished file, run the command again to go on"
    )]
    Truncated {
        /// The repository.
        repo: String,
        /// The file.
        file: String,
        /// Bytes announced.
        expected: u64,
        /// Bytes received.
        found: u64,
    },
    /// The connection failed, after retries.
    #[error(
        "cannot fetch {what} from {endpoint}: {reason}; what arrived is kept and the next try goes on from there (HF_ENDPOINT sets another server, --offline uses the cache alone)"
    )]
    Network {
        /// A file or `the file list of org/name`.
        what: String,
        /// The server.
        endpoint: String,
        /// What the client said.
        reason: String,
    },
    /// Offline and not in the cache.
    #[error("offline, and {repo}@{revision} is not complete in {}: missing {missing}; fetch it once with `terrarium download {repo}@{revision}` without --offline and HF_HUB_OFFLINE", cache.display())]
    Offline {
        /// The repository.
        repo: String,
        /// The branch, tag or commit.
        revision: String,
        /// The cache folder looked in.
        cache: PathBuf,
        /// The files that are not there.
        missing: String,
    },
    /// The data set exists and lacks what was asked for.
    #[error("data set {repo}: no Parquet or JSON lines of {wanted} on {places}; there are: {found}")]
    NoSplit {
        /// The repository.
        repo: String,
        /// Configuration and split.
        wanted: String,
        /// The branches looked at.
        places: String,
        /// Configurations and splits that are there.
        found: String,
    },
    /// Offline, and the split is not in the cache.
    #[error(
        "offline, and {wanted} of the data set {repo} is not complete in {}: run the same command once without --offline and HF_HUB_OFFLINE, which fetches it",
        cache.display()
    )]
    OfflineSplit {
        /// The repository.
        repo: String,
        /// Configuration and split.
        wanted: String,
        /// The cache folder looked in.
        cache: PathBuf,
    },
    /// The server's answer makes no sense for a model hub.
    #[error("{endpoint} answered with {what}: is HF_ENDPOINT a Hugging Face hub?")]
    Protocol {
        /// The server.
        endpoint: String,
        /// What it said.
        what: String,
    },
    /// The header of remote weights makes no sense.
    #[error("{repo}: {file} cannot be read: {problem}")]
    Header {
        /// The repository.
        repo: String,
        /// The file.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Another process holds the lock of this file.
    #[error("another process is downloading {file} into {}: wait for it, then run the command again", cache.display())]
    Locked {
        /// The file.
        file: String,
        /// The cache folder.
        cache: PathBuf,
    },
}

/// Why text could not be turned into ids or back.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is not a tokenizer.
    #[error("{file}: not a tokenizer this program can read: {reason}")]
    Read {
        /// The file, or `tokenizer` if it came from memory.
        file: String,
        /// What the library said.
        reason: String,
    },
    /// The file is a tokenizer of a kind that is not supported.
    #[error("{file}: this tokenizer cannot be used here: {what}; convert it to a tokenizer.json, or give token ids instead of text")]
    Unsupported {
        /// The file.
        file: String,
        /// What is not supported.
        what: String,
    },
    /// A directory has more than one SentencePiece model and none of them is called tokenizer.model.
    #[error("{} has several SentencePiece models ({}): name the one to use tokenizer.model, or move the others away", dir.display(), files.join(", "))]
    Several {
        /// The directory.
        dir: PathBuf,
        /// Names of the models.
        files: Vec<String>,
    },
    /// Encoding or decoding failed.
    #[error("the tokenizer could not {action}: {reason}")]
    Convert {
        /// `encode` or `decode`.
        action: &'static str,
        /// What the library said.
        reason: String,
    },
    /// There is no tokenizer and text was given.
    #[error("this model has no tokenizer.json: give token ids (--ids 5,17,3) instead of text")]
    None,
    /// There is no chat template and messages were given.
    #[error("this tokenizer has no chat template (tokenizer_config.json or chat_template.jinja): give a plain prompt")]
    NoTemplate,
    /// The chat template failed.
    #[error("the chat template failed: {0}")]
    Template(String),
    /// Training a tokenizer failed.
    #[error("cannot train a tokenizer: {0}")]
    Train(String),
}

/// Why no token could be sampled.
#[derive(Debug, thiserror::Error, Clone, PartialEq)]
pub enum SamplingError {
    /// An option outside its range.
    #[error("{name} is {value}, which is not {range}")]
    Option {
        /// The option, as it is spelt in generation_config.json.
        name: &'static str,
        /// Its value.
        value: f32,
        /// What it has to be.
        range: &'static str,
    },
    /// The model gave no usable number.
    #[error(
        "step {step}: {count} of {total} logits are not finite (first at id {id}): the weights or the precision are at fault; try --dtype f32"
    )]
    NotFinite {
        /// Step of generation, 0 for the first new token.
        step: usize,
        /// How many logits are NaN or infinite.
        count: usize,
        /// Of how many.
        total: usize,
        /// The first such id.
        id: usize,
    },
}

/// Why an input cannot be generated from or scored.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum InputError {
    /// An id the embedding has no row for.
    #[error("input {row}: id {id} at position {position} is out of range: the model has {vocab} ids (0 to {})", vocab.saturating_sub(1))]
    IdRange {
        /// Index of the input.
        row: usize,
        /// The id.
        id: u32,
        /// Where it stands.
        position: usize,
        /// Ids of the model.
        vocab: usize,
    },
    /// Nothing to start from.
    #[error("input {row} is empty and the model has no bos token to start from: give at least one token")]
    Empty {
        /// Index of the input.
        row: usize,
    },
    /// An option that makes no sense.
    #[error("{0}")]
    Option(String),
    /// Text was given and there is no tokenizer.
    #[error("input {row} holds text and this model has no tokenizer.json: give ids instead")]
    NoTokenizer {
        /// Index of the input.
        row: usize,
    },
}
