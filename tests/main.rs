//! Tests of the whole, through the facade. See README.md in this folder.

mod adapters;
mod add_a_family;
mod architecture;
mod big;
mod common;
mod decoding;
#[cfg(all(feature = "fusion", any(feature = "cuda", feature = "vulkan")))]
mod fusion;
mod layouts;
mod masters;
mod packing;
mod parity;
mod prefill;
mod streaming;
