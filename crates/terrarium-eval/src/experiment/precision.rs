//! Loss with products in bfloat16 beside that in float32, on the same rows from the same starting values.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use terrarium_kernels::TrainBackend;
use terrarium_train::config::Compute;
use terrarium_train::plot::{Figure, Panel, Series};

use super::fit::{self, Learned, Training};
use super::report::{Check, Report, Table, Verdict};
use super::stats::Spread;
use super::sweep::{self, Models};
use super::text::{LOSS, TextTask, VOCAB, notes};
use super::{CellName, Combination, Experiment, Running, Subject};
use crate::EvalError;

/// The experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Precision {
    /// A text file.
    #[serde(default)]
    pub data: Option<String>,
    /// What is trained, once in each precision.
    pub models: Models,
    /// The text.
    pub task: TextTask,
    /// How the models learn; held-out loss is compared each time it is measured.
    #[serde(default)]
    pub training: Training,
}

/// A model in one precision.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    model: sweep::Cell,
    compute: Compute,
}

/// What is compared: the first is held to be right.
const COMPUTE: [(Compute, &str); 2] = [(Compute::F32, "f32"), (Compute::Bf16, "bf16")];

impl Cell {
    fn precision(&self) -> &'static str {
        COMPUTE.iter().find(|(compute, _)| *compute == self.compute).map_or("", |(_, name)| name)
    }
}

impl Combination for Cell {
    fn name(&self) -> CellName {
        let CellName { id, label } = self.model.name();
        CellName { id: format!("{id}-{}", self.precision()), label: format!("{label} {}", self.precision()) }
    }
}

/// A step at which both precisions were measured with every seed.
struct Point {
    step: f64,
    /// Of f32 and bf16, over the seeds.
    losses: [Spread; 2],
    /// bf16 less f32, seed by seed.
    apart: Spread,
}

/// Runs of one architecture and width.
struct Pairs<'a> {
    name: String,
    /// One curve per seed, of each precision: step and held-out loss.
    curves: [Vec<Vec<(f64, f64)>>; 2],
    runs: [Vec<&'a Learned>; 2],
}

impl<'a> Pairs<'a> {
    fn all(found: &'a [(Cell, Learned)]) -> Vec<Self> {
        let mut all: Vec<(usize, usize, Self)> = Vec::new();
        for (cell, learned) in found {
            let sweep::Cell { index, width, architecture, .. } = &cell.model;
            let at = all.iter().position(|(i, w, _)| (i, w) == (index, width)).unwrap_or_else(|| {
                let name = format!("{} d={width}", architecture.name);
                all.push((*index, *width, Self { name, curves: Default::default(), runs: Default::default() }));
                all.len() - 1
            });
            let side = usize::from(cell.compute == Compute::Bf16);
            all[at].2.curves[side].push(learned.curve.iter().map(|point| (point.0 as f64, point.4)).collect());
            all[at].2.runs[side].push(learned);
        }
        all.into_iter().map(|(.., pairs)| pairs).collect()
    }

    /// What was measured with every seed; runs stand in the order of their seeds.
    fn points(&self) -> Vec<Point> {
        let [wide, narrow] = &self.curves;
        let shortest = wide.iter().chain(narrow).map(Vec::len).min().unwrap_or(0);
        let seeds = wide.len().min(narrow.len());
        let at = |i: usize| {
            let of = |curves: &[Vec<(f64, f64)>]| Spread::of(curves.iter().map(|curve| curve[i].1));
            let apart = Spread::of((0..seeds).map(|seed| narrow[seed][i].1 - wide[seed][i].1));
            Point { step: wide[0][i].0, losses: [of(wide), of(narrow)], apart }
        };
        if seeds == 0 { Vec::new() } else { (0..shortest).map(at).collect() }
    }

    /// That the difference is smaller than what another seed makes, at the end and along the way.
    fn checks(&self) -> [Check; 2] {
        let claims = [
            format!("{}: in the end bf16 and f32 differ by less than seeds do", self.name),
            format!("{}: so they do along the curve", self.name),
        ];
        let points = self.points();
        let (Some(Point { losses: [wide, _], apart: difference, .. }), true) = (points.last(), self.runs[0].len() > 1) else {
            return claims.map(|claim| Check::absent(claim, "it takes two seeds, and both precisions"));
        };
        let text = format!("{:+.4} on average, deviation over seeds {:.4}", difference.mean, wide.deviation);
        let root = |value: fn(&Point) -> f64| (points.iter().map(|point| value(point).powi(2)).sum::<f64>() / points.len() as f64).sqrt();
        let (apart, seeds) = (root(|point| point.apart.mean), root(|point| point.losses[0].deviation));
        let along = format!("{apart:.4} and {seeds:.4}, root mean squares over {} measurements", points.len());
        let [end, way] = claims;
        [Check::measured(end, difference.mean.abs() < wide.deviation, text), Check::measured(way, apart < seeds, along)]
    }
}

impl Experiment for Precision {
    type Cell = Cell;
    type Found = Learned;

    fn check(&self) -> Result<(), EvalError> {
        match self.training.precision {
            Compute::Auto => Ok(()),
            _ => Err(EvalError::value("training.precision", "both are tried: leave it out")),
        }
    }

    fn training(&self) -> Option<&Training> {
        Some(&self.training)
    }

    fn ready(&self) -> Result<(), EvalError> {
        self.task.check(self.data.as_deref())
    }

    fn cells(&self) -> Result<Vec<Cell>, EvalError> {
        let models = self.models.cells(VOCAB, &self.training)?;
        Ok(models.into_iter().flat_map(|model| COMPUTE.map(|(compute, _)| Cell { model: model.clone(), compute })).collect())
    }

    fn subjects(&self, cells: &[Cell]) -> Vec<Subject> {
        let models: Vec<sweep::Cell> = cells.iter().map(|cell| cell.model.clone()).collect();
        sweep::subjects(&models, self.training.batch, self.task.length, 1.0)
    }

    fn seconds(&self, cell: &Cell, gpu: bool) -> f64 {
        fit::guess(&cell.model.config, self.training.steps, self.training.batch, self.task.length, 1.0, gpu)
    }

    fn run<B: TrainBackend>(&self, cell: &Cell, running: &mut Running<'_>, device: &B::Device) -> Result<Option<Learned>, EvalError> {
        let training = Training { precision: cell.compute, ..self.training.clone() };
        cell.model.run::<B>(&training, &self.task.open(self.data.as_deref())?, running, device)
    }

    fn report(&self, found: &[(Cell, Learned)]) -> Report {
        let pairs = Pairs::all(found);
        let curve = |pairs: &Pairs<'_>, side: usize| Series {
            name: format!("{} {}", pairs.name, COMPUTE[side].1),
            points: pairs.points().iter().map(|point| (point.step, point.losses[side].mean, point.losses[side].deviation)).collect(),
            fit: false,
        };
        let losses = Panel {
            title: "Held-out loss (nats per byte)".into(),
            x: "Steps".into(),
            series: pairs.iter().flat_map(|pairs| [0, 1].map(|side| curve(pairs, side))).collect(),
            ..Panel::default()
        };
        let difference = |pairs: &Pairs<'_>| Series {
            name: pairs.name.clone(),
            points: pairs.points().iter().map(|point| (point.step, point.apart.mean, point.apart.deviation)).collect(),
            fit: false,
        };
        let apart = Panel {
            title: "bf16 less f32, same seed".into(),
            x: "Steps".into(),
            series: pairs.iter().map(difference).collect(),
            ..Panel::default()
        };
        let row = |pairs: &Pairs<'_>| {
            let points = pairs.points();
            let mut row = vec![pairs.name.clone()];
            row.extend([0, 1].map(|side| points.last().map_or("-".to_string(), |point| point.losses[side].to_string())));
            row.push(points.last().map_or("-".to_string(), |point| format!("{:+.4} ± {:.4}", point.apart.mean, point.apart.deviation)));
            row.extend([0, 1].map(|side| {
                let speed = Spread::of(pairs.runs[side].iter().map(|run| run.total().tokens_per_s()));
                super::stats::short(speed.mean)
            }));
            row
        };
        let columns = ["model", "loss f32", "loss bf16", "difference", "tokens/s f32", "tokens/s bf16"].map(String::from).to_vec();
        let mut notes = notes(&self.models, &self.training, &self.task, self.data.as_deref());
        notes.insert(
            0,
            "In bf16 products, scans and attention read bf16 and sum in float32; weights, gradients, moments, norms, states and the residual stream are float32 in both. Both see the same rows from the same starting values.".to_string(),
        );
        Report {
            title: "Training in bfloat16".into(),
            source: "mixed precision with float32 masters, arXiv 1710.03740".into(),
            claim: "Products in bfloat16 cost no loss: curves differ by less than those of two seeds.".into(),
            table: Table { columns, rows: pairs.iter().map(row).collect() },
            figure: Figure { title: "Training in bfloat16".into(), panels: vec![losses, apart] },
            verdict: Verdict { checks: pairs.iter().flat_map(Pairs::checks).collect() },
            notes,
            cells: found.iter().map(|(cell, learned)| line(cell, learned)).collect(),
        }
    }
}

/// A line of `cells.csv`.
fn line(cell: &Cell, learned: &Learned) -> Map<String, Value> {
    let mut row = cell.model.row(learned);
    row.insert(
        format!("{LOSS} curve"),
        Value::String(learned.curve.iter().map(|p| format!("{}:{:.5}", p.0, p.4)).collect::<Vec<_>>().join(" ")),
    );
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learned(losses: &[f64]) -> Learned {
        let curve: Vec<Value> = losses.iter().enumerate().map(|(i, loss)| serde_json::json!([i + 1, 0, 0.0, 0.0, loss])).collect();
        serde_json::from_value(serde_json::json!({
            "parameters": 1, "steps": 2, "tokens": 2, "flop": 1.0, "seconds": 1.0, "tokens_per_s": 1.0, "loss": 1.0, "first_loss": 1.0,
            "diverged": false, "scores": [], "curve": curve, "precision": "",
        }))
        .unwrap()
    }

    fn pairs<'a>(wide: &'a [Learned], narrow: &'a [Learned]) -> Pairs<'a> {
        let curves = |runs: &[Learned]| runs.iter().map(|run| run.curve.iter().map(|p| (p.0 as f64, p.4)).collect()).collect();
        Pairs { name: "A".into(), curves: [curves(wide), curves(narrow)], runs: [wide.iter().collect(), narrow.iter().collect()] }
    }

    #[test]
    fn what_differs_more_than_seeds_is_seen() {
        let wide = [learned(&[3.0, 2.0]), learned(&[3.1, 2.2])];
        let near = [learned(&[3.02, 2.01]), learned(&[3.08, 2.19])];
        let far = [learned(&[3.02, 2.21]), learned(&[3.08, 2.39])];
        let held = |narrow: &[Learned]| pairs(&wide, narrow).checks().map(|check| check.holds);
        assert_eq!(held(&near), [Some(true); 2]);
        assert_eq!(held(&far), [Some(false); 2]);
        // With one seed nothing is known of seeds.
        assert_eq!(pairs(&wide[..1], &near[..1]).checks().map(|check| check.holds), [None; 2]);
        let points = pairs(&wide, &near).points();
        let apart = points[1].apart;
        assert!(apart.mean.abs() < 1e-12 && (apart.deviation - 0.01414).abs() < 1e-4, "{apart:?}");
    }
}
