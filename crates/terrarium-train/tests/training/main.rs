//! Whole runs on small models: gradients, resuming, adapters, failures.

mod common;
mod devices;
mod failures;
mod gradients;
mod labels;
mod lora;
mod resume;
