//! Files of tensors: strict readers of safetensors and PyTorch files that name the key at fault, and an atomic writer of
//! safetensors.
//!
//! Layout of safetensors: eight bytes with the header's length (little endian), the header (JSON: key -> dtype, shape, offsets), the
//! tensors' bytes, row-major, without holes.

mod convert;
mod header;
mod read;
mod torch;
mod write;

pub(crate) use convert::{as_stored, cast, to_dtype};
pub use header::{ElementType, Entry, Header, parse_header};
pub use read::{MappedFile, read_safetensors};
pub use write::{TensorSpec, write_safetensors, write_safetensors_lazily, write_tensors};
