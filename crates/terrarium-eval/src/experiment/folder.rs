//! The report folder: the recipe, one result and one log per cell, and at the end the report.
//!
//! ```text
//! config.json      the recipe with every default filled in; a run goes on with the same, or with other seeds
//! machine.json     what the device reaches, where models are trained
//! cells/ID.json    result of a finished cell, written whole or not at all
//! steps/ID.json    a training step in parts
//! logs/ID.jsonl    one object per logged step of a cell; made anew when an unfinished cell starts again
//! report.md, report.json, table.md, table.csv, cells.csv, figure.svg, figure.png
//! ```

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use terrarium_kernels::measure::Machine;
use terrarium_runtime::write_atomic;
use terrarium_train::config::changed_keys;

use super::recipe::Recipe;
use super::report::{Report, cells_csv};
use super::{Summary, Surroundings, report};
use crate::EvalError;
use crate::timing::Step;

const CONFIG: &str = "config.json";
const MACHINE: &str = "machine.json";

/// Keys that may change when a run goes on: a cell is of one seed.
const FREE: [&str; 2] = ["models.seeds", "seeds"];

/// A report folder.
pub(crate) struct Folder {
    dir: PathBuf,
}

/// Log of one cell.
pub(crate) struct CellLog {
    path: PathBuf,
    file: Option<File>,
}

/// A cell that this process alone is at, as long as the claim or the log made of it lives.
pub(crate) struct Claim {
    path: PathBuf,
    file: File,
}

impl Claim {
    /// The cell begins: its log is empty.
    pub fn begin(self) -> Result<CellLog, EvalError> {
        self.file.set_len(0).map_err(EvalError::io("write", &self.path))?;
        Ok(CellLog { path: self.path, file: Some(self.file) })
    }
}

impl CellLog {
    /// Appends a line.
    pub fn line(&mut self, value: &Value) {
        let Some(file) = &mut self.file else { return };
        // A full disk must not end a run for the sake of its curve; a result that cannot be written does.
        if let Err(error) = file.write_all(format!("{value}\n").as_bytes()) {
            log::warn!("cannot write {}: {error}", self.path.display());
            self.file = None;
        }
    }
}

impl Folder {
    /// Starts a folder, or with `resume` goes on in one.
    pub fn open(dir: &Path, recipe: &Recipe, resume: bool) -> Result<Self, EvalError> {
        let path = dir.join(CONFIG);
        let found = match std::fs::read_to_string(&path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(EvalError::io("read", path)(error)),
        };
        match found {
            Some(_) if !resume => return Err(EvalError::FolderTaken { dir: dir.to_path_buf() }),
            Some(text) => {
                let old: Value = serde_json::from_str(&text).map_err(damaged(&path))?;
                let mut keys = changed_keys(&old, &recipe.to_json());
                keys.retain(|key| !FREE.iter().any(|free| key.split(' ').next() == Some(*free)));
                if !keys.is_empty() {
                    return Err(EvalError::RecipeChanged { dir: dir.to_path_buf(), keys });
                }
            }
            None => {}
        }
        write_atomic(&path, pretty(&recipe.to_json()).as_bytes())?;
        for part in ["cells", "logs", "steps"] {
            let part = dir.join(part);
            std::fs::create_dir_all(&part).map_err(EvalError::io("create", part))?;
        }
        Ok(Self { dir: dir.to_path_buf() })
    }

    fn cell(&self, id: &str) -> PathBuf {
        self.dir.join("cells").join(format!("{id}.json"))
    }

    fn log_path(&self, id: &str) -> PathBuf {
        self.dir.join("logs").join(format!("{id}.jsonl"))
    }

    /// The result of a finished cell.
    pub fn finished<T: DeserializeOwned>(&self, id: &str) -> Result<Option<T>, EvalError> {
        read(&self.cell(id))
    }

    /// Keeps the result of a cell.
    pub fn finish(&self, id: &str, found: &impl Serialize) -> Result<(), EvalError> {
        keep(&self.cell(id), found)
    }

    /// What a device was found to reach.
    pub fn machine(&self) -> Result<Option<Machine>, EvalError> {
        read(&self.dir.join(MACHINE))
    }

    /// Keeps what the device reaches.
    pub fn keep_machine(&self, machine: &Machine) -> Result<(), EvalError> {
        keep(&self.dir.join(MACHINE), machine)
    }

    fn step_path(&self, id: &str) -> PathBuf {
        self.dir.join("steps").join(format!("{id}.json"))
    }

    /// A training step that was taken apart.
    pub fn step(&self, id: &str) -> Result<Option<Step>, EvalError> {
        read(&self.step_path(id))
    }

    /// Keeps the parts of a training step.
    pub fn keep_step(&self, id: &str, step: &Step) -> Result<(), EvalError> {
        keep(&self.step_path(id), step)
    }

    /// Takes a cell, unless another process is at it: who is holds a lock on its log, which ends with the process, however that ends.
    pub fn claim(&self, id: &str) -> Result<Option<Claim>, EvalError> {
        let path = self.log_path(id);
        let file = File::options().append(true).create(true).open(&path).map_err(EvalError::io("write", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Claim { path, file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            // Some network file systems have no locks: then one process works alone.
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => Ok(Some(Claim { path, file })),
            Err(TryLockError::Error(error)) => Err(EvalError::io("lock", path)(error)),
        }
    }

    /// Removes the log of a cell that was not finished.
    pub fn forget(&self, id: &str) -> Result<(), EvalError> {
        let path = self.log_path(id);
        std::fs::remove_file(&path).map_err(EvalError::io("remove", path))
    }

    /// Writes the report.
    pub fn report(&self, report: Report, recipe: &Recipe, surroundings: &Surroundings) -> Result<Summary, EvalError> {
        let page = self.dir.join("report.md");
        let config = pretty(&recipe.to_json());
        let texts = [
            ("table.md", report.table.to_markdown()),
            ("table.csv", report.table.to_csv()),
            ("cells.csv", cells_csv(&report.cells)),
            ("report.json", pretty(&report::to_json(&report, recipe, surroundings))),
        ];
        for (name, text) in texts {
            write_atomic(&self.dir.join(name), text.as_bytes())?;
        }
        report.figure.write(&self.dir, "figure")?;
        // The page last: where it is, all it names is.
        write_atomic(&page, report.to_markdown(&config, surroundings).as_bytes())?;
        Ok(Summary { page, verdict: report.verdict.to_string(), table: report.table.to_markdown(), report })
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, EvalError> {
    match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text).map(Some).map_err(damaged(path)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(EvalError::io("read", path)(error)),
    }
}

fn keep(path: &Path, value: &impl Serialize) -> Result<(), EvalError> {
    let value = serde_json::to_value(value).unwrap_or_default();
    Ok(write_atomic(path, pretty(&value).as_bytes())?)
}

fn pretty(value: &Value) -> String {
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.push('\n');
    text
}

fn damaged(path: &Path) -> impl FnOnce(serde_json::Error) -> EvalError {
    let path = path.to_path_buf();
    move |error| EvalError::Damaged { path, reason: error.to_string() }
}
