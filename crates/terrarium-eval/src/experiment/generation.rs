//! Decoding of large models beside one another, over contexts and batches (arXiv 2406.07887).

use burn::tensor::DType;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use terrarium_kernels::TrainBackend;
use terrarium_models::DecoderConfig;
use terrarium_train::config::{Compute, new_model};
use terrarium_train::plot::{Panel, Scale, Series};

use super::Running;
use super::report::Check;
use super::timed::{Timed, attempt};
use crate::EvalError;
use crate::timing::{Decode, random_model};

/// Models of published shapes, decoding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    /// What is compared: the first is said to be faster than the last.
    pub models: Vec<Shape>,
    /// Tokens of a row before the first that is decoded.
    pub contexts: Vec<usize>,
    /// Rows; what does not fit the device is left out.
    pub batches: Vec<usize>,
    /// Tokens decoded behind each context.
    pub new_tokens: usize,
    /// How often they are timed.
    pub repeats: usize,
}

/// The shape of a published model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// What tables and figures call it.
    pub name: String,
    /// Name of the preset.
    pub preset: String,
    /// Keys of its configuration that are replaced.
    #[serde(default)]
    pub set: Map<String, Value>,
}

/// One model at one context and batch.
#[derive(Debug, Clone)]
pub(crate) struct Point {
    /// Its place among the models.
    pub model: usize,
    pub name: String,
    pub config: DecoderConfig,
    pub context: usize,
    pub batch: usize,
}

/// Contexts beyond have no use, and sizes would not fit their numbers.
const LONGEST: usize = 1 << 40;

impl Shape {
    fn config(&self) -> Result<DecoderConfig, EvalError> {
        let mut section = self.set.clone();
        section.insert("preset".into(), Value::String(self.preset.clone()));
        new_model(&section, &Map::new()).map_err(|error| EvalError::value("generation.models", error.to_string()))
    }
}

impl Generation {
    pub(super) fn check(&self) -> Result<(), EvalError> {
        let Self { models, contexts, batches, new_tokens, repeats } = self;
        if [models.len(), *new_tokens, *repeats].contains(&0) || contexts.contains(&0) || batches.contains(&0) {
            return Err(EvalError::value("generation", "sizes are at least 1, and there is a model"));
        }
        if contexts.iter().chain(batches).any(|&size| size > LONGEST) {
            return Err(EvalError::value("generation", format!("contexts and batches are at most {LONGEST}")));
        }
        Ok(())
    }

    /// Model after model, whose weights are then made once.
    pub(super) fn points(&self) -> Result<Vec<Point>, EvalError> {
        let mut points = Vec::new();
        for (model, shape) in self.models.iter().enumerate() {
            let config = shape.config()?;
            for &batch in &self.batches {
                for &context in &self.contexts {
                    points.push(Point { model, name: shape.name.clone(), config: config.clone(), context, batch });
                }
            }
        }
        Ok(points)
    }

    fn decode(&self, point: &Point) -> Decode {
        let Self { new_tokens, repeats, .. } = *self;
        Decode { batch: point.batch, context: point.context, new_tokens, repeats, seed: 0 }
    }

    pub(super) fn seconds(&self, point: &Point, gpu: bool) -> f64 {
        let steps = ((self.repeats + 2) * self.new_tokens) as f64;
        let (dtype, speed) = if gpu { (DType::BF16, 1e12) } else { (DType::F32, 5e9) };
        // What will hardly fit is left out.
        2.0 + (steps * self.decode(point).floor(&point.config, dtype) / speed).min(60.0)
    }

    pub(super) fn time<B: TrainBackend>(&self, point: &Point, running: &mut Running<'_>, device: &B::Device) -> Timed {
        let dtype = Compute::Auto.on::<B>(device).unwrap_or(DType::F32);
        let config = &point.config;
        let make = || {
            let name = format!("model {} in {dtype:?}", point.model);
            running.shared(&name, || random_model::<B::InnerBackend>(config, 0, dtype, device))
        };
        attempt::<B>(config, &self.decode(point), dtype, make, device)
    }

    /// Milliseconds of a step over contexts, one panel per batch.
    pub(super) fn panels(&self, found: &[(&Point, &Timed)]) -> Vec<Panel> {
        let panel = |&rows: &usize| {
            let series = |(at, shape): (usize, &Shape)| {
                let of = found.iter().filter(|(point, _)| point.model == at && point.batch == rows);
                let points = of.filter_map(|(point, timed)| Some((point.context as f64, timed.ms?, 0.0))).collect();
                Series { name: shape.name.clone(), points, fit: false }
            };
            Panel {
                title: format!("Decoding {rows} {} (ms a step)", if rows == 1 { "row" } else { "rows" }),
                x: "Tokens of context".into(),
                x_scale: Scale::Log2,
                y_scale: Scale::Log10,
                series: self.models.iter().enumerate().map(series).filter(|series| !series.points.is_empty()).collect(),
                ..Panel::default()
            }
        };
        self.batches.iter().map(panel).filter(|panel| !panel.series.is_empty()).collect()
    }

    pub(super) fn note(&self) -> String {
        format!(
            "Generation: greedy steps of {} with random weights, medians of {} times {} steps. Of a context the tokens of one pass are really read; the rest of the cache are copies of \
             their keys and values, so that every step reads a cache of the full length. Of the floor: the least time in which weights, keys and values (once) and states (read and \
             written) move at the rate of a copy, as a share of the step's; \
             above 100 % where caches of the processor hold them. What does not fit by arithmetic is left out, and what the device refused says so.",
            self.models.iter().map(|shape| format!("{} ({})", shape.name, shape.preset)).collect::<Vec<_>>().join(", "),
            self.repeats,
            self.new_tokens
        )
    }

    /// How many times as fast the first model is as the last, by batch and context.
    pub(super) fn checks(&self, found: &[(&Point, &Timed)]) -> Vec<Check> {
        let (Some(fast), Some(slow)) = (self.models.first(), self.models.last()) else { return Vec::new() };
        let [faster, grows, equal, own] = [
            format!("{} decodes faster than {} wherever both fit", fast.name, slow.name),
            "its lead grows with the context".to_string(),
            "at equal batches it decodes up to 8 times as fast".to_string(),
            "each at the batch that gives it most tokens/s, it decodes up to 8 times as fast".to_string(),
        ];
        let rows = self.at_equal_batches(found);
        if rows.is_empty() {
            return [faster, grows, equal, own].map(|claim| Check::absent(claim, "not timed")).to_vec();
        }
        let text = |ratios: &[(usize, f64)]| ratios.iter().map(|(at, ratio)| format!("{ratio:.2} at {at}")).collect::<Vec<_>>().join(", ");
        let listed = rows.iter().map(|(batch, ratios)| format!("batch {batch}: {}", text(ratios))).collect::<Vec<_>>().join("; ");
        let all: Vec<f64> = rows.iter().flat_map(|(_, ratios)| ratios.iter().map(|(_, ratio)| *ratio)).collect();
        let most = all.iter().copied().fold(0.0, f64::max);
        let longer = rows.iter().filter(|(_, ratios)| ratios.len() > 1);
        let leads: Vec<bool> = longer.map(|(_, ratios)| ratios[ratios.len() - 1].1 > ratios[0].1).collect();
        let growing = leads.iter().filter(|grows| **grows).count();
        let (words, owns) = self.at_own_batches(found);
        vec![
            Check::measured(faster, all.iter().all(|ratio| *ratio > 1.0), format!("times as fast: {listed}")),
            match leads.len() {
                0 => Check::absent(grows, "no batch fits at two contexts"),
                count => Check::measured(grows, growing == count, format!("at {growing} of {count} batches")),
            },
            Check::measured(equal, most >= 8.0, format!("{most:.2} times at most")),
            Check::measured(own, owns.into_iter().fold(0.0, f64::max) >= 8.0, format!("times as fast: {}", words.join(", "))),
        ]
    }

    fn speed(&self, found: &[(&Point, &Timed)], model: usize, context: usize, batch: usize) -> Option<f64> {
        let wanted = |point: &Point| (point.model, point.context, point.batch) == (model, context, batch);
        found.iter().find(|(point, _)| wanted(point)).and_then(|(_, timed)| timed.tokens_per_s)
    }

    /// For each batch, contexts and how many times as fast the first model is there; nothing where there is one model.
    fn at_equal_batches(&self, found: &[(&Point, &Timed)]) -> Vec<(usize, Vec<(usize, f64)>)> {
        let last = self.models.len() - 1;
        let ratio = |context: usize, batch: usize| {
            let speeds = (self.speed(found, 0, context, batch)?, self.speed(found, last, context, batch)?);
            (last > 0).then_some((context, speeds.0 / speeds.1))
        };
        let of = |&batch: &usize| (batch, self.contexts.iter().filter_map(|&context| ratio(context, batch)).collect::<Vec<_>>());
        self.batches.iter().map(of).filter(|(_, ratios)| !ratios.is_empty()).collect()
    }

    /// The same for each context where each model has the batch that gives it most tokens/s, in words and in numbers.
    fn at_own_batches(&self, found: &[(&Point, &Timed)]) -> (Vec<String>, Vec<f64>) {
        let best = |model: usize, context: usize| {
            let all = self.batches.iter().filter_map(|&batch| Some((batch, self.speed(found, model, context, batch)?)));
            all.max_by(|a, b| a.1.total_cmp(&b.1))
        };
        let ratio = |&context: &usize| {
            let ((batch, fast), (other, slow)) = (best(0, context)?, best(self.models.len() - 1, context)?);
            Some((format!("{:.2} at {context} (batch {batch} against {other})", fast / slow), fast / slow))
        };
        self.contexts.iter().filter_map(ratio).unzip()
    }
}
