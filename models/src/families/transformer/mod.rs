//! Transformers: attention and MLP in turn.

pub mod llama;
