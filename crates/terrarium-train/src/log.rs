//! `log.jsonl`: one JSON object per step and per validation, always written.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::TrainError;
use crate::event::{Event, Observer};

/// Name of the log in a run directory.
pub const FILE: &str = "log.jsonl";

/// Appends events to the log.
pub struct JsonLog {
    path: PathBuf,
    file: File,
    broken: bool,
}

impl JsonLog {
    /// Opens the log of `run_dir` after `step`: lines of later steps, and a line cut short, are dropped, because those steps are
    /// about to be made again.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn open(run_dir: &Path, step: usize) -> Result<Self, TrainError> {
        let path = run_dir.join(FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(TrainError::io("read", &path)(error)),
        };
        let kept: String =
            text.lines().filter(|line| step_of(line).is_some_and(|at| at <= step as u64)).flat_map(|line| [line, "\n"]).collect();
        if kept != text {
            terrarium_runtime::write_atomic(&path, kept.as_bytes())?;
        }
        let file = File::options().create(true).append(true).open(&path).map_err(TrainError::io("write", &path))?;
        Ok(Self { path, file, broken: false })
    }
}

fn step_of(line: &str) -> Option<u64> {
    serde_json::from_str::<Value>(line).ok()?.get("step")?.as_u64()
}

impl Observer for JsonLog {
    fn event(&mut self, event: &Event) {
        let line = match event {
            Event::Step(report) => serde_json::to_string(report),
            Event::Valid(report) => serde_json::to_string(report),
            _ => return,
        };
        let line = line.unwrap_or_default() + "\n";
        // A full disk must not end a run for the sake of its curve; a checkpoint that cannot be written does.
        if let Err(error) = self.file.write_all(line.as_bytes())
            && !std::mem::replace(&mut self.broken, true)
        {
            log::warn!("cannot write {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_drops_later_and_broken_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        std::fs::write(&path, "{\"step\":1}\n{\"step\":2}\n{\"step\":2,\"valid_loss\":1.0}\n{\"step\":3}\n{\"ste").unwrap();
        drop(JsonLog::open(dir.path(), 2).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n{\"step\":2,\"valid_loss\":1.0}\n");
        drop(JsonLog::open(dir.path(), 0).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    }
}
