//! Multi-query associative recall (arXiv 2312.04927; the sweep over widths and states is figure 8 of arXiv 2405.21060).
//!
//! ```text
//! k1 v1 k2 v2 .. kK vK | queries among noise: at each position that repeats a key, the label is that key's value
//! ```

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::index::sample;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use terrarium_kernels::{KernelBackend, TrainBackend};
use terrarium_models::Decoder;
use terrarium_train::data::{Batch, IGNORED};
use terrarium_train::plot::{Figure, Panel, Scale, Series};

use super::arch::{Architecture, Kind};
use super::curriculum::{Curriculum, TEST, TRAIN, generator};
use super::fit::{self, Learned, Task, Training};
use super::report::{Check, Report, Verdict};
use super::sweep::{self, Cell, Group, LEARNT, Models};
use super::{Experiment, Running, Subject};
use crate::EvalError;

/// The experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mqar {
    /// What is compared.
    pub models: Models,
    /// The task.
    pub task: MqarTask,
    /// How the models learn.
    #[serde(default)]
    pub training: Training,
}

/// Sizes of the task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MqarTask {
    /// Tokens: keys from the lower half, values from the upper.
    pub vocab_size: usize,
    /// Tokens per row, even.
    pub length: usize,
    /// Pairs per row while training.
    pub train_pairs: Vec<usize>,
    /// How training goes through them.
    #[serde(default)]
    pub curriculum: Curriculum,
    /// Pairs per row when measuring; the first decides.
    pub test_pairs: Vec<usize>,
    /// Held-out rows per number of pairs.
    pub test_rows: usize,
    /// Exponent of the distance from pairs to queries: small ones make near queries likelier.
    #[serde(default = "power")]
    pub power: f64,
    /// Random tokens instead of token 0 between queries.
    #[serde(default = "yes")]
    pub random_non_queries: bool,
}

fn power() -> f64 {
    0.01
}

fn yes() -> bool {
    true
}

/// Rows with `IGNORED` at all positions but the queries'.
pub(crate) struct Rows {
    ids: Vec<i32>,
    labels: Vec<i32>,
}

impl MqarTask {
    fn check(&self) -> Result<(), EvalError> {
        let fail = |key: &str, reason: String| Err(EvalError::value(format!("task.{key}"), reason));
        if self.length == 0 || !self.length.is_multiple_of(2) {
            return fail("length", format!("{} is not even", self.length));
        }
        if self.vocab_size <= self.length {
            return fail("vocab_size", format!("{} is not more than the length {}", self.vocab_size, self.length));
        }
        for (key, pairs) in [("train_pairs", &self.train_pairs), ("test_pairs", &self.test_pairs)] {
            if pairs.is_empty() {
                return fail(key, "at least one number of pairs".to_string());
            }
            // A pair takes two places, its query and the answer's place two more.
            if let Some(bad) = pairs.iter().find(|pairs| **pairs == 0 || **pairs * 4 > self.length) {
                return fail(key, format!("{bad} pairs: at least 1, and at most a quarter of the length {}", self.length));
            }
        }
        if self.test_rows == 0 {
            return fail("test_rows", "at least 1".to_string());
        }
        if !(self.power.is_finite() && self.power > 0.0) {
            return fail("power", "more than 0".to_string());
        }
        Ok(())
    }

    /// One row.
    fn row(&self, pairs: usize, rng: &mut StdRng) -> Rows {
        let (vocab, length, half) = (self.vocab_size, self.length, self.vocab_size / 2);
        // Distinct keys from [1, half), distinct values from [half, vocab).
        let keys: Vec<usize> = sample(rng, half - 1, pairs).into_iter().map(|i| i + 1).collect();
        let values: Vec<usize> = sample(rng, vocab - half, pairs).into_iter().map(|i| i + half).collect();
        let (mut ids, mut labels) = (vec![0; length], vec![IGNORED; length]);
        for (j, (key, value)) in keys.iter().zip(&values).enumerate() {
            ids[2 * j] = *key as i32;
            ids[2 * j + 1] = *value as i32;
        }
        let gaps = self.gaps((length - 2 * pairs) / 2, pairs, rng);
        for ((key, value), gap) in keys.iter().zip(&values).zip(gaps) {
            let at = 2 * pairs + 2 * gap;
            ids[at] = *key as i32;
            labels[at] = *value as i32;
        }
        if self.random_non_queries {
            ids.iter_mut().filter(|id| **id == 0).for_each(|id| *id = rng.random_range(0..vocab as i32));
        }
        Rows { ids, labels }
    }

    /// `count` distinct places below `space`, drawn one after another with weights `i^(power - 1)`, `i` from 1.
    ///
    /// The first arrivals of exponential clocks with these rates are such draws.
    fn gaps(&self, space: usize, count: usize, rng: &mut StdRng) -> Vec<usize> {
        let clock = |i: usize, rng: &mut StdRng| {
            let rate = ((i + 1) as f64).powf(self.power - 1.0);
            -(1.0 - rng.random::<f64>()).ln() / rate
        };
        let mut arrivals: Vec<(f64, usize)> = (0..space).map(|i| (clock(i, rng), i)).collect();
        arrivals.sort_by(|a, b| a.0.total_cmp(&b.0));
        arrivals.into_iter().take(count).map(|(_, i)| i).collect()
    }

    /// Rows `start..start + rows` of a stream of examples with one number of pairs.
    pub(crate) fn rows(&self, pairs: usize, stream: [u64; 3], rows: usize) -> Batch {
        let made: Vec<Rows> =
            (0..rows as u64).into_par_iter().map(|row| self.row(pairs, &mut generator([stream[0], stream[1], stream[2], row]))).collect();
        let (mut ids, mut labels) = (Vec::with_capacity(rows * self.length), Vec::with_capacity(rows * self.length));
        for row in made {
            ids.extend(row.ids);
            labels.extend(row.labels);
        }
        Batch { rows, length: self.length, documents: vec![0; ids.len()], ids, labels }
    }
}

/// Rows of one pass when measuring.
const MEASURED: usize = 256;

impl Task for MqarTask {
    fn batch(&self, seed: u64, step: usize, steps: usize, rows: usize) -> Batch {
        let pairs = self.train_pairs[self.curriculum.at(step, steps, self.train_pairs.len())];
        self.rows(pairs, [TRAIN, seed, step as u64], rows)
    }

    /// Share of the queries answered, averaged over rows.
    fn measure<B: KernelBackend>(&self, model: &Decoder<B>, device: &B::Device) -> Vec<(String, f64)> {
        let accuracy = |pairs: usize| {
            let mut sum = 0.0;
            for (part, start) in (0..self.test_rows).step_by(MEASURED).enumerate() {
                let rows = MEASURED.min(self.test_rows - start);
                let batch = self.rows(pairs, [TEST, pairs as u64, part as u64], rows);
                sum += fit::right(model, &batch, device).iter().map(|(right, all)| *right as f64 / (*all).max(1) as f64).sum::<f64>();
            }
            sum / self.test_rows as f64
        };
        self.test_pairs.iter().map(|pairs| (name(*pairs), accuracy(*pairs))).collect()
    }
}

impl Experiment for Mqar {
    type Cell = Cell;
    type Found = Learned;

    fn check(&self) -> Result<(), EvalError> {
        self.task.check()
    }

    fn training(&self) -> Option<&Training> {
        Some(&self.training)
    }

    fn cells(&self) -> Result<Vec<Cell>, EvalError> {
        self.models.cells(self.task.vocab_size, &self.training)
    }

    fn subjects(&self, cells: &[Cell]) -> Vec<Subject> {
        sweep::subjects(cells, self.training.batch, self.task.length, self.labelled())
    }

    fn seconds(&self, cell: &Cell, gpu: bool) -> f64 {
        fit::guess(&cell.config, self.training.steps, self.training.batch, self.task.length, self.labelled(), gpu)
    }

    fn run<B: TrainBackend>(&self, cell: &Cell, running: &mut Running<'_>, device: &B::Device) -> Result<Option<Learned>, EvalError> {
        cell.run::<B>(&self.training, &self.task, running, device)
    }

    fn report(&self, found: &[(Cell, Learned)]) -> Report {
        let scores: Vec<String> = self.task.test_pairs.iter().map(|pairs| name(*pairs)).collect();
        let groups = Group::all(found, &scores[0], true);
        let mut notes = sweep::notes(&self.models, &self.training);
        notes.push(
            "The verdict compares models of one width at their best learning rate by the first test: means over seeds, and the best seed of each beside them."
                .to_string(),
        );
        notes.insert(
            0,
            format!(
                "Rows of {} tokens, {} tokens of vocabulary, {} pairs in training. Accuracy: share of the queries of a row, averaged over {} held-out rows.",
                self.task.length,
                self.task.vocab_size,
                sweep::list(&self.task.train_pairs),
                self.task.test_rows
            ),
        );
        Report {
            title: "Associative recall with many queries".into(),
            source: "Mamba-2, arXiv 2405.21060, figure 8; task of arXiv 2312.04927".into(),
            claim: "Mamba-2 recalls far better than Mamba at equal state, better the larger its state, and with states of 256 as well as attention.".into(),
            table: sweep::table(&groups, &scores),
            figure: self.figure(&groups),
            verdict: self.verdict(&groups, &scores[0]),
            notes,
            cells: found.iter().map(|(cell, learned)| cell.row(learned)).collect(),
        }
    }
}

impl Mqar {
    /// Share of the positions of a training row that are predicted, on average.
    fn labelled(&self) -> f64 {
        let pairs = self.task.train_pairs.iter().sum::<usize>() as f64 / self.task.train_pairs.len().max(1) as f64;
        pairs / self.task.length as f64
    }

    fn figure(&self, groups: &[Group<'_>]) -> Figure {
        let panel = |pairs: &usize| {
            let series = |(index, architecture): (usize, &Architecture)| {
                let points = groups.iter().filter(|group| group.index == index).map(|group| {
                    let accuracy = group.score(&name(*pairs));
                    (group.width as f64, accuracy.mean, accuracy.deviation)
                });
                Series { name: architecture.name.clone(), points: points.collect(), fit: false }
            };
            Panel {
                title: format!("Accuracy with {pairs} pairs in {} tokens", self.task.length),
                x: "Model width".into(),
                x_scale: Scale::Log2,
                y_range: Some((-0.02, 1.02)),
                series: self.models.architectures.iter().enumerate().map(series).collect(),
                ..Panel::default()
            }
        };
        Figure { title: "Associative recall with many queries".into(), panels: self.task.test_pairs.iter().take(4).map(panel).collect() }
    }

    /// On the first test, width by width: models of one width may learn what those of another do not.
    fn verdict(&self, groups: &[Group<'_>], score: &str) -> Verdict {
        let mut widths = self.models.widths.clone();
        widths.sort_unstable();
        widths.dedup();
        Verdict { checks: widths.into_iter().flat_map(|width| self.at(width, groups, score)).collect() }
    }

    /// The parts of the claim at one width.
    fn at(&self, width: usize, groups: &[Group<'_>], score: &str) -> [Check; 3] {
        let side = |architecture| Side::of(architecture, width, groups, score);
        let first = |kind: Kind| self.models.architectures.iter().find(|a| a.kind() == kind);
        let mut states: Vec<(usize, Side<'_>)> =
            self.models.architectures.iter().filter(|a| a.kind() == Kind::Mamba2).filter_map(|a| Some((a.state()?, side(a)?))).collect();
        states.sort_by_key(|(state, _)| *state);
        let (mamba, attention) = (first(Kind::Mamba).and_then(side), first(Kind::Transformer).and_then(side));
        let equal = first(Kind::Mamba).and_then(Architecture::state).and_then(|wanted| states.iter().find(|(state, _)| *state == wanted));
        // Where no seed of any side has learnt it there is nothing to compare.
        let check = |claim: &str, sides: &[&Side<'_>], enough: bool, holds: &dyn Fn() -> bool| {
            let claim = format!("width {width}: {claim}");
            let found = sides.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            match enough {
                false => Check::absent(claim, "the recipe lacks one side"),
                true if sides.iter().all(|side| side.best < LEARNT) => Check::absent(claim, format!("no side has learnt it: {found}")),
                true => Check::measured(claim, holds(), found),
            }
        };
        let above: Vec<&Side<'_>> = equal.iter().map(|(_, side)| side).chain(&mamba).collect();
        let rising: Vec<&Side<'_>> = states.iter().map(|(_, side)| side).collect();
        let near: Vec<&Side<'_>> = states.last().iter().map(|(_, side)| side).chain(&attention).collect();
        [
            check("Mamba-2 is well above Mamba at equal state", &above, above.len() == 2, &|| {
                above[0].mean > above[1].mean + 0.1 && above[0].best > above[1].best + 0.1
            }),
            check("accuracy rises with the state", &rising, rising.len() > 1, &|| {
                // Two equal models differ by their seeds, and nothing rises above 1.
                let steady = rising.windows(2).all(|pair| pair[1].mean > pair[0].mean - 0.02);
                let (low, high) = (rising[0].mean, rising[rising.len() - 1].mean);
                steady && (high > low + 0.02 || low > 0.97)
            }),
            // What each can reach: a seed that has not begun to learn says nothing of it.
            check("the best seed of the largest state comes near that of attention", &near, near.len() == 2, &|| {
                near[0].best > near[1].best - 0.05
            }),
        ]
    }
}

/// What an architecture came to at a width and its best learning rate.
struct Side<'a> {
    name: &'a str,
    /// Over seeds.
    mean: f64,
    best: f64,
}

impl<'a> Side<'a> {
    fn of(architecture: &'a Architecture, width: usize, groups: &[Group<'_>], score: &str) -> Option<Self> {
        let group = groups.iter().find(|group| group.width == width && group.architecture == architecture)?;
        Some(Self { name: &architecture.name, mean: group.score(score).mean, best: group.best(score)? })
    }
}

impl std::fmt::Display for Side<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:.3} (best seed {:.3})", self.name, self.mean, self.best)
    }
}

/// Name of a measurement.
fn name(pairs: usize) -> String {
    format!("accuracy, {pairs} pairs")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(vocab_size: usize, length: usize, random_non_queries: bool) -> MqarTask {
        MqarTask {
            vocab_size,
            length,
            train_pairs: vec![4],
            curriculum: Curriculum::Cycle,
            test_pairs: vec![4],
            test_rows: 8,
            power: 0.01,
            random_non_queries,
        }
    }

    #[test]
    fn rows_follow_the_rules_of_the_generator() {
        for (vocab, length, pairs, random) in [(128, 64, 4, false), (128, 64, 16, false), (101, 50, 7, false), (512, 64, 16, true)] {
            let task = task(vocab, length, random);
            let batch = task.rows(pairs, [TRAIN, 3, 5], 40);
            assert_eq!((batch.ids.len(), batch.labelled()), (40 * length, 40 * pairs));
            for (ids, labels) in batch.ids.chunks(length).zip(batch.labels.chunks(length)) {
                let half = vocab as i32 / 2;
                let (mut keys, mut values): (Vec<i32>, Vec<i32>) = ids[..2 * pairs].chunks(2).map(|pair| (pair[0], pair[1])).unzip();
                assert!(keys.iter().all(|key| (1..half).contains(key)) && values.iter().all(|value| (half..vocab as i32).contains(value)));
                // Every label is the value of the key at its own place; every key is asked for once; queries stand at even places.
                for (at, label) in labels.iter().enumerate().filter(|(_, label)| **label != IGNORED) {
                    assert!(at >= 2 * pairs && at % 2 == 0, "query at {at}");
                    let pair = keys.iter().position(|key| *key == ids[at]).unwrap();
                    assert_eq!(values[pair], *label);
                }
                let mut asked: Vec<i32> = (0..length).filter(|at| labels[*at] != IGNORED).map(|at| ids[at]).collect();
                asked.sort_unstable();
                keys.sort_unstable();
                assert_eq!(asked, keys);
                keys.dedup();
                values.sort_unstable();
                values.dedup();
                assert_eq!((keys.len(), values.len()), (pairs, pairs), "keys and values are distinct");
                let between = (2 * pairs..length).filter(|at| labels[*at] == IGNORED);
                let noise = between.filter(|at| ids[*at] != 0).count();
                assert_eq!(noise > 0, random, "{noise} tokens between queries");
            }
        }
    }

    #[test]
    fn gaps_are_drawn_by_their_weights() {
        let task = MqarTask { power: 0.01, ..task(128, 64, true) };
        let (space, draws) = (8, 20_000);
        let mut counts = vec![0usize; space];
        for i in 0..draws {
            let gaps = task.gaps(space, 2, &mut generator([9, 9, 9, i]));
            assert!(gaps.len() == 2 && gaps[0] != gaps[1] && gaps.iter().all(|gap| *gap < space));
            counts[gaps[0]] += 1;
        }
        let weights: Vec<f64> = (1..=space).map(|i| (i as f64).powf(-0.99)).collect();
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(&weights) {
            let expected = draws as f64 * weight / total;
            assert!((*count as f64 - expected).abs() < 5.0 * expected.sqrt(), "{counts:?}");
        }
        // All places, in an order.
        let mut all = task.gaps(space, space, &mut generator([1, 2, 3, 4]));
        all.sort_unstable();
        assert_eq!(all, (0..space).collect::<Vec<_>>());
    }

    /// Results of a Transformer, Mamba and Mamba-2 with states of 16 and 64 at two widths; two seeds each.
    fn judged(scores: [[f64; 2]; 8]) -> Vec<Option<bool>> {
        let text = include_str!("../../../../examples/experiments/mqar.json");
        let mut value: serde_json::Value = serde_json::from_str(text).unwrap();
        value.as_object_mut().unwrap().remove("experiment");
        let mut mqar: Mqar = serde_json::from_value(value).unwrap();
        // Whatever the recipe says of these.
        mqar.models.architectures.truncate(4);
        mqar.models.architectures.iter_mut().for_each(|architecture| architecture.learning_rates = None);
        mqar.training.learning_rates = vec![1e-3];
        (mqar.models.widths, mqar.models.seeds) = (vec![64, 128], vec![0, 1]);
        let cells = mqar.cells().unwrap();
        let learned = |accuracy: f64| {
            let value = serde_json::json!({ "parameters": 1, "steps": 1, "tokens": 1, "flop": 1.0, "seconds": 1.0, "tokens_per_s": 1.0, "loss": 1.0,
                "first_loss": 1.0, "diverged": false, "scores": [["x", accuracy]], "curve": [], "precision": "f32" });
            serde_json::from_value::<Learned>(value).unwrap()
        };
        // Seed after seed, architecture after architecture, width after width.
        let found: Vec<(Cell, Learned)> = cells.into_iter().enumerate().map(|(at, cell)| (cell, learned(scores[at % 8][at / 8]))).collect();
        let groups = Group::all(&found, "x", true);
        mqar.verdict(&groups, "x").checks.into_iter().map(|check| check.holds).collect()
    }

    #[test]
    fn verdicts_are_of_one_width_and_a_seed_that_failed_hides_no_ceiling() {
        let (no, yes) = (Some(false), Some(true));
        // At the small width nothing but one seed of the Transformer learns; at the large one it fails in one seed.
        let scores = [[0.05, 1.0], [0.04, 1.0], [0.05, 0.04], [0.06, 0.06], [0.05, 0.05], [0.5, 0.6], [0.05, 0.06], [0.97, 0.98]];
        assert_eq!(judged(scores), [None, None, no, yes, yes, yes]);
        let mut equal = scores;
        equal[5] = [0.05, 0.1];
        equal[7] = [0.1, 0.5];
        assert_eq!(judged(equal)[3..], [None, yes, no]);
    }

    #[test]
    fn rows_depend_on_their_place_alone() {
        let task = task(256, 64, true);
        let (few, many) = (task.rows(8, [TRAIN, 1, 2], 3), task.rows(8, [TRAIN, 1, 2], 9));
        assert_eq!(few.ids, many.ids[..3 * 64]);
        for other in [[TEST, 1, 2], [TRAIN, 2, 2], [TRAIN, 1, 3]] {
            assert_ne!(few.ids, task.rows(8, other, 3).ids);
        }
    }

    #[test]
    fn impossible_tasks_are_refused() {
        let said = |task: MqarTask| task.check().map_err(|error| error.to_string());
        assert!(said(task(128, 64, true)).is_ok());
        assert!(said(task(128, 63, true)).unwrap_err().contains("even"));
        assert!(said(task(64, 64, true)).unwrap_err().contains("vocab_size"));
        assert!(said(MqarTask { test_pairs: vec![17], ..task(128, 64, true) }).unwrap_err().contains("test_pairs"));
    }
}
