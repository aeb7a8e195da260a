//! How many of the layers attend (arXiv 2405.21060, table 2).

use serde::{Deserialize, Serialize};
use terrarium_kernels::TrainBackend;
use terrarium_models::pattern;
use terrarium_train::plot::{Figure, Panel, Scale, Series};

use super::arch::{Architecture, Kind};
use super::fit::{self, Learned, Training};
use super::report::{Check, Report, Verdict};
use super::stats::Spread;
use super::sweep::{self, Cell, Group, Models};
use super::text::{LOSS, TextTask, VOCAB, notes};
use super::{Experiment, Running, Subject};
use crate::EvalError;

/// How many of the layers attend: from none to all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerMix {
    /// A text file.
    #[serde(default)]
    pub data: Option<String>,
    /// Attention layers among the others, spread evenly; one model each.
    pub attention_layers: Vec<usize>,
    /// State width of the Mamba-2 layers.
    pub state: usize,
    /// Width of heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Widths, layers and seeds; its architectures are measured beside the mixes.
    pub models: Models,
    /// The text.
    pub task: TextTask,
    /// How the models learn.
    #[serde(default)]
    pub training: Training,
}

impl LayerMix {
    /// The mixes, then what the recipe names.
    fn lineup(&self) -> Result<Models, EvalError> {
        let layers = self.models.layers;
        let mut architectures = Vec::new();
        for count in &self.attention_layers {
            let fail = |reason: String| EvalError::value("attention_layers", reason);
            let kinds = pattern::allocate(layers, *count as f64 / layers as f64, 0.0).map_err(|error| fail(error.to_string()))?;
            architectures.push(Architecture {
                name: format!("{count} of {layers} attend"),
                pattern: kinds.into_iter().map(|kind| kind.symbol()).collect(),
                state: Some(self.state),
                head_dim: self.head_dim,
                attention_conv: None,
                rotary: None,
                learning_rates: None,
            });
        }
        architectures.extend(self.models.architectures.iter().cloned());
        Ok(Models { architectures, ..self.models.clone() })
    }

    /// A mix and its mean loss over widths and seeds.
    fn losses(&self, groups: &[Group<'_>]) -> Vec<(usize, Spread)> {
        let of =
            |index: usize| Spread::of(groups.iter().filter(|g| g.index == index).flat_map(|g| g.runs.iter().filter_map(|r| r.score(LOSS))));
        self.attention_layers.iter().enumerate().map(|(index, count)| (*count, of(index))).collect()
    }

    /// Mixes of up to the half, and their losses less that of the mix without attention, of the same width and seed.
    fn gains(&self, groups: &[Group<'_>]) -> Vec<(usize, Vec<f64>)> {
        let Some(none) = self.attention_layers.iter().position(|count| *count == 0) else { return Vec::new() };
        let losses = |group: &Group<'_>| group.runs.iter().map(|run| run.score(LOSS)).collect::<Vec<_>>();
        let against = |index: usize| {
            let of = |at: usize| groups.iter().filter(move |group| group.index == at);
            let pairs = of(index).flat_map(|group| of(none).filter(|none| none.width == group.width).map(move |none| (group, none)));
            // Runs of a group stand in the order of their seeds.
            pairs.flat_map(|(group, none)| losses(group).into_iter().zip(losses(none))).filter_map(|(a, b)| Some(a? - b?)).collect()
        };
        let counts = self.attention_layers.iter().enumerate().filter(|(_, count)| 2 * **count <= self.models.layers);
        counts.map(|(index, count)| (*count, against(index))).collect()
    }

    fn verdict(&self, groups: &[Group<'_>]) -> Verdict {
        let losses = self.losses(groups);
        let layers = self.models.layers;
        let none = losses.iter().find(|(count, _)| *count == 0);
        let few = losses.iter().filter(|(count, _)| *count > 0 && 4 * count <= layers).min_by(|a, b| a.1.mean.total_cmp(&b.1.mean));
        let many = losses.iter().filter(|(count, _)| 2 * count >= layers).min_by(|a, b| a.1.mean.total_cmp(&b.1.mean));
        let transformer = self.models.architectures.iter().position(|a| a.kind() == Kind::Transformer);
        let transformer = transformer.map(|at| {
            let index = self.attention_layers.len() + at;
            Spread::of(groups.iter().filter(|g| g.index == index).map(|g| g.score(LOSS).mean)).mean
        });
        let compare = |claim: &str, few: Option<&(usize, Spread)>, other: Option<(String, f64)>| match (few, other) {
            (Some((count, loss)), Some((name, value))) => {
                Check::measured(claim, loss.mean < value, format!("{count} of {layers} attend: {:.4}, {name}: {value:.4}", loss.mean))
            }
            _ => Check::absent(claim, "the recipe lacks one side"),
        };
        let gains = self.gains(groups);
        let seeds = few
            .and_then(|(count, _)| gains.iter().find(|(of, _)| of == count))
            .map(|(_, gains)| format!(" (lower in {} of {} seeds)", gains.iter().filter(|gain| **gain < 0.0).count(), gains.len()));
        let named = |side: Option<&(usize, Spread)>| side.map(|(count, loss)| (format!("{count} of {layers}"), loss.mean));
        Verdict {
            checks: vec![
                compare("a few attention layers are better than none", few, named(none)).adding(&seeds.unwrap_or_default()),
                compare("a few attention layers are better than half or more", few, named(many)),
                compare(
                    "a few attention layers are better than a Transformer with MLPs",
                    few,
                    transformer.map(|loss| ("Transformer".to_string(), loss)),
                ),
            ],
        }
    }
}

impl Experiment for LayerMix {
    type Cell = Cell;
    type Found = Learned;

    fn check(&self) -> Result<(), EvalError> {
        if let Some(bad) = self.attention_layers.iter().find(|count| **count > self.models.layers) {
            return Err(EvalError::value("attention_layers", format!("{bad} of {} layers", self.models.layers)));
        }
        Ok(())
    }

    fn training(&self) -> Option<&Training> {
        Some(&self.training)
    }

    fn ready(&self) -> Result<(), EvalError> {
        self.task.check(self.data.as_deref())
    }

    fn cells(&self) -> Result<Vec<Cell>, EvalError> {
        self.lineup()?.cells(VOCAB, &self.training)
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
        let point = |(count, loss): &(usize, Spread)| (*count as f64, loss.mean, loss.deviation);
        let mut series =
            vec![Series { name: "Mamba-2 and attention".into(), points: self.losses(&groups).iter().map(point).collect(), fit: false }];
        let last = self.attention_layers.iter().copied().max().unwrap_or(1) as f64;
        for group in groups.iter().filter(|group| group.index >= self.attention_layers.len()) {
            let loss = group.score(LOSS);
            series.push(Series {
                name: group.architecture.name.clone(),
                points: [0.0, last].map(|x| (x, loss.mean, 0.0)).to_vec(),
                fit: false,
            });
        }
        let mix = Panel {
            title: "Held-out loss (nats per byte)".into(),
            x: format!("Attention layers of {}", self.models.layers),
            series,
            ..Panel::default()
        };
        let gain = |(count, gains): &(usize, Vec<f64>)| {
            let spread = Spread::of(gains.iter().copied());
            (*count as f64, spread.mean, spread.deviation)
        };
        let gains: Vec<_> = self.gains(&groups).iter().map(gain).collect();
        let paired = Panel {
            title: "Less that of none, same seed".into(),
            x: format!("Attention layers of {}", self.models.layers),
            series: vec![Series { name: "Mamba-2 and attention".into(), points: gains.clone(), fit: false }],
            ..Panel::default()
        };
        let mut panels = vec![mix];
        if !gains.is_empty() {
            panels.push(paired);
        }
        panels.push(curves(&groups, |point| point.1 as f64, "Bytes read"));
        let models = self.lineup().unwrap_or_else(|_| self.models.clone());
        Report {
            title: "How many attention layers".into(),
            source: "Mamba-2, arXiv 2405.21060, table 2; 8B study, arXiv 2406.07887".into(),
            claim: "A tenth of the layers attending is better than none and better than half; the mix beats a Transformer.".into(),
            table: sweep::table(&groups, &[LOSS.to_string()]),
            figure: Figure { title: "How many attention layers".into(), panels },
            verdict: self.verdict(&groups),
            notes: notes(&models, &self.training, &self.task, self.data.as_deref()),
            cells: found.iter().map(|(cell, learned)| cell.row(learned)).collect(),
        }
    }
}

type Point = (usize, u64, f64, f64, f64);

/// Held-out losses while learning, of the first seed.
fn curves(groups: &[Group<'_>], x: fn(&Point) -> f64, name: &str) -> Panel {
    let series = groups.iter().filter_map(|group| {
        let run = group.runs.first()?;
        let points = run.curve.iter().map(|point| (x(point), point.4, 0.0)).collect();
        Some(Series { name: group.architecture.name.clone(), points, fit: false })
    });
    Panel {
        title: "Held-out loss while learning (first seed)".into(),
        x: name.into(),
        x_scale: Scale::Log10,
        series: series.collect(),
        ..Panel::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixes_spread_attention_evenly() {
        let text = include_str!("../../../../examples/experiments/layer-mix.json");
        let mut mix: serde_json::Value = serde_json::from_str(text).unwrap();
        mix.as_object_mut().unwrap().remove("experiment");
        let mix: LayerMix = serde_json::from_value(mix).unwrap();
        for (count, architecture) in mix.attention_layers.iter().zip(mix.lineup().unwrap().architectures) {
            assert_eq!(architecture.pattern.matches('*').count(), *count, "{}", architecture.pattern);
            assert_eq!(architecture.pattern.len(), mix.models.layers);
        }
    }
}
