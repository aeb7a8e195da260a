//! `terrarium bench train`, `bench prefill` and `bench decode`: whole models of a preset's shape, with random weights.

use std::time::Instant;

use clap::Args;
use serde::Serialize;
use terrarium::burn::tensor::{DType, Tensor, TensorData};
use terrarium::kernels::backend::{BackendTask, with_backend};
use terrarium::kernels::{KernelBackend, TrainBackend};
use terrarium::models::init::RandomSource;
use terrarium::models::params::{ParamSource, ParamSpec};
use terrarium::models::presets::preset;
use terrarium::models::{Decoder, DecoderConfig, Layout};
use terrarium::runtime::generate::Decoding;
use terrarium::train::TrainConfig;
use terrarium::train::config::{Compute, near_presets};
use terrarium::train::data::{Batch, IGNORED};
use terrarium::train::optim::{AdamW, AdamWConfig};

use super::{RandomIds, Training};
use crate::args::{ComputeArgs, Dtype, DtypeArgs};
use crate::console::Console;
use crate::failure::Failure;
use crate::{interrupt, model, output};

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

/// Time a whole model with random weights.
///
/// The shape is that of a preset (`terrarium models` lists them); nothing is downloaded. Each part runs twice to warm up, then --repeats times.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  terrarium bench train --preset mamba2-130m --batch 8 --tokens 2048 --device cuda --json\n  \
    terrarium bench decode --preset mamba2-1.3b --batch 16 --dtype bf16 --device cuda")]
pub struct Arguments {
    /// Name of the preset.
    #[arg(long, value_name = "NAME")]
    preset: String,
    /// Rows.
    #[arg(long, default_value_t = 1, value_name = "N")]
    batch: usize,
    /// Tokens of a row; when decoding, those already read.
    #[arg(long, default_value_t = 2048, value_name = "N")]
    tokens: usize,
    /// Tokens decoded, one after another.
    #[arg(long, default_value_t = 64, value_name = "N")]
    new_tokens: usize,
    /// How often each part is timed.
    #[arg(long, default_value_t = 5, value_name = "N")]
    repeats: usize,
    /// Seed of weights and ids.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Precision of the weights, or, in training, of the products; auto: bf16 where the device is fast with it, else f32.
    #[command(flatten)]
    dtype: DtypeArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What one part took.
#[derive(Debug, Serialize)]
struct Report {
    part: &'static str,
    preset: String,
    device: String,
    dtype: String,
    batch: usize,
    tokens: usize,
    parameters: usize,
    /// Operations that one replay of a recorded decoding step does.
    #[serde(skip_serializing_if = "Option::is_none")]
    recorded: Option<usize>,
    /// Of a step, sorted.
    ms: Vec<f64>,
    median_ms: f64,
    tokens_per_s: f64,
    /// Arithmetic of the parameters alone: 6 per parameter and token in training, else 2.
    tflops: f64,
}

/// Times, prints.
pub fn run(part: Part, arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    interrupt::immediate();
    model::prepare(&arguments.compute)?;
    let Some(found) = preset(&arguments.preset) else {
        let near = near_presets(&arguments.preset).join(", ");
        return Err(Failure::usage(format!("--preset {}: there is none of that name; near it: {near}", arguments.preset)));
    };
    if arguments.batch * arguments.tokens * arguments.new_tokens * arguments.repeats == 0 {
        return Err(Failure::usage("--batch, --tokens, --new-tokens and --repeats are at least 1".to_string()));
    }
    let config = found.decoder().map_err(|error| Failure::usage(error.to_string()))?;
    let report = with_backend(&arguments.compute.device, Task { part, arguments, config: &config, console })??;
    if arguments.json {
        return output::json(&report);
    }
    let (low, high) = (report.ms.first().copied().unwrap_or(f64::NAN), report.ms.last().copied().unwrap_or(f64::NAN));
    output::line(format_args!(
        "{} of {} in {} on {}: {:.3} ms ({low:.3} to {high:.3}), {} tokens/s, {:.1} TFLOP/s",
        report.part,
        report.preset,
        report.dtype,
        report.device,
        report.median_ms,
        output::count(report.tokens_per_s as usize),
        report.tflops
    ))
}

struct Task<'a> {
    part: Part,
    arguments: &'a Arguments,
    config: &'a DecoderConfig,
    console: &'a Console,
}

impl BackendTask for Task<'_> {
    type Output = Result<Report, Failure>;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
        let Self { part, arguments, config, console } = self;
        let Arguments { batch, tokens, new_tokens, repeats, seed, .. } = *arguments;
        let dtype = match arguments.dtype.dtype {
            Dtype::Auto => Compute::Auto.on::<B>(device).unwrap_or(DType::F32),
            Dtype::F32 => DType::F32,
            Dtype::Bf16 => DType::BF16,
            Dtype::F16 => DType::F16,
        };
        if !B::supports_dtype(device, dtype) {
            return Err(Failure::usage(format!("{} has no {dtype:?}: use --dtype f32", B::name(device))));
        }
        console.note(format_args!("making {} with random weights", arguments.preset));
        let mut source = Tiled(RandomSource::new(seed));
        let mut ids = RandomIds { state: seed, vocab: config.vocab_size };
        let times = |mut run: Box<dyn FnMut() -> f64 + '_>| {
            let mut times: Vec<f64> = (0..repeats + 2).map(|_| run()).skip(2).collect();
            times.sort_by(f64::total_cmp);
            times
        };
        let mut recorded = None;
        let (name, count, flop, ms) = match part {
            Part::Train => {
                let model = Decoder::<B>::build(config, &mut source, DType::F32, device);
                let model = if dtype == DType::F32 { model } else { model.computing_in(dtype) };
                let rows = rows(&mut ids, batch, tokens);
                let mut training = Training { model: Some(model), optim: AdamW::new(AdamWConfig::new(&TrainConfig::default())) };
                ("training step", batch * tokens, 6.0, times(Box::new(|| training.step(&rows, device))))
            }
            Part::Prefill => {
                let model = Decoder::<B::InnerBackend>::build(config, &mut source, dtype, device);
                let prompt = ids.take(batch * tokens);
                ("prefill", batch * tokens, 2.0, times(Box::new(|| prefill(&model, &prompt, [batch, tokens], device))))
            }
            Part::Decode => {
                let model = Decoder::<B::InnerBackend>::build(config, &mut source, dtype, device);
                let prompt = ids.take(batch * tokens);
                ("decoding step", batch, 2.0, {
                    let mut decoding = warm(&model, &prompt, [batch, tokens], config.vocab_size, device)?;
                    let mut run = || decode(&mut decoding, new_tokens);
                    let times: Result<Vec<f64>, _> = (0..repeats + 2).map(|_| run()).collect();
                    let mut times = times?.split_off(2);
                    times.sort_by(f64::total_cmp);
                    recorded = decoding.recorded();
                    times
                })
            }
        };
        let median = ms[ms.len() / 2];
        let parameters = config.parameters();
        Ok(Report {
            part: name,
            preset: arguments.preset.clone(),
            device: B::name(device),
            dtype: format!("{dtype:?}").to_lowercase(),
            batch,
            tokens,
            parameters,
            recorded,
            median_ms: median,
            tokens_per_s: count as f64 / median * 1e3,
            tflops: flop * parameters as f64 * count as f64 / median / 1e9,
            ms,
        })
    }
}

/// Rows in which every token but the first is predicted.
fn rows(ids: &mut RandomIds, rows: usize, length: usize) -> Batch {
    let ids = ids.take(rows * length);
    let labels = ids.chunks(length).flat_map(|row| row[1..].iter().copied().chain([IGNORED])).collect();
    Batch { rows, length, ids, labels, documents: vec![0; rows * length] }
}

/// Milliseconds until the logits after the last token of each row are there.
fn prefill<B: KernelBackend>(model: &Decoder<B>, ids: &[i32], [b, l]: [usize; 2], device: &B::Device) -> f64 {
    let start = Instant::now();
    let ids = Tensor::from_data(TensorData::new(ids.to_vec(), [b, l]), device);
    let (hidden, _) = model.hidden(ids, None, &Layout::full(b, l));
    newest(model, hidden).into_data();
    start.elapsed().as_secs_f64() * 1e3
}

/// Likeliest ids after the last token, `[b, 1]`.
fn newest<B: KernelBackend>(model: &Decoder<B>, hidden: Tensor<B, 3>) -> Tensor<B, 2, terrarium::burn::tensor::Int> {
    let [b, l, d] = hidden.dims();
    model.logits(hidden.slice([0..b, l - 1..l]).reshape([b, d])).argmax(1)
}

/// Rows that have read their prompts and a few tokens more.
fn warm<B: KernelBackend>(
    model: &Decoder<B>,
    ids: &[i32],
    [b, l]: [usize; 2],
    vocab: usize,
    device: &B::Device,
) -> Result<Decoding<B>, Failure> {
    let tensor = Tensor::from_data(TensorData::new(ids.to_vec(), [b, l]), device);
    let (_, cache) = model.hidden(tensor, None, &Layout::full(b, l));
    let mut decoding = Decoding::new(model, cache, vocab, device).choosing();
    decoding.read(&ids[..b].iter().map(|&id| id as u32).collect::<Vec<_>>())?;
    for _ in 0..3 {
        decoding.advance()?;
    }
    decoding.likeliest()?;
    Ok(decoding)
}

/// Milliseconds of a greedy step whose token stays on the device.
fn decode<B: KernelBackend>(decoding: &mut Decoding<B>, n: usize) -> Result<f64, Failure> {
    let start = Instant::now();
    for _ in 0..n {
        decoding.advance()?;
    }
    decoding.likeliest()?;
    Ok(start.elapsed().as_secs_f64() * 1e3 / n as f64)
}

/// Random values, of which large tensors repeat the first: billions of them would take minutes to draw.
struct Tiled(RandomSource);

impl ParamSource for Tiled {
    fn param(&mut self, spec: &ParamSpec) -> TensorData {
        const DRAWN: usize = 1 << 20;
        let n = spec.len();
        if n <= DRAWN {
            return self.0.param(spec);
        }
        let drawn = self.0.param(&ParamSpec { shape: vec![DRAWN], ..spec.clone() });
        let drawn: Vec<f32> = drawn.iter::<f32>().collect();
        // Not a whole number of rows, so that rows differ.
        let drawn = &drawn[..DRAWN - 3];
        let values: Vec<f32> = drawn.iter().copied().cycle().take(n).collect();
        TensorData::new(values, spec.shape.clone())
    }
}
