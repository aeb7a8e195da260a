//! Copying random strings (arXiv 2402.01032): what a model of fixed state cannot do for long.
//!
//! ```text
//! <begin> x1 .. xn <copy> x1 .. xn
//! ```

use rand::Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use terrarium_kernels::{KernelBackend, TrainBackend};
use terrarium_models::Decoder;
use terrarium_train::data::{Batch, IGNORED};
use terrarium_train::plot::{Figure, Panel, Scale};

use super::curriculum::{Curriculum, TEST, TRAIN, generator};
use super::fit::{self, Learned, Task, Training};
use super::report::{Report, Verdict};
use super::sweep::{self, Cell, Group, Models};
use super::{Experiment, Running, Subject};
use crate::EvalError;

/// The experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Copying {
    /// What is compared.
    pub models: Models,
    /// The task.
    pub task: CopyTask,
    /// How the models learn.
    #[serde(default)]
    pub training: Training,
}

/// Sizes of the task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopyTask {
    /// Different letters.
    pub letters: usize,
    /// Lengths of strings while training.
    pub train_lengths: Vec<usize>,
    /// How training goes through them.
    #[serde(default)]
    pub curriculum: Curriculum,
    /// Lengths when measuring, beyond those of training too.
    pub test_lengths: Vec<usize>,
    /// Held-out strings per length.
    pub test_rows: usize,
}

const BEGIN: i32 = 0;
const COPY: i32 = 1;
const SPECIAL: usize = 2;

impl CopyTask {
    fn check(&self) -> Result<(), EvalError> {
        let fail = |key: &str, reason: &str| Err(EvalError::value(format!("task.{key}"), reason));
        let bad = |lengths: &[usize]| lengths.is_empty() || lengths.contains(&0);
        match self {
            _ if self.letters < 2 => fail("letters", "at least 2"),
            _ if bad(&self.train_lengths) => fail("train_lengths", "at least one, none of them 0"),
            _ if bad(&self.test_lengths) => fail("test_lengths", "at least one, none of them 0"),
            _ if self.test_rows == 0 => fail("test_rows", "at least 1"),
            _ => Ok(()),
        }
    }

    fn longest(&self) -> usize {
        self.train_lengths.iter().copied().max().unwrap_or(1)
    }

    /// The length whose measurement decides: the longest that was trained on, among those that are measured.
    fn deciding(&self) -> usize {
        let trained = self.test_lengths.iter().copied().filter(|length| *length <= self.longest()).max();
        trained.or(self.test_lengths.first().copied()).unwrap_or(1)
    }

    /// Rows of strings of length `n`.
    fn rows(&self, n: usize, stream: [u64; 3], rows: usize) -> Batch {
        let length = 2 * n + 1;
        let row = |row: u64| {
            let mut rng = generator([stream[0], stream[1], stream[2], row]);
            let letters: Vec<i32> = (0..n).map(|_| rng.random_range(SPECIAL as i32..(SPECIAL + self.letters) as i32)).collect();
            let mut ids = vec![BEGIN];
            ids.extend(&letters);
            ids.push(COPY);
            // The last letter is predicted, never read.
            ids.extend(&letters[..n - 1]);
            let mut labels = vec![IGNORED; n + 1];
            labels.extend(&letters);
            (ids, labels)
        };
        let made: Vec<(Vec<i32>, Vec<i32>)> = (0..rows as u64).into_par_iter().map(row).collect();
        let (ids, labels): (Vec<Vec<i32>>, Vec<Vec<i32>>) = made.into_iter().unzip();
        Batch { rows, length, ids: ids.concat(), labels: labels.concat(), documents: vec![0; rows * length] }
    }
}

/// Tokens of one pass when measuring.
const MEASURED: usize = 1 << 16;

impl Task for CopyTask {
    fn batch(&self, seed: u64, step: usize, steps: usize, rows: usize) -> Batch {
        let n = self.train_lengths[self.curriculum.at(step, steps, self.train_lengths.len())];
        self.rows(n, [TRAIN, seed, step as u64], rows)
    }

    /// Share of letters, and of whole strings, that are right; a string that is right letter by letter is what greedy decoding writes.
    fn measure<B: KernelBackend>(&self, model: &Decoder<B>, device: &B::Device) -> Vec<(String, f64)> {
        let mut scores = Vec::new();
        let deciding = self.deciding();
        let rest = self.test_lengths.iter().copied().filter(|length| *length != deciding);
        for n in std::iter::once(deciding).chain(rest) {
            let (mut letters, mut strings) = (0.0, 0.0);
            let each = (MEASURED / (2 * n + 1)).clamp(1, self.test_rows);
            for (part, start) in (0..self.test_rows).step_by(each).enumerate() {
                let rows = each.min(self.test_rows - start);
                let batch = self.rows(n, [TEST, n as u64, part as u64], rows);
                for (right, all) in fit::right(model, &batch, device) {
                    letters += right as f64 / all.max(1) as f64;
                    strings += f64::from(u8::from(right == all));
                }
            }
            scores.push((letters_of(n), letters / self.test_rows as f64));
            scores.push((strings_of(n), strings / self.test_rows as f64));
        }
        scores
    }

    /// All lengths that were trained on: with positions each is learnt for itself.
    fn reached(&self, scores: &[(String, f64)]) -> f64 {
        let trained: Vec<String> = self.test_lengths.iter().filter(|length| **length <= self.longest()).map(|n| letters_of(*n)).collect();
        let wanted = |(name, _): &&(String, f64)| trained.iter().any(|trained| trained == name);
        let worst = scores.iter().filter(wanted).map(|(_, value)| *value).reduce(f64::min);
        worst.or(scores.first().map(|(_, value)| *value)).unwrap_or(f64::NAN)
    }
}

/// Name of a measurement.
fn letters_of(n: usize) -> String {
    format!("letters, length {n}")
}

fn strings_of(n: usize) -> String {
    format!("strings, length {n}")
}

impl Experiment for Copying {
    type Cell = Cell;
    type Found = Learned;

    fn check(&self) -> Result<(), EvalError> {
        self.task.check()
    }

    fn training(&self) -> Option<&Training> {
        Some(&self.training)
    }

    fn cells(&self) -> Result<Vec<Cell>, EvalError> {
        self.models.cells(self.task.letters + SPECIAL, &self.training)
    }

    fn subjects(&self, cells: &[Cell]) -> Vec<Subject> {
        sweep::subjects(cells, self.training.batch, 2 * self.task.longest() + 1, 0.5)
    }

    fn seconds(&self, cell: &Cell, gpu: bool) -> f64 {
        let mean = self.task.train_lengths.iter().sum::<usize>() / self.task.train_lengths.len().max(1);
        fit::guess(&cell.config, self.training.steps, self.training.batch, 2 * mean + 1, 0.5, gpu)
    }

    fn run<B: TrainBackend>(&self, cell: &Cell, running: &mut Running<'_>, device: &B::Device) -> Result<Option<Learned>, EvalError> {
        cell.run::<B>(&self.training, &self.task, running, device)
    }

    fn report(&self, found: &[(Cell, Learned)]) -> Report {
        let deciding = letters_of(self.task.deciding());
        let groups = Group::all(found, &deciding, true);
        let mut lengths = self.task.test_lengths.clone();
        lengths.sort_unstable();
        let scores: Vec<String> = lengths.iter().flat_map(|n| [letters_of(*n), strings_of(*n)]).collect();
        let panel = |title: &str, name: fn(usize) -> String| Panel {
            title: format!("{title} (trained on up to {})", self.task.longest()),
            x: "Length of the string".into(),
            x_scale: Scale::Log2,
            y_range: Some((-0.02, 1.02)),
            series: groups.iter().map(|group| group.line(&lengths.iter().map(|n| (*n as f64, name(*n))).collect::<Vec<_>>())).collect(),
            ..Panel::default()
        };
        let [lag, keeps] = self.models.lag(&groups, &deciding, 0.05);
        let beyond = lengths.iter().find(|n| **n > self.task.longest()).map(|n| letters_of(*n));
        let beyond = self.models.beyond(&groups, beyond.as_deref(), 0.05);
        let mut notes = sweep::notes(&self.models, &self.training);
        notes.insert(
            0,
            format!(
                "Strings of {} letters, trained on lengths {}; accuracy on {} held-out strings per length.",
                self.task.letters,
                sweep::list(&self.task.train_lengths),
                self.task.test_rows
            ),
        );
        Report {
            title: "Copying strings".into(),
            source: "Repeat After Me, arXiv 2402.01032; 8B study, arXiv 2406.07887".into(),
            claim: "Transformers copy what they read; models of fixed state lag behind, and a few attention layers make up for it.".into(),
            table: sweep::table(&groups, &scores),
            figure: Figure {
                title: "Copying strings".into(),
                panels: vec![panel("Letters that are right", letters_of), panel("Strings that are right", strings_of)],
            },
            verdict: Verdict { checks: vec![lag, keeps, beyond] },
            notes,
            cells: found.iter().map(|(cell, learned)| cell.row(learned)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task() -> CopyTask {
        CopyTask { letters: 5, train_lengths: vec![4, 6], curriculum: Curriculum::Cycle, test_lengths: vec![4, 6, 12], test_rows: 8 }
    }

    #[test]
    fn labels_are_the_letters_again() {
        for n in [1, 2, 7] {
            let batch = task().rows(n, [TRAIN, 0, 0], 20);
            assert_eq!((batch.length, batch.labelled()), (2 * n + 1, 20 * n));
            for (ids, labels) in batch.ids.chunks(batch.length).zip(batch.labels.chunks(batch.length)) {
                assert_eq!((ids[0], ids[n + 1]), (BEGIN, COPY));
                assert_eq!(ids[1..=n], labels[n + 1..]);
                assert_eq!(ids[n + 2..], labels[n + 1..2 * n]);
                assert!(ids[1..=n].iter().all(|id| (2..7).contains(id)));
            }
        }
    }

    #[test]
    fn the_longest_trained_length_decides() {
        assert_eq!(task().deciding(), 6);
        assert_eq!(CopyTask { test_lengths: vec![9, 12], ..task() }.deciding(), 9);
        assert!(CopyTask { test_lengths: vec![0], ..task() }.check().is_err());
    }
}
