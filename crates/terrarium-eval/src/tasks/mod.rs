//! The standard tasks, asked as lm-evaluation-harness asks them: its prompts, its tokenisation, its metrics.
//!
//! A document becomes requests: a context and a continuation whose log-probability counts, or a context that is continued greedily. Documents
//! come from the data sets of the hub that the harness names, or from local files, in the fields of these data sets or in the forms of
//! other collections. Prompts, metrics and
//! versions are those of lm-evaluation-harness 0.4.13 (its folder `lm_eval/tasks`); `tests/python/lm_eval_compare.py` holds both beside each other.

mod answers;
mod csv;
mod encode;
mod formats;
mod harness;
mod literal;
mod metrics;
mod parquet;
mod python;
mod rows;
mod sources;
mod store;
mod subjects;

use std::path::PathBuf;

pub use harness::{EvalOptions, EvalOutcome, Progress, Questions, evaluate};
pub use sources::Data;

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
    /// A file for more than it can be for.
    #[error("{path} is one file of documents: {reason}; a directory has room for more, and without --data the hub is asked", path = path.display())]
    OneFile {
        /// The file.
        path: PathBuf,
        /// What else was asked for.
        reason: String,
    },
    /// A file that is not what its ending says.
    #[error("{path} cannot be read as Parquet: {reason}", path = path.display())]
    Parquet {
        /// The file; of the cache the blob, not the link.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A compression that is not built in.
    #[error("{path}: column {column} is compressed with {codec}; Snappy, gzip, Zstandard and none are read", path = path.display())]
    Codec {
        /// The file.
        path: PathBuf,
        /// The first such column.
        column: String,
        /// Its compression.
        codec: String,
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
    /// No room for an answer.
    #[error("{task}: answers of {answer} tokens do not fit into {most}; a larger --max-length is needed")]
    NoRoom {
        /// The task.
        task: String,
        /// Longest answer in tokens.
        answer: usize,
        /// Longest prompt and answer in tokens.
        most: usize,
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
    /// The same; what counts is the probability of those that are true.
    Mass,
    /// Several contexts, one continuation.
    Contexts,
    /// One context, one continuation.
    Single,
    /// One context, continued greedily up to one of these; the result is compared with answers, and articles do not count if so said.
    Written { until: &'static [&'static str], articles: bool },
    /// One context, continued greedily to the end of the line, and the probability of having no answer.
    Squad,
}

/// A split of a data set on the hub, as the harness's task names it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hub {
    pub data_set: &'static str,
    /// None: the one there is.
    pub config: Option<&'static str>,
    pub split: &'static str,
}

const fn hub(data_set: &'static str, config: &'static str, split: &'static str) -> Hub {
    Hub { data_set, config: Some(config), split }
}

/// A data set without named configurations.
const fn plain(data_set: &'static str, split: &'static str) -> Hub {
    Hub { data_set, config: None, split }
}

/// A task.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Task {
    pub name: &'static str,
    pub form: Form,
    /// Where the hub has the documents. Examples are its split `train`.
    pub hub: Hub,
    /// Names of files below the data directory, the first that exists counts; one in `.jsonl` at the top may end in `.parquet` as well.
    pub files: &'static [&'static str],
    /// The same for examples; without any, examples are drawn from the documents themselves.
    pub shots: &'static [&'static str],
    /// Whether the harness draws one example more than it shows, to drop the document itself. It does where the task has no test split.
    pub spare: bool,
    /// Whether it takes examples at all; the harness asks TruthfulQA without, whatever was said.
    pub shown: bool,
    /// Between examples.
    pub separator: &'static str,
    /// Before everything.
    pub description: &'static str,
    /// Whether `acc_norm` is reported.
    pub normalised: bool,
    /// Version of the harness's task.
    pub version: f64,
}

/// Choices, with examples from a file of their own and a test split.
const PLAIN: Task = Task {
    name: "",
    form: Form::Choices,
    hub: plain("", "validation"),
    files: &[],
    shots: &[],
    spare: false,
    shown: true,
    separator: "\n\n",
    description: "",
    normalised: false,
    version: 1.0,
};

pub(crate) const MMLU: &str = "mmlu";

/// A subject of MMLU; its configuration is its own name, and examples are the split `dev`.
pub(crate) const SUBJECT: Task = Task { name: MMLU, hub: plain("cais/mmlu", "test"), ..PLAIN };

const TRUTHFULQA: Hub = hub("truthfulqa/truthful_qa", "multiple_choice", "validation");

/// Where short answers end.
const PHRASE: &[&str] = &["\n", ".", ","];

/// All tasks but MMLU, which is many.
pub(crate) const TASKS: [Task; 15] = [
    Task {
        name: "lambada_openai",
        hub: hub("EleutherAI/lambada_openai", "default", "test"),
        form: Form::Single,
        files: &["lambada_openai.jsonl", "mosaic/lambada_openai.jsonl"],
        ..PLAIN
    },
    Task {
        name: "hellaswag",
        hub: plain("Rowan/hellaswag", "validation"),
        files: &["hellaswag.jsonl", "hellaswag/hellaswag_val_full.txt"],
        shots: &["hellaswag.train.jsonl"],
        spare: true,
        normalised: true,
        ..PLAIN
    },
    Task {
        name: "piqa",
        hub: plain("baber/piqa", "validation"),
        files: &["piqa.jsonl", "piqa/valid.jsonl", "mosaic/piqa.jsonl"],
        shots: &["piqa.train.jsonl"],
        spare: true,
        normalised: true,
        ..PLAIN
    },
    Task {
        name: "arc_easy",
        hub: hub("allenai/ai2_arc", "ARC-Easy", "test"),
        files: &["arc_easy.jsonl", "mosaic/arc_easy.jsonl"],
        shots: &["arc_easy.train.jsonl"],
        normalised: true,
        ..PLAIN
    },
    Task {
        name: "arc_challenge",
        hub: hub("allenai/ai2_arc", "ARC-Challenge", "test"),
        files: &["arc_challenge.jsonl", "mosaic/arc_challenge.jsonl"],
        shots: &["arc_challenge.train.jsonl"],
        normalised: true,
        ..PLAIN
    },
    Task {
        name: "winogrande",
        hub: hub("allenai/winogrande", "winogrande_xl", "validation"),
        form: Form::Contexts,
        files: &["winogrande.jsonl", "mosaic/winogrande.jsonl"],
        shots: &["winogrande.train.jsonl"],
        spare: true,
        ..PLAIN
    },
    Task {
        name: "openbookqa",
        hub: hub("allenai/openbookqa", "main", "test"),
        files: &["openbookqa.jsonl", "mosaic/openbook_qa.jsonl"],
        shots: &["openbookqa.train.jsonl"],
        normalised: true,
        ..PLAIN
    },
    Task {
        name: "boolq",
        hub: hub("aps/super_glue", "boolq", "validation"),
        files: &["boolq.jsonl"],
        shots: &["boolq.train.jsonl"],
        spare: true,
        version: 2.0,
        ..PLAIN
    },
    Task { name: "race", hub: hub("EleutherAI/race", "high", "test"), files: &["race.jsonl"], version: 3.0, ..PLAIN },
    Task {
        name: "pubmedqa",
        hub: hub("bigbio/pubmed_qa", "pubmed_qa_labeled_fold0_source", "test"),
        files: &["pubmedqa.jsonl"],
        shots: &["pubmedqa.train.jsonl"],
        ..PLAIN
    },
    Task { name: "truthfulqa_mc1", hub: TRUTHFULQA, files: &["truthfulqa.jsonl"], spare: true, shown: false, version: 2.0, ..PLAIN },
    Task {
        name: "truthfulqa_mc2",
        hub: TRUTHFULQA,
        form: Form::Mass,
        files: &["truthfulqa.jsonl"],
        spare: true,
        shown: false,
        version: 3.0,
        ..PLAIN
    },
    Task {
        name: "nq_open",
        hub: plain("google-research-datasets/nq_open", "validation"),
        form: Form::Written { until: PHRASE, articles: true },
        files: &["nq_open.jsonl"],
        shots: &["nq_open.train.jsonl"],
        spare: true,
        separator: "\n",
        description: "Answer these questions:\n\n",
        version: 4.0,
        ..PLAIN
    },
    Task {
        name: "triviaqa",
        hub: hub("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
        form: Form::Written { until: PHRASE, articles: false },
        files: &["triviaqa.jsonl"],
        shots: &["triviaqa.train.jsonl"],
        spare: true,
        version: 3.0,
        ..PLAIN
    },
    Task {
        name: "squadv2",
        hub: plain("lighteval/squad_v2", "validation"),
        form: Form::Squad,
        files: &["squadv2.jsonl"],
        shots: &["squadv2.train.jsonl"],
        spare: true,
        version: 3.0,
        ..PLAIN
    },
];

/// Names of all tasks; `mmlu` stands for its fields and subjects as well.
pub fn task_names() -> Vec<&'static str> {
    TASKS.iter().map(|task| task.name).chain([MMLU]).chain(subjects::FIELDS.iter().map(|field| field.name)).collect()
}

/// One question to the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// Log-probability of a continuation.
    Score { context: String, continuation: String },
    /// A greedy continuation up to one of these.
    Write { context: String, until: &'static [&'static str] },
}

/// One document, as a task asks it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Doc {
    /// Contexts: one, or one per choice.
    pub contexts: Vec<String>,
    /// Continuations without the blank before them: one per choice, or one. None where the model writes.
    pub choices: Vec<String>,
    /// The right one.
    pub gold: usize,
    /// Whether each choice is true ([`Form::Mass`]).
    pub truths: Vec<bool>,
    /// Answers that are right, where the model writes.
    pub answers: Vec<String>,
}

impl Doc {
    /// Requests of a form; `before` stands before every context.
    pub fn requests(&self, form: Form, before: &str) -> Vec<Request> {
        let context = |i: usize| format!("{before}{}", self.contexts[i.min(self.contexts.len() - 1)]);
        let score = |i: usize, choice: &str| Request::Score { context: context(i), continuation: format!(" {choice}") };
        match form {
            Form::Written { until, .. } => vec![Request::Write { context: context(0), until }],
            Form::Squad => vec![Request::Write { context: context(0), until: &["\n"] }, score(0, UNANSWERABLE)],
            _ => {
                let count = self.contexts.len().max(self.choices.len());
                (0..count).map(|i| score(i, &self.choices[i.min(self.choices.len() - 1)])).collect()
            }
        }
    }

    /// The document with its answer, as an example in another's prompt. The harness puts a blank before every answer, two where the answer
    /// brings its own.
    pub fn example(&self, task: &Task) -> String {
        let context = &self.contexts[self.gold.min(self.contexts.len() - 1)];
        let (blanks, answer) = match task.form {
            Form::Single => ("  ", self.choices.first()),
            Form::Squad => ("  ", self.answers.first()),
            Form::Written { .. } => (" ", self.answers.first()),
            _ => (" ", self.choices.get(self.gold.min(self.choices.len().saturating_sub(1)))),
        };
        let answer = answer.map_or(if task.form == Form::Squad { UNANSWERABLE } else { "" }, String::as_str);
        format!("{context}{blanks}{answer}{}", task.separator)
    }
}

/// What SQuAD 2.0's task offers as the answer to a question without one.
const UNANSWERABLE: &str = "unanswerable";
