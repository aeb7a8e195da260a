//! Claims of papers in miniature: small experiments, each from a recipe to a report. And the standard tasks, asked as
//! lm-evaluation-harness asks them ([`tasks`]).
//!
//! A recipe (`examples/experiments/`) names architectures, sizes and seeds. Every combination is a *cell*: it is run alone, its
//! result is a file, and the report is made of these files. So a run that was stopped goes on where it was. All architectures take
//! the same way through the code: they differ in the list of layers alone.

pub mod error;
pub mod experiment;
pub mod tasks;
pub mod timing;

pub use error::EvalError;
pub use experiment::{Event, Options, Outcome, Recipe, Summary, Watch, recipe_names, run};
pub use tasks::{Data, EvalOptions, EvalOutcome, Questions, TaskError, evaluate, task_names};
