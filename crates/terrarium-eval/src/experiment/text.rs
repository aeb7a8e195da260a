//! Plain text as bytes, to be continued.

use std::path::Path;

use rand::Rng;
use serde::{Deserialize, Serialize};
use terrarium_kernels::KernelBackend;
use terrarium_models::Decoder;
use terrarium_train::data::{Batch, IGNORED};
use terrarium_train::loss;

use super::curriculum::{TRAIN, generator};
use super::fit::{Task, Training};
use super::sweep::{self, Models};
use crate::EvalError;

/// Text and how it is cut.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextTask {
    /// Bytes per row.
    pub length: usize,
    /// Rows of held-out text, from the end of the file.
    pub valid_rows: usize,
}

/// Instead of a file: sentences of a small grammar.
const SYNTHETIC: &str = "synthetic";

/// Bytes are tokens.
pub(crate) const VOCAB: usize = 256;

/// Name of the measurement.
pub(crate) const LOSS: &str = "loss";

/// A text in memory.
pub(crate) struct Book<'a> {
    task: &'a TextTask,
    bytes: Vec<u8>,
}

impl TextTask {
    pub(crate) fn check(&self, data: Option<&str>) -> Result<(), EvalError> {
        let Some(data) = data else {
            return Err(EvalError::value("data", "name a text file with --set data=PATH"));
        };
        if self.length == 0 || self.valid_rows == 0 {
            return Err(EvalError::value("task", "length and valid_rows are at least 1"));
        }
        if data != SYNTHETIC {
            std::fs::metadata(data).map_err(EvalError::io("read", data))?;
        }
        Ok(())
    }

    /// Reads the text.
    pub(crate) fn open(&self, data: Option<&str>) -> Result<Book<'_>, EvalError> {
        self.check(data)?;
        let bytes = match data {
            Some(SYNTHETIC) | None => sentences(1 << 16),
            Some(path) => std::fs::read(Path::new(path)).map_err(EvalError::io("read", path))?,
        };
        let needed = (self.valid_rows + 2) * (self.length + 1);
        if bytes.len() < needed {
            let reason = format!("{} bytes are fewer than the {needed} that held-out rows and a row of training take", bytes.len());
            return Err(EvalError::value("data", reason));
        }
        Ok(Book { task: self, bytes })
    }
}

/// Sentences with a choice here and there.
fn sentences(bytes: usize) -> Vec<u8> {
    let mut rng = generator([11, 12, 13, 14]);
    let mut pick = |words: &[&'static str]| words[rng.random_range(0..words.len())];
    let mut text = String::new();
    while text.len() < bytes {
        let who = pick(&["The fox", "The owl", "A goat", "The old wolf", "A hen"]);
        let did = pick(&["saw", "lost", "found", "wanted", "sang to"]);
        let what = pick(&["the sea", "a bell", "a red kite", "the moon", "a small boat"]);
        let when = pick(&["at night", "in the morning", "before the rain", "after lunch"]);
        text += &format!("{who} {did} {what} {when}.\n");
    }
    text.into_bytes()
}

impl Book<'_> {
    /// Where held-out rows begin.
    fn split(&self) -> usize {
        self.bytes.len() - self.task.valid_rows * (self.task.length + 1)
    }

    fn rows(&self, starts: impl Iterator<Item = usize>) -> Batch {
        let length = self.task.length;
        let (mut ids, mut labels) = (Vec::new(), Vec::new());
        for start in starts {
            let row = &self.bytes[start..=start + length];
            ids.extend(row[..length].iter().map(|byte| i32::from(*byte)));
            labels.extend(row[1..].iter().map(|byte| i32::from(*byte)));
        }
        Batch { rows: ids.len() / length, length, documents: vec![0; ids.len()], ids, labels }
    }
}

impl Task for Book<'_> {
    fn batch(&self, seed: u64, step: usize, _steps: usize, rows: usize) -> Batch {
        let last = self.split() - self.task.length - 1;
        let mut rng = generator([TRAIN, seed, step as u64, 0]);
        let starts: Vec<usize> = (0..rows).map(|_| rng.random_range(0..=last)).collect();
        self.rows(starts.into_iter())
    }

    /// Mean loss per byte, natural logarithm.
    fn measure<B: KernelBackend>(&self, model: &Decoder<B>, device: &B::Device) -> Vec<(String, f64)> {
        let width = self.task.length + 1;
        let each = ((1 << 16) / self.task.length).max(1);
        let starts: Vec<usize> = (0..self.task.valid_rows).map(|row| self.split() + row * width).collect();
        let (mut sum, mut count) = (0.0, 0);
        for starts in starts.chunks(each) {
            let batch = self.rows(starts.iter().copied());
            count += batch.labels.iter().filter(|label| **label != IGNORED).count();
            sum += loss::evaluate(model, &batch, device).into_data().iter::<f64>().sum::<f64>();
        }
        vec![(LOSS.to_string(), sum / count.max(1) as f64)]
    }

    fn larger_is_better(&self) -> bool {
        false
    }
}

/// What a reader has to know about the text.
pub(crate) fn notes(models: &Models, training: &Training, task: &TextTask, data: Option<&str>) -> Vec<String> {
    let mut notes = sweep::notes(models, training);
    let read = training.steps * training.batch * task.length;
    let text = format!(
        "Text: {}, as bytes; every model reads {read} bytes in rows of {}; loss on the last {} rows of the text. Divide by ln 2 for bits per byte.",
        data.unwrap_or(SYNTHETIC),
        task.length,
        task.valid_rows
    );
    notes.insert(0, text);
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_out_rows_are_never_trained_on() {
        let task = TextTask { length: 10, valid_rows: 3 };
        let book = Book { task: &task, bytes: (0..=255).collect() };
        assert_eq!(book.split(), 256 - 33);
        for step in 0..200 {
            let batch = book.batch(1, step, 200, 4);
            assert_eq!((batch.rows, batch.labelled()), (4, 40));
            for (ids, labels) in batch.ids.chunks(10).zip(batch.labels.chunks(10)) {
                assert!(ids.iter().zip(labels).all(|(id, label)| id + 1 == *label));
                assert!(labels.iter().all(|label| (*label as usize) < book.split()), "{labels:?}");
            }
        }
        let small = TextTask { length: 100_000, valid_rows: 3 };
        assert!(small.open(Some(SYNTHETIC)).err().unwrap().to_string().contains("fewer"));
        assert!(task.open(None).err().unwrap().to_string().contains("--set data=PATH"));
        assert!(task.open(Some("/nowhere/at/all")).err().unwrap().to_string().contains("/nowhere/at/all"));
    }
}
