//! The standard tasks, asked as lm-evaluation-harness asks them: its prompts, its tokenisation, its metrics.
//!
//! A document becomes requests: a context and a continuation whose log-probability counts. Documents come from local files, in the
//! fields of the data sets on the hub or in the forms of other collections; both are read.

mod csv;
mod formats;
mod harness;
mod metrics;
mod python;

use std::path::PathBuf;

pub use harness::{EvalOptions, EvalOutcome, Progress, evaluate};

/// What can go wrong with a task.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// Not a task.
    #[error("there is no task `{name}`; tasks: {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// Those there are.
        known: String,
    },
    /// No file of the task.
    #[error("{task}: none of {tried} in {dir}", dir = dir.display())]
    NoData {
        /// The task.
        task: String,
        /// The directory.
        dir: PathBuf,
        /// Names that were looked for.
        tried: String,
    },
    /// A document that is not of this task.
    #[error("{path}, document {number}: {reason}", path = path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// Its number, from 1.
        number: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Too few examples.
    #[error("{task}: {wanted} examples per prompt were asked for, and there are {found}")]
    Shots {
        /// The task.
        task: String,
        /// How many were asked for.
        wanted: usize,
        /// How many there are.
        found: usize,
    },
    /// The model cannot be given text.
    #[error("the model has no tokenizer")]
    NoTokenizer,
    /// An empty context needs a token to start from.
    #[error("{task}: a prompt is empty, and the tokenizer has neither a beginning nor an end of text to stand for it")]
    NoPrefix {
        /// The task.
        task: String,
    },
}

/// How a task asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// One context, several continuations.
    Choices,
    /// Several contexts, one continuation.
    Contexts,
    /// One context, one continuation.
    Single,
}

/// A task.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Task {
    pub name: &'static str,
    pub form: Form,
    /// Names of files below the data directory, the first that exists counts.
    pub files: &'static [&'static str],
    /// The same for examples; without any, examples are drawn from the documents themselves.
    pub shots: &'static [&'static str],
    /// Whether `acc_norm` is reported.
    pub normalised: bool,
    /// Version of the harness's task.
    pub version: f64,
}

pub(crate) const MMLU: &str = "mmlu";

/// All tasks but MMLU, which is many.
pub(crate) const TASKS: [Task; 7] = [
    Task {
        name: "lambada_openai",
        form: Form::Single,
        files: &["lambada_openai.jsonl", "mosaic/lambada_openai.jsonl"],
        shots: &[],
        normalised: false,
        version: 1.0,
    },
    Task {
        name: "hellaswag",
        form: Form::Choices,
        files: &["hellaswag.jsonl", "hellaswag/hellaswag_val_full.txt"],
        shots: &["hellaswag.train.jsonl"],
        normalised: true,
        version: 1.0,
    },
    Task {
        name: "piqa",
        form: Form::Choices,
        files: &["piqa.jsonl", "piqa/valid.jsonl", "mosaic/piqa.jsonl"],
        shots: &["piqa.train.jsonl"],
        normalised: true,
        version: 1.0,
    },
    Task {
        name: "arc_easy",
        form: Form::Choices,
        files: &["arc_easy.jsonl", "mosaic/arc_easy.jsonl"],
        shots: &["arc_easy.train.jsonl"],
        normalised: true,
        version: 1.0,
    },
    Task {
        name: "arc_challenge",
        form: Form::Choices,
        files: &["arc_challenge.jsonl", "mosaic/arc_challenge.jsonl"],
        shots: &["arc_challenge.train.jsonl"],
        normalised: true,
        version: 1.0,
    },
    Task {
        name: "winogrande",
        form: Form::Contexts,
        files: &["winogrande.jsonl", "mosaic/winogrande.jsonl"],
        shots: &["winogrande.train.jsonl"],
        normalised: false,
        version: 1.0,
    },
    Task {
        name: "openbookqa",
        form: Form::Choices,
        files: &["openbookqa.jsonl", "mosaic/openbook_qa.jsonl"],
        shots: &["openbookqa.train.jsonl"],
        normalised: true,
        version: 1.0,
    },
];

/// Names of all tasks.
pub fn task_names() -> Vec<&'static str> {
    TASKS.iter().map(|task| task.name).chain([MMLU]).collect()
}

/// One document, as a task asks it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Doc {
    /// Contexts: one, or one per choice.
    pub contexts: Vec<String>,
    /// Continuations without the blank before them: one per choice, or one.
    pub choices: Vec<String>,
    /// The right one.
    pub gold: usize,
}

impl Doc {
    /// Context and continuation of each request; `before` stands before every context.
    pub fn requests(&self, before: &str) -> Vec<(String, String)> {
        let count = self.contexts.len().max(self.choices.len());
        let context = |i: usize| &self.contexts[i.min(self.contexts.len() - 1)];
        let choice = |i: usize| &self.choices[i.min(self.choices.len() - 1)];
        (0..count).map(|i| (format!("{before}{}", context(i)), format!(" {}", choice(i)))).collect()
    }

    /// The document with its answer, as an example in another's prompt.
    pub fn example(&self) -> String {
        let context = &self.contexts[self.gold.min(self.contexts.len() - 1)];
        let choice = &self.choices[self.gold.min(self.choices.len() - 1)];
        format!("{context} {choice}\n\n")
    }
}
