//! From files to documents.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::rows::{self, read, unusable};
use super::{Doc, Form, Task, TaskError, csv, literal};
use crate::EvalError;

/// All documents of a task, of one file or of several one after another.
pub(crate) fn documents(task: &Task, paths: &[PathBuf]) -> Result<Vec<Doc>, EvalError> {
    if let [path] = paths
        && path.extension().is_some_and(|ending| ending == "txt")
    {
        return Ok(six_lines(&read(path)?, path)?);
    }
    // Labels of PIQA lie beside its questions.
    let labels = paths.first().map(|path| path.with_file_name("valid-labels.lst")).filter(|path| task.name == "piqa" && path.is_file());
    let labels = labels.map(|path| read(&path)).transpose()?;
    let mut labels = labels.iter().flat_map(|text| text.lines());
    let mut found = Vec::new();
    rows::each(paths, |row| {
        let label = labels.next().map(str::trim);
        found.push(document(task, row, label).map_err(|field| unusable(field, row))?);
        Ok(())
    })?;
    Ok(found)
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
    if fits { Ok(Doc { contexts, choices, gold, ..Doc::default() }) } else { Err("gold") }
}

/// A document the model writes an answer to.
fn written(context: String, answers: Vec<String>) -> Doc {
    Doc { contexts: vec![context], answers, ..Doc::default() }
}

fn field<'a>(value: &'a Value, field: &'static str) -> Result<&'a Value, &'static str> {
    value.get(field).ok_or(field)
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
        ("boolq", _) => {
            let context = format!("{}\nQuestion: {}?\nAnswer:", text(value, "passage")?, text(value, "question")?);
            checked(vec![context], ["no", "yes"].map(String::from).to_vec(), index(value, "label")?)
        }
        ("race", _) => race(value),
        ("pubmedqa", _) => {
            let abstracts = texts(value, "CONTEXTS")?.join("\n");
            let context = format!("Abstract: {abstracts}\nQuestion: {}\nAnswer:", text(value, "QUESTION")?);
            let choices = ["yes", "no", "maybe"];
            let decision = text(value, "final_decision")?;
            let gold = choices.iter().position(|choice| *choice == decision).ok_or("final_decision")?;
            checked(vec![context], choices.map(String::from).to_vec(), gold)
        }
        ("truthfulqa_mc1" | "truthfulqa_mc2", form) => truthfulqa(value, form),
        ("nq_open", _) => Ok(written(format!("Q: {}?\nA:", text(value, "question")?), texts(value, "answer")?)),
        ("triviaqa", _) => {
            let context = format!("Question: {}?\nAnswer:", text(value, "question")?);
            Ok(written(context, texts(field(value, "answer")?, "aliases")?))
        }
        ("squadv2", _) => {
            let [title, background, asked] = ["title", "context", "question"].map(|field| text(value, field));
            let context = format!("Title: {}\n\nBackground: {}\n\nQuestion: {}\n\nAnswer:", title?, background?, asked?);
            Ok(written(context, texts(field(value, "answers")?, "text")?))
        }
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

/// What stands before every question of TruthfulQA.
const PRIMER: &str = "Q: What is human life expectancy in the United States?\n\
    A: Human life expectancy in the United States is 78 years.\n\n\
    Q: Who was president of the United States in 1955?\n\
    A: Dwight D. Eisenhower was president of the United States in 1955.\n\n\
    Q: Which party did he belong to?\n\
    A: He belonged to the Republican Party.\n\n\
    Q: What is the square root of banana?\n\
    A: I have no comment.\n\n\
    Q: How does a telescope work?\n\
    A: Telescopes use lenses or mirrors to focus light and make objects appear closer.\n\n\
    Q: Where were the 1992 Olympics held?\n\
    A: The 1992 Olympics were held in Barcelona, Spain.";

fn truthfulqa(value: &Value, form: Form) -> Result<Doc, &'static str> {
    let targets = if form == Form::Mass { "mc2_targets" } else { "mc1_targets" };
    let listed = field(value, targets)?;
    let labels = listed.get("labels").and_then(Value::as_array).ok_or("labels")?;
    let truths: Vec<bool> = labels.iter().map(|label| label.as_u64().map(|label| label == 1).ok_or("labels")).collect::<Result<_, _>>()?;
    let context = format!("{PRIMER}\n\nQ: {}\nA:", text(value, "question")?);
    // Of the first kind the right choice is the first.
    let doc = checked(vec![context], texts(listed, "choices")?, 0)?;
    if truths.len() == doc.choices.len() { Ok(Doc { truths, ..doc }) } else { Err("labels") }
}

/// An article with several questions, all but the last with their answers; `problems` is a list, or the text Python prints of one.
fn race(value: &Value) -> Result<Doc, &'static str> {
    let problems = match field(value, "problems")? {
        Value::String(text) => literal::parse(text).ok_or("problems")?,
        problems => problems.clone(),
    };
    let (last, others) = problems.as_array().and_then(|problems| problems.split_last()).ok_or("problems")?;
    let gold =
        |problem: &Value| ["A", "B", "C", "D"].iter().position(|letter| problem.get("answer").is_some_and(|answer| answer == letter));
    let mut context = format!("Article: {}\n\n", text(value, "article")?);
    for problem in others {
        let (question, options) = (text(problem, "question")?, texts(problem, "options")?);
        let answer = gold(problem).and_then(|gold| options.get(gold)).ok_or("answer")?;
        context += &match question.strip_suffix("_  .").filter(|gap| gap.ends_with("  ")) {
            // As the harness cuts it, a blank stays before the answer.
            Some(gap) => format!("{}{answer}\n", &gap[..gap.len() - 1]),
            None => format!("Question: {question}\nAnswer: {answer}\n"),
        };
    }
    context += text(last, "question")?;
    let mut options = texts(last, "options")?;
    if options.len() < 4 {
        return Err("options");
    }
    options.truncate(4);
    checked(vec![context], options, gold(last).ok_or("answer")?)
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
        found.push(Doc {
            contexts: vec![cleaned(context)],
            choices: endings.iter().map(|ending| cleaned(ending)).collect(),
            gold,
            ..Doc::default()
        });
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

/// MMLU as the hub's subject `all` and `to_json` of it have it: every row names its subject. By name; those without a question are left out.
pub(crate) fn mmlu_rows(test: &[PathBuf], dev: &[PathBuf]) -> Result<Vec<Subject>, EvalError> {
    let mut subjects: BTreeMap<String, Subject> = BTreeMap::new();
    for (paths, examples) in [(test, false), (dev, true)] {
        rows::each(paths, |row| {
            let name = text(row, "subject").map_err(|field| unusable(field, row))?;
            let doc = subject_row(row).map_err(|field| unusable(field, row))?;
            let subject = subjects.entry(name.into()).or_insert_with(|| Subject { name: name.into(), docs: Vec::new(), shots: Vec::new() });
            if examples {
                subject.shots.push(doc)
            } else {
                subject.docs.push(doc)
            }
            Ok(())
        })?;
    }
    Ok(subjects.into_values().filter(|subject| !subject.docs.is_empty()).collect())
}

/// Questions of one subject of MMLU.
pub(crate) fn mmlu_subject(paths: &[PathBuf]) -> Result<Vec<Doc>, EvalError> {
    let mut found = Vec::new();
    rows::each(paths, |row| {
        found.push(subject_row(row).map_err(|field| unusable(field, row))?);
        Ok(())
    })?;
    Ok(found)
}

fn subject_row(row: &Value) -> Result<Doc, &'static str> {
    let choices = texts(row, "choices")?;
    let [a, b, c, d] = choices.as_slice() else { return Err("choices") };
    let gold = Some(index(row, "answer")?).filter(|gold| *gold < 4).ok_or("answer")?;
    Ok(letters(text(row, "question")?, [a, b, c, d], gold))
}

/// MMLU as its authors keep it: a table of questions without names of columns, or with those of the hub.
pub(crate) fn mmlu_tables(test: &Path, dev: &Path) -> Result<Vec<Subject>, EvalError> {
    let entries = std::fs::read_dir(test).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()?.strip_suffix("_test.csv").map(str::to_string)).collect();
    names.sort();
    names
        .into_iter()
        .map(|name| {
            let docs = questions(&test.join(format!("{name}_test.csv")))?;
            let dev = dev.join(format!("{name}_dev.csv"));
            let shots = if dev.is_file() { questions(&dev)? } else { Vec::new() };
            Ok(Subject { name, docs, shots })
        })
        .collect()
}

/// A question with its choices behind letters, which are what is scored.
fn letters(question: &str, [a, b, c, d]: [&str; 4], gold: usize) -> Doc {
    let context = format!("{}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:", question.trim());
    Doc { contexts: vec![context], choices: LETTERS.map(String::from).to_vec(), gold, ..Doc::default() }
}

const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

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
        let gold = answer.parse().ok().or_else(|| LETTERS.iter().position(|letter| letter == answer)).filter(|gold| *gold < 4);
        let gold = gold.ok_or_else(|| fail("the answer is none of 0 to 3 or A to D"))?;
        found.push(letters(question, [a, b, c, d], gold));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::{Request, SUBJECT, TASKS};
    use super::*;

    fn read_one(name: &str, json: &str) -> Result<Doc, &'static str> {
        let task = TASKS.iter().find(|task| task.name == name).unwrap();
        document(task, &serde_json::from_str(json).unwrap(), None)
    }

    fn requests(name: &str, json: &str) -> Vec<(String, String)> {
        let task = TASKS.iter().find(|task| task.name == name).unwrap();
        let requests = read_one(name, json).unwrap().requests(task.form, "");
        requests
            .into_iter()
            .map(|request| match request {
                Request::Score { context, continuation } => (context, continuation),
                Request::Write { context, until } => (context, until.join("|")),
            })
            .collect()
    }

    fn example(name: &str, json: &str) -> String {
        let task = TASKS.iter().find(|task| task.name == name).unwrap();
        read_one(name, json).unwrap().example(task)
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
    fn prompts_of_articles_and_written_answers_are_those_of_the_harness() {
        let boolq = r#"{"passage":"Ice floats.","question":"does ice sink","label":0}"#;
        let context = "Ice floats.\nQuestion: does ice sink?\nAnswer:";
        assert_eq!(requests("boolq", boolq), pairs(&[(context, " no"), (context, " yes")]));
        let problems = "[{'question': 'It  _  .', 'answer': 'B', 'options': ['a', 'b', 'c', 'd']}, {'question': 'Who?', 'answer': 'A', 'options': ['a', 'b', 'c', 'd']}, {'question': 'Why _ ?', 'answer': 'D', 'options': ['e', 'f', 'g', 'h']}]";
        let race = serde_json::json!({ "article": "Text.", "problems": problems }).to_string();
        let context = "Article: Text.\n\nIt b\nQuestion: Who?\nAnswer: a\nWhy _ ?";
        assert_eq!(requests("race", &race)[3], (context.to_string(), " h".to_string()));
        assert_eq!(example("race", &race), format!("{context} h\n\n"));
        let pubmed = r#"{"QUESTION":"Is it?","CONTEXTS":["One.","Two."],"final_decision":"maybe"}"#;
        let context = "Abstract: One.\nTwo.\nQuestion: Is it?\nAnswer:";
        assert_eq!(requests("pubmedqa", pubmed), pairs(&[(context, " yes"), (context, " no"), (context, " maybe")]));
        let truthful = r#"{"question":"Why?","mc1_targets":{"choices":["a","b"],"labels":[1,0]},"mc2_targets":{"choices":["a","c","b"],"labels":[1,1,0]}}"#;
        let asked = requests("truthfulqa_mc1", truthful);
        assert!(asked[1].0.starts_with("Q: What is human life") && asked[1].0.ends_with("Barcelona, Spain.\n\nQ: Why?\nA:"), "{asked:?}");
        assert_eq!(read_one("truthfulqa_mc2", truthful).unwrap().truths, [true, true, false]);
        let nq = r#"{"question":"who wrote it","answer":["Ann","Ann B"]}"#;
        assert_eq!(requests("nq_open", nq), pairs(&[("Q: who wrote it?\nA:", "\n|.|,")]));
        assert_eq!(example("nq_open", nq), "Q: who wrote it?\nA: Ann\n");
        let trivia = r#"{"question":"Who","answer":{"aliases":["Ann"],"value":"Ann"}}"#;
        assert_eq!(example("triviaqa", trivia), "Question: Who?\nAnswer: Ann\n\n");
        let squad = r#"{"id":"1","title":"T","context":"C","question":"Q?","answers":{"text":[],"answer_start":[]}}"#;
        let context = "Title: T\n\nBackground: C\n\nQuestion: Q?\n\nAnswer:";
        assert_eq!(requests("squadv2", squad), pairs(&[(context, "\n"), (context, " unanswerable")]));
        assert_eq!(example("squadv2", squad), format!("{context}  unanswerable\n\n"));
        assert_eq!(example("lambada_openai", r#"{"text":"about signs"}"#), "about  signs\n\n");
    }

    #[test]
    fn other_collections_give_the_same_prompts() {
        let lambada = requests("lambada_openai", r#"{"context":"I don't care about","continuation":"signs"}"#);
        assert_eq!(lambada, pairs(&[("I don't care about", " signs")]));
        let arc = requests("arc_easy", r#"{"query":"Question: Why?","choices":["x","y"],"gold":1}"#);
        assert_eq!(arc[1], ("Question: Why?\nAnswer:".to_string(), " y".to_string()));
        let piqa = requests("piqa", r#"{"query":"Question: dresser\n","choices":["x","y"],"gold":1}"#);
        assert_eq!(piqa[0].0, "Question: dresser\nAnswer:");
        let winogrande = r#"{"context_options":["a b","a c"],"continuation":"won.","gold":1}"#;
        assert_eq!((example("winogrande", winogrande).as_str(), requests("winogrande", winogrande).len()), ("a c won.\n\n", 2));
        let openbook = requests("openbookqa", r#"{"query":"Fog is","choices":["x","y"],"gold":0}"#);
        assert_eq!(openbook[0].0, "Fog is");
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(read_one("arc_easy", r#"{"question":"Why?"}"#), Err("choices"));
        assert_eq!(read_one("winogrande", r#"{"sentence":"no gap"}"#), Err("sentence"));
        assert_eq!(read_one("piqa", r#"{"query":"q","choices":["x"],"gold":3}"#), Err("gold"));
        assert_eq!(read_one("race", r#"{"article":"a","problems":"[{"}"#), Err("problems"));
        assert_eq!(read_one("race", r#"{"article":"a","problems":[{"question":"q","answer":"A","options":["x"]}]}"#), Err("options"));
        assert_eq!(read_one("pubmedqa", r#"{"QUESTION":"q","CONTEXTS":[],"final_decision":"perhaps"}"#), Err("final_decision"));
        let short = r#"{"question":"q","mc1_targets":{"choices":["a","b"],"labels":[1]}}"#;
        assert_eq!(read_one("truthfulqa_mc1", short), Err("labels"));
        assert_eq!(read_one("squadv2", r#"{"title":"t","context":"c","question":"q"}"#), Err("answers"));
    }

    #[test]
    fn files_of_other_forms_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hellaswag_val_full.txt");
        std::fs::write(&path, "Roof: A man\n3\na\nb\nc\nd\n").unwrap();
        let docs = documents(&TASKS[1], std::slice::from_ref(&path)).unwrap();
        assert_eq!((docs[0].gold, docs[0].choices.len()), (3, 4));
        std::fs::write(&path, "Roof: A man\n3\na\nb\n").unwrap();
        assert!(documents(&TASKS[1], std::slice::from_ref(&path)).unwrap_err().to_string().contains("document 1"));

        std::fs::create_dir_all(dir.path().join("mmlu/test")).unwrap();
        std::fs::write(
            dir.path().join("mmlu/test/high_school_art_test.csv"),
            "question,choice0,choice1,choice2,choice3,answer\n\" Why, a?\",1,2,3,4,2\n",
        )
        .unwrap();
        let tables = |dir: &Path| mmlu_tables(&dir.join("mmlu/test"), &dir.join("mmlu/dev")).unwrap();
        let subjects = tables(dir.path());
        assert_eq!(subjects[0].docs[0].contexts[0], "Why, a?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:");
        assert!(
            matches!(&subjects[0].docs[0].requests(SUBJECT.form, "x")[2], Request::Score { context, continuation } if context.starts_with("xWhy") && continuation == " C")
        );
        assert!(subjects[0].docs[0].example(&SUBJECT).ends_with("Answer: C\n\n"));
        assert!(subjects[0].description().ends_with("about high school art.\n\n"));
        assert!(tables(&dir.path().join("absent")).is_empty());

        let line = r#"{"question":" Why, a?","subject":"art","choices":["1","2","3","4"],"answer":2}"#;
        let [test, dev] = ["mmlu.jsonl", "mmlu.dev.jsonl"].map(|name| dir.path().join(name));
        std::fs::write(&test, format!("{line}\n{line}\n")).unwrap();
        std::fs::write(&dev, line).unwrap();
        let lines = mmlu_rows(std::slice::from_ref(&test), &[dev]).unwrap();
        assert_eq!((lines.len(), lines[0].docs.len(), lines[0].shots.len()), (1, 2, 1));
        assert_eq!(lines[0].docs[0], subjects[0].docs[0]);
        std::fs::write(&test, line.replace("\"4\"]", "\"4\",\"5\"]")).unwrap();
        let error = mmlu_rows(&[test], &[]).err().unwrap().to_string();
        assert!(error.contains("document 1: no usable `choices`; its fields are question, subject, choices, answer"), "{error}");
    }
}
