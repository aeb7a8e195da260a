//! Plain text as bytes, to be continued.

use std::ops::Range;
use std::path::Path;

use rand::Rng;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};
use terrarium_kernels::KernelBackend;
use terrarium_models::Decoder;
use terrarium_train::data::Batch;
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
pub(crate) const SYNTHETIC: &str = "synthetic";

/// Bytes are tokens.
pub(crate) const VOCAB: usize = 256;

/// Name of the measurement.
pub(crate) const LOSS: &str = "loss";

/// A text in memory, its end held out.
pub(crate) struct Text {
    bytes: Vec<u8>,
    /// Where held-out text begins.
    split: usize,
}

/// A text cut into rows of one length.
pub(crate) struct Book<'a> {
    task: &'a TextTask,
    text: Text,
}

/// Refuses what cannot be read.
pub(crate) fn check(data: Option<&str>) -> Result<(), EvalError> {
    let Some(data) = data else {
        return Err(EvalError::value("data", "name a text file with --set data=PATH"));
    };
    if data != SYNTHETIC {
        std::fs::metadata(data).map_err(EvalError::io("read", data))?;
    }
    Ok(())
}

impl TextTask {
    pub(crate) fn check(&self, data: Option<&str>) -> Result<(), EvalError> {
        check(data)?;
        if self.length == 0 || self.valid_rows == 0 {
            return Err(EvalError::value("task", "length and valid_rows are at least 1"));
        }
        Ok(())
    }

    /// Reads the text.
    pub(crate) fn open(&self, data: Option<&str>) -> Result<Book<'_>, EvalError> {
        self.check(data)?;
        Ok(Book { task: self, text: Text::open(data, self.length, self.valid_rows)? })
    }
}

impl Text {
    /// Reads the text, and holds out so many rows of a length; two more are to train on.
    pub(crate) fn open(data: Option<&str>, length: usize, valid_rows: usize) -> Result<Self, EvalError> {
        check(data)?;
        let bytes = match data {
            Some(SYNTHETIC) | None => sentences(1 << 16),
            Some(path) => std::fs::read(Path::new(path)).map_err(EvalError::io("read", path))?,
        };
        let needed = (valid_rows + 2) * (length + 1);
        if bytes.len() < needed {
            let reason = format!("{} bytes are fewer than the {needed} that held-out rows and a row of training take", bytes.len());
            return Err(EvalError::value("data", reason));
        }
        let split = bytes.len() - valid_rows * (length + 1);
        Ok(Self { bytes, split })
    }

    fn rows(&self, starts: impl Iterator<Item = usize>, length: usize) -> Batch {
        let (mut ids, mut labels) = (Vec::new(), Vec::new());
        for start in starts {
            let row = &self.bytes[start..=start + length];
            ids.extend(row[..length].iter().map(|byte| i32::from(*byte)));
            labels.extend(row[1..].iter().map(|byte| i32::from(*byte)));
        }
        Batch { rows: ids.len() / length, length, documents: vec![0; ids.len()], ids, labels }
    }

    /// Rows from random places before the held-out end.
    pub(crate) fn drawn(&self, seed: u64, step: usize, rows: usize, length: usize) -> Batch {
        let mut rng = generator([TRAIN, seed, step as u64, 0]);
        let starts: Vec<usize> = (0..rows).map(|_| rng.random_range(0..=self.split - length - 1)).collect();
        self.rows(starts.into_iter(), length)
    }

    /// Rows of the held-out end by their numbers.
    pub(crate) fn held_out(&self, rows: Range<usize>, length: usize) -> Batch {
        self.rows(rows.map(|row| self.split + row * (length + 1)), length)
    }

    /// A piece from a random place, held out or not.
    pub(crate) fn piece(&self, held_out: bool, length: usize, rng: &mut StdRng) -> &[u8] {
        let part = if held_out { &self.bytes[self.split..] } else { &self.bytes[..self.split] };
        let start = rng.random_range(0..=part.len() - length);
        &part[start..start + length]
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

impl Task for Book<'_> {
    fn batch(&self, seed: u64, step: usize, _steps: usize, rows: usize) -> Batch {
        self.text.drawn(seed, step, rows, self.task.length)
    }

    /// Mean loss per byte, natural logarithm.
    fn measure<B: KernelBackend>(&self, model: &Decoder<B>, device: &B::Device) -> Vec<(String, f64)> {
        let TextTask { length, valid_rows } = *self.task;
        let each = ((1 << 16) / length).max(1);
        let (mut sum, mut count) = (0.0, 0);
        for start in (0..valid_rows).step_by(each) {
            let batch = self.text.held_out(start..valid_rows.min(start + each), length);
            count += batch.labelled();
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
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("text");
        std::fs::write(&file, (0..=255).collect::<Vec<u8>>()).unwrap();
        let book = task.open(file.to_str()).unwrap();
        assert_eq!(book.text.split, 256 - 33);
        for step in 0..200 {
            let batch = book.batch(1, step, 200, 4);
            assert_eq!((batch.rows, batch.labelled()), (4, 40));
            for (ids, labels) in batch.ids.chunks(10).zip(batch.labels.chunks(10)) {
                assert!(ids.iter().zip(labels).all(|(id, label)| id + 1 == *label));
                assert!(labels.iter().all(|label| (*label as usize) < book.text.split), "{labels:?}");
            }
        }
        let held_out = book.text.held_out(0..3, 10);
        assert_eq!((held_out.ids[0], held_out.labels[29]), (256 - 33, 255));
        let mut rng = generator([5, 6, 7, 8]);
        for held_out in [false, true] {
            assert!((0..200).all(|_| book.text.piece(held_out, 30, &mut rng).iter().all(|byte| (usize::from(*byte) >= 223) == held_out)));
        }
        let small = TextTask { length: 100_000, valid_rows: 3 };
        assert!(small.open(Some(SYNTHETIC)).err().unwrap().to_string().contains("fewer"));
        assert!(task.open(None).err().unwrap().to_string().contains("--set data=PATH"));
        assert!(task.open(Some("/nowhere/at/all")).err().unwrap().to_string().contains("/nowhere/at/all"));
    }
}
