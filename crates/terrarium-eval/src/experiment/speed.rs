//! Times of single operations over lengths and states, of whole models of equal size, and of large ones that decode.

use burn::tensor::DType;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use terrarium_kernels::TrainBackend;
use terrarium_kernels::measure::{self, Shape, Size};
use terrarium_models::DecoderConfig;
use terrarium_train::config::Compute;
use terrarium_train::plot::{Figure, Panel, Scale, Series};

use super::arch::Architecture;
use super::generation::{Generation, Point};
use super::report::{Check, Report, Table, Verdict};
use super::stats::short;
use super::timed::{Timed, attempt, caught};
use super::{CellName, Combination, Experiment, Running};
use crate::EvalError;
use crate::timing::{Decode, Load, Part, random_model, time_model};

/// The experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Speed {
    /// Single operations.
    pub operations: Operations,
    /// Whole models.
    pub models: Timings,
    /// Decoding of models of published shapes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
}

/// The scans of Mamba-2 and Mamba, and attention, of equal inner width.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Operations {
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens of a call: as many rows of one length as make these.
    pub tokens: usize,
    /// Lengths of rows, for all three.
    pub lengths: Vec<usize>,
    /// State width of both scans over the lengths.
    pub state: usize,
    /// State widths, for both scans.
    pub states: Vec<usize>,
    /// Length of rows over the states.
    pub length: usize,
    /// Compare with float64 before timing.
    #[serde(default = "yes")]
    pub check: bool,
    /// A few milliseconds per case.
    #[serde(default)]
    pub quick: bool,
}

/// Models of equal size, by their layers and width.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timings {
    /// What is compared.
    pub architectures: Vec<Architecture>,
    /// Model width.
    pub width: usize,
    /// Layers.
    pub layers: usize,
    /// Tokens of vocabulary.
    pub vocab_size: usize,
    /// Tokens of a training step or of prompts: as many rows of one length as make these.
    pub tokens: usize,
    /// Lengths of rows in training, and of prompts and contexts where these are not given.
    pub lengths: Vec<usize>,
    /// Lengths of prompts, and of the contexts behind which is decoded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contexts: Option<Vec<usize>>,
    /// Rows when decoding.
    pub decode_rows: usize,
    /// Tokens decoded behind each context.
    pub new_tokens: usize,
    /// How often each part is timed.
    pub repeats: usize,
}

fn yes() -> bool {
    true
}

/// What is timed.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "there are a few dozen")]
pub(crate) enum Cell {
    Operation { call: Call, over_states: bool },
    Model { architecture: Architecture, config: DecoderConfig, index: usize, part: Part, length: usize },
    Generation(Point),
}

const OPERATIONS: [&str; 3] = ["SSD (Mamba-2)", "selective scan (Mamba)", "attention"];

/// A call of an operation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    /// Its place in [`OPERATIONS`].
    op: usize,
    /// Tokens of a row.
    l: usize,
    /// State width.
    n: Option<usize>,
    shape: Shape,
}

impl Call {
    fn ssd(b: usize, l: usize, [h, p]: [usize; 2], n: usize) -> Self {
        Self { op: 0, l, n: Some(n), shape: Shape::Ssd { b, l, h, p, g: 1, n, softplus: false } }
    }

    fn scan(b: usize, l: usize, e: usize, n: usize) -> Self {
        Self { op: 1, l, n: Some(n), shape: Shape::SelectiveScan { b, l, e, n, gate: false } }
    }

    fn attention(b: usize, l: usize, [h, p]: [usize; 2]) -> Self {
        Self { op: 2, l, n: None, shape: Shape::Attention { b, l, h, g: h, p } }
    }
}

fn word(part: Part) -> &'static str {
    match part {
        Part::Train => "train",
        Part::Prefill => "prefill",
        Part::Decode => "decode",
    }
}

impl Combination for Cell {
    fn name(&self) -> CellName {
        match self {
            Cell::Operation { call, over_states } => {
                let Call { op, l, n, .. } = *call;
                let state = n.map_or(String::new(), |n| format!(" N={n}"));
                CellName {
                    id: format!("op{op}-l{l}-n{}-{}", n.unwrap_or(0), if *over_states { "states" } else { "lengths" }),
                    label: format!("{} L={l}{state}", OPERATIONS[op]),
                }
            }
            Cell::Model { architecture, index, part, length, .. } => CellName {
                id: format!("model{index}-{}-l{length}", word(*part)),
                label: format!("{} {} L={length}", architecture.name, word(*part)),
            },
            Cell::Generation(Point { model, name, context, batch, .. }) => {
                CellName { id: format!("generation{model}-b{batch}-l{context}"), label: format!("{name} generation L={context} b={batch}") }
            }
        }
    }
}

impl Operations {
    /// Whether the recipe has any.
    fn any(&self) -> bool {
        !self.lengths.is_empty() || !self.states.is_empty()
    }

    fn cells(&self) -> Vec<Cell> {
        let Self { heads: h, head_dim: p, tokens, state, .. } = *self;
        let rows = |l: usize| (tokens / l).max(1);
        let scans = |l: usize, n: usize| [Call::ssd(rows(l), l, [h, p], n), Call::scan(rows(l), l, h * p, n)];
        let lengths = self.lengths.iter().flat_map(|&l| {
            let attention = Call::attention(rows(l), l, [h, p]);
            scans(l, state).into_iter().chain([attention]).map(|call| Cell::Operation { call, over_states: false })
        });
        let states = self.states.iter().flat_map(|&n| scans(self.length, n).map(|call| Cell::Operation { call, over_states: true }));
        lengths.chain(states).collect()
    }
}

impl Experiment for Speed {
    type Cell = Cell;
    type Found = Timed;

    fn check(&self) -> Result<(), EvalError> {
        let Operations { heads, head_dim, tokens, lengths, state, states, length, .. } = &self.operations;
        let zero = [*heads, *head_dim, *tokens, *state, *length].contains(&0) || lengths.contains(&0) || states.contains(&0);
        if zero {
            return Err(EvalError::value("operations", "sizes are at least 1"));
        }
        let Timings { tokens, lengths, decode_rows, new_tokens, repeats, vocab_size, .. } = &self.models;
        let zero = [*tokens, *decode_rows, *new_tokens, *repeats, *vocab_size].contains(&0);
        if zero || lengths.iter().chain(self.models.contexts()).any(|&length| length == 0) {
            return Err(EvalError::value("models", "sizes are at least 1"));
        }
        self.generation.as_ref().map_or(Ok(()), Generation::check)
    }

    fn cells(&self) -> Result<Vec<Cell>, EvalError> {
        let mut cells = self.operations.cells();
        let Timings { architectures, width, layers, vocab_size, lengths, .. } = &self.models;
        let contexts = self.models.contexts();
        for (part, lengths) in [(Part::Train, lengths.as_slice()), (Part::Prefill, contexts), (Part::Decode, contexts)] {
            for length in lengths {
                for (index, architecture) in architectures.iter().enumerate() {
                    let config = architecture.decoder(*width, *layers, *vocab_size)?;
                    cells.push(Cell::Model { architecture: architecture.clone(), config, index, part, length: *length });
                }
            }
        }
        let points = self.generation.as_ref().map_or(Ok(Vec::new()), Generation::points)?;
        cells.extend(points.into_iter().map(Cell::Generation));
        Ok(cells)
    }

    fn judged_in<B: TrainBackend>(&self, device: &B::Device) -> Option<DType> {
        self.generation.as_ref().map(|_| Compute::Auto.on::<B>(device).unwrap_or(DType::F32))
    }

    fn seconds(&self, cell: &Cell, gpu: bool) -> f64 {
        match cell {
            Cell::Generation(point) => self.generation.as_ref().map_or(0.0, |generation| generation.seconds(point, gpu)),
            Cell::Operation { .. } if self.operations.quick => 0.2,
            Cell::Operation { .. } if gpu => 6.0,
            Cell::Operation { .. } => 10.0,
            Cell::Model { config, part, length, .. } => {
                let steps = (self.models.repeats + 2) as f64;
                let tokens = match part {
                    Part::Decode => (self.models.decode_rows * self.models.new_tokens) as f64,
                    _ => self.models.tokens.max(*length) as f64,
                };
                let flop = 6.0 * config.parameters() as f64 * tokens;
                let launches = if *part == Part::Decode { self.models.new_tokens as f64 } else { 1.0 } * 1e-3 * config.layers.len() as f64;
                if gpu { 2.0 + steps * (flop / 1e14 + launches) } else { steps * flop / 2e10 }
            }
        }
    }

    fn run<B: TrainBackend>(&self, cell: &Cell, running: &mut Running<'_>, device: &B::Device) -> Result<Option<Timed>, EvalError> {
        let found = match cell {
            Cell::Operation { call, .. } => self.operations.time::<B>(call.shape, device)?,
            Cell::Model { config, part, length, .. } => self.models.time::<B>(config, *part, *length, device),
            Cell::Generation(point) => match &self.generation {
                Some(generation) => generation.time::<B>(point, running, device),
                None => Timed::default(),
            },
        };
        running.log.line(&serde_json::to_value(&found).unwrap_or_default());
        Ok(Some(found))
    }

    fn report(&self, found: &[(Cell, Timed)]) -> Report {
        let Operations { tokens, heads, head_dim, state, length, .. } = self.operations;
        let mut notes = Vec::new();
        if self.operations.any() {
            notes.push(format!(
                "Operations: {tokens} tokens in rows of each length, {heads} heads of {head_dim}; over lengths both scans have states of {state}, over states rows of {length}. Medians; calls follow one another without waiting."
            ));
        }
        if !self.models.architectures.is_empty() {
            notes.push(format!(
                "Models: {} layers of width {}; a training step and prompts of {} tokens in rows of each length (one row where that is longer); decoding {} rows behind each length, of which the tokens of \
                 one pass are really read, the rest of the cache being copies. The time of decoding is that of one step.",
                self.models.layers, self.models.width, self.models.tokens, self.models.decode_rows
            ));
        }
        notes.extend(self.generation.as_ref().map(Generation::note));
        Report {
            title: "Speed of scans, attention and whole models".into(),
            source: "Mamba-2, arXiv 2405.21060, figure 10; 8B study, arXiv 2406.07887".into(),
            claim: "The SSD scan is 2 to 8 times as fast as Mamba's, faster than attention from 2K tokens on, and hardly slower with larger states. The 8B hybrid generates up to 8 times as fast as the Transformer.".into(),
            table: self.table(found),
            figure: Figure { title: "Speed of scans, attention and whole models".into(), panels: self.panels(found) },
            verdict: self.verdict(found),
            notes,
            cells: found.iter().map(|(cell, timed)| self.row(cell, timed)).collect(),
        }
    }
}

impl Operations {
    fn time<B: TrainBackend>(&self, shape: Shape, device: &B::Device) -> Result<Timed, EvalError> {
        let options = measure::Options {
            shapes: vec![shape],
            size: self.quick.then_some(Size::Quick),
            no_check: !self.check,
            ..measure::Options::default()
        };
        let mut timed = Timed::default();
        measure::run::<B>(device, &options, |event| {
            if let measure::Event::Row(row) = event {
                timed = Timed {
                    ms: row.forward.as_ref().map(|speed| speed.timing.ms),
                    both_ms: row.both.as_ref().map(|speed| speed.timing.ms),
                    path: row.path.to_string(),
                    note: row.note.clone(),
                    ..Timed::default()
                };
            }
        })
        .map_err(|error| EvalError::value("operations", error.to_string()))?;
        Ok(timed)
    }
}

impl Timings {
    /// Lengths of prompts, and contexts.
    fn contexts(&self) -> &[usize] {
        self.contexts.as_deref().unwrap_or(&self.lengths)
    }

    /// Rows of a part.
    fn rows(&self, part: Part, length: usize) -> usize {
        if part == Part::Decode { self.decode_rows } else { (self.tokens / length).max(1) }
    }

    fn time<B: TrainBackend>(&self, config: &DecoderConfig, part: Part, length: usize, device: &B::Device) -> Timed {
        let dtype = Compute::Auto.on::<B>(device).unwrap_or(DType::F32);
        let Self { new_tokens, repeats, .. } = *self;
        let batch = self.rows(part, length);
        if part == Part::Decode {
            let decode = Decode { batch, context: length, new_tokens, repeats, seed: 0 };
            return attempt::<B>(config, &decode, dtype, || random_model::<B::InnerBackend>(config, 0, dtype, device), device);
        }
        let load = Load { part, batch, tokens: length, new_tokens, repeats, seed: 0, labelled: length - 1, in_parts: false };
        let path = format!("{dtype:?}").to_lowercase();
        match caught(|| time_model::<B>(config, &load, dtype, device)) {
            Ok(found) => {
                let ms = found.ms.get(found.ms.len() / 2).copied();
                let tokens_per_s = ms.map(|ms| found.count as f64 / ms * 1e3);
                Timed { ms, tokens_per_s, memory_bytes: found.memory, path, ..Timed::default() }
            }
            Err(reason) => Timed { path, note: Some(format!("failed: {reason}")), ..Timed::default() },
        }
    }
}

impl Speed {
    /// What a cell is, its part, length, state width, rows and parameters.
    #[allow(clippy::type_complexity, reason = "the columns of a table")]
    fn what(&self, cell: &Cell) -> (String, &'static str, usize, Option<usize>, Option<usize>, Option<usize>) {
        match cell {
            Cell::Operation { call: Call { op, l, n, .. }, .. } => (OPERATIONS[*op].to_string(), "operation", *l, *n, None, None),
            Cell::Model { architecture, config, part, length, .. } => {
                let rows = self.models.rows(*part, *length);
                (architecture.name.clone(), word(*part), *length, architecture.state(), Some(rows), Some(config.parameters()))
            }
            Cell::Generation(Point { name, config, context, batch, .. }) => {
                (name.clone(), "generation", *context, None, Some(*batch), Some(config.parameters()))
            }
        }
    }

    fn table(&self, found: &[(Cell, Timed)]) -> Table {
        let columns =
            ["what", "length", "state", "rows", "ms", "ms with backward", "tokens/s", "cache, GB", "memory, GB", "of the floor", "path"];
        let number = |value: Option<f64>| value.map_or("-".to_string(), |value| format!("{value:.3}"));
        let count = |value: Option<usize>| value.map_or("-".to_string(), |value| value.to_string());
        let gigabytes = |bytes: Option<u64>| number(bytes.map(|bytes| bytes as f64 / 1e9));
        let rows = found.iter().map(|(cell, timed)| {
            let (what, part, length, state, rows, _) = self.what(cell);
            let (what, state) = match cell {
                Cell::Operation { .. } => (what, state),
                _ => (format!("{what} {part}"), None),
            };
            let speed = timed.tokens_per_s.map_or("-".to_string(), short);
            let floor = timed.of_floor().map_or("-".to_string(), |share| format!("{:.0} %", 100.0 * share));
            let path = timed.note.clone().unwrap_or_else(|| timed.path.clone());
            let (cache, memory) = (gigabytes(timed.cache_bytes), gigabytes(timed.memory_bytes));
            vec![
                what,
                length.to_string(),
                count(state),
                count(rows),
                number(timed.ms),
                number(timed.both_ms),
                speed,
                cache,
                memory,
                floor,
                path,
            ]
        });
        Table { columns: columns.map(String::from).to_vec(), rows: rows.collect() }
    }

    fn row(&self, cell: &Cell, timed: &Timed) -> Map<String, Value> {
        let (what, part, length, state, rows, parameters) = self.what(cell);
        let value = json!({ "what": what, "part": part, "length": length, "state": state, "rows": rows, "parameters": parameters,
                            "ms": timed.ms, "ms_with_backward": timed.both_ms, "tokens_per_s": timed.tokens_per_s,
                            "cache_bytes": timed.cache_bytes, "memory_bytes": timed.memory_bytes, "floor_bytes": timed.floor_bytes,
                            "floor_ms": timed.floor_ms(), "of_floor": timed.of_floor(), "path": timed.path, "note": timed.note });
        match value {
            Value::Object(row) => row,
            _ => Map::new(),
        }
    }
}

/// Cells of the generation part.
fn points(found: &[(Cell, Timed)]) -> Vec<(&Point, &Timed)> {
    let mut points = Vec::new();
    for (cell, timed) in found {
        if let Cell::Generation(point) = cell {
            points.push((point, timed));
        }
    }
    points
}

/// Forward and backward where both were timed.
fn whole(timed: &Timed) -> Option<f64> {
    timed.both_ms.or(timed.ms)
}

impl Speed {
    /// Times of an operation over lengths, or over states.
    fn times(&self, found: &[(Cell, Timed)], op: usize, states: bool) -> Vec<(f64, f64)> {
        let point = |(cell, timed): &(Cell, Timed)| match cell {
            Cell::Operation { call, over_states } if *over_states == states => {
                let Call { op: found, l, n, .. } = *call;
                let x = if states { n.unwrap_or(0) } else { l };
                (found == op).then_some((x as f64, whole(timed)?))
            }
            _ => None,
        };
        found.iter().filter_map(point).collect()
    }

    fn panels(&self, found: &[(Cell, Timed)]) -> Vec<Panel> {
        let operations = |states: bool, title: &str, x: &str| Panel {
            title: title.into(),
            x: x.into(),
            x_scale: Scale::Log2,
            y_scale: Scale::Log10,
            series: (0..OPERATIONS.len())
                .map(|op| Series {
                    name: OPERATIONS[op].into(),
                    points: self.times(found, op, states).into_iter().map(|(x, y)| (x, y, 0.0)).collect(),
                    fit: false,
                })
                .filter(|series| !series.points.is_empty())
                .collect(),
            ..Panel::default()
        };
        let models = |wanted: Part, title: &str| {
            let series = |(at, architecture): (usize, &Architecture)| {
                let point = |(cell, timed): &(Cell, Timed)| match cell {
                    Cell::Model { index, part, length, .. } if *index == at && *part == wanted => {
                        Some((*length as f64, timed.tokens_per_s?, 0.0))
                    }
                    _ => None,
                };
                Series { name: architecture.name.clone(), points: found.iter().filter_map(point).collect(), fit: false }
            };
            Panel {
                title: title.into(),
                x: "Tokens of a row".into(),
                x_scale: Scale::Log2,
                y_scale: Scale::Log10,
                series: self.models.architectures.iter().enumerate().map(series).collect(),
                ..Panel::default()
            }
        };
        let mut panels = Vec::new();
        if self.operations.any() {
            panels.push(operations(false, "Operations, forward and backward (ms)", "Tokens of a row"));
            panels.push(operations(true, "Operations, forward and backward (ms)", "State width"));
        }
        if !self.models.architectures.is_empty() {
            panels.push(models(Part::Train, "Training (tokens/s)"));
            panels.push(models(Part::Prefill, "Reading prompts (tokens/s)"));
            panels.push(models(Part::Decode, "Decoding (tokens/s)"));
        }
        panels.extend(self.generation.as_ref().map_or(Vec::new(), |generation| generation.panels(&points(found))));
        panels
    }

    fn verdict(&self, found: &[(Cell, Timed)]) -> Verdict {
        let [ssd, scan, attention] = [0, 1, 2].map(|op| self.times(found, op, false));
        // Times of the second over those of the first, at equal lengths.
        let ratios = |a: &[(f64, f64)], b: &[(f64, f64)], from: f64| -> Vec<(f64, f64)> {
            let both = a.iter().filter(|(l, _)| *l >= from);
            both.filter_map(|(l, x)| b.iter().find(|(other, _)| other == l).map(|(_, y)| (*l, y / x))).collect()
        };
        let text = |ratios: &[(f64, f64)]| ratios.iter().map(|(l, r)| format!("{r:.1} at {l:.0}")).collect::<Vec<_>>().join(", ");
        let missing = |claim: &str| Check::absent(claim, "not timed");
        let twice = "SSD is at least twice as fast as Mamba's scan from 2K tokens on";
        let over_scan = ratios(&ssd, &scan, 2048.0);
        let first = match over_scan.as_slice() {
            [] => missing(twice),
            all => Check::measured(twice, all.iter().all(|(_, ratio)| *ratio >= 2.0), format!("times as fast: {}", text(all))),
        };
        let beats = "SSD is faster than attention from 2K tokens on";
        let over_attention = ratios(&ssd, &attention, 2048.0);
        let second = match over_attention.as_slice() {
            [] => missing(beats),
            all => Check::measured(beats, all.iter().all(|(_, ratio)| *ratio > 1.0), format!("times as fast: {}", text(all))),
        };
        let flat = "with its state SSD slows down less than Mamba's scan";
        let growth = |times: &[(f64, f64)]| {
            let (first, last) = (times.first()?, times.last()?);
            (last.0 > first.0).then_some((last.0 / first.0, last.1 / first.1))
        };
        let third = match (growth(&self.times(found, 0, true)), growth(&self.times(found, 1, true))) {
            (Some((states, ssd)), Some((other, scan))) => {
                // Per doubling of the state: one of them may not run at the largest.
                let rate = |states: f64, times: f64| times.powf(1.0 / states.log2());
                let (a, b) = (rate(states, ssd), rate(other, scan));
                Check::measured(flat, a < b, format!("per doubling: SSD {a:.2} times, scan {b:.2} times"))
            }
            _ => missing(flat),
        };
        let mut checks = if self.operations.any() { vec![first, second, third] } else { Vec::new() };
        checks.extend(self.generation.as_ref().map_or(Vec::new(), |generation| generation.checks(&points(found))));
        Verdict { checks }
    }
}
