//! From a task to the files of its documents: on the hub, or below a directory.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use terrarium_runtime::{DataSet, HubOptions, Progress, SplitFiles};

use super::formats::{self, Subject};
use super::subjects::FIELDS;
use super::{Doc, Hub, MMLU, SUBJECT, Task, TaskError};
use crate::EvalError;

/// Where documents come from.
#[derive(Debug, Clone)]
pub enum Data {
    /// The data sets of the Hugging Face hub that the harness names, through the shared cache.
    Hub(HubOptions),
    /// A directory of files, or one file of documents for one task. The hub is not asked.
    Local(PathBuf),
}

/// Finds files and reads them.
pub(super) struct Sources<'a> {
    data: &'a Data,
    /// Data sets asked so far.
    sets: BTreeMap<String, DataSet>,
    /// Commits of those of the hub.
    commits: Map<String, Value>,
    progress: &'a mut dyn Progress,
}

/// The documents asked about, or the examples.
#[derive(Clone, Copy)]
enum Part {
    Docs,
    Shots,
}

impl<'a> Sources<'a> {
    pub fn new(data: &'a Data, progress: &'a mut dyn Progress) -> Self {
        Self { data, sets: BTreeMap::new(), commits: Map::new(), progress }
    }

    /// Of the hub, data sets with their commits; else the path.
    pub fn record(&self) -> Value {
        match self.data {
            Data::Hub(_) => Value::Object(self.commits.clone()),
            Data::Local(path) => json!(path),
        }
    }

    /// All documents of a task.
    pub fn documents(&mut self, task: &Task) -> Result<Vec<Doc>, EvalError> {
        formats::documents(task, &self.files(task, Part::Docs)?)
    }

    /// Those that examples are drawn from.
    pub fn shots(&mut self, task: &Task) -> Result<Vec<Doc>, EvalError> {
        formats::documents(task, &self.files(task, Part::Shots)?)
    }

    fn files(&mut self, task: &Task, part: Part) -> Result<Vec<PathBuf>, EvalError> {
        let (names, split) = match part {
            Part::Docs => (task.files, task.hub.split),
            Part::Shots => (task.shots, "train"),
        };
        let hub = Hub { split, ..task.hub };
        match self.data {
            Data::Hub(options) => self.fetched(options, &hub),
            Data::Local(path) if path.is_file() => match part {
                Part::Docs => Ok(vec![path.clone()]),
                Part::Shots => {
                    Err(TaskError::OneFile { path: path.clone(), reason: format!("{} takes examples from another", task.name) }.into())
                }
            },
            Data::Local(dir) => {
                let copy = dir.join(hub.data_set);
                match find(dir, names) {
                    Some(path) => Ok(vec![path]),
                    None if copy.is_dir() => Ok(DataSet::folder(&copy).split(hub.config, hub.split, self.progress)?.paths),
                    None => Err(missing(task.name, dir, names, &hub).into()),
                }
            }
        }
    }

    /// A split, from the hub or its cache; what it is of is said once per data set.
    fn fetched(&mut self, options: &HubOptions, hub: &Hub) -> Result<Vec<PathBuf>, EvalError> {
        let name = hub.data_set;
        let set = match self.sets.entry(name.to_string()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(DataSet::hub(name, options)?),
        };
        let SplitFiles { paths, commit, .. } = set.split(hub.config, hub.split, self.progress)?;
        if let (Some(commit), false) = (commit, self.commits.contains_key(name)) {
            self.progress.note(&format!("documents of {name}, commit {commit}"));
            self.commits.insert(name.to_string(), json!(commit));
        }
        Ok(paths)
    }

    /// Subjects of MMLU that `wanted` takes, in the order of their names: of the hub all, else those that are there. Examples if `examples`; where
    /// they lie beside the questions, in any case.
    pub fn subjects(&mut self, wanted: &dyn Fn(&str) -> bool, examples: bool) -> Result<Vec<Subject>, EvalError> {
        let mut found = match self.data {
            Data::Hub(options) => {
                return by_subject(wanted, examples, |name, split| {
                    self.fetched(options, &Hub { config: Some(name), split, ..SUBJECT.hub })
                });
            }
            Data::Local(path) if path.is_file() => {
                if examples {
                    return Err(TaskError::OneFile { path: path.clone(), reason: format!("{MMLU} takes examples from another") }.into());
                }
                formats::mmlu_rows(std::slice::from_ref(path), &[])?
            }
            Data::Local(dir) => {
                let (tables, copy) = (dir.join("mmlu/test"), dir.join(SUBJECT.hub.data_set));
                let files = ["mmlu.jsonl"];
                match find(dir, &files) {
                    Some(test) => formats::mmlu_rows(&[test], &find(dir, &["mmlu.dev.jsonl"]).into_iter().collect::<Vec<_>>())?,
                    None if tables.is_dir() => formats::mmlu_tables(&tables, &dir.join("mmlu/dev"))?,
                    None if copy.is_dir() => {
                        let mut set = DataSet::folder(&copy);
                        // A copy may have some of the subjects.
                        let wanted = |name: &str| wanted(name) && copy.join(name).is_dir();
                        return by_subject(&wanted, examples, |name, split| Ok(set.split(Some(name), split, self.progress)?.paths));
                    }
                    None => return Err(missing(MMLU, dir, &["mmlu.jsonl", "mmlu/test/SUBJECT_test.csv"], &SUBJECT.hub).into()),
                }
            }
        };
        found.retain(|subject| wanted(&subject.name));
        Ok(found)
    }
}

/// Each subject from files of its own.
fn by_subject(
    wanted: &dyn Fn(&str) -> bool,
    examples: bool,
    mut files: impl FnMut(&'static str, &'static str) -> Result<Vec<PathBuf>, EvalError>,
) -> Result<Vec<Subject>, EvalError> {
    let mut names: Vec<&str> = FIELDS.iter().flat_map(|field| field.subjects).copied().filter(|name| wanted(name)).collect();
    names.sort_unstable();
    let mut found = Vec::new();
    for name in names {
        let docs = formats::mmlu_subject(&files(name, "test")?)?;
        let shots = if examples { formats::mmlu_subject(&files(name, "dev")?)? } else { Vec::new() };
        found.push(Subject { name: name.to_string(), docs, shots });
    }
    Ok(found)
}

/// The first of `names` that is a file in `dir`, or is with the ending of Parquet.
fn find(dir: &Path, names: &[&str]) -> Option<PathBuf> {
    let parquet =
        |name: &str| name.strip_suffix(".jsonl").filter(|stem| !stem.contains('/')).map(|stem| dir.join(format!("{stem}.parquet")));
    names.iter().flat_map(|name| [Some(dir.join(name)), parquet(name)]).flatten().find(|path| path.is_file())
}

fn missing(task: &str, dir: &Path, names: &[&str], hub: &Hub) -> TaskError {
    let parquet = names.first().and_then(|name| name.strip_suffix(".jsonl")).map(|stem| format!("{stem}.parquet"));
    let tried: Vec<String> = names.iter().map(|name| name.to_string()).chain(parquet).chain([format!("{}/", hub.data_set)]).collect();
    TaskError::NoData { task: task.into(), dir: dir.to_path_buf(), tried: tried.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::super::TASKS;
    use super::*;

    fn fixtures(name: &str) -> Data {
        Data::Local(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/datasets").join(name))
    }

    #[test]
    fn parquet_gives_the_documents_of_its_lines() {
        let (lines, copy) = (fixtures("lines"), fixtures("hub"));
        for task in &TASKS {
            let read = |data: &Data| {
                let mut progress = ();
                let mut sources = Sources::new(data, &mut progress);
                let shots = if task.shots.is_empty() { Vec::new() } else { sources.shots(task).unwrap() };
                (sources.documents(task).unwrap(), shots)
            };
            let (docs, shots) = read(&copy);
            assert!(docs.len() > 1 && (shots.len() > 1 || task.shots.is_empty()), "{}", task.name);
            assert_eq!((docs, shots), read(&lines), "{}", task.name);
        }
        let subjects = |data: &Data| {
            let mut progress = ();
            let found = Sources::new(data, &mut progress).subjects(&|name| name != "astronomy", true).unwrap();
            found.into_iter().map(|subject| (subject.name, subject.docs, subject.shots)).collect::<Vec<_>>()
        };
        let found = subjects(&copy);
        assert_eq!(
            found.iter().map(|(name, docs, shots)| (name.as_str(), docs.len(), shots.len())).collect::<Vec<_>>(),
            [("anatomy", 3, 2), ("high_school_psychology", 3, 2)]
        );
        assert_eq!(found, subjects(&lines));
    }

    #[test]
    fn a_directory_is_searched_in_order_and_the_rest_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let data = Data::Local(dir.path().to_path_buf());
        let arc = *TASKS.iter().find(|task| task.name == "arc_easy").unwrap();
        let read = || Sources::new(&data, &mut ()).documents(&arc).map(|docs| docs.len()).map_err(|error| error.to_string());
        let Data::Local(hub) = fixtures("hub") else { return };
        let Data::Local(lines) = fixtures("lines") else { return };
        let error = read().unwrap_err();
        assert!(error.contains("arc_easy.jsonl, mosaic/arc_easy.jsonl, arc_easy.parquet, allenai/ai2_arc/"), "{error}");
        std::fs::create_dir_all(dir.path().join("allenai/ai2_arc/ARC-Easy")).unwrap();
        let error = read().unwrap_err();
        assert!(error.contains("ARC-Easy/test") && error.contains("no such files among 0"), "{error}");
        std::fs::copy(hub.join("allenai/ai2_arc/ARC-Easy/test/0000.parquet"), dir.path().join("allenai/ai2_arc/ARC-Easy/test.parquet"))
            .unwrap();
        assert_eq!(read(), Ok(1));
        std::fs::copy(hub.join("allenai/ai2_arc/ARC-Easy/test/0001.parquet"), dir.path().join("arc_easy.parquet")).unwrap();
        assert_eq!(read(), Ok(4));
        std::fs::copy(lines.join("arc_easy.jsonl"), dir.path().join("arc_easy.jsonl")).unwrap();
        assert_eq!(read(), Ok(5));
        // The schema of another task: what was expected, and what there is.
        std::fs::remove_file(dir.path().join("arc_easy.jsonl")).unwrap();
        std::fs::copy(hub.join("aps/super_glue/boolq/validation/0000.parquet"), dir.path().join("arc_easy.parquet")).unwrap();
        let error = read().unwrap_err();
        assert!(
            error.contains("arc_easy.parquet, document 1: no usable `choices`; its fields are question, passage, idx, label"),
            "{error}"
        );
        // Files without a row, and only those, are an error.
        std::fs::copy(hub.join("allenai/ai2_arc/ARC-Easy/test/0002.parquet"), dir.path().join("arc_easy.parquet")).unwrap();
        assert!(read().unwrap_err().contains("the file holds none"));
    }
}
