//! Times of whole models with random weights: a training step, and the operations in it; reading prompts; greedy decoding.
//!
//! Devices work through a queue, so a step cannot be stopped between its operations without changing it. The shares of a step are
//! therefore those of its operations timed alone, forward and backward, at the step's shapes, as `bench ops` times them, times the
//! number of their calls. Gradient norm and optimiser are timed within steps that wait before and after them. What is left of the
//! whole step is everything else: elementwise operations between these, changes of type, and waiting for the host. It may be below
//! zero, where calls go faster in a step than alone.

pub mod decode;
mod random;

use std::time::Instant;

use burn::tensor::DType;
use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};
use terrarium_kernels::measure::{self, Shape};
use terrarium_kernels::{KernelBackend, TrainBackend};
use terrarium_models::layers::NormKind;
use terrarium_models::{Decoder, DecoderConfig, MixerConfig};
use terrarium_runtime::Result;
use terrarium_train::TrainConfig;
use terrarium_train::data::{Batch, IGNORED};
use terrarium_train::gradients::{Gradients, Norm, clip_factor};
use terrarium_train::loss;
use terrarium_train::optim::{AdamW, AdamWConfig};

use crate::experiment::forward_flop;
pub use decode::Decode;
pub use random::{RandomIds, random_model};

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Forward, loss, backward, clipping, AdamW.
    Train,
    /// Reading prompts.
    Prefill,
    /// Greedy steps.
    Decode,
}

/// How much of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// What is timed.
    pub part: Part,
    /// Rows.
    pub batch: usize,
    /// Tokens of a row; when decoding, those before the first, see [`decode`].
    pub tokens: usize,
    /// Tokens decoded, one after another.
    pub new_tokens: usize,
    /// How often it is timed, after two times to warm up.
    pub repeats: usize,
    /// Seed of weights and ids.
    pub seed: u64,
    /// Positions of a row that are predicted in training, at its end; fewer than `tokens`.
    pub labelled: usize,
    /// Time the operations of a training step too.
    pub in_parts: bool,
}

/// What it took.
#[derive(Debug, Clone)]
pub struct Timed {
    /// What was timed, in words.
    pub name: &'static str,
    /// Tokens of one step.
    pub count: usize,
    /// Arithmetic per parameter and token.
    pub flop: f64,
    /// Milliseconds of a step, sorted.
    pub ms: Vec<f64>,
    /// Operations that one replay of a recorded decoding step does.
    pub recorded: Option<usize>,
    /// The parts of a training step, where they were asked for.
    pub step: Option<Step>,
    /// The most memory that was taken at once, bytes; see [`memory`].
    pub memory: Option<u64>,
    /// Bytes that a decoding step cannot but move; see [`Decode::floor`].
    pub floor: Option<f64>,
    /// Bytes of the cache when decoding.
    pub cache: Option<u64>,
}

/// What [`Step::by_operation`] calls the rest.
pub const OTHER: &str = "other";

/// One training step in parts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Rows.
    pub rows: usize,
    /// Tokens of a row.
    pub length: usize,
    /// What products are computed in.
    pub dtype: String,
    /// The whole step, median of several, milliseconds.
    pub ms: f64,
    /// Arithmetic of the step: three times that of reading, by the textbook algorithms, as `bench ops` counts them.
    pub flop: f64,
    /// The most memory that was taken at once, bytes: from the device by its pools, or by this process so far on a CPU.
    pub memory: Option<u64>,
    /// What it takes by arithmetic ([`terrarium_train::memory`]), bytes.
    #[serde(default)]
    pub estimate: u64,
    /// Its parts.
    pub shares: Vec<Share>,
    /// Of the step without its parts, milliseconds.
    pub other_ms: f64,
}

/// One kind of call in a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// The operation, as `bench ops` names it; `gradient_norm`, `adamw`.
    pub op: String,
    /// Its sizes.
    pub case: String,
    /// Calls in a step.
    pub calls: usize,
    /// Of all these calls, forward and backward, milliseconds; nothing where the operation broke.
    pub ms: Option<f64>,
    /// Of the step.
    pub share: Option<f64>,
}

impl Step {
    /// Tokens per second.
    pub fn tokens_per_s(&self) -> f64 {
        (self.rows * self.length) as f64 / self.ms * 1e3
    }

    /// Arithmetic per second.
    pub fn flop_per_s(&self) -> f64 {
        self.flop / self.ms * 1e3
    }

    /// Shares of operations, whatever their sizes, in the order of their first.
    pub fn by_operation(&self) -> Vec<(String, f64)> {
        let mut found: Vec<(String, f64)> = Vec::new();
        for part in &self.shares {
            let share = part.share.unwrap_or(0.0);
            match found.iter_mut().find(|(op, _)| *op == part.op) {
                Some((_, sum)) => *sum += share,
                None => found.push((part.op.clone(), share)),
            }
        }
        found.push((OTHER.to_string(), self.other_ms / self.ms));
        found
    }
}

/// Times a model whose weights, or in training whose products, are in `dtype`.
///
/// # Errors
/// When the device failed while reading or decoding.
pub fn time_model<B: TrainBackend>(config: &DecoderConfig, load: &Load, dtype: DType, device: &B::Device) -> Result<Timed> {
    time_beside::<B>(config, load, dtype, &[], device)
}

/// As [`time_model`], where `others` are steps of other models on the same device in the same type: operations that they have in common are
/// not timed again.
///
/// # Errors
/// As [`time_model`].
pub fn time_beside<B: TrainBackend>(
    config: &DecoderConfig,
    load: &Load,
    dtype: DType,
    others: &[&Step],
    device: &B::Device,
) -> Result<Timed> {
    let Load { part, batch, tokens, new_tokens, repeats, seed, labelled, in_parts } = *load;
    let mut ids = RandomIds::new(seed, config.vocab_size);
    let (mut recorded, mut step, mut decoding) = (None, None, None);
    let most;
    let (name, count, flop, ms) = match part {
        Part::Train => {
            let model = random_model::<B>(config, seed, DType::F32, device);
            let model = if dtype == DType::F32 { model } else { model.computing_in(dtype) };
            let rows = rows(&mut ids, batch, tokens, labelled);
            let mut training = Training::new(model);
            let ms = sorted((0..repeats + 2).map(|_| training.step(&rows, device)).collect());
            most = memory::<B>(device);
            if in_parts {
                let mut waits: Vec<[f64; 2]> = (0..3).map(|_| training.ends(&rows, device)).collect();
                let memory = memory::<B>(device);
                drop(training);
                <B::InnerBackend as Backend>::memory_cleanup(device);
                waits.sort_by(|a, b| (a[0] + a[1]).total_cmp(&(b[0] + b[1])));
                let whole = Whole { rows: &rows, dtype, ms: ms[ms.len() / 2], memory, ends: waits[1] };
                step = Some(in_operations::<B>(config, whole, others, device));
            }
            ("training step", batch * tokens, 6.0, ms)
        }
        Part::Prefill => {
            let model = random_model::<B::InnerBackend>(config, seed, dtype, device);
            let all: Result<Vec<f64>> = (0..repeats + 2).map(|_| decode::prefill(&model, &mut ids, [batch, tokens], device)).collect();
            most = memory::<B>(device);
            ("prefill", batch * tokens, 2.0, sorted(all?))
        }
        Part::Decode => {
            let model = random_model::<B::InnerBackend>(config, seed, dtype, device);
            let decode = Decode { batch, context: tokens, new_tokens, repeats, seed };
            let found = decode.run(&model, config, device)?;
            recorded = found.recorded;
            most = found.memory;
            decoding = Some((decode.floor(config, dtype), found.cache));
            ("decoding step", batch, 2.0, found.ms)
        }
    };
    let (floor, cache) = decoding.unzip();
    Ok(Timed { name, count, flop, ms, recorded, step, memory: most, floor, cache })
}

/// Without the first two, which warm up, in order.
fn sorted(times: Vec<f64>) -> Vec<f64> {
    let mut times: Vec<f64> = times.into_iter().skip(2).collect();
    times.sort_by(f64::total_cmp);
    times
}

/// The most memory that was taken at once, bytes: from the device by its pools since they were last cleaned, or on a CPU by this process
/// since it began, where the system tells.
pub fn memory<B: KernelBackend>(device: &B::Device) -> Option<u64> {
    if let Some(memory) = B::memory(device) {
        return Some(memory.reserved);
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// Bytes of memory that there are for a model: those of the device where it tells, on a CPU those that are free or this process has.
pub fn capacity<B: KernelBackend>(device: &B::Device) -> Option<u64> {
    if let Some(bytes) = B::capacity(device) {
        return Some(bytes);
    }
    if !matches!(B::name(device).as_str(), "flex" | "ndarray") {
        return None;
    }
    let kilobytes = |path: &str, key: &str| -> Option<u64> {
        let text = std::fs::read_to_string(path).ok()?;
        text.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
    };
    let free = kilobytes("/proc/meminfo", "MemAvailable:")?;
    Some(1024 * (free + kilobytes("/proc/self/status", "VmRSS:").unwrap_or(0)))
}

/// A step as it was measured.
struct Whole<'a> {
    rows: &'a Batch,
    dtype: DType,
    ms: f64,
    memory: Option<u64>,
    /// Of gradient norm and optimiser.
    ends: [f64; 2],
}

/// Times the operations of a step one by one.
fn in_operations<B: TrainBackend>(config: &DecoderConfig, whole: Whole<'_>, others: &[&Step], device: &B::Device) -> Step {
    let Whole { rows, dtype, ms, memory, ends } = whole;
    let labelled = rows.labelled();
    let at_once = loss::at_once::<B::InnerBackend>(labelled, config.vocab_size, dtype, device).max(1);
    let needs = terrarium_train::memory::Load {
        positions: rows.rows * rows.length,
        compute: dtype,
        segment: 0,
        logits: (at_once * config.vocab_size * dtype.size()) as u64,
        states: 16 * config.parameters() as u64,
    };
    let calls = calls(config, [rows.rows, rows.length], labelled, at_once);
    let shapes: Vec<Shape> = calls.iter().map(|(shape, _)| *shape).collect();
    let timed = |op: &str, case: &str| {
        let mut shares = others.iter().flat_map(|step| &step.shares);
        shares.find_map(|share| share.ms.filter(|_| share.op == op && share.case == case).map(|ms| ms / share.calls as f64))
    };
    // The device has just trained in this type.
    let found = measure::times::<B>(device, dtype, &shapes, |op, case| timed(op, case).is_none()).unwrap_or_default();
    let share = |op: &str, case: String, calls: usize, each: Option<f64>| {
        let all = each.map(|each| each * calls as f64);
        Share { op: op.to_string(), case, calls, ms: all, share: all.map(|all| all / ms) }
    };
    let mut shares: Vec<Share> = found
        .into_iter()
        .zip(calls)
        .map(|(row, (_, calls))| {
            let own = row.both.or(row.forward).map(|speed| speed.timing.ms);
            let each = own.or_else(|| timed(row.op, &row.case));
            share(row.op, row.case, calls, each)
        })
        .collect();
    let parameters = format!("parameters={}", config.parameters());
    shares.extend(["gradient_norm", "adamw"].into_iter().zip(ends).map(|(op, ms)| share(op, parameters.clone(), 1, Some(ms))));
    let known: f64 = shares.iter().filter_map(|share| share.ms).sum();
    let flop = 3.0 * forward_flop(config, rows.length, labelled as f64 / rows.ids.len().max(1) as f64) * rows.ids.len() as f64;
    Step {
        rows: rows.rows,
        length: rows.length,
        dtype: format!("{dtype:?}").to_lowercase(),
        ms,
        flop,
        memory,
        estimate: needs.estimate(config).total(),
        shares,
        other_ms: ms - known,
    }
}

/// The operations of a training step and how often each is called, equal ones together.
fn calls(config: &DecoderConfig, [b, l]: [usize; 2], labelled: usize, at_once: usize) -> Vec<(Shape, usize)> {
    let (d, rows) = (config.hidden_size, b * l);
    let mut calls: Vec<(Shape, usize)> = Vec::new();
    let mut add = |shape: Shape| match calls.iter_mut().find(|(known, _)| *known == shape) {
        Some((_, count)) => *count += 1,
        None => calls.push((shape, 1)),
    };
    let linear = |inputs: usize, outputs: usize| Shape::Linear { rows, inputs, outputs };
    let layer = config.norm.kind != NormKind::Rms;
    let norm = |added: bool| match added || layer {
        true => Shape::ResidualNorm { b, l, d, layer, added },
        false => Shape::Norm { b, l, e: d, groups: 1, gate: false },
    };
    for (i, layer) in config.layers.iter().enumerate() {
        let beside = config.parallel_mlp && matches!(layer, MixerConfig::Mlp(_));
        // The first layer has no branch before it to add.
        add(norm(i > 0 && !beside));
        match layer {
            MixerConfig::Mamba(m) => {
                let (e, n, r) = (m.inner, m.state, m.dt_rank);
                [(d, 2 * e), (e, r + 2 * n), (r, e), (e, d)].into_iter().for_each(|(inputs, outputs)| add(linear(inputs, outputs)));
                add(Shape::Conv { b, l, e, k: m.conv_kernel });
                add(Shape::SelectiveScan { b, l, e, n, gate: true });
            }
            MixerConfig::Mamba2(m) => {
                let (e, h, g, n) = (m.inner(), m.heads, m.groups, m.state);
                [(d, e + m.conv_channels() + h), (e, d)].into_iter().for_each(|(inputs, outputs)| add(linear(inputs, outputs)));
                add(Shape::Conv { b, l, e: m.conv_channels(), k: m.conv_kernel });
                add(Shape::Ssd { b, l, h, p: m.head_dim, g, n, softplus: true });
                add(Shape::Norm { b, l, e, groups: g, gate: true });
            }
            MixerConfig::Attention(a) => {
                let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
                [(d, q), (d, kv), (d, kv), (q, d)].into_iter().for_each(|(inputs, outputs)| add(linear(inputs, outputs)));
                if let Some(k) = a.conv_kernel {
                    add(Shape::Conv { b, l, e: a.conv_channels(), k });
                }
                if let Some(rope) = &a.rope {
                    [a.heads, a.kv_heads].into_iter().for_each(|h| add(Shape::Rotary { b, l, h, p: a.head_dim, half: rope.dim / 2 }));
                }
                add(Shape::Attention { b, l, h: a.heads, g: a.kv_heads, p: a.head_dim });
            }
            MixerConfig::Mlp(m) => {
                let up = if m.gated { 2 } else { 1 };
                (0..up).for_each(|_| add(linear(d, m.intermediate)));
                add(Shape::Glu { b, l, f: m.intermediate, activation: m.activation, gated: m.gated });
                add(linear(m.intermediate, d));
            }
        }
    }
    add(norm(true));
    let v = config.vocab_size;
    for _ in 0..labelled.div_ceil(at_once) {
        let rows = at_once.min(labelled);
        add(Shape::Linear { rows, inputs: d, outputs: v });
        add(Shape::CrossEntropy { rows, v });
    }
    add(Shape::EmbeddingBackward { tokens: rows, v, d, float32: true });
    // The labelled positions are looked up among all.
    add(Shape::EmbeddingBackward { tokens: labelled.max(1), v: rows, d, float32: false });
    calls
}

/// A model in training; it is absent only while a step changes it.
pub struct Training<B: TrainBackend> {
    model: Option<Decoder<B>>,
    optim: AdamW<B::InnerBackend>,
}

impl<B: TrainBackend> Training<B> {
    /// A model whose first step is to come.
    pub fn new(model: Decoder<B>) -> Self {
        Self { model: Some(model), optim: AdamW::new(AdamWConfig::new(&TrainConfig::default())) }
    }

    /// Forward, loss, backward, clip, AdamW; in milliseconds.
    pub fn step(&mut self, batch: &Batch, device: &B::Device) -> f64 {
        let Some(model) = self.model.take() else { return f64::NAN };
        let start = Instant::now();
        let mut grads = Gradients::default();
        let loss = loss::backward(&model, batch, 1.0 / batch.labelled().max(1) as f64, 0, &mut grads, device);
        let factor = factor(&mut grads);
        self.finish(model, grads, factor);
        let _ = loss.into_data();
        start.elapsed().as_secs_f64() * 1e3
    }

    /// Milliseconds of gradient norm and optimiser in a step that waits for the device before each.
    fn ends(&mut self, batch: &Batch, device: &B::Device) -> [f64; 2] {
        let Some(model) = self.model.take() else { return [f64::NAN; 2] };
        let mut grads = Gradients::default();
        let loss = loss::backward(&model, batch, 1.0 / batch.labelled().max(1) as f64, 0, &mut grads, device);
        let _ = loss.into_data();
        // A device that fails here failed in the steps before.
        let _ = <B::InnerBackend as Backend>::sync(device);
        let start = Instant::now();
        let factor = factor(&mut grads);
        let norm = start.elapsed().as_secs_f64() * 1e3;
        let start = Instant::now();
        self.finish(model, grads, factor);
        let _ = <B::InnerBackend as Backend>::sync(device);
        [norm, start.elapsed().as_secs_f64() * 1e3]
    }

    /// The optimiser's step; reading a result waits for the device.
    fn finish(&mut self, model: Decoder<B>, grads: Gradients<B::InnerBackend>, factor: f64) {
        let model = self.optim.step(model, grads, 1e-5, factor);
        let _ = model.norm_f.weight.val().cast(DType::F32).into_data();
        self.model = Some(model);
    }
}

/// What gradients are multiplied with to be clipped at 1.
fn factor<B: KernelBackend>(grads: &mut Gradients<B>) -> f64 {
    match grads.norm() {
        Norm::Finite(norm) => clip_factor(norm, 1.0),
        Norm::NotFinite(_) => 0.0,
    }
}

/// Rows whose last `labelled` tokens are predicted.
fn rows(ids: &mut RandomIds, rows: usize, length: usize, labelled: usize) -> Batch {
    let ids = ids.take(rows * length);
    let first = (length - 1).saturating_sub(labelled);
    let label = |row: &[i32], at: usize| if (first..length - 1).contains(&at) { row[at + 1] } else { IGNORED };
    let labels = ids.chunks(length).flat_map(|row| (0..length).map(|at| label(row, at)).collect::<Vec<_>>()).collect();
    Batch { rows, length, ids, labels, documents: vec![0; rows * length] }
}
