//! Asking a model all questions of some tasks, a batch at a time, each answer kept as soon as it is there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Map, Value, json};
use terrarium_kernels::KernelBackend;
use terrarium_models::{Decoder, DecoderConfig};
use terrarium_runtime::{ScoreInput, ScoreOptions, Tokenizer, score, write_atomic};
use terrarium_train::StopFlag;
use terrarium_train::config::changed_keys;

use super::formats::{self, Subject};
use super::metrics::{self, Answer};
use super::python::Random;
use super::{Doc, Form, MMLU, TASKS, Task, TaskError, task_names};
use crate::EvalError;

/// What to ask.
#[derive(Debug, Clone)]
pub struct EvalOptions {
    /// Names of tasks.
    pub tasks: Vec<String>,
    /// Where their files are.
    pub data: PathBuf,
    /// Examples before each question.
    pub num_fewshot: usize,
    /// Documents of each task, from the first; of each subject for MMLU.
    pub limit: Option<usize>,
    /// Longest prompt and answer in tokens; what is beyond is cut off at the start. By default what the model was made for, or 2048.
    pub max_length: Option<usize>,
    /// Put a beginning of text before every prompt, for models that were trained so.
    pub add_bos: bool,
    /// Tokens per pass, padding included.
    pub batch_tokens: usize,
    /// Where answers and results go; nowhere by default.
    pub out_dir: Option<PathBuf>,
    /// Whether that may hold answers of the same questions to the same model.
    pub resume: bool,
    /// Name of the model, for the record.
    pub model: String,
    /// Raised to leave after the running batch.
    pub stop: StopFlag,
}

/// Told how far it is.
pub trait Progress {
    /// So many questions in all, so many answered before.
    fn start(&mut self, questions: usize, answered: usize);
    /// So many more are answered.
    fn advance(&mut self, questions: usize);
    /// Something worth telling.
    fn note(&mut self, text: &str);
}

impl Progress for () {
    fn start(&mut self, _questions: usize, _answered: usize) {}
    fn advance(&mut self, _questions: usize) {}
    fn note(&mut self, _text: &str) {}
}

/// How it ended.
#[derive(Debug, Clone)]
pub enum EvalOutcome {
    /// Everything is answered: results in the shape of the harness.
    Finished(Value),
    /// Someone asked to stop; answers are kept where there is a directory for them.
    Interrupted {
        /// Questions answered.
        answered: usize,
        /// All questions.
        questions: usize,
    },
}

/// Questions of one task, or of one subject of MMLU.
struct Work {
    task: Task,
    name: String,
    alias: String,
    group: Option<&'static str>,
    docs: Vec<Doc>,
    /// What stands before each document's context.
    before: Vec<String>,
    original: usize,
    shots: usize,
    answers: Vec<Answer>,
}

/// Asks everything.
///
/// # Errors
/// [`EvalError`]; answers that were kept stay.
pub fn evaluate<B: KernelBackend>(
    model: &Decoder<B>,
    config: &DecoderConfig,
    tokenizer: Option<&Tokenizer>,
    options: &EvalOptions,
    progress: &mut dyn Progress,
    device: &B::Device,
) -> Result<EvalOutcome, EvalError> {
    let tokenizer = tokenizer.ok_or(TaskError::NoTokenizer)?;
    let begun = Instant::now();
    let mut works = prepare(options)?;
    let encoder = Encoder { tokenizer, config, options };
    let store = options.out_dir.as_deref().map(|dir| Store::open(dir, options)).transpose()?;
    for work in &mut works {
        if let Some(store) = &store {
            work.answers = store.answers(work)?;
        }
    }
    let questions: usize = works.iter().map(|work| work.docs.len()).sum();
    let mut answered: usize = works.iter().map(|work| work.answers.len()).sum();
    progress.start(questions, answered);
    for work in &mut works {
        let mut log = store.as_ref().map(|store| store.log(work)).transpose()?;
        let done: Vec<usize> = work.answers.iter().map(|answer| answer.doc_id).collect();
        let left: Vec<usize> = (0..work.docs.len()).filter(|id| !done.contains(id)).collect();
        for ids in left.chunks(GROUP) {
            if options.stop.requested() {
                return Ok(EvalOutcome::Interrupted { answered, questions });
            }
            let answers = ask(work, ids, model, &encoder, device)?;
            if let Some(log) = &mut log {
                log.append(&answers)?;
            }
            answered += answers.len();
            progress.advance(answers.len());
            work.answers.extend(answers);
        }
        work.answers.sort_by_key(|answer| answer.doc_id);
    }
    let results = results(&works, options, begun.elapsed().as_secs_f64());
    if let Some(store) = &store {
        let text = serde_json::to_string_pretty(&results).unwrap_or_default() + "\n";
        write_atomic(&store.dir.join("results.json"), text.as_bytes())?;
    }
    Ok(EvalOutcome::Finished(results))
}

/// Documents between two looks at the stop flag.
const GROUP: usize = 32;

fn ask<B: KernelBackend>(
    work: &Work,
    ids: &[usize],
    model: &Decoder<B>,
    encoder: &Encoder<'_>,
    device: &B::Device,
) -> Result<Vec<Answer>, EvalError> {
    let mut inputs = Vec::new();
    for id in ids {
        for (context, continuation) in work.docs[*id].requests(&work.before[*id]) {
            inputs.push(encoder.encode(&work.name, &context, &continuation)?);
        }
    }
    let options = ScoreOptions { top: 0, batch_tokens: encoder.options.batch_tokens };
    let scores = score(model, encoder.config, None, &inputs, &options, device)?;
    let mut scores = scores.into_iter().map(|score| (score.sum, score.greedy.iter().all(|greedy| *greedy)));
    let answers = ids.iter().map(|id| {
        let doc = &work.docs[*id];
        let count = doc.contexts.len().max(doc.choices.len());
        Answer::new(&work.task, *id, doc, scores.by_ref().take(count).collect())
    });
    Ok(answers.collect())
}

/// From text to ids as the harness does it.
struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    config: &'a DecoderConfig,
    options: &'a EvalOptions,
}

impl Encoder<'_> {
    /// Context and continuation are tokenised together; blanks at the end of the context belong to the continuation, whose tokens are
    /// those of the whole after as many as the context alone has. What is too long is cut off at the start.
    fn encode(&self, task: &str, context: &str, continuation: &str) -> Result<ScoreInput, EvalError> {
        let add = self.options.add_bos;
        let bare = context.trim_end();
        let (mut ids, from) = if context.is_empty() {
            let prefix = self.tokenizer.bos().or(self.tokenizer.eos()).or(self.config.eos.first().copied());
            let prefix = prefix.ok_or_else(|| TaskError::NoPrefix { task: task.to_string() })?;
            let mut ids = vec![prefix];
            ids.extend(self.tokenizer.encode(continuation, false)?);
            (ids, 1)
        } else {
            let whole = self.tokenizer.encode(&format!("{context}{continuation}"), add)?;
            let before = self.tokenizer.encode(bare, add)?.len();
            (whole, before)
        };
        let most = self.options.max_length.or(self.config.max_positions).unwrap_or(2048) + 1;
        let cut = ids.len().saturating_sub(most);
        ids.drain(..cut);
        // The first token has nothing before it that could predict it.
        let from = from.saturating_sub(cut).clamp(1, ids.len().max(1));
        Ok(ScoreInput::Ids { ids, from: Some(from) })
    }
}

/// Reads all documents, draws all examples.
fn prepare(options: &EvalOptions) -> Result<Vec<Work>, EvalError> {
    let mut works = Vec::new();
    for name in &options.tasks {
        if name == MMLU {
            for subject in formats::mmlu(&options.data)? {
                works.push(subject_work(subject, options)?);
            }
            continue;
        }
        let task = TASKS.iter().find(|task| task.name == name);
        let task = *task.ok_or_else(|| TaskError::Unknown { name: name.clone(), known: task_names().join(", ") })?;
        works.push(task_work(task, options)?);
    }
    Ok(works)
}

fn subject_work(subject: Subject, options: &EvalOptions) -> Result<Work, EvalError> {
    let (wanted, found) = (options.num_fewshot, subject.shots.len());
    if wanted > found {
        return Err(TaskError::Shots { task: format!("{MMLU}_{}", subject.name), wanted, found }.into());
    }
    let examples: String = subject.shots[..wanted].iter().map(Doc::example).collect();
    let before = subject.description() + &examples;
    let original = subject.docs.len();
    let docs: Vec<Doc> = subject.docs.into_iter().take(options.limit.unwrap_or(usize::MAX)).collect();
    let task = Task { name: MMLU, form: Form::Choices, files: &[], shots: &[], normalised: false, version: 1.0 };
    Ok(Work {
        task,
        name: format!("{MMLU}_{}", subject.name),
        alias: subject.name.replace('_', " "),
        group: Some(MMLU),
        before: vec![before; docs.len()],
        docs,
        original,
        shots: wanted,
        answers: Vec::new(),
    })
}

/// The harness's seed for drawing examples.
const SHOT_SEED: u32 = 1234;

fn task_work(task: Task, options: &EvalOptions) -> Result<Work, EvalError> {
    let dir = &options.data;
    let missing = |names: &[&str]| TaskError::NoData { task: task.name.into(), dir: dir.clone(), tried: names.join(", ") };
    let path = formats::find(dir, task.files).ok_or_else(|| missing(task.files))?;
    let all = formats::documents(&task, &path)?;
    let wanted = options.num_fewshot;
    let pool = match task.shots {
        _ if wanted == 0 => Vec::new(),
        [] => all.clone(),
        names => formats::documents(&task, &formats::find(dir, names).ok_or_else(|| missing(names))?)?,
    };
    if wanted > pool.len() {
        return Err(TaskError::Shots { task: task.name.into(), wanted, found: pool.len() }.into());
    }
    let original = all.len();
    let docs: Vec<Doc> = all.into_iter().take(options.limit.unwrap_or(usize::MAX)).collect();
    let mut random = Random::new(SHOT_SEED);
    let mut draw = |doc: &Doc| -> String {
        let drawn = if wanted > 0 { random.sample(pool.len(), wanted) } else { Vec::new() };
        drawn.into_iter().map(|at| &pool[at]).filter(|shot| *shot != doc).map(Doc::example).collect()
    };
    Ok(Work {
        name: task.name.to_string(),
        alias: task.name.to_string(),
        group: None,
        before: docs.iter().map(&mut draw).collect(),
        docs,
        original,
        shots: wanted,
        answers: Vec::new(),
        task,
    })
}

/// The directory of answers.
struct Store {
    dir: PathBuf,
}

/// Answers of one task, appended.
struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    fn append(&mut self, answers: &[Answer]) -> Result<(), EvalError> {
        let lines: String = answers.iter().filter_map(|answer| serde_json::to_string(answer).ok()).map(|line| line + "\n").collect();
        self.file.write_all(lines.as_bytes()).map_err(EvalError::io("write", &self.path))
    }
}

impl Store {
    fn open(dir: &Path, options: &EvalOptions) -> Result<Self, EvalError> {
        let path = dir.join("eval.json");
        // Tasks and the limit may change: an answer stays the answer to its question.
        let now = json!({
            "model": options.model, "data": options.data, "num_fewshot": options.num_fewshot, "max_length": options.max_length,
            "add_bos": options.add_bos,
        });
        match std::fs::read_to_string(&path) {
            Ok(_) if !options.resume => return Err(EvalError::FolderTaken { dir: dir.to_path_buf() }),
            Ok(text) => {
                let old: Value =
                    serde_json::from_str(&text).map_err(|error| EvalError::Damaged { path: path.clone(), reason: error.to_string() })?;
                let keys = changed_keys(&old, &now);
                if !keys.is_empty() {
                    return Err(EvalError::RecipeChanged { dir: dir.to_path_buf(), keys });
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                write_atomic(&path, (now.to_string() + "\n").as_bytes())?;
            }
            Err(error) => return Err(EvalError::io("read", path)(error)),
        }
        Ok(Self { dir: dir.to_path_buf() })
    }

    fn path(&self, work: &Work) -> PathBuf {
        self.dir.join(format!("samples_{}.jsonl", work.name))
    }

    /// Answers of an earlier run. A line cut short is dropped, and so are answers beyond the limit.
    fn answers(&self, work: &Work) -> Result<Vec<Answer>, EvalError> {
        let path = self.path(work);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(EvalError::io("read", path)(error)),
        };
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut found: BTreeMap<usize, Answer> = BTreeMap::new();
        for line in whole.lines() {
            let answer: Answer =
                serde_json::from_str(line).map_err(|error| EvalError::Damaged { path: path.clone(), reason: error.to_string() })?;
            found.insert(answer.doc_id, answer);
        }
        if !text.is_empty() && !text.ends_with('\n') {
            write_atomic(&path, if whole.is_empty() { String::new() } else { format!("{whole}\n") }.as_bytes())?;
        }
        Ok(found.into_values().filter(|answer| work.docs.get(answer.doc_id).is_some_and(|doc| doc.gold == answer.target)).collect())
    }

    fn log(&self, work: &Work) -> Result<Log, EvalError> {
        let path = self.path(work);
        let file = File::options().create(true).append(true).open(&path).map_err(EvalError::io("write", &path))?;
        Ok(Log { path, file })
    }
}

/// What the harness would write.
fn results(works: &[Work], options: &EvalOptions, seconds: f64) -> Value {
    let (mut results, mut versions, mut shots, mut samples, mut higher) = (Map::new(), Map::new(), Map::new(), Map::new(), Map::new());
    let mut groups: BTreeMap<&str, (Vec<f64>, Vec<String>)> = BTreeMap::new();
    for work in works {
        results.insert(work.name.clone(), Value::Object(metrics::aggregate(&work.task, &work.alias, &work.answers)));
        versions.insert(work.name.clone(), json!(work.task.version));
        shots.insert(work.name.clone(), json!(work.shots));
        samples.insert(work.name.clone(), json!({ "original": work.original, "effective": work.answers.len() }));
        let mut better = Map::from_iter([("acc".to_string(), json!(true))]);
        if work.task.normalised {
            better.insert("acc_norm".into(), json!(true));
        }
        if work.task.form == Form::Single {
            better.insert("perplexity".into(), json!(false));
        }
        higher.insert(work.name.clone(), Value::Object(better));
        if let Some(group) = work.group {
            let (all, names) = groups.entry(group).or_default();
            all.extend(work.answers.iter().map(|answer| answer.acc));
            names.push(work.name.clone());
        }
    }
    let mut subtasks: Map<String, Value> =
        works.iter().filter(|work| work.group.is_none()).map(|work| (work.name.clone(), json!([]))).collect();
    let mut totals = Map::new();
    for (group, (all, names)) in groups {
        // Every question counts the same, whichever subject it is of.
        let (mean, error) = metrics::mean(&all);
        let entry =
            json!({ "alias": group, "acc,none": mean, "acc_stderr,none": if error.is_finite() { json!(error) } else { json!("N/A") } });
        results.insert(group.to_string(), entry.clone());
        totals.insert(group.to_string(), entry);
        subtasks.insert(group.to_string(), json!(names));
    }
    json!({
        "results": results, "groups": totals, "group_subtasks": subtasks, "versions": versions, "n-shot": shots,
        "higher_is_better": higher, "n-samples": samples,
        "config": {
            "model": options.model, "num_fewshot": options.num_fewshot, "limit": options.limit, "max_length": options.max_length,
            "fewshot_seed": SHOT_SEED,
        },
        "total_evaluation_time_seconds": seconds,
    })
}
