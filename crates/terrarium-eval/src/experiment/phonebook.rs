//! Phonebook lookup (arXiv 2406.07887, section 3.3.3), trained from scratch on its own templates.
//!
//! The text is the paper's, character by character; its tokens are words, signs and at most four digits, so that a model without any
//! other schooling can read it. A book is filled up to a length in tokens.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::seq::index::sample;
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

mod page;

pub(super) use page::FIRST as KEYS;
pub use page::Variant;
use page::{FIRST, LAST, Page, page, pieces};

/// The experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phonebook {
    /// What is compared.
    pub models: Models,
    /// The task.
    pub task: PhonebookTask,
    /// How the models learn.
    #[serde(default)]
    pub training: Training,
}

/// Sizes of the task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PhonebookTask {
    /// Which templates, in turn while training.
    pub variants: Vec<Variant>,
    /// Different first names, and as many last names, at most 64.
    pub names: usize,
    /// Tokens of a prompt, at most, while training.
    pub train_lengths: Vec<usize>,
    /// Training steps on books whose entries come again in another order, for one step on each of the variants. They have many
    /// numbers to predict where a page of the paper has three, and teach the same.
    #[serde(default)]
    pub recall: usize,
    /// How training goes through them.
    #[serde(default)]
    pub curriculum: Curriculum,
    /// Tokens of a prompt when measuring, beyond those of training too.
    pub test_lengths: Vec<usize>,
    /// Held-out books per length and variant.
    pub test_rows: usize,
}

impl PhonebookTask {
    fn check(&self) -> Result<(), EvalError> {
        let fail = |key: &str, reason: String| Err(EvalError::value(format!("task.{key}"), reason));
        if self.variants.is_empty() {
            return fail("variants", "standard, reversed, or both".to_string());
        }
        if !(2..=FIRST.len()).contains(&self.names) {
            return fail("names", format!("{} is not from 2 to {}", self.names, FIRST.len()));
        }
        if self.test_rows == 0 {
            return fail("test_rows", "at least 1".to_string());
        }
        for (key, lengths) in [("train_lengths", &self.train_lengths), ("test_lengths", &self.test_lengths)] {
            if lengths.is_empty() {
                return fail(key, "at least one".to_string());
            }
            for length in lengths {
                for variant in &self.variants {
                    holds(self.names, *variant, *length, Shots::Paper).or_else(|reason| fail(key, reason))?;
                }
                if self.recall > 0 && key == "train_lengths" {
                    holds_twice(self.names, *length).or_else(|reason| fail(key, reason))?;
                }
            }
        }
        Ok(())
    }

    fn longest(&self) -> usize {
        self.train_lengths.iter().copied().max().unwrap_or(1)
    }

    /// The length whose measurement decides: the longest that was trained on, among those that are measured.
    fn deciding(&self) -> usize {
        let trained = self.test_lengths.iter().copied().filter(|length| *length <= self.longest()).max();
        trained.or(self.test_lengths.first().copied()).unwrap_or(1)
    }
}

/// Names and every piece that a page with them may have.
pub(super) struct Shelf {
    names: usize,
    words: Vec<String>,
}

/// Which entries are asked for before the one that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shots {
    /// Two, at a third and two thirds of the book.
    Paper,
    /// So many, at random.
    Random(usize),
}

impl Shots {
    fn count(self) -> usize {
        match self {
            Self::Paper => 2,
            Self::Random(count) => count,
        }
    }

    /// Places in a book of `count` entries, none of them `target`.
    fn places(self, count: usize, target: usize, rng: &mut StdRng) -> Vec<usize> {
        match self {
            Self::Paper => [count / 3, 2 * count / 3].map(|shot| if shot == target { (shot + 1) % count } else { shot }).to_vec(),
            Self::Random(shots) => sample(rng, count - 1, shots).into_iter().map(|shot| shot + usize::from(shot >= target)).collect(),
        }
    }
}

/// Entries that fill a prompt and its answer up to `length` tokens.
fn entries(variant: Variant, length: usize, shots: Shots) -> usize {
    let tokens = |n: usize| {
        let entries = vec![("Ada Abbott".to_string(), "200-200-1000".to_string()); n];
        page(variant, &entries, &vec![0; shots.count()], 0).parts.iter().map(|(text, _)| pieces(text).len()).sum::<usize>()
    };
    let (one, two) = (tokens(1), tokens(2));
    (length + (two - one)).saturating_sub(one) / (two - one)
}

/// Refuses books that are too small for their questions, or too large for their names.
pub(super) fn holds(names: usize, variant: Variant, length: usize, shots: Shots) -> Result<(), String> {
    match entries(variant, length, shots) {
        count if count < 3.max(shots.count() + 1) => {
            Err(format!("{length} tokens hold no book of {} entries with its questions", 3.max(shots.count() + 1)))
        }
        count if count > names * names => {
            Err(format!("{length} tokens hold {count} entries, more than {names} first and {names} last names make"))
        }
        _ => Ok(()),
    }
}

/// Refuses books that cannot be read twice.
pub(super) fn holds_twice(names: usize, length: usize) -> Result<(), String> {
    match (length + 1) / (2 * ENTRY) {
        0 | 1 => Err(format!("{length} tokens hold no book of two entries twice")),
        count if count > names * names => {
            Err(format!("{length} tokens hold {count} entries twice, more than {names} first and {names} last names make"))
        }
        _ => Ok(()),
    }
}

impl Shelf {
    /// Books with the first `names` first and last names, at most 64.
    pub fn new(names: usize) -> Self {
        let entries: Vec<(String, String)> = (0..2).map(|i| (format!("{} {}", FIRST[i], LAST[i]), "200-200-1000".to_string())).collect();
        let mut words: Vec<String> = (200..10_000).map(|n| n.to_string()).collect();
        words.extend(FIRST[..names].iter().chain(&LAST[..names]).map(ToString::to_string));
        for variant in [Variant::Standard, Variant::Reversed] {
            let page = page(variant, &entries, &[0, 1], 0);
            words.extend(page.parts.iter().flat_map(|(text, _)| pieces(text)).map(ToString::to_string));
        }
        words.sort();
        words.dedup();
        Self { names, words }
    }

    /// Tokens of vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.words.len()
    }

    /// A book of `count` entries, and the places of examples and target.
    fn book(&self, count: usize, shots: Shots, rng: &mut StdRng) -> (Vec<(String, String)>, Vec<usize>, usize) {
        let names = sample(rng, self.names * self.names, count);
        let entries: Vec<(String, String)> = names
            .into_iter()
            .map(|name| {
                let (area, exchange) = (rng.random_range(200..1000), rng.random_range(200..1000));
                let phone = format!("{area}-{exchange}-{}", rng.random_range(1000..10000));
                (format!("{} {}", FIRST[name / self.names], LAST[name % self.names]), phone)
            })
            .collect();
        let depth = rng.random_range(0..100) as f64 / 100.0 * 0.97;
        let target = (depth * count as f64) as usize;
        let shots = shots.places(count, target, rng);
        (entries, shots, target)
    }

    /// `rows` books that fill `length` tokens with their questions, whose answers are the labels.
    pub fn rows(&self, variant: Variant, length: usize, shots: Shots, stream: [u64; 3], rows: usize) -> Batch {
        let count = entries(variant, length, shots);
        self.pages(stream, rows, |rng| {
            let (entries, shots, target) = self.book(count, shots, rng);
            page(variant, &entries, &shots, target)
        })
    }

    /// `rows` books that are read twice in `length` tokens, the second time in another order: its numbers are the labels.
    pub fn twice(&self, length: usize, stream: [u64; 3], rows: usize) -> Batch {
        let count = (length + 1) / (2 * ENTRY);
        self.pages(stream, rows, |rng| {
            let (mut entries, ..) = self.book(count, Shots::Random(0), rng);
            let book = entries.clone();
            entries.shuffle(rng);
            page::twice(&book, &entries)
        })
    }

    fn pages(&self, stream: [u64; 3], rows: usize, page: impl Fn(&mut StdRng) -> Page + Sync) -> Batch {
        // Every piece that a page can have is a word.
        let id = |piece: &str| self.words.binary_search_by(|word| word.as_str().cmp(piece)).unwrap_or_default() as i32;
        let row = |row: u64| {
            let page = page(&mut generator([stream[0], stream[1], stream[2], row]));
            let (mut ids, mut labels) = (Vec::new(), Vec::new());
            for (text, answer) in &page.parts {
                for piece in pieces(text) {
                    let id = id(piece);
                    ids.push(id);
                    // The label of a position is the token after it.
                    labels.push(if *answer { id } else { IGNORED });
                }
            }
            labels.remove(0);
            ids.pop();
            (ids, labels)
        };
        let made: Vec<(Vec<i32>, Vec<i32>)> = (0..rows as u64).into_par_iter().map(row).collect();
        let (ids, labels): (Vec<Vec<i32>>, Vec<Vec<i32>>) = made.into_iter().unzip();
        let length = ids.first().map_or(0, Vec::len);
        Batch { rows, length, ids: ids.concat(), labels: labels.concat(), documents: vec![0; rows * length] }
    }

    /// The same with the last answer of each row as its only label: answers to the examples do not count.
    pub fn targets(&self, variant: Variant, length: usize, stream: [u64; 3], rows: usize) -> Batch {
        let mut batch = self.rows(variant, length, Shots::Paper, stream, rows);
        for labels in batch.labels.chunks_mut(batch.length) {
            let until = labels.len() - ANSWER;
            labels[..until].fill(IGNORED);
        }
        batch
    }
}

/// The task and its books.
struct Books<'a> {
    task: &'a PhonebookTask,
    shelf: Shelf,
}

/// Tokens of one pass when measuring.
const MEASURED: usize = 1 << 16;

/// Tokens of an entry: two names, a sign, a number, the line's end.
const ENTRY: usize = 4 + ANSWER;

/// Tokens of a number: three groups, two signs.
const ANSWER: usize = 5;

impl Task for Books<'_> {
    fn batch(&self, seed: u64, step: usize, steps: usize, rows: usize) -> Batch {
        let length = self.task.train_lengths[self.task.curriculum.at(step, steps, self.task.train_lengths.len())];
        // Lengths may be taken in turn too: each meets every kind of page.
        let turn = step / self.task.train_lengths.len().max(1) % (self.task.recall + self.task.variants.len());
        let stream = [TRAIN, seed, step as u64];
        match turn.checked_sub(self.task.recall) {
            None => self.shelf.twice(length, stream, rows),
            Some(variant) => self.shelf.rows(self.task.variants[variant], length, Shots::Paper, stream, rows),
        }
    }

    /// Share of targets whose whole number is right: what greedy decoding would write.
    fn measure<B: KernelBackend>(&self, model: &Decoder<B>, device: &B::Device) -> Vec<(String, f64)> {
        let task = self.task;
        let deciding = task.deciding();
        let rest = task.test_lengths.iter().copied().filter(|length| *length != deciding);
        let mut scores = Vec::new();
        for length in std::iter::once(deciding).chain(rest) {
            for variant in &task.variants {
                let each = (MEASURED / length).clamp(1, task.test_rows);
                let mut right = 0;
                for (part, start) in (0..task.test_rows).step_by(each).enumerate() {
                    let rows = each.min(task.test_rows - start);
                    let stream = [TEST, length as u64, part as u64 * 2 + u64::from(*variant == Variant::Reversed)];
                    let batch = self.shelf.targets(*variant, length, stream, rows);
                    right += whole(&fit::right(model, &batch, device));
                }
                scores.push((name(*variant, length), right as f64 / task.test_rows as f64));
            }
        }
        scores
    }
}

/// Rows without a mistake.
pub(super) fn whole(counts: &[(usize, usize)]) -> usize {
    counts.iter().filter(|(right, all)| right == all).count()
}

/// Name of a measurement.
fn name(variant: Variant, length: usize) -> String {
    let variant = match variant {
        Variant::Standard => "standard",
        Variant::Reversed => "reversed",
    };
    format!("{variant}, {length} tokens")
}

impl Phonebook {
    fn books(&self) -> Books<'_> {
        Books { task: &self.task, shelf: Shelf::new(self.task.names) }
    }
}

impl Experiment for Phonebook {
    type Cell = Cell;
    type Found = Learned;

    fn check(&self) -> Result<(), EvalError> {
        self.task.check()
    }

    fn training(&self) -> Option<&Training> {
        Some(&self.training)
    }

    fn cells(&self) -> Result<Vec<Cell>, EvalError> {
        self.models.cells(self.books().shelf.vocabulary(), &self.training)
    }

    fn subjects(&self, cells: &[Cell]) -> Vec<Subject> {
        sweep::subjects(cells, self.training.batch, self.task.longest(), (3 * ANSWER) as f64 / self.task.longest() as f64)
    }

    fn seconds(&self, cell: &Cell, gpu: bool) -> f64 {
        let mean = self.task.train_lengths.iter().sum::<usize>() / self.task.train_lengths.len().max(1);
        fit::guess(&cell.config, self.training.steps, self.training.batch, mean, 0.05, gpu)
    }

    fn run<B: TrainBackend>(&self, cell: &Cell, running: &mut Running<'_>, device: &B::Device) -> Result<Option<Learned>, EvalError> {
        cell.run::<B>(&self.training, &self.books(), running, device)
    }

    fn report(&self, found: &[(Cell, Learned)]) -> Report {
        let task = &self.task;
        let deciding = name(task.variants[0], task.deciding());
        let groups = Group::all(found, &deciding, true);
        let mut lengths = task.test_lengths.clone();
        lengths.sort_unstable();
        let scores: Vec<String> = task.variants.iter().flat_map(|variant| lengths.iter().map(|length| name(*variant, *length))).collect();
        let panel = |variant: &Variant| Panel {
            title: format!("{variant:?}: numbers that are right (trained on up to {} tokens)", task.longest()),
            x: "Tokens of the prompt".into(),
            x_scale: Scale::Log2,
            y_range: Some((-0.02, 1.02)),
            series: groups
                .iter()
                .map(|group| group.line(&lengths.iter().map(|length| (*length as f64, name(*variant, *length))).collect::<Vec<_>>()))
                .collect(),
            ..Panel::default()
        };
        let [lag, keeps] = self.models.lag(&groups, &deciding, 0.05);
        let beyond = lengths.iter().find(|length| **length > task.longest()).map(|length| name(task.variants[0], *length));
        let beyond = self.models.beyond(&groups, beyond.as_deref(), 0.05);
        let mut notes = sweep::notes(&self.models, &self.training);
        notes.insert(
            0,
            format!(
                "Books of {} tokens in training, {} first and last names; whole numbers that are right, of {} held-out books per length.{}",
                sweep::list(&task.train_lengths),
                task.names,
                task.test_rows,
                match task.recall {
                    0 => String::new(),
                    n => format!(
                        " Of {} training steps {n} are on books whose entries come again in another order, their numbers predicted.",
                        n + task.variants.len()
                    ),
                }
            ),
        );
        Report {
            title: "Phonebook lookup".into(),
            source: "8B study, arXiv 2406.07887, section 3.3.3".into(),
            claim: "Pure state-space models lose numbers as the book grows; the hybrid looks them up as well as the Transformer.".into(),
            table: sweep::table(&groups, &scores),
            figure: Figure { title: "Phonebook lookup".into(), panels: task.variants.iter().map(panel).collect() },
            verdict: Verdict { checks: vec![lag, keeps, beyond] },
            notes,
            cells: found.iter().map(|(cell, learned)| cell.row(learned)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task() -> PhonebookTask {
        PhonebookTask {
            variants: vec![Variant::Standard, Variant::Reversed],
            names: 8,
            train_lengths: vec![160],
            recall: 0,
            curriculum: Curriculum::Cycle,
            test_lengths: vec![160, 320],
            test_rows: 4,
        }
    }

    #[test]
    fn books_are_full_and_hold_what_is_asked_for() {
        let task = task();
        let shelf = Shelf::new(task.names);
        for variant in [Variant::Standard, Variant::Reversed] {
            for length in [160, 320] {
                let batch = shelf.rows(variant, length, Shots::Paper, [TRAIN, 1, 2], 12);
                // The last token is predicted, never read.
                assert!(batch.length < length && batch.length + 1 + 10 > length, "{variant:?} {length}: {}", batch.length);
                let answers = if variant == Variant::Standard { 3 } else { 1 };
                assert_eq!(batch.labelled(), 12 * answers * ANSWER);
                for (ids, labels) in batch.ids.chunks(batch.length).zip(batch.labels.chunks(batch.length)) {
                    let text = |id: i32| shelf.words[id as usize].as_str();
                    let answer: Vec<&str> = labels[batch.length - ANSWER..].iter().map(|id| text(*id)).collect();
                    assert!(
                        answer[0].parse::<usize>().unwrap() >= 200 && answer[1] == "-" && answer[3] == "-" && answer[4].len() == 4,
                        "{answer:?}"
                    );
                    // The name before the question mark stands in the book before that very number.
                    let shown: Vec<&str> = ids.iter().map(|id| text(*id)).collect();
                    let mark = shown.iter().rposition(|piece| *piece == "?").unwrap();
                    let line = [&shown[mark - 2..mark], &[":"], &answer[..]].concat();
                    assert!(shown.windows(line.len()).any(|window| window == line), "{line:?} in {shown:?}");
                }
            }
        }
    }

    #[test]
    fn many_questions_are_about_different_entries() {
        let shelf = Shelf::new(8);
        let batch = shelf.rows(Variant::Standard, 400, Shots::Random(7), [TRAIN, 1, 2], 20);
        assert!(batch.length < 400 && batch.length + 11 > 400, "{}", batch.length);
        assert_eq!(batch.labelled(), 20 * 8 * ANSWER);
        for ids in batch.ids.chunks(batch.length) {
            let text: Vec<&str> = ids.iter().map(|id| shelf.words[*id as usize].as_str()).collect();
            let asked: Vec<[&str; 2]> = (2..text.len()).filter(|at| text[*at] == "?").map(|at| [text[at - 2], text[at - 1]]).collect();
            assert_eq!(asked.len(), 8);
            for (i, name) in asked.iter().enumerate() {
                assert!(!asked[..i].contains(name) && text.windows(3).any(|w| w[..2] == name[..] && w[2] == ":"), "{name:?}");
            }
        }
        assert!(holds(8, Variant::Standard, 400, Shots::Random(7)).is_ok());
        assert!(holds(8, Variant::Standard, 400, Shots::Random(20)).unwrap_err().contains("21 entries"));
    }

    #[test]
    fn books_are_read_twice_in_another_order() {
        let shelf = Shelf::new(8);
        let batch = shelf.twice(400, [TRAIN, 1, 2], 20);
        assert_eq!((batch.length, batch.labelled()), (395, 20 * 22 * ANSWER));
        for (ids, labels) in batch.ids.chunks(395).zip(batch.labels.chunks(395)) {
            let (first, second) = (&ids[..198], &ids[198..]);
            let lines = |ids: &[i32]| ids.chunks(ENTRY).take(21).map(<[i32]>::to_vec).collect::<Vec<_>>();
            assert_ne!(lines(first), lines(second));
            assert!(lines(second).iter().all(|line| first.chunks(ENTRY).any(|other| other == line)));
            // What is predicted follows.
            assert!((0..394).all(|at| labels[at] == IGNORED || labels[at] == ids[at + 1]) && labels[..200].iter().all(|l| *l == IGNORED));
        }
    }

    #[test]
    fn recall_takes_turns_with_the_variants() {
        let task = PhonebookTask { recall: 2, ..task() };
        let books = Books { task: &task, shelf: Shelf::new(task.names) };
        let labelled = |step: usize| books.batch(0, step, 8, 1).labelled() / ANSWER;
        assert_eq!([0, 1, 2, 3, 4].map(labelled), [8, 8, 3, 1, 8]);
    }

    #[test]
    fn impossible_books_are_refused() {
        let said = |task: PhonebookTask| task.check().map_err(|error| error.to_string());
        assert!(said(task()).is_ok());
        assert!(said(PhonebookTask { test_lengths: vec![40], ..task() }).unwrap_err().contains("book of 3 entries"));
        assert!(said(PhonebookTask { test_lengths: vec![4000], ..task() }).unwrap_err().contains("entries"));
        let variants = vec![Variant::Reversed];
        let short = PhonebookTask { variants, recall: 1, names: 2, train_lengths: vec![160], test_lengths: vec![160], ..task() };
        assert!(said(short).unwrap_err().contains("entries twice"));
        assert!(said(PhonebookTask { names: 65, ..task() }).unwrap_err().contains("names"));
    }
}
