//! Times of whole models with random weights: a training step, reading prompts, greedy decoding.

use std::time::Instant;

use burn::tensor::{DType, Int, Tensor, TensorData};
use terrarium_kernels::{KernelBackend, TrainBackend};
use terrarium_models::init::RandomSource;
use terrarium_models::params::{ParamSource, ParamSpec};
use terrarium_models::{Decoder, DecoderConfig, Layout};
use terrarium_runtime::Result;
use terrarium_runtime::generate::Decoding;
use terrarium_train::TrainConfig;
use terrarium_train::data::{Batch, IGNORED};
use terrarium_train::gradients::{Gradients, Norm, clip_factor};
use terrarium_train::loss;
use terrarium_train::optim::{AdamW, AdamWConfig};

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
    /// Tokens of a row; when decoding, those already read.
    pub tokens: usize,
    /// Tokens decoded, one after another.
    pub new_tokens: usize,
    /// How often it is timed, after two times to warm up.
    pub repeats: usize,
    /// Seed of weights and ids.
    pub seed: u64,
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
}

/// Times a model whose weights, or in training whose products, are in `dtype`.
///
/// # Errors
/// When the device failed while decoding.
pub fn time_model<B: TrainBackend>(config: &DecoderConfig, load: &Load, dtype: DType, device: &B::Device) -> Result<Timed> {
    let Load { part, batch, tokens, new_tokens, repeats, seed } = *load;
    let mut source = Tiled(RandomSource::new(seed));
    let mut ids = RandomIds::new(seed, config.vocab_size);
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
            let mut training = Training::new(model);
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
            let mut decoding = warm(&model, &prompt, [batch, tokens], config.vocab_size, device)?;
            let all: Result<Vec<f64>> = (0..repeats + 2).map(|_| decode(&mut decoding, new_tokens)).collect();
            let mut all = all?.split_off(2);
            all.sort_by(f64::total_cmp);
            recorded = decoding.recorded();
            ("decoding step", batch, 2.0, all)
        }
    };
    Ok(Timed { name, count, flop, ms, recorded })
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
        let loss = loss::backward(&model, batch, 1.0 / batch.labelled().max(1) as f64, &mut grads, device);
        let factor = match grads.norm() {
            Norm::Finite(norm) => clip_factor(norm, 1.0),
            Norm::NotFinite(_) => 0.0,
        };
        let model = self.optim.step(model, grads, 1e-5, factor);
        // Reading results waits for the device.
        let _ = (loss.into_data(), model.norm_f.weight.val().cast(DType::F32).into_data());
        self.model = Some(model);
        start.elapsed().as_secs_f64() * 1e3
    }
}

/// Ids of no meaning, the same for a seed everywhere (splitmix64).
pub struct RandomIds {
    state: u64,
    vocab: usize,
}

impl RandomIds {
    /// Ids below `vocab`.
    pub fn new(seed: u64, vocab: usize) -> Self {
        Self { state: seed, vocab }
    }

    /// The next `n`.
    pub fn take(&mut self, n: usize) -> Vec<i32> {
        (0..n).map(|_| self.next()).collect()
    }

    fn next(&mut self) -> i32 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % self.vocab.max(1) as u64) as i32
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
fn newest<B: KernelBackend>(model: &Decoder<B>, hidden: Tensor<B, 3>) -> Tensor<B, 2, Int> {
    let [b, l, d] = hidden.dims();
    model.logits(hidden.slice([0..b, l - 1..l]).reshape([b, d])).argmax(1)
}

/// Rows that have read their prompts and a few tokens more.
fn warm<B: KernelBackend>(model: &Decoder<B>, ids: &[i32], [b, l]: [usize; 2], vocab: usize, device: &B::Device) -> Result<Decoding<B>> {
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
fn decode<B: KernelBackend>(decoding: &mut Decoding<B>, n: usize) -> Result<f64> {
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
