//! `terrarium bench train`, `bench prefill` and `bench decode`: whole models of a preset's shape, with random weights.

use clap::Args;
use serde::Serialize;
use terrarium::burn::tensor::DType;
use terrarium::eval::timing::{Load, Part, Share, Step, Timed, time_model};
use terrarium::kernels::TrainBackend;
use terrarium::kernels::backend::{BackendTask, with_backend};
use terrarium::kernels::measure;
use terrarium::models::DecoderConfig;
use terrarium::models::presets::preset;
use terrarium::train::config::{Compute, near_presets};

use crate::args::{ComputeArgs, Dtype, DtypeArgs};
use crate::console::Console;
use crate::failure::Failure;
use crate::{interrupt, model, output};

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
    /// Tokens of a row; when decoding, those before the first: of more than a pass the first ones are read, and the rest of the cache
    /// are copies of theirs.
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
    /// Leave out what a training step consists of.
    #[arg(long)]
    no_shares: bool,
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
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    training: Option<Training>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    reading: Option<Reading>,
}

/// What reading or decoding takes besides time.
#[derive(Debug, Serialize)]
struct Reading {
    /// The most memory taken at once: from the device by its pools, or by this process on a CPU.
    memory_bytes: Option<u64>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    decoding: Option<Decoding>,
}

/// How far a decoding step is from what memory allows.
#[derive(Debug, Serialize)]
struct Decoding {
    /// Of the cache, room for the tokens to come included.
    cache_bytes: u64,
    /// What a step cannot but move: weights, keys and values once, states of constant size twice.
    floor_bytes: f64,
    /// A copy here, bytes read and written.
    copy_tbs: Option<f64>,
    /// The second over the third.
    floor_ms: Option<f64>,
    /// That over the median.
    of_floor: Option<f64>,
}

/// What a training step consists of, and how busy it keeps the device.
#[derive(Debug, Serialize)]
struct Training {
    /// Arithmetic of the whole model by the textbook algorithms, scans and attention included.
    model_tflops: f64,
    /// What a large matrix product reaches here.
    matmul_tflops: Option<f64>,
    /// The first over the second.
    utilisation: Option<f64>,
    /// The most memory taken at once: from the device by its pools, or by this process on a CPU.
    memory_bytes: Option<u64>,
    /// What it takes by arithmetic.
    estimated_bytes: u64,
    /// Operations timed alone, times their calls.
    shares: Vec<Share>,
    /// Of the step without these.
    other_ms: f64,
}

/// Times, prints.
pub fn run(part: Part, arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    interrupt::immediate();
    model::prepare(&arguments.compute)?;
    let Some(found) = preset(&arguments.preset) else {
        let near = near_presets(&arguments.preset).join(", ");
        return Err(Failure::usage(format!("--preset {}: there is none of that name; near it: {near}", arguments.preset)));
    };
    if part == Part::Train && arguments.tokens < 2 {
        return Err(Failure::usage("--tokens is at least 2 in training: the first one is not predicted".to_string()));
    }
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
    ))?;
    report.reading.as_ref().map_or(Ok(()), say_memory)?;
    report.training.as_ref().map_or(Ok(()), |training| say(training, report.median_ms))
}

fn say_memory(reading: &Reading) -> Result<(), Failure> {
    if let Some(bytes) = reading.memory_bytes {
        output::line(format_args!("memory: {:.2} GB at most", bytes as f64 / 1e9))?;
    }
    let Some(Decoding { cache_bytes, floor_bytes, copy_tbs, floor_ms, of_floor }) = reading.decoding else { return Ok(()) };
    let floor = match (copy_tbs, floor_ms, of_floor) {
        (Some(copy), Some(ms), Some(share)) => {
            format!(": at least {ms:.3} ms at the {copy:.3} TB/s of a copy, {:.0} % of the step", 100.0 * share)
        }
        _ => String::new(),
    };
    output::line(format_args!("cache: {:.3} GB; a step moves {:.3} GB{floor}", cache_bytes as f64 / 1e9, floor_bytes / 1e9))
}

/// The parts of a step, largest first.
fn say(training: &Training, ms: f64) -> Result<(), Failure> {
    let ceiling = match (training.matmul_tflops, training.utilisation) {
        (Some(matmul), Some(share)) => format!(", {:.1} % of a matrix product's {matmul:.2}", 100.0 * share),
        _ => String::new(),
    };
    let estimate = training.estimated_bytes as f64 / 1e9;
    let memory = training
        .memory_bytes
        .map_or(String::new(), |bytes| format!("; {:.2} GB at most ({estimate:.2} by arithmetic)", bytes as f64 / 1e9));
    output::line(format_args!("whole model: {:.2} TFLOP/s{ceiling}{memory}", training.model_tflops))?;
    output::line(format_args!("{:>6} {:>10} {:>6}  operation, timed alone, forward and backward", "share", "ms", "calls"))?;
    let mut shares: Vec<&Share> = training.shares.iter().collect();
    shares.sort_by(|a, b| b.ms.unwrap_or(0.0).total_cmp(&a.ms.unwrap_or(0.0)));
    for Share { op, case, calls, ms, share } in shares {
        match (ms, share) {
            (Some(ms), Some(share)) => output::line(format_args!("{:>5.1}% {ms:>10.3} {calls:>6}  {op} {case}", 100.0 * share))?,
            _ => output::line(format_args!("{:>6} {:>10} {calls:>6}  {op} {case}", "-", "-"))?,
        }
    }
    let other = training.other_ms;
    output::line(format_args!("{:>5.1}% {other:>10.3} {:>6}  other: between these, and waiting for the host", 100.0 * other / ms, ""))
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
        let in_parts = part == Part::Train && !arguments.no_shares;
        let load = Load { part, batch, tokens, new_tokens, repeats, seed, labelled: tokens - 1, in_parts };
        let Timed { name, count, flop, ms, recorded, step, memory, floor, cache } = time_model::<B>(config, &load, dtype, device)?;
        let training = step.map(|step| {
            let model_tflops = step.flop_per_s() / 1e12;
            let matmul_tflops = measure::ceilings::<B>(device, dtype).ok().and_then(|machine| machine.matmul_tflops);
            let utilisation = matmul_tflops.map(|matmul| model_tflops / matmul);
            let Step { memory: memory_bytes, estimate: estimated_bytes, shares, other_ms, .. } = step;
            Training { model_tflops, matmul_tflops, utilisation, memory_bytes, estimated_bytes, shares, other_ms }
        });
        let median = ms[ms.len() / 2];
        let decoding = floor.zip(cache).map(|(floor_bytes, cache_bytes)| {
            let copy_tbs = measure::ceilings::<B>(device, dtype).ok().and_then(|machine| machine.copy_tbs);
            let floor_ms = copy_tbs.map(|copy| floor_bytes / copy / 1e9);
            Decoding { cache_bytes, floor_bytes, copy_tbs, floor_ms, of_floor: floor_ms.map(|ms| ms / median) }
        });
        let reading = (part != Part::Train).then_some(Reading { memory_bytes: memory, decoding });
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
            training,
            reading,
        })
    }
}
