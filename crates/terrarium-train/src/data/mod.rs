//! From files to batches of token ids: reading, templates, packing, order.

mod batch;
mod cursor;
mod examples;
mod files;
mod packing;
mod split;

use std::path::PathBuf;

use terrarium_runtime::Tokenizer;

use crate::config::{DataConfig, TrainConfig};

pub use batch::{Batch, IGNORED};
pub use cursor::{Cursor, Sampler, permutation};
pub use examples::{Example, parse_example};
pub use files::{Source, read_sources};
pub use packing::{Document, Overflow, PackStats, PackedRows};

/// What is wrong with the data. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file or directory that is not there, or cannot be read.
    #[error("cannot read data {path}: {source}", path = path.display())]
    Read {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A directory without data files.
    #[error("{path} holds no .txt, .md, .jsonl or .json file", path = path.display())]
    NoFiles {
        /// The directory.
        path: PathBuf,
    },
    /// Text that is not UTF-8.
    #[error("{path} is not UTF-8 text (byte {offset}); convert it, for example with iconv", path = path.display())]
    NotText {
        /// The file.
        path: PathBuf,
        /// Where the first bad byte is.
        offset: usize,
    },
    /// An example that cannot be used.
    #[error("{path} {place}: {reason}", path = path.display())]
    Example {
        /// The file.
        path: PathBuf,
        /// `line 7` or `item 7`.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nothing to train on.
    #[error("no {kind} data: {paths} hold nothing but white space; add text or examples", paths = list(paths))]
    Empty {
        /// `training` or `validation`.
        kind: &'static str,
        /// Where it was looked for.
        paths: Vec<PathBuf>,
    },
    /// Less text than one row.
    #[error(
        "the {kind} text has {tokens} tokens, less than one sequence of train.sequence_length = {length}; \
         add text, or set train.sequence_length={suggestion} or lower"
    )]
    TooShort {
        /// `training` or `validation`.
        kind: &'static str,
        /// Tokens found.
        tokens: usize,
        /// Tokens wanted.
        length: usize,
        /// What would fit.
        suggestion: usize,
    },
    /// Examples, but no completion within reach.
    #[error(
        "no completion fits: all {examples} examples have prompts of train.sequence_length = {length} tokens or more; raise it, or shorten the prompts"
    )]
    NothingToLearn {
        /// Examples read.
        examples: usize,
        /// Tokens per row.
        length: usize,
    },
    /// Ids that the model does not have.
    #[error("the tokenizer makes id {id}, but the model's vocab_size is {vocab}; use the model's own tokenizer, or raise vocab_size")]
    Vocabulary {
        /// The id.
        id: u32,
        /// Size of the model's vocabulary.
        vocab: usize,
    },
    /// No tokenizer.
    #[error(
        "no tokenizer: set data.tokenizer to a tokenizer.json, a directory that holds one, or bpe:SIZE to make one from the training text"
    )]
    NoTokenizer,
    /// A bad value of `data.tokenizer`.
    #[error("data.tokenizer = \"{value}\": {reason}")]
    BadTokenizer {
        /// The value.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Packed training and validation rows.
#[derive(Debug)]
pub struct Corpus {
    /// Rows to learn from.
    pub train: PackedRows,
    /// Rows to validate on.
    pub valid: Option<PackedRows>,
    /// What was decided, for the user.
    pub notes: Vec<String>,
}

impl Corpus {
    /// Reads, tokenises, splits and packs the data of a run.
    ///
    /// # Errors
    /// [`DataError`] names the file and what to do.
    pub fn load(
        data: &DataConfig,
        train: &TrainConfig,
        tokenizer: &Tokenizer,
        eos: Option<u32>,
        vocab: usize,
    ) -> Result<Self, crate::TrainError> {
        let mut notes = Vec::new();
        let documents = tokenise("training", &data.train, data, tokenizer, eos, vocab)?;
        let (documents, held_out) = if !data.valid.is_empty() {
            (documents, Some(tokenise("validation", &data.valid, data, tokenizer, eos, vocab)?))
        } else if data.valid_fraction > 0.0 {
            let (kept, held_out, how) = split::hold_out(documents, data.valid_fraction, train.seed);
            notes.push(how);
            (kept, (!held_out.is_empty()).then_some(held_out))
        } else {
            (documents, None)
        };
        let rows = pack("training", documents, train.sequence_length)?;
        notes.push(format!("training data: {}", rows.stats));
        let valid = match held_out {
            // What was held out of a small corpus may be shorter than a row; it is measured all the same.
            Some(documents) => Some(PackedRows::pack(documents, train.sequence_length)).filter(|rows| rows.stats.labelled > 0),
            None => None,
        };
        match &valid {
            Some(rows) => notes.push(format!("validation data: {}", rows.stats)),
            None => notes.push("no validation data".to_string()),
        }
        Ok(Self { train: rows, valid, notes })
    }
}

fn pack(kind: &'static str, documents: Vec<Document>, length: usize) -> Result<PackedRows, DataError> {
    let tokens: usize = documents.iter().map(|document| document.ids.len()).sum();
    let text = documents.iter().all(|document| document.overflow == Overflow::Split);
    if text && tokens <= length {
        return Err(DataError::TooShort { kind, tokens, length, suggestion: tokens.saturating_sub(1).max(1) });
    }
    let examples = documents.len();
    let rows = PackedRows::pack(documents, length);
    if rows.stats.labelled == 0 {
        return Err(DataError::NothingToLearn { examples, length });
    }
    Ok(rows)
}

fn tokenise(
    kind: &'static str,
    paths: &[PathBuf],
    data: &DataConfig,
    tokenizer: &Tokenizer,
    eos: Option<u32>,
    vocab: usize,
) -> Result<Vec<Document>, crate::TrainError> {
    let sources = read_sources(paths, data)?;
    let mut documents = Vec::new();
    for source in sources {
        examples::tokenise(source, data, tokenizer, eos, &mut documents)?;
    }
    documents.retain(|document| document.ids.len() > 1);
    if documents.is_empty() {
        return Err(DataError::Empty { kind, paths: paths.to_vec() }.into());
    }
    let highest = documents.iter().flat_map(|document| document.ids.iter().copied()).max().unwrap_or(0);
    if highest as usize >= vocab {
        return Err(DataError::Vocabulary { id: highest, vocab }.into());
    }
    Ok(documents)
}
