//! From files to documents.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Doc, Form, MMLU, Task, TaskError, csv};
use crate::EvalError;

/// The first of `names` that is a file in `dir`.
pub(crate) fn find(dir: &Path, names: &[&str]) -> Option<PathBuf> {
    names.iter().map(|name| dir.join(name)).find(|path| path.is_file())
}

/// All documents of a task.
pub(crate) fn documents(task: &Task, path: &Path) -> Result<Vec<Doc>, EvalError> {
    let text = read(path)?;
    if path.extension().is_some_and(|ending| ending == "txt") {
        return Ok(six_lines(&text, path)?);
    }
    // Labels of PIQA lie beside its questions.
    let labels = path.with_file_name("valid-labels.lst");
    let labels = if task.name == "piqa" && labels.is_file() { Some(read(&labels)?) } else { None };
    let mut labels = labels.iter().flat_map(|text| text.lines());
    let mut found = Vec::new();
    for (i, line) in text.lines().filter(|line| !line.trim().is_empty()).enumerate() {
        let fail = |reason: String| TaskError::Document { path: path.to_path_buf(), number: i + 1, reason };
        let value: Value = serde_json::from_str(line).map_err(|error| fail(error.to_string()))?;
        let label = labels.next().map(str::trim);
        found.push(document(task, &value, label).map_err(|field| fail(format!("no usable `{field}`")))?);
    }
    if found.is_empty() {
        return Err(TaskError::Document { path: path.to_path_buf(), number: 1, reason: "the file holds none".into() }.into());
    }
    Ok(found)
}

fn read(path: &Path) -> Result<String, EvalError> {
    std::fs::read_to_string(path).map_err(EvalError::io("read", path))
}

fn text<'a>(value: &'a Value, field: &'static str) -> Result<&'a str, &'static str> {
    value.get(field).and_then(Value::as_str).ok_or(field)
}

fn texts(value: &Value, field: &'static str) -> Result<Vec<String>, &'static str> {
    let items = value.get(field).and_then(Value::as_array).ok_or(field)?;
    items.iter().map(|item| item.as_str().map(str::to_string).ok_or(field)).collect()
}

/// A number, or a text that is one.
fn index(value: &Value, field: &'static str) -> Result<usize, &'static str> {
    let found = value.get(field).ok_or(field)?;
    let number = found.as_u64().map(|n| n as usize);
    number.or_else(|| found.as_str().and_then(|text| text.trim().parse().ok())).ok_or(field)
}

fn checked(contexts: Vec<String>, choices: Vec<String>, gold: usize) -> Result<Doc, &'static str> {
    let fits = !contexts.is_empty() && !choices.is_empty() && gold < contexts.len().max(choices.len());
    if fits { Ok(Doc { contexts, choices, gold }) } else { Err("gold") }
}

/// One document; the error is the field that is missing or wrong.
fn document(task: &Task, value: &Value, label: Option<&str>) -> Result<Doc, &'static str> {
    let has = |field: &str| value.get(field).is_some();
    // The forms of llm-foundry's collection.
    if has("query") && has("gold") {
        let query = text(value, "query")?.trim_end();
        let asks = query.starts_with("Question: ");
        let context = if asks { format!("{query}\nAnswer:") } else { query.to_string() };
        return checked(vec![context], texts(value, "choices")?, index(value, "gold")?);
    }
    if has("context_options") {
        return checked(texts(value, "context_options")?, vec![text(value, "continuation")?.trim().to_string()], index(value, "gold")?);
    }
    if has("continuation") {
        return checked(vec![text(value, "context")?.to_string()], vec![text(value, "continuation")?.trim().to_string()], 0);
    }
    match (task.name, task.form) {
        (_, Form::Single) => {
            let whole = text(value, "text")?;
            let (context, last) = whole.rsplit_once(' ').unwrap_or(("", whole));
            checked(vec![context.to_string()], vec![last.to_string()], 0)
        }
        (_, Form::Contexts) => winogrande(value),
        ("hellaswag", _) => hellaswag(value),
        ("piqa", _) => {
            let gold = match label {
                Some(label) => label.parse().map_err(|_| "label")?,
                None => index(value, "label")?,
            };
            let choices = ["sol1", "sol2"].map(|field| text(value, field).map(str::to_string));
            let [first, second] = choices;
            checked(vec![question(text(value, "goal")?)], vec![first?, second?], gold)
        }
        _ => {
            let listed = value.get("choices").ok_or("choices")?;
            let labels = texts(listed, "label")?;
            let key = text(value, "answerKey")?.trim_start();
            let gold = labels.iter().position(|label| label == key).ok_or("answerKey")?;
            let context = match text(value, "question_stem") {
                Ok(stem) => stem.to_string(),
                Err(_) => question(text(value, "question")?),
            };
            checked(vec![context], texts(listed, "text")?, gold)
        }
    }
}

fn question(text: &str) -> String {
    format!("Question: {text}\nAnswer:")
}

/// The context varies, what follows the gap is scored.
fn winogrande(value: &Value) -> Result<Doc, &'static str> {
    let (before, after) = text(value, "sentence")?.split_once('_').ok_or("sentence")?;
    let options = ["option1", "option2"].map(|field| text(value, field).map(|option| format!("{before}{option}")));
    let [first, second] = options;
    let gold = index(value, "answer")?.checked_sub(1).ok_or("answer")?;
    checked(vec![first?, second?], vec![after.trim().to_string()], gold)
}

fn hellaswag(value: &Value) -> Result<Doc, &'static str> {
    let second = capitalised(text(value, "ctx_b")?);
    let context = format!("{}: {} {second}", text(value, "activity_label")?, text(value, "ctx_a")?);
    let endings = texts(value, "endings")?.iter().map(|ending| cleaned(ending)).collect();
    checked(vec![cleaned(&context)], endings, index(value, "label")?)
}

/// Python's `capitalize`.
fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars.flat_map(char::to_lowercase)).collect())
}

/// What the harness does to texts of HellaSwag.
fn cleaned(text: &str) -> String {
    let titled = text.trim().replace(" [title]", ". ");
    let mut out = String::new();
    let mut rest = titled.as_str();
    while let Some(open) = rest.find('[') {
        let (before, from) = rest.split_at(open);
        out += before;
        // Up to the nearest bracket, on the same line; without one it stays.
        match from.find(']').filter(|close| !from[..*close].contains('\n')) {
            Some(close) => rest = &from[close + 1..],
            None => {
                out.push('[');
                rest = &from[1..];
            }
        }
    }
    (out + rest).replace("  ", " ")
}

/// HellaSwag as llama.cpp keeps it: context, label, four endings.
fn six_lines(text: &str, path: &Path) -> Result<Vec<Doc>, TaskError> {
    let lines: Vec<&str> = text.lines().collect();
    let fail = |number: usize, reason: &str| TaskError::Document { path: path.to_path_buf(), number, reason: reason.to_string() };
    let mut found = Vec::new();
    for (i, lines) in lines.chunks(6).enumerate() {
        let [context, label, endings @ ..] = lines else { return Err(fail(i + 1, "six lines were expected")) };
        let gold = label.trim().parse().ok().filter(|gold| *gold < 4 && endings.len() == 4);
        let gold = gold.ok_or_else(|| fail(i + 1, "a label from 0 to 3 and four endings were expected"))?;
        found.push(Doc { contexts: vec![cleaned(context)], choices: endings.iter().map(|ending| cleaned(ending)).collect(), gold });
    }
    if found.is_empty() { Err(fail(1, "the file holds none")) } else { Ok(found) }
}

/// A subject of MMLU: its name, test documents, examples.
pub(crate) struct Subject {
    pub name: String,
    pub docs: Vec<Doc>,
    pub shots: Vec<Doc>,
}

impl Subject {
    /// What stands before everything in its prompts.
    pub fn description(&self) -> String {
        format!("The following are multiple choice questions (with answers) about {}.\n\n", self.name.replace('_', " "))
    }
}

/// All subjects, by name: `mmlu/test/SUBJECT_test.csv` and `mmlu/dev/SUBJECT_dev.csv`, with or without a header.
pub(crate) fn mmlu(dir: &Path) -> Result<Vec<Subject>, EvalError> {
    let test = dir.join("mmlu/test");
    let none = || TaskError::NoData { task: MMLU.into(), dir: dir.to_path_buf(), tried: "mmlu/test/SUBJECT_test.csv".into() };
    let entries = std::fs::read_dir(&test).map_err(|_| none())?;
    let mut names: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()?.strip_suffix("_test.csv").map(str::to_string)).collect();
    names.sort();
    if names.is_empty() {
        return Err(none().into());
    }
    names
        .into_iter()
        .map(|name| {
            let docs = questions(&test.join(format!("{name}_test.csv")))?;
            let dev = dir.join(format!("mmlu/dev/{name}_dev.csv"));
            let shots = if dev.is_file() { questions(&dev)? } else { Vec::new() };
            Ok(Subject { name, docs, shots })
        })
        .collect()
}

fn questions(path: &Path) -> Result<Vec<Doc>, EvalError> {
    let text = read(path)?;
    let mut found = Vec::new();
    for (i, row) in csv::rows(&text).into_iter().enumerate() {
        if i == 0 && row.first().is_some_and(|name| name == "question") {
            continue;
        }
        let fail = |reason: &str| TaskError::Document { path: path.to_path_buf(), number: i + 1, reason: reason.to_string() };
        let [question, a, b, c, d, answer] = row.as_slice() else {
            return Err(fail("question, four choices and the answer were expected").into());
        };
        let letters = ["A", "B", "C", "D"];
        let gold = answer.parse().ok().or_else(|| letters.iter().position(|letter| letter == answer)).filter(|gold| *gold < 4);
        let gold = gold.ok_or_else(|| fail("the answer is none of 0 to 3 or A to D"))?;
        let context = format!("{}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:", question.trim());
        found.push(Doc { contexts: vec![context], choices: letters.map(String::from).to_vec(), gold });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::TASKS;
    use super::*;

    fn read_one(name: &str, json: &str) -> Result<Doc, &'static str> {
        let task = TASKS.iter().find(|task| task.name == name).unwrap();
        document(task, &serde_json::from_str(json).unwrap(), None)
    }

    fn requests(name: &str, json: &str) -> Vec<(String, String)> {
        read_one(name, json).unwrap().requests("")
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect()
    }

    #[test]
    fn prompts_are_those_of_the_harness() {
        assert_eq!(requests("lambada_openai", r#"{"text":"I don't care about signs"}"#), pairs(&[("I don't care about", " signs")]));
        let hellaswag = r#"{"activity_label":"Roof","ctx_a":"A man [step] sits  down.","ctx_b":"he IS","endings":["waits. [title] Now","goes [x]."],"label":"1"}"#;
        let context = "Roof: A man sits down. He is";
        assert_eq!(requests("hellaswag", hellaswag), pairs(&[(context, " waits.. Now"), (context, " goes .")]));
        let piqa = r#"{"goal":"dresser","sol1":"one ","sol2":"two","label":1}"#;
        let context = "Question: dresser\nAnswer:";
        assert_eq!(requests("piqa", piqa), pairs(&[(context, " one "), (context, " two")]));
        let arc = r#"{"question":"Why?","choices":{"text":["x","y"],"label":["1","2"]},"answerKey":"2"}"#;
        assert_eq!(requests("arc_easy", arc), pairs(&[("Question: Why?\nAnswer:", " x"), ("Question: Why?\nAnswer:", " y")]));
        let winogrande = r#"{"sentence":"Sarah was better than Maria so _ always won.","option1":"Sarah","option2":"Maria","answer":"1"}"#;
        let options = ["Sarah was better than Maria so Sarah", "Sarah was better than Maria so Maria"];
        assert_eq!(requests("winogrande", winogrande), pairs(&[(options[0], " always won."), (options[1], " always won.")]));
        let openbook = r#"{"question_stem":"Fog is around","choices":{"text":["a marsh","a tundra"],"label":["A","B"]},"answerKey":"A"}"#;
        assert_eq!(requests("openbookqa", openbook), pairs(&[("Fog is around", " a marsh"), ("Fog is around", " a tundra")]));
    }

    #[test]
    fn other_collections_give_the_same_prompts() {
        let lambada = requests("lambada_openai", r#"{"context":"I don't care about","continuation":"signs"}"#);
        assert_eq!(lambada, pairs(&[("I don't care about", " signs")]));
        let arc = requests("arc_easy", r#"{"query":"Question: Why?","choices":["x","y"],"gold":1}"#);
        assert_eq!(arc[1], ("Question: Why?\nAnswer:".to_string(), " y".to_string()));
        let piqa = requests("piqa", r#"{"query":"Question: dresser\n","choices":["x","y"],"gold":1}"#);
        assert_eq!(piqa[0].0, "Question: dresser\nAnswer:");
        let winogrande = read_one("winogrande", r#"{"context_options":["a b","a c"],"continuation":"won.","gold":1}"#).unwrap();
        assert_eq!((winogrande.example().as_str(), winogrande.requests("").len()), ("a c won.\n\n", 2));
        let openbook = requests("openbookqa", r#"{"query":"Fog is","choices":["x","y"],"gold":0}"#);
        assert_eq!(openbook[0].0, "Fog is");
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(read_one("arc_easy", r#"{"question":"Why?"}"#), Err("choices"));
        assert_eq!(read_one("winogrande", r#"{"sentence":"no gap"}"#), Err("sentence"));
        assert_eq!(read_one("piqa", r#"{"query":"q","choices":["x"],"gold":3}"#), Err("gold"));
    }

    #[test]
    fn files_of_other_forms_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hellaswag_val_full.txt");
        std::fs::write(&path, "Roof: A man\n3\na\nb\nc\nd\n").unwrap();
        let docs = documents(&TASKS[1], &path).unwrap();
        assert_eq!((docs[0].gold, docs[0].choices.len()), (3, 4));
        std::fs::write(&path, "Roof: A man\n3\na\nb\n").unwrap();
        assert!(documents(&TASKS[1], &path).unwrap_err().to_string().contains("document 1"));

        std::fs::create_dir_all(dir.path().join("mmlu/test")).unwrap();
        std::fs::write(
            dir.path().join("mmlu/test/high_school_art_test.csv"),
            "question,choice0,choice1,choice2,choice3,answer\n\" Why, a?\",1,2,3,4,2\n",
        )
        .unwrap();
        let subjects = mmlu(dir.path()).unwrap();
        assert_eq!(subjects[0].docs[0].contexts[0], "Why, a?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:");
        assert_eq!(subjects[0].docs[0].requests("")[2].1, " C");
        assert!(subjects[0].description().ends_with("about high school art.\n\n"));
        assert!(mmlu(&dir.path().join("absent")).is_err());
    }
}
