//! The harness's metrics.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Doc, Form, Task};

/// What the model said to one document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub doc_id: usize,
    pub target: usize,
    /// Log-probability of each continuation, and whether greedy decoding writes it.
    pub resps: Vec<(f64, bool)>,
    pub acc: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<f64>,
}

impl Answer {
    pub fn new(task: &Task, doc_id: usize, doc: &Doc, resps: Vec<(f64, bool)>) -> Self {
        let right = |best: usize| f64::from(u8::from(best == doc.gold));
        let sums: Vec<f64> = resps.iter().map(|(sum, _)| *sum).collect();
        let acc = match task.form {
            Form::Single => f64::from(u8::from(resps.first().is_some_and(|(_, greedy)| *greedy))),
            _ => right(best(&sums)),
        };
        // By characters of the choice, without the blank before it.
        let per_character =
            || -> Vec<f64> { sums.iter().zip(&doc.choices).map(|(sum, choice)| sum / choice.chars().count().max(1) as f64).collect() };
        let acc_norm = task.normalised.then(|| right(best(&per_character())));
        Self { doc_id, target: doc.gold, resps, acc, acc_norm }
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

/// Mean and its standard error.
pub(crate) fn mean(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, if values.len() > 1 { (squares / (n - 1.0)).sqrt() / n.sqrt() } else { f64::NAN })
}

/// The entry of `results`.
pub(crate) fn aggregate(task: &Task, alias: &str, answers: &[Answer]) -> Map<String, Value> {
    let mut entry = Map::new();
    entry.insert("alias".into(), json!(alias));
    let number = |value: f64| if value.is_finite() { json!(value) } else { json!("N/A") };
    if task.form == Form::Single {
        let sums: Vec<f64> = answers.iter().filter_map(|answer| answer.resps.first().map(|(sum, _)| *sum)).collect();
        entry.insert("perplexity,none".into(), number((-mean(&sums).0).exp()));
        // The harness draws a hundred bootstrap samples for it.
        entry.insert("perplexity_stderr,none".into(), json!("N/A"));
    }
    let mut add = |name: &str, values: Vec<f64>| {
        let (mean, error) = mean(&values);
        entry.insert(format!("{name},none"), number(mean));
        entry.insert(format!("{name}_stderr,none"), number(error));
    };
    add("acc", answers.iter().map(|answer| answer.acc).collect());
    if task.normalised {
        add("acc_norm", answers.iter().filter_map(|answer| answer.acc_norm).collect());
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::super::TASKS;
    use super::*;

    fn task(name: &str) -> &'static Task {
        TASKS.iter().find(|task| task.name == name).unwrap()
    }

    #[test]
    fn longer_choices_are_weighed_by_their_characters() {
        let doc = Doc { contexts: vec!["c".into()], choices: vec!["no".into(), "añ long one".into()], gold: 1 };
        let answer = Answer::new(task("arc_easy"), 0, &doc, vec![(-4.0, false), (-11.0, true)]);
        assert_eq!((answer.acc, answer.acc_norm), (0.0, Some(1.0)));
        let equal = Answer::new(task("winogrande"), 0, &Doc { gold: 0, ..doc }, vec![(-4.0, false), (-4.0, false)]);
        assert_eq!((equal.acc, equal.acc_norm), (1.0, None));
    }

    #[test]
    fn results_have_the_names_of_the_harness() {
        let doc = Doc { contexts: vec!["c".into()], choices: vec!["x".into()], gold: 0 };
        let lambada = task("lambada_openai");
        let answers: Vec<Answer> =
            [(-1.0, true), (-3.0, false)].iter().enumerate().map(|(i, resp)| Answer::new(lambada, i, &doc, vec![*resp])).collect();
        let entry = aggregate(lambada, "lambada_openai", &answers);
        assert!((entry["perplexity,none"].as_f64().unwrap() - 2f64.exp()).abs() < 1e-12);
        assert_eq!((entry["acc,none"].as_f64(), entry["acc_stderr,none"].as_f64()), (Some(0.5), Some(0.5)));
        assert!(aggregate(task("piqa"), "piqa", &answers).contains_key("acc_norm_stderr,none"));
    }
}
