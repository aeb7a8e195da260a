//! One binary for all operations: each is checked against a float64 scalar loop, its reference against central
//! differences, its fast path against its reference, and the properties that hold for any path.
//!
//! The backend is the one that the cargo features pick in [`common`].

mod adamw;
mod argmax;
mod attention;
mod attention_step;
mod causal_conv1d;
mod collective;
mod common;
mod cross_entropy;
mod cumsum;
mod embedding;
mod glu;
mod linear;
mod norm_residual;
mod path;
mod record;
mod repeated;
mod rms_norm_gated;
mod rotary;
mod sample;
mod selective_scan;
mod split;
mod ssd;
