//! Short models continued at longer lengths (arXiv 2406.07887, section 4): what they then read, and what they look up.
//!
//! A model learns at one length, is measured, and goes on at longer ones, measured after each. Four kinds of rows, one kind per step:
//!
//! ```text
//! text       bytes of a file, all predicted
//! recall     a phonebook, and its entries again in another order, their numbers predicted: the same words
//! phonebook  the standard template of the phonebook experiment with many questions; tokens are its words, behind those of bytes
//! needles    bytes: text with sentences that name numbers hidden in it, which are asked for at its end; answers are predicted
//! ```

use rand::Rng;
use rand::seq::SliceRandom;
use rand::seq::index::sample;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use terrarium_kernels::{KernelBackend, TrainBackend};
use terrarium_models::Decoder;
use terrarium_train::data::{Batch, IGNORED};
use terrarium_train::loss;
use terrarium_train::plot::{Figure, Panel, Scale, Series};

use super::arch::{Architecture, Kind};
use super::curriculum::{Curriculum, TEST, TRAIN, generator};
use super::fit::{self, Learned, Stage, Task, Training};
use super::phonebook::{KEYS, Shelf, Shots, Variant, holds, holds_twice, whole};
use super::report::{Check, Report, Table, Verdict};
use super::sweep::{self, Cell, Group, LEARNT, Models};
use super::text::{self, Text};
use super::{Experiment, Running, Subject};
use crate::EvalError;

/// The experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LongContext {
    /// A text file.
    #[serde(default)]
    pub data: Option<String>,
    /// What is compared.
    pub models: Models,
    /// Rows, and what is measured.
    pub task: LongTask,
    /// How the models learn at the short length.
    #[serde(default)]
    pub training: Training,
    /// How they go on, from shorter to longer.
    pub continuation: Vec<Continuation>,
}

/// Rows and measurements.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LongTask {
    /// Tokens of a row at first.
    pub length: usize,
    /// Kinds of rows: steps take them in turn.
    pub mix: Vec<Rows>,
    /// Rows of all but `text` are so many times shorter than the stage's length, and as many times more; `needles` no shorter than
    /// hides one.
    #[serde(default = "whole_rows")]
    pub divisors: Vec<usize>,
    /// How training at the short length goes through them; later stages take them in turn.
    #[serde(default)]
    pub curriculum: Curriculum,
    /// Share of a training row of `phonebook` that its questions take.
    #[serde(default = "quarter")]
    pub asked: f64,
    /// First names of phonebooks, and as many last names, at most 64.
    pub names: usize,
    /// Numbers hidden in a row of `needles`, as far as two thirds of it hold them; all are asked for in training, one when measuring.
    pub needles: usize,
    /// Tokens of a row when looking up is measured.
    pub test_lengths: Vec<usize>,
    /// Held-out rows per length of both tasks.
    pub test_rows: usize,
    /// Held-out rows of text, each as long as the longest stage.
    pub valid_rows: usize,
}

/// A kind of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rows {
    /// Text.
    Text,
    /// Phonebooks read twice, the second time in another order.
    Recall,
    /// Phonebook lookup.
    Phonebook,
    /// Numbers hidden in text.
    Needles,
}

/// A stretch of training at a longer length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Continuation {
    /// Tokens of a row.
    pub length: usize,
    /// Rows per step.
    pub batch: usize,
    /// Optimiser steps.
    pub steps: usize,
    /// Highest learning rate, as a share of that of the training before; warm-up and cosine as there.
    #[serde(default = "third")]
    pub rate: f64,
    /// Base of rotary positions from here on; absent, it stays. Models begin with 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotary_base: Option<f64>,
}

fn whole_rows() -> Vec<usize> {
    vec![1]
}

fn quarter() -> f64 {
    0.25
}

fn third() -> f64 {
    0.3
}

/// Bytes come first in the vocabulary.
const BYTES: i32 = 256;

/// Tokens of a question of a phonebook with its answer and the line's end.
const QUESTION: usize = 19;

/// Digits of a hidden number.
const DIGITS: u32 = 7;

/// Tokens of one pass when measuring.
const MEASURED: usize = 1 << 16;

/// How much a mean loss may differ by chance, nats per byte.
const MARGIN: f64 = 0.02;

fn needle(key: &str, number: u32) -> String {
    format!(" The special magic number for {key} is {number}. ")
}

/// The question up to its answer.
fn question(key: &str) -> String {
    format!("\nWhat is the special magic number for {key}? The special magic number for {key} is ")
}

impl LongTask {
    /// Questions before the last one that a training row of `length` has.
    fn shots(&self, length: usize) -> Shots {
        Shots::Random(((self.asked * length as f64) as usize / QUESTION).max(2) - 1)
    }

    /// Numbers that two thirds of a row of `length` holds with their questions.
    fn hidden(&self, length: usize) -> usize {
        let longest = KEYS.iter().map(|key| key.len()).max().unwrap_or(0);
        let each = needle("", 0).len() + question("").len() + 3 * longest + 2 * DIGITS as usize;
        self.needles.min(2 * length / 3 / each)
    }

    /// By how many times rows of a kind are shorter than `length`.
    fn divisors_of(&self, rows: Rows, length: usize) -> Vec<usize> {
        let fits = |divisor: &usize| rows != Rows::Needles || self.hidden(length / divisor) > 0;
        let fit: Vec<usize> = self.divisors.iter().copied().filter(fits).collect();
        if fit.is_empty() { vec![1] } else { fit }
    }

    /// Refuses rows that are too short for one.
    fn hides(&self, length: usize) -> Result<(), String> {
        if self.hidden(length) == 0 {
            return Err(format!("two thirds of {length} tokens hold no number with its question"));
        }
        Ok(())
    }

    /// Rows of text with hidden numbers, of which `asked` are asked for; all others, and all other labels, are not predicted.
    fn needle_rows(&self, text: &Text, length: usize, asked: usize, stream: [u64; 3], rows: usize) -> Batch {
        let hidden = self.hidden(length);
        let row = |row: u64| {
            let mut rng = generator([stream[0], stream[1], stream[2], row]);
            let keys = sample(&mut rng, KEYS.len(), hidden);
            let numbers: Vec<(&str, u32)> =
                keys.iter().map(|key| (KEYS[key], rng.random_range(10u32.pow(DIGITS - 1)..10u32.pow(DIGITS)))).collect();
            let mut order: Vec<usize> = (0..hidden).collect();
            order.shuffle(&mut rng);
            let mut questions = Vec::new();
            let mut answers = Vec::new();
            for (key, number) in order.iter().take(asked).map(|i| numbers[*i]) {
                questions.extend(question(key).into_bytes());
                answers.push(questions.len());
                questions.extend(number.to_string().into_bytes());
            }
            let needles: Vec<String> = numbers.iter().map(|(key, number)| needle(key, *number)).collect();
            // The last byte is predicted, never read.
            let hay = (length + 1).saturating_sub(questions.len() + needles.iter().map(String::len).sum::<usize>());
            let hay = text.piece(stream[0] == TEST, hay, &mut rng);
            let mut places: Vec<usize> = (0..hidden).map(|_| rng.random_range(0..=hay.len())).collect();
            places.sort_unstable();
            let mut bytes = Vec::with_capacity(length + 1);
            let mut from = 0;
            for (place, needle) in places.iter().zip(&needles) {
                bytes.extend(&hay[from..*place]);
                bytes.extend(needle.as_bytes());
                from = *place;
            }
            bytes.extend(&hay[from..]);
            let start = bytes.len();
            bytes.extend(questions);
            let mut labels = vec![IGNORED; length];
            for at in answers.iter().flat_map(|answer| (0..DIGITS as usize).map(move |digit| start + answer + digit)) {
                labels[at - 1] = i32::from(bytes[at]);
            }
            (bytes[..length].iter().map(|byte| i32::from(*byte)).collect::<Vec<_>>(), labels)
        };
        let made: Vec<(Vec<i32>, Vec<i32>)> = (0..rows as u64).into_par_iter().map(row).collect();
        let (ids, labels): (Vec<Vec<i32>>, Vec<Vec<i32>>) = made.into_iter().unzip();
        Batch { rows, length, ids: ids.concat(), labels: labels.concat(), documents: vec![0; rows * length] }
    }
}

/// Behind the tokens of bytes.
fn behind(mut batch: Batch) -> Batch {
    batch.ids.iter_mut().for_each(|id| *id += BYTES);
    batch.labels.iter_mut().filter(|label| **label != IGNORED).for_each(|label| *label += BYTES);
    batch
}

/// What a stage learns and how it is measured.
struct Lesson<'a> {
    curriculum: Curriculum,
    recipe: &'a LongContext,
    text: &'a Text,
    shelf: &'a Shelf,
    length: usize,
}

impl Task for Lesson<'_> {
    fn batch(&self, seed: u64, step: usize, steps: usize, rows: usize) -> Batch {
        let task = &self.recipe.task;
        let (cycle, place) = (step / task.mix.len(), step % task.mix.len());
        let part = task.mix[place];
        let count = |parts: &[Rows]| parts.iter().filter(|other| **other == part).count();
        // How often this kind had its turn before, and will have had it.
        let turn = cycle * count(&task.mix) + count(&task.mix[..place]);
        let turns = steps.div_ceil(task.mix.len()) * count(&task.mix);
        let divisors = task.divisors_of(part, self.length);
        let divisor = divisors[self.curriculum.at(turn, turns, divisors.len())];
        let (length, rows_here) = (self.length / divisor, rows * divisor);
        // Stages draw from streams of their own.
        let stream = [TRAIN, seed ^ ((self.length as u64) << 32), step as u64];
        match part {
            Rows::Text => self.text.drawn(stream[1], step, rows, self.length),
            Rows::Recall => behind(self.shelf.twice(length, stream, rows_here)),
            Rows::Phonebook => behind(self.shelf.rows(Variant::Standard, length, task.shots(length), stream, rows_here)),
            Rows::Needles => task.needle_rows(self.text, length, task.needles, stream, rows_here),
        }
    }

    /// Loss over the short length first, then by position, then what is looked up.
    fn measure<B: KernelBackend>(&self, model: &Decoder<B>, device: &B::Device) -> Vec<(String, f64)> {
        let task = &self.recipe.task;
        let longest = self.recipe.longest();
        let mut by_position = vec![0.0f64; longest];
        let each = (MEASURED / longest).max(1);
        for start in (0..task.valid_rows).step_by(each) {
            let batch = self.text.held_out(start..task.valid_rows.min(start + each), longest);
            let losses = loss::evaluate_each(model, &batch, device);
            losses.iter().enumerate().for_each(|(at, loss)| by_position[at % longest] += f64::from(*loss));
        }
        let mean = |(from, to): (usize, usize)| by_position[from..to].iter().sum::<f64>() / ((to - from) * task.valid_rows) as f64;
        let mut spans = vec![(0, task.length), (task.length, longest)];
        spans.extend(self.recipe.octaves());
        let mut scores: Vec<(String, f64)> = spans.into_iter().map(|span| (loss_name(span, self.length), mean(span))).collect();
        for length in &task.test_lengths {
            let each = (MEASURED / length).clamp(1, task.test_rows);
            let (mut numbers, mut needles) = (0, 0);
            for (part, start) in (0..task.test_rows).step_by(each).enumerate() {
                let rows = each.min(task.test_rows - start);
                let stream = [TEST, *length as u64, part as u64];
                let batch = behind(self.shelf.targets(Variant::Standard, *length, stream, rows));
                numbers += whole(&fit::right(model, &batch, device));
                let batch = task.needle_rows(self.text, *length, 1, stream, rows);
                needles += whole(&fit::right(model, &batch, device));
            }
            let share = |count: usize| count as f64 / task.test_rows as f64;
            scores.push((lookup_name(Rows::Phonebook, *length, self.length), share(numbers)));
            scores.push((lookup_name(Rows::Needles, *length, self.length), share(needles)));
        }
        scores
    }

    fn larger_is_better(&self) -> bool {
        false
    }
}

/// Names of measurements after training up to a length.
fn loss_name((from, to): (usize, usize), after: usize) -> String {
    format!("loss at {from} to {to}, after {after}")
}

fn lookup_name(part: Rows, length: usize, after: usize) -> String {
    let part = if part == Rows::Phonebook { "phonebook" } else { "needles" };
    format!("{part} of {length}, after {after}")
}

impl LongContext {
    /// Lengths of the stages.
    fn lengths(&self) -> Vec<usize> {
        std::iter::once(self.task.length).chain(self.continuation.iter().map(|stage| stage.length)).collect()
    }

    fn longest(&self) -> usize {
        self.continuation.last().map_or(self.task.length, |stage| stage.length)
    }

    /// Spans of positions, each twice the one before, on both sides of the short length.
    fn octaves(&self) -> Vec<(usize, usize)> {
        let longest = self.longest();
        let mut edges: Vec<usize> = vec![0];
        edges.extend([8, 4, 2, 1].map(|part| self.task.length / part));
        edges.dedup();
        while edges.last().is_some_and(|last| 2 * last < longest) {
            edges.extend(edges.last().map(|last| 2 * last));
        }
        edges.push(longest);
        edges.windows(2).map(|edges| (edges[0], edges[1])).collect()
    }

    /// The text, without which no model can be measured.
    fn text(&self) -> Result<Text, EvalError> {
        Text::open(self.data.as_deref(), self.longest(), self.task.valid_rows)
    }

    /// Learning, then going on.
    fn stages<'a>(&'a self, text: &'a Text, shelf: &'a Shelf, lr: f64) -> Vec<Stage<Lesson<'a>>> {
        let lesson = |length: usize| {
            let curriculum = if length == self.task.length { self.task.curriculum } else { Curriculum::Cycle };
            Lesson { curriculum, recipe: self, text, shelf, length }
        };
        let Training { steps, batch: rows, .. } = self.training;
        let first = Stage { task: lesson(self.task.length), steps, rows, lr, rotary_base: None };
        let later = self.continuation.iter().map(|stage| Stage {
            task: lesson(stage.length),
            steps: stage.steps,
            rows: stage.batch,
            lr: lr * stage.rate,
            rotary_base: stage.rotary_base,
        });
        std::iter::once(first).chain(later).collect()
    }
}

impl Experiment for LongContext {
    type Cell = Cell;
    type Found = Learned;

    fn check(&self) -> Result<(), EvalError> {
        let task = &self.task;
        let fail = |key: &str, reason: String| Err(EvalError::value(key, reason));
        if task.length < 8 {
            return fail("task.length", "at least 8".to_string());
        }
        if self.continuation.is_empty() {
            return fail("continuation", "at least one longer length".to_string());
        }
        if let Some(pair) = self.lengths().windows(2).find(|pair| pair[1] <= pair[0]) {
            return fail("continuation", format!("length {} does not lie above the {} before it", pair[1], pair[0]));
        }
        for (i, stage) in self.continuation.iter().enumerate() {
            let fail = |key: &str, reason: &str| fail(&format!("continuation.{i}.{key}"), reason.to_string());
            match stage {
                _ if stage.batch == 0 => return fail("batch", "at least 1"),
                _ if stage.steps == 0 => return fail("steps", "at least 1"),
                _ if !(stage.rate.is_finite() && stage.rate > 0.0) => return fail("rate", "more than 0"),
                _ if stage.rotary_base.is_some_and(|base| !(base.is_finite() && base > 1.0)) => return fail("rotary_base", "more than 1"),
                _ => {}
            }
        }
        if self.training.stop_at.is_some() {
            return fail("training.stop_at", "stages have the steps that the recipe gives them; leave it out".to_string());
        }
        if task.mix.is_empty() {
            return fail("task.mix", "at least one of text, recall, phonebook, needles".to_string());
        }
        if task.divisors.is_empty() || task.divisors.contains(&0) {
            return fail("task.divisors", "at least one, none of them 0".to_string());
        }
        if !(task.asked > 0.0 && task.asked < 1.0) {
            return fail("task.asked", "a share of a row, between 0 and 1".to_string());
        }
        if !(2..=KEYS.len()).contains(&task.names) {
            return fail("task.names", format!("{} is not from 2 to {}", task.names, KEYS.len()));
        }
        if !(1..=KEYS.len()).contains(&task.needles) {
            return fail("task.needles", format!("{} is not from 1 to {}", task.needles, KEYS.len()));
        }
        if task.test_rows == 0 || task.valid_rows == 0 || task.test_lengths.is_empty() {
            return fail("task", "test_rows and valid_rows are at least 1, and there is a test length".to_string());
        }
        for length in &task.test_lengths {
            let fail = |reason: String| fail("task.test_lengths", reason);
            if *length > self.longest() {
                return fail(format!("{length} tokens are more than the longest stage's {}", self.longest()));
            }
            task.hides(*length).and_then(|()| holds(task.names, Variant::Standard, *length, Shots::Paper)).or_else(fail)?;
        }
        for whole in self.lengths() {
            let rows =
                task.mix.iter().flat_map(|rows| task.divisors_of(*rows, whole).into_iter().map(move |divisor| (rows, whole / divisor)));
            for (rows, length) in rows {
                let made = match rows {
                    Rows::Text => Ok(()),
                    Rows::Recall => holds_twice(task.names, length),
                    Rows::Phonebook => holds(task.names, Variant::Standard, length, task.shots(length)),
                    Rows::Needles => task.hides(length),
                };
                made.or_else(|reason| fail("task.divisors", reason))?;
            }
        }
        Ok(())
    }

    fn training(&self) -> Option<&Training> {
        Some(&self.training)
    }

    fn subjects(&self, cells: &[Cell]) -> Vec<Subject> {
        let longest = self.continuation.last().map(|stage| (stage.batch, stage.length));
        let steps = std::iter::once((self.training.batch, self.task.length)).chain(longest);
        // Of text: a row ends with a position that is not predicted.
        steps.flat_map(|(rows, length)| sweep::subjects(cells, rows, length, 1.0)).collect()
    }

    fn ready(&self) -> Result<(), EvalError> {
        self.text().map(drop)
    }

    fn cells(&self) -> Result<Vec<Cell>, EvalError> {
        self.models.cells(BYTES as usize + Shelf::new(self.task.names).vocabulary(), &self.training)
    }

    fn seconds(&self, cell: &Cell, gpu: bool) -> f64 {
        let task = &self.task;
        let guess = |steps: usize, rows: usize, length: usize| fit::guess(&cell.config, steps, rows, length, 0.6, gpu);
        let learning = guess(self.training.steps, self.training.batch, task.length);
        let continuing = self.continuation.iter().map(|stage| guess(stage.steps, stage.batch, stage.length)).sum::<f64>();
        // Forward alone, a third.
        let lookups: f64 = task.test_lengths.iter().map(|length| 2.0 * guess(1, task.test_rows, *length)).sum();
        let measured = (lookups + guess(1, task.valid_rows, self.longest())) / 3.0;
        learning + continuing + measured * self.lengths().len() as f64
    }

    fn run<B: TrainBackend>(&self, cell: &Cell, running: &mut Running<'_>, device: &B::Device) -> Result<Option<Learned>, EvalError> {
        let (text, shelf) = (self.text()?, Shelf::new(self.task.names));
        cell.run_stages::<B, _>(&self.training, &self.stages(&text, &shelf, cell.lr), running, device)
    }

    fn report(&self, found: &[(Cell, Learned)]) -> Report {
        let groups = Group::all(found, &loss_name((0, self.task.length), self.longest()), false);
        Report {
            title: "Continued at longer lengths".into(),
            source: "8B study, arXiv 2406.07887, section 4".into(),
            claim: "Models continued at longer lengths keep what they could at the short one and make use of the longer context; the hybrid looks things up there as the Transformer does, the pure state-space model lags behind.".into(),
            table: self.table(&groups),
            figure: self.figure(&groups),
            verdict: self.verdict(&groups),
            notes: self.notes(),
            cells: found.iter().map(|(cell, learned)| cell.row(learned)).collect(),
        }
    }
}

impl LongContext {
    /// One row per model and stage.
    fn table(&self, groups: &[Group<'_>]) -> Table {
        let (task, longest) = (&self.task, self.longest());
        let mut columns = sweep::MODEL.map(String::from).to_vec();
        columns.push("after".to_string());
        columns.push(format!("loss below {}", task.length));
        columns.push(format!("loss beyond {}", task.length));
        let parts = [Rows::Phonebook, Rows::Needles];
        for part in parts {
            columns.extend(task.test_lengths.iter().map(|length| lookup_name(part, *length, 0).replace(", after 0", "")));
        }
        columns.extend(sweep::SPEED.map(String::from));
        let mut rows = Vec::new();
        for group in groups {
            for (stage, after) in self.lengths().into_iter().enumerate() {
                let mut row = sweep::model(group);
                row.push(after.to_string());
                row.push(group.score(&loss_name((0, task.length), after)).to_string());
                row.push(group.score(&loss_name((task.length, longest), after)).to_string());
                for part in parts {
                    row.extend(task.test_lengths.iter().map(|length| group.score(&lookup_name(part, *length, after)).to_string()));
                }
                row.extend(sweep::speed(group, |run| run.pace.get(stage).copied().unwrap_or_default()));
                rows.push(row);
            }
        }
        Table { columns, rows }
    }

    fn figure(&self, groups: &[Group<'_>]) -> Figure {
        let task = &self.task;
        let mut lengths = task.test_lengths.clone();
        lengths.sort_unstable();
        let lookups = |part: Rows, after: usize| Panel {
            title: format!("{part:?}: numbers that are right, after {after}"),
            x: "Tokens of the row".into(),
            x_scale: Scale::Log2,
            y_range: Some((-0.02, 1.02)),
            series: groups
                .iter()
                .map(|group| {
                    group.line(&lengths.iter().map(|length| (*length as f64, lookup_name(part, *length, after))).collect::<Vec<_>>())
                })
                .collect(),
            ..Panel::default()
        };
        // Losses of untrained positions may be anything: the axes of both panels are those of what was learnt.
        let losses: Vec<Vec<Series>> = [task.length, self.longest()]
            .map(|after| {
                let names: Vec<(f64, String)> =
                    self.octaves().into_iter().map(|(from, to)| (((from + to) / 2) as f64, loss_name((from, to), after))).collect();
                groups.iter().map(|group| group.line(&names)).collect()
            })
            .into();
        let after: Vec<f64> =
            losses[1].iter().flat_map(|series| series.points.iter().map(|point| point.1)).filter(|y| y.is_finite()).collect();
        let (low, high) = after.iter().fold((f64::MAX, f64::MIN), |(low, high), y| (low.min(*y), high.max(*y)));
        let room = 0.1 * (high - low).max(0.1);
        let y_range = (!after.is_empty()).then_some((low - room, high + 4.0 * room));
        let loss = |series: Vec<Series>, after: usize| Panel {
            title: format!("Held-out loss by position, after {after} (nats per byte)"),
            x: "Position".into(),
            x_scale: Scale::Log2,
            y_range,
            series,
            ..Panel::default()
        };
        let mut losses = losses.into_iter();
        let mut panels = Vec::new();
        for after in [task.length, self.longest()] {
            panels.extend(losses.next().map(|series| loss(series, after)));
        }
        for part in [Rows::Phonebook, Rows::Needles] {
            panels.extend([task.length, self.longest()].map(|after| lookups(part, after)));
        }
        Figure { title: "Continued at longer lengths".into(), panels }
    }

    fn verdict(&self, groups: &[Group<'_>]) -> Verdict {
        let (length, longest) = (self.task.length, self.longest());
        // Of every architecture, on average over its widths.
        let of = |architecture: &Architecture, name: &str| self.models.of(groups, name, |a| a == architecture).map_or(f64::NAN, |(_, v)| v);
        let all = |claim: String, holds: &dyn Fn(&Architecture) -> (bool, String)| {
            let found: Vec<(bool, String)> = self.models.architectures.iter().map(holds).collect();
            let text = found.iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>().join(", ");
            Check::measured(claim, found.iter().all(|(held, _)| *held), text)
        };
        let keeps = all(format!("continuing keeps the loss of the first {length} positions"), &|a| {
            let [before, after] = [length, longest].map(|after| of(a, &loss_name((0, length), after)));
            (after < before + MARGIN, format!("{} {before:.3} before, {after:.3} after", a.name))
        });
        let within = self.octaves().into_iter().find(|(_, to)| *to == length).unwrap_or((0, length));
        let falls = all(format!("after continuing, the loss beyond {length} is no higher than before it"), &|a| {
            let [near, far] = [within, (length, longest)].map(|span| of(a, &loss_name(span, longest)));
            (far < near + MARGIN, format!("{} {near:.3} at {} to {}, {far:.3} beyond", a.name, within.0, within.1))
        });
        let most = self.task.test_lengths.iter().copied().max().unwrap_or(longest);
        let mut checks = vec![keeps, falls];
        for kind in [Kind::Transformer, Kind::Hybrid] {
            let name = if kind == Kind::Transformer { "Transformer" } else { "hybrid" };
            let claim = format!("the {name} looks numbers up in books of {most} tokens after continuing");
            let Some(architecture) = self.models.architectures.iter().find(|a| a.kind() == kind) else {
                checks.push(Check::absent(claim, "the recipe lacks it"));
                continue;
            };
            let near = self.task.test_lengths.iter().copied().min().unwrap_or(length);
            let at = |books: usize, after: usize| of(architecture, &lookup_name(Rows::Phonebook, books, after));
            let (known, before, after) = (at(near, longest).max(at(near, length)), at(most, length), at(most, longest));
            let text = format!("{} {before:.3} before, {after:.3} after; {known:.3} at {near} tokens", architecture.name);
            checks.push(if known < LEARNT {
                Check::absent(claim, format!("it has not learnt to at any length: {text}"))
            } else {
                Check::measured(claim, after > 0.5 * known && after > LEARNT, text)
            });
        }
        checks.extend(self.models.lag(groups, &lookup_name(Rows::Phonebook, most, longest), 0.05));
        Verdict { checks }
    }

    fn notes(&self) -> Vec<String> {
        let task = &self.task;
        let data = self.data.as_deref().unwrap_or(text::SYNTHETIC);
        let mix: Vec<String> = task.mix.iter().map(|part| format!("{part:?}").to_lowercase()).collect();
        let going_on: Vec<String> = self
            .continuation
            .iter()
            .map(|stage| {
                let base = stage.rotary_base.map_or("rotary base as before".to_string(), |base| format!("rotary base {base}"));
                format!(
                    "{} steps of {} rows of {} tokens at {} of the learning rate, {base}",
                    stage.steps, stage.batch, stage.length, stage.rate
                )
            })
            .collect();
        let mut notes = vec![
            format!(
                "Learning: {} steps of {} rows of {} tokens, rotary base 10000 where attention has positions. Continuing: {}.",
                self.training.steps,
                self.training.batch,
                task.length,
                going_on.join("; ")
            ),
            format!(
                "Steps are of one kind in turn: {}. Text: {data}, as bytes, all predicted. Small models do not learn to look things up from text alone, so rows of both tasks are part of training, and phonebooks whose entries come again in another order (recall); of them numbers alone are predicted.",
                mix.join(", ")
            ),
            match task.curriculum {
                Curriculum::Cycle => format!("Rows of these are a stage's length divided by {}, in turn.", sweep::list(&task.divisors)),
                Curriculum::Stages => format!(
                    "Rows of these are a stage's length divided by {}: one after another for equal numbers of steps at {} tokens, in turn later.",
                    sweep::list(&task.divisors),
                    task.length
                ),
            },
            format!(
                "Loss: the last {} rows of {} bytes of the text, nats per byte. Phonebook: standard template, {} first and last names, words as tokens; needles: a number of {DIGITS} digits among up to {} in held-out text, bytes as tokens; whole numbers that are right, of {} held-out rows per length.",
                task.valid_rows,
                self.longest(),
                task.names,
                task.needles,
                task.test_rows
            ),
            format!("Differences of losses below {MARGIN} are taken for chance."),
        ];
        notes.extend(sweep::notes(&self.models, &self.training));
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe() -> LongContext {
        let text = include_str!("../../../../examples/experiments/smoke/long-context.json");
        let mut value: serde_json::Value = serde_json::from_str(text).unwrap();
        value.as_object_mut().unwrap().remove("experiment");
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn needles_lie_in_text_and_answers_are_theirs() {
        let recipe = recipe();
        let text = recipe.text().unwrap();
        for (length, asked, stream) in [(384, 9, TRAIN), (768, 1, TEST)] {
            let batch = recipe.task.needle_rows(&text, length, asked, [stream, 3, 4], 12);
            let hidden = recipe.task.hidden(length);
            assert_eq!((batch.ids.len(), batch.labelled()), (12 * length, 12 * asked.min(hidden) * DIGITS as usize));
            for (ids, labels) in batch.ids.chunks(length).zip(batch.labels.chunks(length)) {
                let shown: String = ids.iter().map(|id| char::from(*id as u8)).collect();
                assert_eq!(shown.matches("magic number for").count(), hidden + 2 * asked.min(hidden), "{shown}");
                let mut at = 0;
                while let Some(first) = (at..length).find(|at| labels[*at] != IGNORED) {
                    let answer: String = labels[first..first + DIGITS as usize].iter().map(|label| char::from(*label as u8)).collect();
                    let key = shown[..=first].trim_end().rsplit(' ').nth(1).unwrap();
                    assert!(shown.contains(&format!("The special magic number for {key} is {answer}.")), "{key} {answer}: {shown}");
                    at = first + DIGITS as usize;
                }
                assert!(at == length || at == 0 || at > length - 8, "the last answer ends the row");
            }
        }
    }

    #[test]
    fn stages_have_their_lengths_and_their_rows() {
        let recipe = recipe();
        let (text, shelf) = (recipe.text().unwrap(), Shelf::new(recipe.task.names));
        let vocabulary = BYTES as usize + shelf.vocabulary();
        for stage in recipe.stages(&text, &shelf, 1e-3) {
            let whole = stage.rows * stage.task.length;
            for step in 0..2 * recipe.task.mix.len() * recipe.task.divisors.len() {
                let batch = stage.task.batch(1, step, stage.steps, stage.rows);
                // A book ends with a whole question.
                assert!(batch.ids.len() <= whole && 10 * batch.ids.len() > 8 * whole, "{} of {whole}", batch.ids.len());
                assert!(batch.ids.iter().all(|id| (*id as usize) < vocabulary) && batch.labelled() > 0);
                let part = recipe.task.mix[step % recipe.task.mix.len()];
                assert_eq!(batch.ids.iter().all(|id| *id >= BYTES), matches!(part, Rows::Phonebook | Rows::Recall));
                assert_eq!(batch.labelled() == batch.ids.len(), part == Rows::Text);
            }
        }
    }

    #[test]
    fn octaves_cover_all_positions() {
        let mut recipe = recipe();
        for (length, longest) in [(192, 768), (2048, 32768), (100, 301)] {
            recipe.task.length = length;
            recipe.continuation.last_mut().unwrap().length = longest;
            let octaves = recipe.octaves();
            assert_eq!((octaves[0].0, octaves.last().unwrap().1), (0, longest));
            assert!(octaves.windows(2).all(|pair| pair[0].1 == pair[1].0) && octaves.iter().all(|(from, to)| from < to), "{octaves:?}");
            assert!(octaves.iter().any(|(_, to)| *to == length), "{octaves:?}");
        }
    }

    #[test]
    fn impossible_recipes_are_refused() {
        let said = |change: &dyn Fn(&mut LongContext)| {
            let mut recipe = recipe();
            change(&mut recipe);
            recipe.check().map_err(|error| error.to_string())
        };
        assert!(said(&|_| {}).is_ok());
        assert!(said(&|r| r.continuation.clear()).unwrap_err().contains("continuation"));
        assert!(said(&|r| r.continuation[0].length = 100).unwrap_err().contains("100"));
        assert!(said(&|r| r.continuation[1].rotary_base = Some(0.0)).unwrap_err().contains("continuation.1.rotary_base"));
        assert!(said(&|r| r.training.stop_at = Some(1.0)).unwrap_err().contains("stop_at"));
        assert!(said(&|r| r.task.test_lengths.push(100_000)).unwrap_err().contains("100000"));
        assert!(said(&|r| r.task.divisors.push(20)).unwrap_err().contains("divisors"));
        assert!(said(&|r| r.task.names = 2).unwrap_err().contains("names"));
        assert!(said(&|r| r.task.mix = vec![]).unwrap_err().contains("mix"));
        assert!(said(&|r| (r.task.mix, r.task.divisors) = (vec![Rows::Recall], vec![20])).unwrap_err().contains("two entries"));
        assert!(said(&|r| (r.task.mix, r.task.divisors) = (vec![Rows::Text], vec![20])).is_ok());
        assert!(said(&|r| r.task.needles = 0).unwrap_err().contains("needles"));
    }
}
