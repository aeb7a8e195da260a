//! The safetensors format: a strict reader that names the key at fault, and an atomic writer.
//!
//! Layout: eight bytes with the header's length (little endian), the header (JSON: key -> dtype, shape, offsets), the
//! tensors' bytes, row-major, without holes.

mod convert;
mod header;
mod read;
mod write;

pub(crate) use convert::{cast, to_dtype};
pub use header::{ElementType, Entry, Header, parse_header};
pub use read::{MappedFile, read_safetensors};
pub use write::{write_safetensors, write_tensors};
