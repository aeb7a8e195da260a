//! Step-exact checkpoints: weights, optimiser, data position and counters, written whole or not at all.

use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use terrarium_runtime::{StagedDir, read_safetensors, write_safetensors};

use crate::TrainError;
use crate::data::Cursor;

/// Folder of checkpoints in a run directory.
pub const FOLDER: &str = "checkpoints";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// Everything of a run that is no tensor. The learning rate and the order of the data are functions of the step, the seed and
/// the cursor, so that there is no other random state to keep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Version of this format.
    pub format: u32,
    /// Optimiser steps made.
    pub step: usize,
    /// Where the data stand.
    pub cursor: Cursor,
    /// Tokens seen.
    pub tokens: u64,
    /// Seconds of training.
    pub seconds: f64,
    /// Loss of the last step.
    pub train_loss: Option<f64>,
    /// The last validation made, by step, and its loss.
    pub validated: Option<(usize, f64)>,
    /// The best validation, by step, and its loss.
    pub best: Option<(usize, f64)>,
    /// The best one whose step has a checkpoint.
    pub best_saved: Option<(usize, f64)>,
    /// Validations since the best.
    pub stale: usize,
    /// The whole configuration, defaults filled in.
    pub config: Value,
    /// Fingerprint of the packed training data.
    pub data: String,
}

/// A checkpoint read back.
#[derive(Debug)]
pub struct Checkpoint {
    /// Its directory.
    pub dir: PathBuf,
    /// Counters and positions.
    pub state: RunState,
    /// Trained parameters by path.
    pub model: Vec<(String, TensorData)>,
    /// The optimiser's moments.
    pub optimizer: Vec<(String, TensorData)>,
}

/// The checkpoints of one run directory.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
    keep: usize,
}

impl Store {
    /// Those of `run_dir`; the newest `keep` are kept, and the best.
    pub fn new(run_dir: &Path, keep: usize) -> Self {
        Self { folder: run_dir.join(FOLDER), keep }
    }

    /// Directory of a step's checkpoint.
    pub fn dir(&self, step: usize) -> PathBuf {
        self.folder.join(format!("step-{step:06}"))
    }

    /// Complete checkpoints by step, oldest first. A write cut short leaves a directory of another name, which is ignored.
    pub fn steps(&self) -> Vec<usize> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut steps: Vec<usize> = entries
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok())
            .filter(|step| self.dir(*step).join(STATE).is_file())
            .collect();
        steps.sort_unstable();
        steps
    }

    /// Writes a checkpoint: into a temporary directory, flushed to disk, then renamed.
    ///
    /// # Errors
    /// When the disk is full or refuses; earlier checkpoints are untouched.
    pub fn save(
        &self,
        state: &RunState,
        model: Vec<(String, TensorData)>,
        optimizer: Vec<(String, TensorData)>,
    ) -> Result<PathBuf, TrainError> {
        std::fs::create_dir_all(&self.folder).map_err(TrainError::io("create", &self.folder))?;
        let dir = self.dir(state.step);
        if dir.exists() {
            // Left by a run that was resumed from an earlier step.
            remove(&dir)?;
        }
        let staged = StagedDir::new(&dir)?;
        let metadata = std::iter::once(("format".to_string(), "terrarium-train".to_string())).collect();
        write_safetensors(&staged.path().join(MODEL), model, &metadata)?;
        write_safetensors(&staged.path().join(OPTIMIZER), optimizer, &metadata)?;
        let text = serde_json::to_string_pretty(state).expect("a state is plain data");
        terrarium_runtime::write_atomic(&staged.path().join(STATE), text.as_bytes())?;
        staged.commit()?;
        Ok(dir)
    }

    /// Removes what need not be kept.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn prune(&self, best: Option<usize>) -> Result<(), TrainError> {
        let steps = self.steps();
        let old = steps.len().saturating_sub(self.keep);
        for step in steps[..old].iter().filter(|step| Some(**step) != best) {
            remove(&self.dir(*step))?;
        }
        Ok(())
    }

    /// Removes what a run that was killed while it wrote has left.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn sweep(&self) -> Result<(), TrainError> {
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(".step-")) {
                std::fs::remove_dir_all(entry.path()).map_err(TrainError::io("remove", entry.path()))?;
            }
        }
        Ok(())
    }

    /// Directory of the newest complete checkpoint.
    pub fn latest(&self) -> Option<PathBuf> {
        self.steps().last().map(|step| self.dir(*step))
    }
}

/// The state goes first: a directory without it is no checkpoint, so that a removal cut short leaves none that looks whole.
fn remove(dir: &Path) -> Result<(), TrainError> {
    let _ = std::fs::remove_file(dir.join(STATE));
    std::fs::remove_dir_all(dir).map_err(TrainError::io("remove", dir))
}

impl Checkpoint {
    /// Reads a checkpoint directory.
    ///
    /// # Errors
    /// When a file is missing or damaged.
    pub fn read(dir: &Path) -> Result<Self, TrainError> {
        let path = dir.join(STATE);
        let text = std::fs::read_to_string(&path).map_err(TrainError::io("read", &path))?;
        let fail = |reason: String| TrainError::Checkpoint { dir: dir.to_path_buf(), reason };
        let state: RunState = serde_json::from_str(&text).map_err(|error| fail(format!("{STATE}: {error}")))?;
        if state.format != 1 {
            return Err(fail(format!("format {} is not known to this version", state.format)));
        }
        let (model, _) = read_safetensors(&dir.join(MODEL))?;
        let (optimizer, _) = read_safetensors(&dir.join(OPTIMIZER))?;
        Ok(Self { dir: dir.to_path_buf(), state, model, optimizer })
    }

    /// Reads only the trained parameters.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub fn read_model(dir: &Path) -> Result<Vec<(String, TensorData)>, TrainError> {
        Ok(read_safetensors(&dir.join(MODEL))?.0)
    }

    /// True for a directory that holds one checkpoint.
    pub fn is_at(dir: &Path) -> bool {
        dir.join(STATE).is_file()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(step: usize) -> RunState {
        RunState {
            format: 1,
            step,
            cursor: Cursor { epoch: 2, position: 5 },
            tokens: 77,
            seconds: 0.1 + 0.2,
            train_loss: Some(1.0 / 3.0),
            validated: None,
            best: Some((4, 0.123_456_789_012_345_67)),
            best_saved: None,
            stale: 1,
            config: serde_json::json!({"train": {"lr": 1e-3}}),
            data: "abc".into(),
        }
    }

    fn tensors() -> Vec<(String, TensorData)> {
        vec![("w".to_string(), TensorData::new(vec![1.0_f32 / 3.0, f32::MIN_POSITIVE], [2]))]
    }

    #[test]
    fn checkpoints_come_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), 2);
        let path = store.save(&state(4), tensors(), Vec::new()).unwrap();
        let read = Checkpoint::read(&path).unwrap();
        assert_eq!((read.state, read.model), (state(4), tensors()));
    }

    #[test]
    fn the_newest_and_the_best_are_kept_and_halves_are_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), 2);
        for step in [1, 2, 3, 4, 5] {
            store.save(&state(step), tensors(), Vec::new()).unwrap();
            store.prune(Some(2)).unwrap();
        }
        assert_eq!(store.steps(), [2, 4, 5]);
        std::fs::create_dir_all(dir.path().join(FOLDER).join("step-000009")).unwrap();
        std::fs::create_dir_all(dir.path().join(FOLDER).join(".step-000010-x")).unwrap();
        store.sweep().unwrap();
        assert!(!dir.path().join(FOLDER).join(".step-000010-x").exists());
        assert_eq!(store.latest(), Some(store.dir(5)));
        store.save(&state(5), tensors(), Vec::new()).unwrap();
        assert!(Checkpoint::read(&store.dir(9)).is_err());
    }
}
