//! Building blocks below the mixers: linear, norms, embedding, rotary positions.

mod embedding;
pub(crate) mod linear;
mod norm;
mod rope;

pub use embedding::Embedding;
pub use linear::{Linear, Lora};
pub use norm::{Norm, NormConfig, NormKind, RmsNorm};
pub use rope::{RopeConfig, RopeScaling};
pub(crate) use rope::{RopeTables, rotate};
