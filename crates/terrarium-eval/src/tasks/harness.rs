//! Asking a model all questions of some tasks, a batch at a time, each answer kept as soon as it is there.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Map, Value, json};
use terrarium_kernels::KernelBackend;
use terrarium_models::{Decoder, DecoderConfig};
use terrarium_runtime::{GenerateOptions, ScoreOptions, Tokenizer, generate, score};
use terrarium_train::StopFlag;

use super::encode::{ANSWER, Encoder};
use super::formats::Subject;
use super::metrics::{self, Answer, Resp};
use super::python::Random;
use super::sources::{Data, Sources};
use super::store::Store;
use super::subjects::FIELDS;
use super::{Doc, MMLU, Request, SUBJECT, TASKS, Task, TaskError, task_names};
use crate::EvalError;

/// What to ask.
#[derive(Debug, Clone)]
pub struct EvalOptions {
    /// Names of tasks.
    pub tasks: Vec<String>,
    /// Where their documents come from.
    pub data: Data,
    /// Examples before each question.
    pub num_fewshot: usize,
    /// Documents of each task, from the first; of each subject for MMLU.
    pub limit: Option<usize>,
    /// Longest prompt and answer in tokens; what is beyond is cut off at the start. By default what the model was made for, or 2048.
    pub max_length: Option<usize>,
    /// Whether a beginning of text stands before every prompt; by default what the tokenizer puts there by itself.
    pub add_bos: Option<bool>,
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
pub(crate) struct Work {
    pub task: Task,
    /// Name in the results.
    pub name: String,
    alias: String,
    pub docs: Vec<Doc>,
    /// What stands before each document's context.
    before: Vec<String>,
    original: usize,
    shots: usize,
    answers: Vec<Answer>,
}

/// What is to be asked: the documents of all tasks, with the examples before them.
pub struct Questions(Plan);

impl Questions {
    /// Finds the documents, fetching those of the hub that its cache has not, reads all and draws the examples.
    ///
    /// # Errors
    /// [`TaskError`] for tasks and files, [`terrarium_runtime::HubError`] for the hub.
    pub fn read(options: &EvalOptions, progress: &mut dyn terrarium_runtime::Progress) -> Result<Self, EvalError> {
        Plan::read(options, progress).map(Self)
    }
}

/// Asks everything.
///
/// # Errors
/// [`EvalError`]; answers that were kept stay.
pub fn evaluate<B: KernelBackend>(
    model: &Decoder<B>,
    config: &DecoderConfig,
    tokenizer: Option<&Tokenizer>,
    Questions(mut plan): Questions,
    options: &EvalOptions,
    progress: &mut dyn Progress,
    device: &B::Device,
) -> Result<EvalOutcome, EvalError> {
    let tokenizer = tokenizer.ok_or(TaskError::NoTokenizer)?;
    let begun = Instant::now();
    let encoder = Encoder { tokenizer, config, add_bos: options.add_bos, max_length: options.max_length };
    let asker = Asker { model, encoder, options, device };
    let store = options.out_dir.as_deref().map(|dir| Store::open(dir, options, &plan.data)).transpose()?;
    for work in &mut plan.works {
        if let Some(store) = &store {
            work.answers = store.answers(work)?;
        }
    }
    let questions: usize = plan.works.iter().map(|work| work.docs.len()).sum();
    let mut answered: usize = plan.works.iter().map(|work| work.answers.len()).sum();
    progress.start(questions, answered);
    for work in &mut plan.works {
        let mut log = store.as_ref().map(|store| store.log(work)).transpose()?;
        let done: Vec<usize> = work.answers.iter().map(|answer| answer.doc_id / GROUP).collect();
        let all: Vec<usize> = (0..work.docs.len()).collect();
        for ids in all.chunks(GROUP).filter(|ids| !done.contains(&(ids[0] / GROUP))) {
            if options.stop.requested() {
                return Ok(EvalOutcome::Interrupted { answered, questions });
            }
            let answers = asker.ask(work, ids)?;
            if let Some(log) = &mut log {
                log.append(work, &answers)?;
            }
            answered += answers.len();
            progress.advance(answers.len());
            work.answers.extend(answers);
        }
        work.answers.sort_by_key(|answer| answer.doc_id);
    }
    let results = plan.results(options, begun.elapsed().as_secs_f64());
    if let Some(store) = &store {
        store.finish(&results)?;
    }
    Ok(EvalOutcome::Finished(results))
}

/// Documents between two looks at the stop flag, counted from the first; they are asked together.
pub(crate) const GROUP: usize = 32;

/// Asks the model.
struct Asker<'a, B: KernelBackend> {
    model: &'a Decoder<B>,
    encoder: Encoder<'a>,
    options: &'a EvalOptions,
    device: &'a B::Device,
}

impl<B: KernelBackend> Asker<'_, B> {
    /// Asks documents of a task together.
    fn ask(&self, work: &Work, ids: &[usize]) -> Result<Vec<Answer>, EvalError> {
        let requests: Vec<Vec<Request>> = ids.iter().map(|id| work.docs[*id].requests(work.task.form, &work.before[*id])).collect();
        let (mut scored, mut prompts, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        for request in requests.iter().flatten() {
            match request {
                Request::Score { context, continuation } => scored.push(self.encoder.encode(&work.name, context, continuation)?),
                Request::Write { context, until } => {
                    prompts.push(self.encoder.prompt(&work.name, context)?);
                    ends = until.iter().map(|end| end.to_string()).collect();
                }
            }
        }
        let options = ScoreOptions { top: 0, batch_tokens: self.options.batch_tokens };
        let mut scores = score(self.model, self.encoder.config, None, &scored, &options, self.device)?.into_iter();
        let mut texts = self.write(&prompts, ends)?.into_iter();
        let mut answers = Vec::with_capacity(ids.len());
        for (id, requests) in ids.iter().zip(&requests) {
            let resps = requests.iter().filter_map(|request| match request {
                Request::Score { .. } => {
                    scores.next().map(|score| Resp::Score(score.sum as f32, score.greedy.iter().all(|greedy| *greedy)))
                }
                Request::Write { .. } => texts.next().map(Resp::Text),
            });
            answers.push(Answer::new(&work.task, *id, &work.docs[*id], resps.collect()));
        }
        Ok(answers)
    }

    /// Continues prompts greedily up to a stop string or the end of text.
    fn write(&self, prompts: &[Vec<u32>], mut stop: Vec<String>) -> Result<Vec<String>, EvalError> {
        let Encoder { tokenizer, config, .. } = self.encoder;
        let Some(longest) = prompts.iter().map(Vec::len).max() else { return Ok(Vec::new()) };
        stop.extend(tokenizer.eos().and_then(|id| tokenizer.token(id)));
        let options = GenerateOptions {
            eos: config.eos.iter().copied().chain(tokenizer.eos()).collect(),
            stop,
            batch: (self.options.batch_tokens / (longest + ANSWER)).max(1),
            ..GenerateOptions::new(ANSWER)
        };
        let go_on = &mut |_: terrarium_runtime::Piece<'_>| ControlFlow::Continue(());
        let generated = generate(self.model, config, Some(tokenizer), prompts, &options, self.device, go_on)?;
        Ok(generated.rows.into_iter().map(|row| row.text.unwrap_or_default()).collect())
    }
}

/// A group of tasks in the results.
struct Group {
    name: &'static str,
    alias: &'static str,
    /// Names of what it consists of: tasks, or groups.
    children: Vec<String>,
    /// Names of its tasks.
    tasks: Vec<String>,
}

/// What is asked.
struct Plan {
    works: Vec<Work>,
    groups: Vec<Group>,
    /// Where it came from, for the record.
    data: Value,
}

impl Plan {
    /// Reads all documents, draws all examples.
    fn read(options: &EvalOptions, progress: &mut dyn terrarium_runtime::Progress) -> Result<Self, EvalError> {
        let known = task_names();
        if let Some(name) = options.tasks.iter().find(|name| !known.contains(&name.as_str()) && !name.starts_with("mmlu_")) {
            return Err(unknown(name).into());
        }
        if let (Data::Local(path), [_, _, ..]) = (&options.data, options.tasks.as_slice())
            && path.is_file()
        {
            return Err(TaskError::OneFile { path: path.clone(), reason: format!("{} tasks were named", options.tasks.len()) }.into());
        }
        let mut sources = Sources::new(&options.data, progress);
        let mut plan = Self { works: Vec::new(), groups: Vec::new(), data: Value::Null };
        for name in &options.tasks {
            match TASKS.iter().find(|task| task.name == name) {
                Some(task) => plan.add(task_work(*task, options, &mut sources)?),
                None => plan.add_mmlu(name, options, &mut sources)?,
            }
        }
        plan.data = sources.record();
        Ok(plan)
    }

    /// Asks everything once, however often it was named.
    fn add(&mut self, work: Work) {
        if !self.works.iter().any(|other| other.name == work.name) {
            self.works.push(work);
        }
    }

    /// All of MMLU, a field or a subject.
    fn add_mmlu(&mut self, name: &str, options: &EvalOptions, sources: &mut Sources) -> Result<(), EvalError> {
        let field = |subject: &str| FIELDS.iter().find(|field| field.subjects.contains(&subject));
        let wanted = |subject: &str| {
            name == MMLU || name.strip_prefix("mmlu_") == Some(subject) || field(subject).is_some_and(|field| field.name == name)
        };
        let subjects = sources.subjects(&wanted, options.num_fewshot > 0)?;
        let of = |subject: &Subject| field(&subject.name);
        let full = |subject: &Subject| format!("{MMLU}_{}", subject.name);
        if subjects.is_empty() {
            return Err(unknown(name).into());
        }
        let mut fields = Vec::new();
        for field in FIELDS.iter().filter(|field| name == MMLU || field.name == name) {
            let tasks: Vec<String> = subjects.iter().filter(|one| of(one).is_some_and(|its| its.name == field.name)).map(full).collect();
            if !tasks.is_empty() {
                fields.push(Group { name: field.name, alias: field.alias, children: tasks.clone(), tasks });
            }
        }
        if name == MMLU {
            let own = subjects.iter().filter(|subject| of(subject).is_none()).map(full);
            let children = fields.iter().map(|field| field.name.to_string()).chain(own).collect();
            self.groups.push(Group { name: MMLU, alias: MMLU, children, tasks: subjects.iter().map(full).collect() });
        }
        self.groups.extend(fields);
        for subject in subjects {
            self.add(subject_work(subject, options)?);
        }
        Ok(())
    }
}

fn unknown(name: &str) -> TaskError {
    TaskError::Unknown { name: name.to_string(), known: task_names().join(", ") }
}

fn subject_work(subject: Subject, options: &EvalOptions) -> Result<Work, EvalError> {
    let (wanted, found) = (options.num_fewshot, subject.shots.len());
    if wanted > found {
        return Err(TaskError::Shots { task: format!("{MMLU}_{}", subject.name), wanted, found }.into());
    }
    let examples: String = subject.shots[..wanted].iter().map(|shot| shot.example(&SUBJECT)).collect();
    let before = subject.description() + &examples;
    let original = subject.docs.len();
    let docs: Vec<Doc> = subject.docs.into_iter().take(options.limit.unwrap_or(usize::MAX)).collect();
    Ok(Work {
        task: SUBJECT,
        name: format!("{MMLU}_{}", subject.name),
        alias: subject.name,
        before: vec![before; docs.len()],
        docs,
        original,
        shots: wanted,
        answers: Vec::new(),
    })
}

/// The harness's seed for drawing examples.
const SHOT_SEED: u32 = 1234;

fn task_work(task: Task, options: &EvalOptions, sources: &mut Sources) -> Result<Work, EvalError> {
    let all = sources.documents(&task)?;
    let wanted = if task.shown { options.num_fewshot } else { 0 };
    let pool = match task.shots {
        _ if wanted == 0 => Vec::new(),
        [] => all.clone(),
        _ => sources.shots(&task)?,
    };
    let drawn = if wanted > 0 { wanted + usize::from(task.spare) } else { 0 };
    if drawn > pool.len() {
        return Err(TaskError::Shots { task: task.name.into(), wanted: drawn, found: pool.len() }.into());
    }
    let original = all.len();
    let docs: Vec<Doc> = all.into_iter().take(options.limit.unwrap_or(usize::MAX)).collect();
    let mut random = Random::new(SHOT_SEED);
    let before = docs.iter().map(|doc| Ok(task.description.to_string() + &examples(&task, doc, &pool, wanted, &mut random)?));
    let before = before.collect::<Result<_, TaskError>>()?;
    Ok(Work { name: task.name.to_string(), alias: task.name.to_string(), before, docs, original, shots: wanted, answers: Vec::new(), task })
}

/// Draws examples as the harness's `ContextSampler` does. Where it leaves the document itself out it draws one more, and draws again from
/// the others if the document came more than once.
fn examples(task: &Task, doc: &Doc, pool: &[Doc], wanted: usize, random: &mut Random) -> Result<String, TaskError> {
    if wanted == 0 {
        return Ok(String::new());
    }
    let drawn = random.sample(pool.len(), wanted + usize::from(task.spare));
    let mut drawn: Vec<&Doc> = drawn.into_iter().map(|at| &pool[at]).filter(|shot| !task.spare || *shot != doc).take(wanted).collect();
    if drawn.len() < wanted {
        let others: Vec<&Doc> = pool.iter().filter(|shot| *shot != doc).collect();
        if others.len() < wanted {
            return Err(TaskError::Shots { task: task.name.into(), wanted, found: others.len() });
        }
        drawn = random.sample(others.len(), wanted).into_iter().map(|at| others[at]).collect();
    }
    Ok(drawn.into_iter().map(|shot| shot.example(task)).collect())
}

impl Plan {
    /// What the harness would write.
    fn results(&self, options: &EvalOptions, seconds: f64) -> Value {
        let (mut results, mut versions, mut shots, mut samples, mut higher) = (Map::new(), Map::new(), Map::new(), Map::new(), Map::new());
        for work in &self.works {
            let name = work.name.clone();
            results.insert(name.clone(), Value::Object(metrics::aggregate(&work.task, &name, &work.alias, &work.docs, &work.answers)));
            versions.insert(name.clone(), json!(work.task.version));
            shots.insert(name.clone(), json!(work.shots));
            samples.insert(name.clone(), json!({ "original": work.original, "effective": work.answers.len() }));
            higher.insert(name, Value::Object(metrics::directions(&work.task)));
        }
        let (mut totals, mut children) = (Map::new(), Map::new());
        for group in &self.groups {
            let entries: Vec<&Map<String, Value>> = group.tasks.iter().filter_map(|name| results.get(name)?.as_object()).collect();
            totals.insert(group.name.into(), Value::Object(metrics::group(group.name, group.alias, &entries)));
            children.insert(group.name.into(), json!(group.children));
            versions.insert(group.name.into(), json!(GROUP_VERSION));
            shots.insert(group.name.into(), json!(options.num_fewshot));
            higher.insert(group.name.into(), json!({ "acc": true }));
        }
        results.extend(totals.clone());
        let mut all = json!({
            "results": results, "group_subtasks": children, "versions": versions, "n-shot": shots, "higher_is_better": higher,
            "n-samples": samples,
            "config": {
                "model": options.model, "data": self.data, "num_fewshot": options.num_fewshot, "limit": options.limit, "max_length": options.max_length,
                "fewshot_seed": SHOT_SEED, "bootstrap_iters": metrics::bootstraps(),
            },
            "total_evaluation_time_seconds": seconds,
        });
        if !totals.is_empty() {
            all["groups"] = Value::Object(totals);
        }
        all
    }
}

/// Version of the harness's groups of MMLU.
const GROUP_VERSION: f64 = 2.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn docs(names: &[usize]) -> Vec<Doc> {
        let doc = |name: &usize| Doc { contexts: vec![format!("{name}:")], choices: vec!["x".into()], ..Doc::default() };
        names.iter().map(doc).collect()
    }

    /// Names of the examples before each document.
    fn drawn(spare: bool, pool: &[usize], asked: &[usize]) -> Vec<String> {
        let task = Task { spare, separator: "|", ..SUBJECT };
        let mut random = Random::new(SHOT_SEED);
        docs(asked).iter().map(|doc| examples(&task, doc, &docs(pool), 2, &mut random).unwrap().replace(": x", "")).collect()
    }

    #[test]
    fn examples_are_drawn_as_by_the_harness() {
        // random.Random(1234): sample(range(12), 3) four times is [7, 1, 0], [1, 9, 0], [10, 1, 11], [5, 3, 0].
        let pool: Vec<usize> = (0..12).collect();
        assert_eq!(drawn(true, &pool, &[20, 1, 10, 0]), ["7|1|", "9|0|", "1|11|", "5|3|"]);
        // Without one to spare the document itself may stand among its examples: sample(range(12), 2) three times.
        assert_eq!(drawn(false, &pool, &[7, 0, 1]), ["7|1|", "0|1|", "9|0|"]);
        // From [0, 0, 1, 2]: [2, 0, 1], [0, 1, 2], and [0, 2, 0], which leaves one: sample([1, 2], 2) is [1, 2].
        assert_eq!(drawn(true, &[0, 0, 1, 2], &[0, 0, 0]), ["2|1|", "1|2|", "1|2|"]);
        let task = Task { spare: true, ..SUBJECT };
        let error = examples(&task, &docs(&[0])[0], &docs(&[0, 0, 1]), 2, &mut Random::new(SHOT_SEED)).unwrap_err();
        assert!(matches!(error, TaskError::Shots { wanted: 2, found: 1, .. }), "{error}");
    }
}
