//! Hybrids of Mamba-2, attention and MLP layers.

pub mod bamba;
pub mod nemotron_h;
