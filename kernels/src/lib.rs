//! Operations of state-space models and attention for [Burn](burn), generic over its `Backend`.
//!
//! Every operation has a `reference` written in plain Burn tensor operations: slow, obvious, and the judge of
//! every faster path. Fast paths are chosen per backend through one extension trait, [`KernelBackend`]; which one
//! runs, and why, is answered by [`path::report`].
//!
//! # Dimension legend
//!
//! | letter | meaning | letter | meaning |
//! |---|---|---|---|
//! | `b` | batch | `h` | heads |
//! | `l` | sequence length | `g` | groups (`h % g == 0`) |
//! | `s` | key/value slots of attention | `r` | heads per group, `h / g` |
//! | `d` | model width | `p` | head width |
//! | `e` | inner width (`h * p`), channels | `n` | state width |
//! | `k` | convolution width | `c`, `q` | chunks and chunk length |
//! | `v` | vocabulary | | |
//!
//! The letters are used with the same meaning in every crate of the workspace.

pub mod adamw;
pub mod argmax;
pub mod attention;
pub mod autodiff;
pub mod backend;
pub mod causal_conv1d;
pub mod collective;
#[cfg(any(feature = "flex", feature = "ndarray"))]
mod cpu;
pub mod cross_entropy;
#[cfg(feature = "_cube")]
mod cube;
pub mod cumsum;
pub mod embedding;
pub mod error;
pub mod glu;
pub mod linear;
pub mod measure;
pub mod norm_residual;
pub mod path;
pub mod record;
pub mod rms_norm_gated;
pub mod rotary;
pub mod sample;
pub mod segments;
pub mod selective_scan;
pub mod split;
pub mod ssd;

pub use backend::{KernelBackend, TrainBackend};
pub use error::ArgumentError;
pub use path::{KernelChoice, Op};
pub use segments::Segments;
