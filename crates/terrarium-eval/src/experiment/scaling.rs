//! Loss against compute (arXiv 2405.21060, figure 9).

use serde::{Deserialize, Serialize};
use terrarium_kernels::TrainBackend;
use terrarium_train::plot::{Figure, Panel, Scale, Series};

use super::arch::{Architecture, Kind};
use super::fit::{self, Learned, Training};
use super::report::{Check, Report, Verdict};
use super::stats::{PowerLaw, Spread, short};
use super::sweep::{self, Cell, Group, Models, Size};
use super::text::{LOSS, TextTask, VOCAB, notes};
use super::{Experiment, Running, Subject};
use crate::EvalError;

/// Loss against compute, over sizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scaling {
    /// A text file.
    #[serde(default)]
    pub data: Option<String>,
    /// What is compared.
    pub architectures: Vec<Architecture>,
    /// Sizes of every architecture.
    pub sizes: Vec<ModelSize>,
    /// Seeds of starting values and data; each is a run.
    pub seeds: Vec<u64>,
    /// The text.
    pub task: TextTask,
    /// How the models learn.
    #[serde(default)]
    pub training: Training,
}

/// A size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSize {
    /// Model width.
    pub width: usize,
    /// Layers.
    pub layers: usize,
    /// Learning rates in place of those of `training`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rates: Option<Vec<f64>>,
}

impl Scaling {
    fn models(&self) -> Models {
        let widths = self.sizes.iter().map(|size| size.width).collect();
        let layers = self.sizes.first().map_or(0, |size| size.layers);
        Models { architectures: self.architectures.clone(), widths, layers, seeds: self.seeds.clone() }
    }

    fn law(&self, groups: &[Group<'_>], index: usize, x: fn(&Learned) -> f64) -> Option<PowerLaw> {
        let points: Vec<(f64, f64)> = groups.iter().filter(|g| g.index == index).map(|g| (g.mean(x), g.score(LOSS).mean)).collect();
        PowerLaw::fit(&points)
    }

    fn panel(&self, groups: &[Group<'_>], title: &str, name: &str, x: fn(&Learned) -> f64) -> Panel {
        let mut series = Vec::new();
        for (index, architecture) in self.architectures.iter().enumerate() {
            let own: Vec<&Group<'_>> = groups.iter().filter(|group| group.index == index).collect();
            let point = |group: &&Group<'_>| {
                let loss = group.score(LOSS);
                (group.mean(x), loss.mean, loss.deviation)
            };
            let points: Vec<(f64, f64, f64)> = own.iter().map(point).collect();
            let law = self.law(groups, index, x);
            let label = law.map_or(architecture.name.clone(), |law| format!("{}: {:.3} exponent", architecture.name, law.exponent));
            let fit = law.map(|law| points.iter().map(|(x, ..)| (*x, law.at(*x), 0.0)).collect());
            series.push(Series { name: label, points, fit: false });
            series.extend(fit.map(|points| Series { name: String::new(), points, fit: true }));
        }
        Panel { title: title.into(), x: name.into(), x_scale: Scale::Log10, y_scale: Scale::Log10, series, ..Panel::default() }
    }

    fn verdict(&self, groups: &[Group<'_>]) -> Verdict {
        // In the middle of what all were measured at, on a logarithmic scale.
        let flop: Vec<f64> = groups.iter().map(|group| group.mean(|run| run.flop).ln()).collect();
        let middle = Spread::of(flop).mean.exp();
        let found = |wanted: Kind| {
            let index = self.architectures.iter().position(|a| a.kind() == wanted)?;
            let law = self.law(groups, index, |run| run.flop)?;
            Some((self.architectures[index].name.clone(), law.at(middle)))
        };
        let compare = |claim: &str, a: Option<(String, f64)>, b: Option<(String, f64)>| match (a, b) {
            (Some((a, x)), Some((b, y))) => {
                Check::measured(claim, x < y * 1.005, format!("{a} {x:.4}, {b} {y:.4} at {} FLOP", short(middle)))
            }
            _ => Check::absent(claim, "the recipe lacks one side, or two sizes of it"),
        };
        Verdict {
            checks: vec![
                compare("Mamba-2 is as good as the Transformer at equal FLOP", found(Kind::Mamba2), found(Kind::Transformer)),
                compare("Mamba-2 is as good as Mamba at equal FLOP", found(Kind::Mamba2), found(Kind::Mamba)),
                compare("the hybrid is as good as Mamba-2 at equal FLOP", found(Kind::Hybrid), found(Kind::Mamba2)),
            ],
        }
    }
}

impl Experiment for Scaling {
    type Cell = Cell;
    type Found = Learned;

    fn check(&self) -> Result<(), EvalError> {
        if self.sizes.is_empty() {
            return Err(EvalError::value("sizes", "at least one"));
        }
        let bad = |rates: &Vec<f64>| rates.is_empty() || !rates.iter().all(|lr| lr.is_finite() && *lr > 0.0);
        if self.sizes.iter().any(|size| size.learning_rates.as_ref().is_some_and(bad)) {
            return Err(EvalError::value("sizes: learning_rates", "at least one, and more than 0"));
        }
        self.models().check()
    }

    fn training(&self) -> Option<&Training> {
        Some(&self.training)
    }

    fn ready(&self) -> Result<(), EvalError> {
        self.task.check(self.data.as_deref())
    }

    fn cells(&self) -> Result<Vec<Cell>, EvalError> {
        let mut cells = Vec::new();
        for seed in &self.seeds {
            for size in &self.sizes {
                for (index, architecture) in self.architectures.iter().enumerate() {
                    let rates = size.learning_rates.as_ref().unwrap_or(&self.training.learning_rates);
                    let size = Size { index, architecture, width: size.width, layers: size.layers, rates };
                    cells.extend(size.cells(VOCAB, *seed)?);
                }
            }
        }
        Ok(cells)
    }

    fn subjects(&self, cells: &[Cell]) -> Vec<Subject> {
        sweep::subjects(cells, self.training.batch, self.task.length, 1.0)
    }

    fn seconds(&self, cell: &Cell, gpu: bool) -> f64 {
        fit::guess(&cell.config, self.training.steps, self.training.batch, self.task.length, 1.0, gpu)
    }

    fn run<B: TrainBackend>(&self, cell: &Cell, running: &mut Running<'_>, device: &B::Device) -> Result<Option<Learned>, EvalError> {
        cell.run::<B>(&self.training, &self.task.open(self.data.as_deref())?, running, device)
    }

    fn report(&self, found: &[(Cell, Learned)]) -> Report {
        let groups = Group::all(found, LOSS, false);
        let panels = vec![
            self.panel(&groups, "Held-out loss (nats per byte) against arithmetic", "FLOP of training", |run| run.flop),
            self.panel(&groups, "Held-out loss (nats per byte) against time", "Seconds of training", |run| run.seconds),
        ];
        let mut notes = notes(&self.models(), &self.training, &self.task, self.data.as_deref());
        notes.push("Lines are power laws fitted between the logarithms of loss and cost, one point per size.".to_string());
        Report {
            title: "Loss against compute".into(),
            source: "Mamba-2, arXiv 2405.21060, figure 9".into(),
            claim: "At equal arithmetic Mamba-2 is as good as a Transformer++ and as Mamba, or better.".into(),
            table: sweep::table(&groups, &[LOSS.to_string()]),
            figure: Figure { title: "Loss against compute".into(), panels },
            verdict: self.verdict(&groups),
            notes,
            cells: found.iter().map(|(cell, learned)| cell.row(learned)).collect(),
        }
    }
}
