//! Decoder language models for [Burn](burn): Transformer, Mamba, Mamba-2 and any hybrid of them, generic over the backend.
//!
//! There is one [`Decoder`]: embeddings, a list of layers (norm, mixer, residual), a final norm, a head. A Transformer,
//! a Mamba, a Mamba-2 and a hybrid differ in their list of layers only. This crate does no file, network or terminal access.
//!
//! The contract of every mixer and of the decoder is `forward(x, Option<Cache>, &Sequence) -> (y, Cache)`: right for any
//! length, any incoming state, any document boundary and any padding; differentiable through the state. One token at a
//! time, any chunking, and all at once give the same answer.
//!
//! Letters in shapes are those of [`terrarium_kernels`].

pub mod cache;
pub mod config;
pub mod decoder;
pub mod families;
pub mod init;
pub mod layers;
pub mod lora;
pub mod mixers;
pub mod params;
pub mod pattern;
pub mod presets;
mod reconcile;
pub mod sequence;
pub mod weights;

pub use cache::{Cache, LayerCache};
pub use config::{ConfigError, DecoderConfig, MixerConfig, Scaling};
pub use decoder::{Decoder, Stream};
pub use families::{Family, Part, Place};
pub use init::Init;
pub use lora::{LoraConfig, LoraError, LoraReport, LoraTargets};
pub use params::{ParamInit, ParamSource, ParamSpec};
pub use presets::Preset;
pub use sequence::{Context, Layout, LayoutError, Sequence, StepPlace};
pub use weights::{Rows, WeightEntry, WeightTable};
