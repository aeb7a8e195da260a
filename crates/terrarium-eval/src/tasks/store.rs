//! Answers on disk: a file per task, a line per document, appended as they come.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use terrarium_runtime::write_atomic;
use terrarium_train::config::changed_keys;

use super::harness::{EvalOptions, GROUP, Work};
use super::metrics::{Answer, Sample};
use crate::EvalError;

/// The directory of answers.
pub(crate) struct Store {
    dir: PathBuf,
}

/// Answers of one task, appended.
pub(crate) struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    pub fn append(&mut self, work: &Work, answers: &[Answer]) -> Result<(), EvalError> {
        let mut lines = String::new();
        for answer in answers {
            let sample = Sample::of(&work.task, &work.docs[answer.doc_id], answer);
            lines += &serde_json::to_string(&sample).map_err(|error| damaged(&self.path, &error))?;
            lines.push('\n');
        }
        self.file.write_all(lines.as_bytes()).map_err(EvalError::io("write", &self.path))
    }
}

fn damaged(path: &Path, reason: &serde_json::Error) -> EvalError {
    EvalError::Damaged { path: path.to_path_buf(), reason: reason.to_string() }
}

fn write_record(path: &Path, record: &Value) -> Result<(), EvalError> {
    Ok(write_atomic(path, (record.to_string() + "\n").as_bytes())?)
}

impl Store {
    /// `data` is where the documents came from: a path, or the data sets of the hub with their commits.
    pub fn open(dir: &Path, options: &EvalOptions, data: &Value) -> Result<Self, EvalError> {
        let path = dir.join("eval.json");
        // Tasks and the limit may change: an answer stays the answer to its question.
        let mut now = json!({
            "model": options.model, "data": data, "num_fewshot": options.num_fewshot, "max_length": options.max_length,
            "add_bos": options.add_bos,
        });
        match std::fs::read_to_string(&path) {
            Ok(_) if !options.resume => return Err(EvalError::FolderTaken { dir: dir.to_path_buf() }),
            Ok(text) => {
                let mut old: Value = serde_json::from_str(&text).map_err(|error| damaged(&path, &error))?;
                // So may the data sets, but not the commit of one that was asked before.
                if let (Value::Object(before), Value::Object(after)) = (&mut old["data"], &mut now["data"]) {
                    for (name, commit) in before.iter() {
                        after.entry(name.clone()).or_insert_with(|| commit.clone());
                    }
                    for (name, commit) in after.iter() {
                        before.entry(name.clone()).or_insert_with(|| commit.clone());
                    }
                }
                let keys = changed_keys(&old, &now);
                if !keys.is_empty() {
                    return Err(EvalError::RecipeChanged { dir: dir.to_path_buf(), keys });
                }
                write_record(&path, &now)?;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                write_record(&path, &now)?;
            }
            Err(error) => return Err(EvalError::io("read", path)(error)),
        }
        Ok(Self { dir: dir.to_path_buf() })
    }

    fn path(&self, work: &Work) -> PathBuf {
        self.dir.join(format!("samples_{}.jsonl", work.name))
    }

    /// Answers of an earlier run. A line cut short is dropped, so is what belongs to other documents, and so are groups that are not
    /// complete: what is asked together is asked again together, so that a run that was stopped ends with the bits of one that was not.
    /// What is beyond the limit stays in the file.
    pub fn answers(&self, work: &Work) -> Result<Vec<Answer>, EvalError> {
        let path = self.path(work);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(EvalError::io("read", path)(error)),
        };
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut found: BTreeMap<usize, (&str, Answer)> = BTreeMap::new();
        let mut beyond: BTreeMap<usize, &str> = BTreeMap::new();
        for line in whole.lines() {
            let sample: Sample = serde_json::from_str(line).map_err(|error| damaged(&path, &error))?;
            if sample.doc_id >= work.docs.len() {
                beyond.insert(sample.doc_id, line);
            } else if let Some(answer) = work.docs.get(sample.doc_id).and_then(|doc| sample.answer(&work.task, doc)) {
                found.insert(answer.doc_id, (line, answer));
            }
        }
        let asked = |group: usize| GROUP.min(work.docs.len() - group * GROUP);
        let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
        for id in found.keys() {
            *counts.entry(id / GROUP).or_default() += 1;
        }
        found.retain(|id, _| counts[&(id / GROUP)] == asked(id / GROUP));
        let lines: String = found.values().map(|(line, _)| *line).chain(beyond.into_values()).flat_map(|line| [line, "\n"]).collect();
        if lines != text {
            write_atomic(&path, lines.as_bytes())?;
        }
        Ok(found.into_values().map(|(_, answer)| answer).collect())
    }

    pub fn log(&self, work: &Work) -> Result<Log, EvalError> {
        let path = self.path(work);
        let file = File::options().create(true).append(true).open(&path).map_err(EvalError::io("write", &path))?;
        Ok(Log { path, file })
    }

    /// Writes the results beside the answers.
    pub fn finish(&self, results: &Value) -> Result<(), EvalError> {
        let path = self.dir.join("results.json");
        let text = serde_json::to_string_pretty(results).map_err(|error| damaged(&path, &error))? + "\n";
        Ok(write_atomic(&path, text.as_bytes())?)
    }
}
