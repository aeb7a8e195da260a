//! Plain text as bytes, and the two experiments on it: how many attention layers, and how loss falls with compute.

use std::path::Path;

use rand::Rng;
use serde::{Deserialize, Serialize};
use terrarium_kernels::{KernelBackend, TrainBackend};
use terrarium_models::Decoder;
use terrarium_models::pattern;
use terrarium_train::data::{Batch, IGNORED};
use terrarium_train::loss;
use terrarium_train::plot::{Figure, Panel, Scale, Series};

use super::arch::{Architecture, Kind};
use super::curriculum::{TRAIN, generator};
use super::fit::{self, Learned, Task, Training};
use super::report::{Check, Report, Verdict};
use super::stats::{PowerLaw, Spread};
use super::sweep::{self, Cell, Group, Models, Size};
use super::{CellName, Experiment, Running};
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
const VOCAB: usize = 256;

/// Name of the measurement.
const LOSS: &str = "loss";

/// A text in memory.
struct Book<'a> {
    task: &'a TextTask,
    bytes: Vec<u8>,
}

impl TextTask {
    fn check(&self, data: Option<&str>) -> Result<(), EvalError> {
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
    fn open(&self, data: Option<&str>) -> Result<Book<'_>, EvalError> {
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
        let named = |side: Option<&(usize, Spread)>| side.map(|(count, loss)| (format!("{count} of {layers}"), loss.mean));
        Verdict {
            checks: vec![
                compare("a few attention layers are better than none", few, named(none)),
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
        self.lineup()?.check()?;
        self.training.check()
    }

    fn ready(&self) -> Result<(), EvalError> {
        self.task.check(self.data.as_deref())
    }

    fn cells(&self) -> Result<Vec<Cell>, EvalError> {
        self.lineup()?.cells(VOCAB, &self.training)
    }

    fn name(&self, cell: &Cell) -> CellName {
        cell.name()
    }

    fn seconds(&self, cell: &Cell, gpu: bool) -> f64 {
        fit::guess(&cell.config, self.training.steps, self.training.batch, self.task.length, 1.0, gpu)
    }

    fn run<B: TrainBackend>(&self, cell: &Cell, running: &mut Running<'_>, device: &B::Device) -> Result<Option<Learned>, EvalError> {
        cell.run::<B>(&self.training, &self.task.open(self.data.as_deref())?, running, device)
    }

    fn words(&self, found: &Learned) -> String {
        sweep::words(found)
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
        let models = self.lineup().unwrap_or_else(|_| self.models.clone());
        Report {
            title: "How many attention layers".into(),
            source: "Mamba-2, arXiv 2405.21060, table 2; 8B study, arXiv 2406.07887".into(),
            claim: "A tenth of the layers attending is better than none and better than half; the mix beats a Transformer.".into(),
            table: sweep::table(&groups, &[LOSS.to_string()]),
            figure: Figure {
                title: "How many attention layers".into(),
                panels: vec![mix, curves(&groups, |point| point.1 as f64, "Bytes read")],
            },
            verdict: self.verdict(&groups),
            notes: notes(&models, &self.training, &self.task, self.data.as_deref()),
            cells: found.iter().map(|(cell, learned)| cell.row(learned)).collect(),
        }
    }
}

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
                Check::measured(claim, x < y * 1.005, format!("{a} {x:.4}, {b} {y:.4} at {} FLOP", super::stats::short(middle)))
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
        self.models().check()?;
        self.training.check()
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

    fn name(&self, cell: &Cell) -> CellName {
        cell.name()
    }

    fn seconds(&self, cell: &Cell, gpu: bool) -> f64 {
        fit::guess(&cell.config, self.training.steps, self.training.batch, self.task.length, 1.0, gpu)
    }

    fn run<B: TrainBackend>(&self, cell: &Cell, running: &mut Running<'_>, device: &B::Device) -> Result<Option<Learned>, EvalError> {
        cell.run::<B>(&self.training, &self.task.open(self.data.as_deref())?, running, device)
    }

    fn words(&self, found: &Learned) -> String {
        sweep::words(found)
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

fn notes(models: &Models, training: &Training, task: &TextTask, data: Option<&str>) -> Vec<String> {
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
