//! Why files of PyTorch and folders of Megatron could not be read.

use std::path::PathBuf;

/// Why a file of PyTorch could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TorchError {
    /// The zip container is damaged, or made to mislead.
    #[error("{}: not a valid torch.save archive: {problem}", file.display())]
    Container {
        /// The file.
        file: PathBuf,
        /// What is wrong, naming the member where there is one.
        problem: String,
    },
    /// The file is of another format.
    #[error("{}: {found}, which is not read: {advice}", file.display())]
    Format {
        /// The file.
        file: PathBuf,
        /// What it is.
        found: &'static str,
        /// What to do instead.
        advice: &'static str,
    },
    /// The pickle in it.
    #[error("{}: {member}: {source}", file.display())]
    Pickle {
        /// The file.
        file: PathBuf,
        /// The member that holds the pickle.
        member: String,
        /// What is wrong with it.
        source: PickleError,
    },
    /// One entry of its dictionary.
    #[error("{}: `{key}` {problem}", file.display())]
    Entry {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Why a pickle could not be read. Offsets are those of the opcode, from the start of the pickle.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum PickleError {
    /// It calls something that is not on the list of plain data types.
    #[error("calls `{callable}` at byte {at}: refused: a checkpoint holds data, and nothing in it is ever run")]
    Refused {
        /// What would be called, as module and name.
        callable: String,
        /// Where.
        at: usize,
    },
    /// It ends too early.
    #[error("truncated: byte {at} asks for {needed} more bytes, {left} are left; download or copy the file again")]
    Truncated {
        /// Where.
        at: usize,
        /// Bytes that the opcode needs.
        needed: u64,
        /// Bytes there are.
        left: usize,
    },
    /// An opcode that no protocol has.
    #[error("byte {at} is 0x{opcode:02x}, which no pickle protocol up to 5 knows")]
    UnknownOpcode {
        /// Where.
        at: usize,
        /// The byte.
        opcode: u8,
    },
    /// An opcode takes more values than there are.
    #[error("the opcode 0x{opcode:02x} at byte {at} takes a value that was never put there")]
    Underflow {
        /// Where.
        at: usize,
        /// The byte.
        opcode: u8,
    },
    /// More of something than any checkpoint has.
    #[error("more than {limit} {what} at byte {at}: refused")]
    Limit {
        /// Where.
        at: usize,
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: usize,
    },
    /// Anything else.
    #[error("byte {at}: {problem}")]
    Malformed {
        /// Where.
        at: usize,
        /// What is wrong.
        problem: String,
    },
}

/// Why a Megatron folder could not be read.
#[derive(Debug, thiserror::Error)]
pub enum MegatronError {
    /// Folders or files are missing, or there are too many.
    #[error("{}: {problem}", path.display())]
    Layout {
        /// The folder or file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// One tensor cannot be put together.
    #[error("{}: `{key}` {problem}", file.display())]
    Key {
        /// The file of the rank at fault.
        file: PathBuf,
        /// The key, as in that file.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
}
