//! Where a run goes on, and whether it may.

use serde_json::Value;

use crate::TrainError;
use crate::checkpoint::{Checkpoint, FOLDER, Store};
use crate::config::{RunConfig, changed_keys};
use crate::data::Corpus;
use crate::run::{Resume, RunOptions};

/// The checkpoint that `options.resume` asks for.
pub(super) fn find(options: &RunOptions, write: bool) -> Result<Option<Checkpoint>, TrainError> {
    let store = Store::new(&options.out_dir, options.config.train.keep);
    let dir = match &options.resume {
        Resume::No if write && (!store.steps().is_empty() || options.out_dir.join(crate::log::FILE).exists()) => {
            return Err(TrainError::RunExists { dir: options.out_dir.clone() });
        }
        Resume::No => return Ok(None),
        Resume::Auto => match store.latest() {
            Some(dir) => dir,
            None => return Ok(None),
        },
        Resume::From(dir) if Checkpoint::is_at(dir) => dir.clone(),
        Resume::From(dir) => Store::new(dir, 1).latest().ok_or_else(|| TrainError::NoCheckpoint { dir: dir.join(FOLDER) })?,
    };
    if write {
        store.sweep()?;
    }
    Checkpoint::read(&dir).map(Some)
}

/// Takes values that the configuration leaves open from the run it continues, where they had been derived.
pub(super) fn inherit(config: &mut RunConfig, old: &Value) {
    let old = |key: &str| old.pointer(&format!("/train/{key}"));
    let train = &mut config.train;
    train.min_lr = train.min_lr.or_else(|| old("min_lr")?.as_f64());
    let whole = |key: &str| old(key).and_then(Value::as_u64).map(|value| value as usize);
    train.warmup = train.warmup.or_else(|| whole("warmup"));
    train.save_every = train.save_every.or_else(|| whole("save_every"));
}

/// Refuses to go on with another configuration or other data.
pub(super) fn compare(config: &RunConfig, corpus: &Corpus, checkpoint: &Checkpoint) -> Result<(), TrainError> {
    let keys = changed_keys(&checkpoint.state.config, &config.to_json());
    if !keys.is_empty() {
        return Err(TrainError::ConfigChanged { keys });
    }
    let found = fingerprint(corpus);
    if found != checkpoint.state.data {
        return Err(TrainError::DataChanged { found, expected: checkpoint.state.data.clone() });
    }
    let rows = corpus.train.len();
    if checkpoint.state.cursor.position > rows {
        let reason = format!("its position {} is beyond the {rows} rows", checkpoint.state.cursor.position);
        return Err(TrainError::Checkpoint { dir: checkpoint.dir.clone(), reason });
    }
    Ok(())
}

/// Of the packed training data.
pub(super) fn fingerprint(corpus: &Corpus) -> String {
    format!("{:016x}", corpus.train.fingerprint())
}
