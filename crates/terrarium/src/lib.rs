//! terrarium: a portable zoo of language models for [Burn](burn).
//!
//! Transformer, Mamba, Mamba-2 and any hybrid of them, written once and generic over Burn's `Backend`; the backend is a cargo
//! feature. This crate only gathers the others:
//!
//! - [`kernels`]: operations of state-space models and attention, references and fast paths;
//! - [`models`]: the decoder, its mixers, caches, configurations and weight tables;
//! - [`runtime`]: checkpoints, the Hugging Face hub, tokenizers, sampling, generation, scoring;
//! - [`train`]: training and fine-tuning on burn-train;
//! - [`eval`]: experiments that repeat claims of papers in miniature.

pub use burn;
pub use terrarium_eval as eval;
pub use terrarium_kernels as kernels;
pub use terrarium_models as models;
pub use terrarium_runtime as runtime;
pub use terrarium_train as train;

/// What most programs need.
pub mod prelude {
    pub use crate::kernels::backend::{BackendTask, DeviceSpec, with_backend};
    pub use crate::kernels::{KernelBackend, TrainBackend};
    pub use crate::models::{Cache, Decoder, DecoderConfig, Layout};
}
