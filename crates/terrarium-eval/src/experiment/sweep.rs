//! Architectures times widths times learning rates times seeds, all on one task.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use terrarium_kernels::TrainBackend;
use terrarium_models::DecoderConfig;
use terrarium_train::plot::Series;

use super::arch::{Architecture, Kind};
use super::fit::{self, Learned, Pace, Stage, Student, Task, Training};
use super::report::{Check, Table};
use super::stats::{Spread, short};
use super::{CellName, Combination, Running, Subject};
use crate::EvalError;

/// Models to compare.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Models {
    /// What is compared.
    pub architectures: Vec<Architecture>,
    /// Model widths.
    pub widths: Vec<usize>,
    /// Layers of every model.
    pub layers: usize,
    /// Seeds of starting values and data; each is a run.
    pub seeds: Vec<u64>,
}

/// One model.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    pub architecture: Architecture,
    /// Its place in the recipe.
    pub index: usize,
    pub width: usize,
    pub lr: f64,
    pub seed: u64,
    pub config: DecoderConfig,
}

/// A Transformer below this has learnt nothing that others could match or miss.
pub(crate) const LEARNT: f64 = 0.2;

/// One size of an architecture, and the rates that it learns at.
#[derive(Clone, Copy)]
pub(crate) struct Size<'a> {
    /// Place of the architecture in the recipe.
    pub index: usize,
    pub architecture: &'a Architecture,
    pub width: usize,
    pub layers: usize,
    pub rates: &'a [f64],
}

impl Size<'_> {
    /// One cell per learning rate.
    pub fn cells(self, vocab: usize, seed: u64) -> Result<Vec<Cell>, EvalError> {
        let Self { index, architecture, width, layers, rates } = self;
        let config = architecture.decoder(width, layers, vocab)?;
        let cell = |lr: &f64| Cell { architecture: architecture.clone(), index, width, lr: *lr, seed, config: config.clone() };
        Ok(architecture.learning_rates.as_deref().unwrap_or(rates).iter().map(cell).collect())
    }
}

impl Models {
    pub(crate) fn check(&self) -> Result<(), EvalError> {
        let empty =
            [("architectures", self.architectures.is_empty()), ("widths", self.widths.is_empty()), ("seeds", self.seeds.is_empty())];
        if let Some((key, _)) = empty.into_iter().find(|(_, empty)| *empty) {
            return Err(EvalError::value(format!("models.{key}"), "at least one"));
        }
        let bad = |rates: &Vec<f64>| rates.is_empty() || !rates.iter().all(|lr| lr.is_finite() && *lr > 0.0);
        match self.architectures.iter().find(|a| a.learning_rates.as_ref().is_some_and(bad)) {
            Some(a) => Err(EvalError::value(format!("architecture {}: learning_rates", a.name), "at least one, and more than 0")),
            None => Ok(()),
        }
    }

    /// Seed after seed, so that a run that is cut short has compared all architectures.
    pub(crate) fn cells(&self, vocab: usize, training: &Training) -> Result<Vec<Cell>, EvalError> {
        self.check()?;
        let mut cells = Vec::new();
        for seed in &self.seeds {
            for (index, architecture) in self.architectures.iter().enumerate() {
                for width in &self.widths {
                    let size = Size { index, architecture, width: *width, layers: self.layers, rates: &training.learning_rates };
                    cells.extend(size.cells(vocab, *seed)?);
                }
            }
        }
        Ok(cells)
    }

    /// Mean over widths of a score of the first architecture that is wanted, with its name.
    pub(crate) fn of(&self, groups: &[Group<'_>], score: &str, wanted: impl Fn(&Architecture) -> bool) -> Option<(String, f64)> {
        self.all(groups, score, wanted).next()
    }

    /// The same of the one where it is largest: what others are held against is what does best.
    fn best(&self, groups: &[Group<'_>], score: &str, wanted: impl Fn(&Architecture) -> bool) -> Option<(String, f64)> {
        self.all(groups, score, wanted).max_by(|a, b| a.1.total_cmp(&b.1))
    }

    fn all(&self, groups: &[Group<'_>], score: &str, wanted: impl Fn(&Architecture) -> bool) -> impl Iterator<Item = (String, f64)> {
        let named = self.architectures.iter().enumerate().filter(move |(_, a)| wanted(a));
        named.map(move |(index, a)| (a.name.clone(), mean_of(groups, index, score)))
    }

    /// That each pure state-space model lies below the best Transformer by more than `margin`, and the first hybrid not below it by more.
    pub(crate) fn lag(&self, groups: &[Group<'_>], score: &str, margin: f64) -> [Check; 2] {
        let attention = self.best(groups, score, |a| a.kind() == Kind::Transformer);
        let hybrid = self.of(groups, score, |a| a.kind() == Kind::Hybrid);
        let pure = |a: &Architecture| matches!(a.kind(), Kind::Mamba | Kind::Mamba2);
        let scans: Vec<(String, f64)> = self
            .architectures
            .iter()
            .enumerate()
            .filter(|(_, a)| pure(a))
            .map(|(index, a)| (a.name.clone(), mean_of(groups, index, score)))
            .collect();
        let (lag, keeps) = ("pure state-space models lag behind the Transformer", "the hybrid matches the Transformer");
        let why = "the recipe lacks one side";
        if let Some((name, x)) = attention.as_ref().filter(|(_, x)| *x < LEARNT) {
            let why = format!("{name} has not learnt it: {x:.3}, {score}");
            return [Check::absent(lag, why.clone()), Check::absent(keeps, why)];
        }
        let first = match (&attention, scans.as_slice()) {
            (Some((name, x)), [_, ..]) => {
                let text = scans.iter().map(|(name, y)| format!("{name} {y:.3}")).collect::<Vec<_>>().join(", ");
                Check::measured(lag, scans.iter().all(|(_, y)| *y < x - margin), format!("{text}, {name} {x:.3}, {score}"))
            }
            _ => Check::absent(lag, why),
        };
        let second = match (&attention, &hybrid) {
            (Some((a, x)), Some((b, y))) => Check::measured(keeps, *y > x - margin, format!("{b} {y:.3}, {a} {x:.3}, {score}")),
            _ => Check::absent(keeps, why),
        };
        [first, second]
    }

    /// That the hybrid is not below the Transformer by more than `margin` where neither was trained.
    pub(crate) fn beyond(&self, groups: &[Group<'_>], score: Option<&str>, margin: f64) -> Check {
        let claim = "beyond the lengths of training the hybrid is no worse than the Transformer";
        let Some(score) = score else { return Check::absent(claim, "the recipe measures none") };
        let attention = self.best(groups, score, |a| a.kind() == Kind::Transformer);
        match (attention, self.of(groups, score, |a| a.kind() == Kind::Hybrid)) {
            (Some((a, x)), Some((b, y))) if x.max(y) < LEARNT => {
                Check::absent(claim, format!("neither can: {b} {y:.3}, {a} {x:.3}, {score}"))
            }
            (Some((a, x)), Some((b, y))) => Check::measured(claim, y > x - margin, format!("{b} {y:.3}, {a} {x:.3}, {score}")),
            _ => Check::absent(claim, "the recipe lacks one side"),
        }
    }
}

fn mean_of(groups: &[Group<'_>], index: usize, score: &str) -> f64 {
    Spread::of(groups.iter().filter(|group| group.index == index).map(|group| group.score(score).mean)).mean
}

impl Combination for Cell {
    fn name(&self) -> CellName {
        let Self { architecture, index, width, lr, seed, config } = self;
        CellName {
            id: format!("a{index}-d{width}-l{}-lr{lr:e}-s{seed}", config.layers.len()),
            label: format!("{} d={width} lr={lr:e} seed {seed}", architecture.name),
        }
    }
}

impl Cell {
    pub fn run<B: TrainBackend>(
        &self,
        training: &Training,
        task: &impl Task,
        running: &mut Running<'_>,
        device: &B::Device,
    ) -> Result<Option<Learned>, EvalError> {
        let stage = Stage { task, steps: training.steps, rows: training.batch, lr: self.lr, rotary_base: None };
        self.run_stages::<B, _>(training, &[stage], running, device)
    }

    pub fn run_stages<B: TrainBackend, T: Task>(
        &self,
        training: &Training,
        stages: &[Stage<T>],
        running: &mut Running<'_>,
        device: &B::Device,
    ) -> Result<Option<Learned>, EvalError> {
        fit::fit::<B, T>(Student { config: &self.config, training, seed: self.seed }, stages, running, device)
    }

    /// One line of `cells.csv`.
    pub fn row(&self, learned: &Learned) -> Map<String, Value> {
        let values = json!({
            "architecture": self.architecture.name, "pattern": self.config.pattern(), "width": self.width,
            "state": self.architecture.state(), "lr": self.lr, "seed": self.seed, "parameters": learned.parameters,
            "steps": learned.steps, "tokens": learned.tokens, "flop": learned.flop, "seconds": learned.seconds,
            "tokens_per_s": learned.tokens_per_s, "flop_per_s": learned.total().flop_per_s(), "utilisation": learned.utilisation(),
            "memory_bytes": learned.memory, "first_loss": learned.first_loss, "loss": learned.loss, "diverged": learned.diverged, "precision": learned.precision,
        });
        let mut row = match values {
            Value::Object(row) => row,
            _ => Map::new(),
        };
        row.extend(learned.scores.iter().map(|(name, value)| (name.clone(), json!(value))));
        row
    }
}

/// Seeds of one model, at its best learning rate.
pub(crate) struct Group<'a> {
    pub architecture: &'a Architecture,
    pub index: usize,
    pub width: usize,
    pub lr: f64,
    pub config: &'a DecoderConfig,
    pub runs: Vec<&'a Learned>,
}

impl<'a> Group<'a> {
    /// Groups all results; of several learning rates, the one that is best by `score`.
    pub fn all(found: &'a [(Cell, Learned)], score: &str, larger_is_better: bool) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for (cell, learned) in found {
            let same = |group: &&mut Self| group.is_size_of(cell.index, &cell.config) && group.lr == cell.lr;
            match all.iter_mut().find(same) {
                Some(group) => group.runs.push(learned),
                None => all.push(Self {
                    architecture: &cell.architecture,
                    index: cell.index,
                    width: cell.width,
                    lr: cell.lr,
                    config: &cell.config,
                    runs: vec![learned],
                }),
            }
        }
        let mut best: Vec<Self> = Vec::new();
        for group in all {
            match best.iter_mut().find(|known| known.is_size_of(group.index, group.config)) {
                Some(known) if (known.score(score).mean < group.score(score).mean) == larger_is_better => *known = group,
                Some(_) => {}
                None => best.push(group),
            }
        }
        best.sort_by_key(|group| (group.index, group.width, group.config.layers.len()));
        best
    }

    fn is_size_of(&self, index: usize, config: &DecoderConfig) -> bool {
        self.index == index && self.width == config.hidden_size && self.config.layers.len() == config.layers.len()
    }

    /// A number of its runs, on average.
    pub fn mean(&self, value: fn(&Learned) -> f64) -> f64 {
        Spread::of(self.runs.iter().map(|run| value(run))).mean
    }

    /// A measurement over its seeds.
    pub fn score(&self, name: &str) -> Spread {
        Spread::of(self.runs.iter().filter_map(|run| run.score(name)))
    }

    /// The largest of a measurement over its seeds.
    pub fn best(&self, name: &str) -> Option<f64> {
        self.runs.iter().filter_map(|run| run.score(name)).max_by(f64::total_cmp)
    }

    /// Points of a line through measurements, with the place of each on the horizontal axis.
    pub fn line(&self, scores: &[(f64, String)]) -> Series {
        let point = |(x, name): &(f64, String)| {
            let score = self.score(name);
            (*x, score.mean, score.deviation)
        };
        Series { name: self.architecture.name.clone(), points: scores.iter().map(point).collect(), fit: false }
    }
}

/// What [`model`] says, column by column.
pub(crate) const MODEL: [&str; 6] = ["architecture", "width", "layers", "state", "parameters", "lr"];

/// The first columns of a group's row.
pub(crate) fn model(group: &Group<'_>) -> Vec<String> {
    vec![
        group.architecture.name.clone(),
        group.width.to_string(),
        group.config.layers.len().to_string(),
        group.architecture.state().map_or("-".to_string(), |state| state.to_string()),
        short(group.config.parameters() as f64),
        format!("{:e}", group.lr),
    ]
}

/// What [`speed`] says, column by column.
pub(crate) const SPEED: [&str; 3] = ["tokens/s", "FLOP/s", "of a product"];

/// How fast a group trained, by one pace of each run.
pub(crate) fn speed(group: &Group<'_>, pace: impl Fn(&Learned) -> Pace) -> [String; 3] {
    let mean = |value: &dyn Fn(&Learned) -> f64| Spread::of(group.runs.iter().map(|run| value(run))).mean;
    let share = mean(&|run| run.ceiling.map_or(f64::NAN, |ceiling| pace(run).flop_per_s() / ceiling));
    [
        short(mean(&|run| pace(run).tokens_per_s())),
        short(mean(&|run| pace(run).flop_per_s())),
        if share.is_finite() { format!("{:.1} %", 100.0 * share) } else { "-".to_string() },
    ]
}

/// One training step per size of an architecture.
pub(crate) fn subjects(cells: &[Cell], rows: usize, length: usize, labelled: f64) -> Vec<Subject> {
    let mut subjects: Vec<Subject> = Vec::new();
    for Cell { architecture, index, width, config, .. } in cells {
        let layers = config.layers.len();
        let id = format!("a{index}-d{width}-l{layers}-{rows}x{length}");
        if subjects.iter().any(|known| known.id == id) {
            continue;
        }
        let label = format!("{} d={width}, {layers} layers", architecture.name);
        let labelled = (labelled * length as f64).round().max(1.0) as usize;
        subjects.push(Subject { id, label, config: config.clone(), rows, length, labelled });
    }
    subjects
}

/// Averages over seeds.
pub(crate) fn table(groups: &[Group<'_>], scores: &[String]) -> Table {
    let mut columns = MODEL.map(String::from).to_vec();
    columns.extend(scores.iter().cloned());
    columns.extend(["steps", "FLOP", "seconds"].map(String::from));
    columns.extend(SPEED.map(String::from));
    let row = |group: &Group<'_>| {
        let mut row = model(group);
        row.extend(scores.iter().map(|name| group.score(name).to_string()));
        row.extend([
            format!("{:.0}", group.mean(|run| run.steps as f64)),
            short(group.mean(|run| run.flop)),
            format!("{:.1}", group.mean(|run| run.seconds)),
        ]);
        row.extend(speed(group, Learned::total));
        row
    };
    Table { columns, rows: groups.iter().map(row).collect() }
}

/// What every report on trained models says.
pub(crate) fn notes(models: &Models, training: &Training) -> Vec<String> {
    let mut notes = vec![
        format!("± is the sample deviation over {} seeds.", models.seeds.len()),
        "FLOP: three times the forward pass by the textbook algorithms, as `bench ops` counts them. Tokens/s and FLOP/s: training, the first tenth of the steps left out; \"of a product\": FLOP/s as a share of what a large matrix product reaches on this device.".to_string(),
    ];
    let several = |a: &Architecture| a.learning_rates.as_ref().unwrap_or(&training.learning_rates).len() > 1;
    if models.architectures.iter().any(several) {
        notes.push("Of several learning rates, the best by the first measurement counts.".to_string());
    }
    notes
}

/// Numbers in a sentence.
pub(crate) fn list(values: &[usize]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
