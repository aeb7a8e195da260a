//! The harness's metrics.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::answers::{Squad, exact_match, squad, squad_table};
use super::python::Random;
use super::{Doc, Form, Task};

/// What the model said to one request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Resp {
    /// Log-probability of the continuation, and whether greedy decoding writes it.
    Score(f32, bool),
    /// What it wrote.
    Text(String),
}

/// What the model said to one document, and what that is worth.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    pub doc_id: usize,
    pub resps: Vec<Resp>,
    /// Metrics that are means over documents, in the order of the harness.
    pub metrics: Vec<(&'static str, f64)>,
    pub squad: Option<[f64; 2]>,
}

/// The line of a document in `samples_*.jsonl`, with names of the harness.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub doc_id: usize,
    target: Value,
    resps: Vec<Resp>,
    #[serde(flatten)]
    metrics: Map<String, Value>,
}

impl Sample {
    pub fn of(task: &Task, doc: &Doc, answer: &Answer) -> Self {
        let metrics = answer.metrics.iter().map(|(name, value)| (name.to_string(), json!(value))).collect();
        Self { doc_id: answer.doc_id, target: target(task, doc), resps: answer.resps.clone(), metrics }
    }

    /// The answer, if it is one to this document.
    pub fn answer(self, task: &Task, doc: &Doc) -> Option<Answer> {
        let fits = self.target == target(task, doc) && self.resps.len() == doc.requests(task.form, "").len();
        fits.then(|| Answer::new(task, self.doc_id, doc, self.resps))
    }
}

/// What the harness calls the target.
fn target(task: &Task, doc: &Doc) -> Value {
    match task.form {
        Form::Written { .. } | Form::Squad => json!(doc.answers),
        Form::Single => json!(doc.choices.first().map(|choice| format!(" {choice}"))),
        _ => json!(doc.gold),
    }
}

impl Answer {
    pub fn new(task: &Task, doc_id: usize, doc: &Doc, resps: Vec<Resp>) -> Self {
        let sums: Vec<f64> =
            resps.iter().filter_map(|resp| if let Resp::Score(sum, _) = resp { Some(f64::from(*sum)) } else { None }).collect();
        let text = resps.iter().find_map(|resp| if let Resp::Text(text) = resp { Some(text.as_str()) } else { None }).unwrap_or("");
        let truth = |right: bool| f64::from(u8::from(right));
        let mut points = None;
        let metrics = match task.form {
            Form::Single => {
                let greedy = matches!(resps.first(), Some(Resp::Score(_, true)));
                vec![("perplexity", sums.first().copied().unwrap_or(f64::NAN)), ("acc", truth(greedy))]
            }
            Form::Mass => vec![("acc", mass(&sums, &doc.truths))],
            Form::Written { articles, .. } => vec![("exact_match", truth(exact_match(text.trim(), &doc.answers, articles)))],
            Form::Squad => {
                let (exact, f1) = squad(text, &doc.answers);
                points = Some([exact, f1]);
                Vec::new()
            }
            Form::Choices | Form::Contexts => {
                let mut metrics = vec![("acc", truth(best(&sums) == doc.gold))];
                if task.normalised {
                    // By characters of the choice, without the blank before it.
                    let each = sums.iter().zip(&doc.choices).map(|(sum, choice)| sum / choice.chars().count().max(1) as f64);
                    metrics.push(("acc_norm", truth(best(&each.collect::<Vec<_>>()) == doc.gold)));
                }
                metrics
            }
        };
        Self { doc_id, resps, metrics, squad: points }
    }
}

/// The first of the largest.
fn best(values: &[f64]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    best
}

/// What the true choices have of the probability of all.
fn mass(sums: &[f64], truths: &[bool]) -> f64 {
    let all: f64 = sums.iter().map(|sum| sum.exp()).sum();
    sums.iter().zip(truths).filter(|(_, truth)| **truth).map(|(sum, _)| sum.exp() / all).sum()
}

/// Mean and its standard error.
pub(crate) fn mean(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (mean, deviation(values) / n.sqrt())
}

/// Standard deviation of a sample; not a number for one value.
fn deviation(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (n - 1.0)).sqrt()
}

/// How often the harness draws the documents anew, and so many at a time: each time from a generator of its own.
const DRAWS: (u32, usize) = (100, 1000);

/// Samples that the error of the perplexity is made of.
pub(crate) fn bootstraps() -> usize {
    DRAWS.0 as usize * DRAWS.1
}

/// Perplexity and its standard error: the harness draws a hundred thousand samples with Python's generator, and so does this.
fn perplexity(sums: &[f64]) -> (f64, f64) {
    let n = sums.len();
    let of = |sum: f64| (-sum / n as f64).exp();
    if n < 2 {
        return (of(sums.iter().sum()), f64::NAN);
    }
    let draws = |seed: u32| {
        let mut random = Random::new(seed);
        (0..DRAWS.1).map(|_| of((0..n).map(|_| sums[random.choice(n)]).sum())).collect::<Vec<f64>>()
    };
    let all: Vec<f64> = (0..DRAWS.0).into_par_iter().flat_map_iter(draws).collect();
    (of(sums.iter().sum()), deviation(&all))
}

/// A number of the results; what is none reads as in the harness.
pub(crate) fn number(value: f64) -> Value {
    if value.is_finite() { json!(value) } else { json!("N/A") }
}

/// Under which name of a filter the harness reports.
fn filter(form: Form) -> &'static str {
    if matches!(form, Form::Written { .. }) { "remove_whitespace" } else { "none" }
}

/// Metrics of a task and whether more is better.
pub(crate) fn directions(task: &Task) -> Map<String, Value> {
    let names: &[&str] = match task.form {
        Form::Single => return Map::from_iter([("perplexity".to_string(), json!(false)), ("acc".to_string(), json!(true))]),
        Form::Written { .. } => &["exact_match"],
        Form::Squad => return squad_table(&[]).into_iter().map(|(name, _)| (name.to_string(), json!(true))).collect(),
        _ if task.normalised => &["acc", "acc_norm"],
        _ => &["acc"],
    };
    names.iter().map(|name| (name.to_string(), json!(true))).collect()
}

/// The entry of `results`.
pub(crate) fn aggregate(task: &Task, name: &str, alias: &str, docs: &[Doc], answers: &[Answer]) -> Map<String, Value> {
    let mut entry = Map::from_iter([("name".to_string(), json!(name)), ("alias".to_string(), json!(alias))]);
    entry.insert("sample_len".into(), json!(answers.len()));
    let filter = filter(task.form);
    let mut add = |name: &str, value: f64, error: f64| {
        entry.insert(format!("{name},{filter}"), number(value));
        entry.insert(format!("{name}_stderr,{filter}"), number(error));
    };
    if task.form == Form::Squad {
        let all: Vec<Squad> = answers.iter().filter_map(|answer| one_squad(&docs[answer.doc_id], answer)).collect();
        // The harness gives no error for these.
        squad_table(&all).into_iter().for_each(|(name, value)| add(name, value, f64::NAN));
    }
    let names: Vec<&str> = answers.first().map_or(Vec::new(), |answer| answer.metrics.iter().map(|(name, _)| *name).collect());
    for (i, name) in names.into_iter().enumerate() {
        let values: Vec<f64> = answers.iter().filter_map(|answer| answer.metrics.get(i).map(|(_, value)| *value)).collect();
        let (value, error) = if name == "perplexity" { perplexity(&values) } else { mean(&values) };
        add(name, value, error);
    }
    entry
}

fn one_squad(doc: &Doc, answer: &Answer) -> Option<Squad> {
    match (answer.squad, answer.resps.as_slice()) {
        (Some([exact, f1]), [Resp::Text(text), Resp::Score(sum, _)]) => {
            Some(Squad { exact, f1, no_answer: f64::from(*sum).exp(), answerable: !doc.answers.is_empty(), answered: !text.is_empty() })
        }
        _ => None,
    }
}

/// The entry of a group: every question counts the same, whichever task it is of.
pub(crate) fn group(name: &str, alias: &str, entries: &[&Map<String, Value>]) -> Map<String, Value> {
    let get = |key: &str| -> Vec<Option<f64>> { entries.iter().map(|entry| entry.get(key).and_then(Value::as_f64)).collect() };
    let sizes: Vec<f64> = get("sample_len").into_iter().flatten().collect();
    let total: f64 = sizes.iter().sum();
    let value: f64 = get("acc,none").into_iter().flatten().zip(&sizes).map(|(value, size)| value * size).sum::<f64>() / total;
    // Pooled variances of the tasks, as the harness has it.
    let squares: Option<f64> =
        get("acc_stderr,none").into_iter().zip(&sizes).map(|(error, size)| error.map(|error| (size - 1.0) * error.powi(2) * size)).sum();
    let error = squares.map_or(f64::NAN, |squares| (squares / (total - sizes.len() as f64) / total).sqrt());
    let entry = json!({
        "alias": alias, "name": name, "sample_len": total as usize, "acc,none": number(value), "acc_stderr,none": number(error),
        "sample_count": { "acc,none": total as usize },
    });
    entry.as_object().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::TASKS;
    use super::*;

    fn task(name: &str) -> &'static Task {
        TASKS.iter().find(|task| task.name == name).unwrap()
    }

    fn scores(sums: &[f32]) -> Vec<Resp> {
        sums.iter().map(|sum| Resp::Score(*sum, false)).collect()
    }

    #[test]
    fn longer_choices_are_weighed_by_their_characters() {
        let doc = Doc { contexts: vec!["c".into()], choices: vec!["no".into(), "añ long one".into()], gold: 1, ..Doc::default() };
        let answer = Answer::new(task("arc_easy"), 0, &doc, scores(&[-4.0, -11.0]));
        assert_eq!(answer.metrics, [("acc", 0.0), ("acc_norm", 1.0)]);
        let equal = Answer::new(task("winogrande"), 0, &Doc { gold: 0, ..doc }, scores(&[-4.0, -4.0]));
        assert_eq!(equal.metrics, [("acc", 1.0)]);
    }

    #[test]
    fn true_choices_are_weighed_by_their_probability() {
        let choices = ["a", "b", "c"].map(String::from).to_vec();
        let doc = Doc { contexts: vec!["c".into()], choices, truths: vec![true, false, true], ..Doc::default() };
        let answer = Answer::new(task("truthfulqa_mc2"), 0, &doc, scores(&[0.1f32.ln(), 0.2f32.ln(), 0.1f32.ln()]));
        assert!((answer.metrics[0].1 - 0.5).abs() < 1e-6, "{answer:?}");
    }

    #[test]
    fn what_was_written_is_compared() {
        let doc = Doc { contexts: vec!["c".into()], answers: vec!["Paris".into()], ..Doc::default() };
        let text = || vec![Resp::Text(" the paris\t".into())];
        assert_eq!(Answer::new(task("nq_open"), 0, &doc, text()).metrics, [("exact_match", 1.0)]);
        assert_eq!(Answer::new(task("triviaqa"), 0, &doc, text()).metrics, [("exact_match", 0.0)]);
        let answers = [Answer::new(task("squadv2"), 0, &doc, vec![Resp::Text("Paris".into()), Resp::Score(-2.0, false)])];
        let entry = aggregate(task("squadv2"), "squadv2", "squadv2", &[doc], &answers);
        assert_eq!((entry["HasAns_f1,none"].as_f64(), entry["f1_stderr,none"].as_str()), (Some(100.0), Some("N/A")));
    }

    #[test]
    fn results_have_the_names_and_numbers_of_the_harness() {
        let doc = Doc { contexts: vec!["c".into()], choices: vec!["x".into()], ..Doc::default() };
        let lambada = task("lambada_openai");
        let answers: Vec<Answer> = [(-1.0, true), (-3.0, false)]
            .iter()
            .enumerate()
            .map(|(i, (sum, greedy))| Answer::new(lambada, i, &doc, vec![Resp::Score(*sum, *greedy)]))
            .collect();
        let entry = aggregate(lambada, "lambada_openai", "lambada_openai", &[doc.clone(), doc], &answers);
        assert!((entry["perplexity,none"].as_f64().unwrap() - 2f64.exp()).abs() < 1e-12);
        // stderr_for_metric(perplexity, 100000)([-1.0, -3.0]) of the harness.
        assert!((entry["perplexity_stderr,none"].as_f64().unwrap() - 6.464_890_884_236_977).abs() < 1e-9, "{entry:?}");
        assert_eq!((entry["acc,none"].as_f64(), entry["acc_stderr,none"].as_f64()), (Some(0.5), Some(0.5)));
        assert_eq!(entry["sample_len"], 2);
        assert_eq!(json!(directions(task("piqa"))), json!({ "acc": true, "acc_norm": true }));
    }

    #[test]
    fn groups_pool_their_tasks() {
        let entry = |acc: f64, error: Value, size: usize| {
            json!({ "acc,none": acc, "acc_stderr,none": error, "sample_len": size }).as_object().cloned().unwrap()
        };
        let (a, b) = (entry(0.5, json!(0.1), 10), entry(0.25, json!(0.05), 30));
        let all = group("mmlu", "mmlu", &[&a, &b]);
        assert_eq!((all["acc,none"].as_f64(), all["sample_len"].as_u64()), (Some(0.3125), Some(40)));
        // pooled_sample_stderr([0.1, 0.05], [10, 30])
        assert!((all["acc_stderr,none"].as_f64().unwrap() - 0.044_978_064_829_308_45).abs() < 1e-12, "{all:?}");
        assert_eq!(group("mmlu", "mmlu", &[&a, &entry(1.0, json!("N/A"), 1)])["acc_stderr,none"], "N/A");
    }
}
