//! Tests of the whole, through the facade. See README.md in this folder.

mod adapters;
mod add_a_family;
mod architecture;
mod big;
mod common;
mod layouts;
mod packing;
mod parity;
mod streaming;
