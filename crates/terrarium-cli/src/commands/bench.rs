//! `terrarium bench`

mod model;
mod ops;

use std::time::Instant;

use clap::{Args, Subcommand};
use serde::Serialize;
use terrarium::burn::tensor::backend::Backend;
use terrarium::burn::tensor::{Int, Tensor, TensorData};
use terrarium::eval::timing::{Part, RandomIds, Training};
use terrarium::kernels::backend::{BackendTask, with_backend};
use terrarium::kernels::{KernelBackend, TrainBackend};
use terrarium::models::{Cache, Decoder, Layout};
use terrarium::runtime::{self, Precision};
use terrarium::train::data::{Batch, IGNORED};

use crate::args::{ComputeArgs, DtypeArgs, TokenizerArgs};
use crate::console::Console;
use crate::failure::Failure;
use crate::model as load_model;
use crate::model::{ModelArgs, Source};
use crate::{interrupt, output};

/// Time generation and a training step.
///
/// Decoding, reading a prompt, and a training step, on random token ids with batch 1. Each part runs once to warm up, then --repeats times; 0 tokens switch a part off. The training step is forward, loss,
/// backward, clipping and AdamW on all parameters, in float32.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  terrarium bench --model HuggingFaceTB/SmolLM2-135M --threads 2 --json",
    args_conflicts_with_subcommands = true
)]
pub struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens in the cache when decoding begins.
    #[arg(long, default_value_t = 32, value_name = "N")]
    prompt_tokens: usize,
    /// Tokens decoded.
    #[arg(long, default_value_t = 64, value_name = "N")]
    new_tokens: usize,
    /// Length of the prompt that is read.
    #[arg(long, default_value_t = 512, value_name = "N")]
    prefill: usize,
    /// Length of the row that is trained on.
    #[arg(long, default_value_t = 256, value_name = "N")]
    train_tokens: usize,
    /// How often each part is timed.
    #[arg(long, default_value_t = 5, value_name = "N")]
    repeats: usize,
    /// Seed of the ids.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    dtype: DtypeArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What to time instead of a model.
#[derive(Debug, Subcommand)]
enum What {
    Ops(ops::Arguments),
    /// Time a training step of a whole model.
    Train(model::Arguments),
    /// Time the reading of prompts.
    Prefill(model::Arguments),
    /// Time greedy decoding.
    Decode(model::Arguments),
}

/// Milliseconds, one entry per repeat.
#[derive(Debug, Default, Serialize)]
struct Report {
    decode_ms_per_token: Vec<f64>,
    prefill_ms: Vec<f64>,
    train_step_ms: Vec<f64>,
    threads: usize,
}

/// Times, prints.
pub fn run(arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    interrupt::immediate();
    match &arguments.what {
        Some(What::Ops(arguments)) => return ops::run(arguments, console),
        Some(What::Train(arguments)) => return model::run(Part::Train, arguments, console),
        Some(What::Prefill(arguments)) => return model::run(Part::Prefill, arguments, console),
        Some(What::Decode(arguments)) => return model::run(Part::Decode, arguments, console),
        None => {}
    }
    load_model::prepare(&arguments.compute)?;
    let source = arguments.model.source(&TokenizerArgs::default(), console)?;
    let report = with_backend(&arguments.compute.device, Task { arguments, console, source: &source })??;
    if arguments.json {
        return output::json(&report);
    }
    let rows = [
        ("decode", "ms/token", &report.decode_ms_per_token),
        ("prefill", "ms", &report.prefill_ms),
        ("train step", "ms", &report.train_step_ms),
    ];
    for (name, unit, times) in rows {
        let mut sorted = times.clone();
        sorted.sort_by(f64::total_cmp);
        if let (Some(best), Some(median)) = (sorted.first(), sorted.get(sorted.len() / 2)) {
            output::line(format_args!("{name:<11} {median:>9.2} {unit:<9} median, {best:.2} best of {}", sorted.len()))?;
        }
    }
    output::line(format_args!("threads     {:>9}", report.threads))
}

struct Task<'a> {
    arguments: &'a Arguments,
    console: &'a Console,
    source: &'a Source,
}

impl BackendTask for Task<'_> {
    type Output = Result<Report, Failure>;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
        let Self { arguments, console, source } = self;
        let mut report = Report { threads: rayon::current_num_threads(), ..Report::default() };
        let Arguments { prompt_tokens, new_tokens, prefill, train_tokens, repeats, .. } = *arguments;
        let hub = &arguments.model.hub;
        let loaded = load_model::load::<B::InnerBackend>(source, arguments.dtype.dtype.into(), hub, console, device)?;
        load_model::require_fused::<B::InnerBackend>(&loaded.config, loaded.dtype)?;
        let mut ids = RandomIds::new(arguments.seed, loaded.config.vocab_size);
        if new_tokens > 0 {
            let prompt = ids.take(prompt_tokens.max(1));
            let decode = || decode(&loaded.model, &prompt, new_tokens, device);
            report.decode_ms_per_token = repeat(repeats, decode)?;
        }
        if prefill > 0 {
            let prompt = ids.take(prefill);
            report.prefill_ms = repeat(repeats, || {
                let start = Instant::now();
                last_id(&read(&loaded.model, &prompt, 0, device)?.0);
                Ok(milliseconds(start))
            })?;
        }
        if train_tokens > 0 && repeats > 0 {
            drop(loaded);
            let loaded = load_model::load::<B>(source, Precision::F32, hub, console, device)?;
            let batch = batch(ids.take(train_tokens));
            let mut training = Training::<B>::new(loaded.model);
            report.train_step_ms = repeat(repeats, || Ok(training.step(&batch, device)))?;
        }
        Ok(report)
    }
}

/// One run to warm up, then `n` that count.
fn repeat(n: usize, mut run: impl FnMut() -> runtime::Result<f64>) -> runtime::Result<Vec<f64>> {
    let all: runtime::Result<Vec<f64>> = (0..=n).map(|_| run()).collect();
    Ok(all?.split_off(1))
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

/// Logits after the last token, as generation reads a prompt, and the cache with room for `spare` tokens.
fn read<B: KernelBackend>(model: &Decoder<B>, ids: &[i32], spare: usize, device: &B::Device) -> runtime::Result<(Tensor<B, 2>, Cache<B>)> {
    let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
    let (hidden, cache) = runtime::read_prompts(model, &[&ids], runtime::prefill_chunk::<B>(device), spare, device)?;
    Ok((model.logits(hidden), cache))
}

fn last<B: KernelBackend>(model: &Decoder<B>, hidden: Tensor<B, 3>) -> Tensor<B, 2> {
    let [_, l, d] = hidden.dims();
    model.logits(hidden.slice([0..1, l - 1..l]).reshape([1, d]))
}

/// Milliseconds per token of greedy steps after the prompt; reading the prompt is not counted.
fn decode<B: KernelBackend>(model: &Decoder<B>, prompt: &[i32], n: usize, device: &B::Device) -> runtime::Result<f64> {
    let (logits, mut cache) = read(model, prompt, n, device)?;
    let mut id = last_id(&logits);
    let start = Instant::now();
    for _ in 0..n {
        let (hidden, next) = model.hidden(tensor(&[id], device), Some(cache), &Layout::full(1, 1));
        cache = next;
        id = last_id(&last(model, hidden));
    }
    Ok(milliseconds(start) / n as f64)
}

/// The likeliest id, read back from the device.
fn last_id<B: KernelBackend>(logits: &Tensor<B, 2>) -> i32 {
    let data = logits.clone().into_data();
    let best = data.iter::<f32>().enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    best.map_or(0, |(id, _)| id as i32)
}

fn tensor<B: Backend>(ids: &[i32], device: &B::Device) -> Tensor<B, 2, Int> {
    Tensor::from_data(TensorData::new(ids.to_vec(), [1, ids.len()]), device)
}

/// One row in which every token but the first is predicted.
fn batch(ids: Vec<i32>) -> Batch {
    let length = ids.len();
    let labels = ids.iter().skip(1).copied().chain([IGNORED]).collect();
    Batch { rows: 1, length, ids, labels, documents: vec![0; length] }
}
