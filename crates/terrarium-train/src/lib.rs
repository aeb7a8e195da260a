//! Training and fine-tuning: data, packing, optimiser, schedule, step-exact checkpoints, and burn-train's dashboard.
//!
//! A run is described by a [`RunConfig`] and started by [`run()`]. The step loop ([`trainer`]) knows no terminal: it tells
//! [`Observer`]s what happened, and one of them feeds burn-train's metrics and dashboard.

pub mod checkpoint;
pub mod config;
mod dashboard;
pub mod data;
pub mod error;
pub mod event;
mod finite;
pub mod gradients;
mod host;
mod interrupt;
pub mod log;
pub mod loss;
pub mod memory;
mod merge;
pub mod optim;
mod params;
pub mod plot;
mod run;
pub mod schedule;
mod segments;
mod setup;
mod team;
pub mod trainer;

pub use config::{BaseConfig, ConfigError, DataConfig, LoraSection, OutputConfig, RunConfig, TrainConfig};
pub use error::TrainError;
pub use event::{Event, Observer, Outcome, StepReport, ValidReport};
pub use interrupt::{StopFlag, install_signal_handler, leave_at_once};
pub use merge::{MergeReport, merge};
pub use plot::plot;
pub use run::{Display, Resume, RunOptions, RunReport, run, run_on};
pub use setup::{Plan, plan};
