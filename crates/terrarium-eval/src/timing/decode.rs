//! Reading prompts and decoding after them, and what that takes: memory, and the bytes that a step reads.
//!
//! A decoding step at a long context costs what reading its cache costs, whatever stands in it. So that cells of long contexts take
//! seconds and not hours, one pass of random tokens is read, and keys and values of the rest are copies of theirs
//! ([`Cache::stretched`]). Every step then reads a cache of the full length.

use std::time::Instant;

use burn::tensor::{DType, Tensor};
use terrarium_kernels::KernelBackend;
use terrarium_models::{Cache, Decoder, DecoderConfig, MixerConfig};
use terrarium_runtime::generate::Decoding;
use terrarium_runtime::{Result, prefill_chunk, read_prompts};

use super::random::RandomIds;
use super::{memory, sorted};

/// Steps of decoding before the first that is timed: they compile kernels, and record a step where that can be done.
const WARM: usize = 4;

/// What is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decode {
    /// Rows.
    pub batch: usize,
    /// Tokens of a row before the first that is decoded.
    pub context: usize,
    /// Tokens decoded, one after another.
    pub new_tokens: usize,
    /// How often they are timed, after two times to warm up.
    pub repeats: usize,
    /// Seed of the ids.
    pub seed: u64,
}

/// What it took.
#[derive(Debug, Clone)]
pub struct Decoded {
    /// Milliseconds of a step, sorted.
    pub ms: Vec<f64>,
    /// Operations that one replay of a recorded step does.
    pub recorded: Option<usize>,
    /// The most memory that was taken at once, bytes; see [`memory`].
    pub memory: Option<u64>,
    /// Bytes of the cache.
    pub cache: u64,
}

impl Decode {
    /// Slots of a row's cache at the end.
    fn slots(&self) -> usize {
        self.context + WARM + (self.repeats + 2) * self.new_tokens
    }

    /// Tokens of a row that are really read, when passes are of `chunk` tokens: one pass.
    fn read(&self, chunk: usize) -> usize {
        (chunk / self.batch.max(1)).clamp(1, self.context.max(1))
    }

    /// Bytes that a step cannot but move: the weights but for an embedding that is only looked up in, keys and values of the context,
    /// and states of constant size twice, which are read and written.
    pub fn floor(&self, config: &DecoderConfig, dtype: DType) -> f64 {
        let kept: usize = config
            .parameter_specs()
            .iter()
            .filter(|spec| config.tie_embeddings || spec.path != "embeddings.weight")
            .map(|spec| spec.len() * if spec.float32 { 4 } else { dtype.size() })
            .sum();
        let row = config.state_bytes(self.context, dtype.size()) + config.state_bytes(0, dtype.size());
        kept as f64 + self.batch as f64 * row as f64
    }

    /// Bytes that it takes at most, by arithmetic: weights, cache, and the widest values of a pass and of a step.
    pub fn needs(&self, config: &DecoderConfig, dtype: DType, chunk: usize) -> f64 {
        let size = dtype.size() as f64;
        let weights: usize = config.parameter_specs().iter().map(|spec| spec.len() * if spec.float32 { 4 } else { dtype.size() }).sum();
        let cache = self.batch as f64 * config.state_bytes(self.slots(), dtype.size()) as f64;
        let widest = config.layers.iter().map(widest).max().unwrap_or(0) as f64;
        // Input and output of the widest projection and what is made of it, beside the residual stream in float32.
        let pass = (self.batch * self.read(chunk)) as f64 * (3.0 * widest * size + 4.0 * config.hidden_size as f64 * 4.0);
        let logits = (self.batch * config.vocab_size) as f64 * (size + 8.0);
        weights as f64 + cache + pass + logits
    }

    /// Decodes greedily.
    ///
    /// # Errors
    /// When the device failed.
    pub fn run<B: KernelBackend>(&self, model: &Decoder<B>, config: &DecoderConfig, device: &B::Device) -> Result<Decoded> {
        let mut ids = RandomIds::new(self.seed, config.vocab_size);
        let read = self.read(prefill_chunk::<B>(device));
        let (_, cache) = read_random(model, &mut ids, [self.batch, read], device)?;
        let cache = cache.stretched(self.context, self.slots());
        let bytes = cache.bytes() as u64;
        let newest: Vec<u32> = ids.take(self.batch).into_iter().map(|id| id as u32).collect();
        let mut decoding = Decoding::new(model, cache, config.vocab_size, 1024, device).choosing();
        decoding.read(&newest)?;
        for _ in 1..WARM {
            decoding.advance()?;
        }
        decoding.chosen()?;
        let all: Result<Vec<f64>> = (0..self.repeats + 2).map(|_| steps(&mut decoding, self.new_tokens)).collect();
        let own = decoding.memory().map_or(0, |memory| memory.reserved);
        Ok(Decoded { ms: sorted(all?), recorded: decoding.recorded(), memory: memory::<B>(device).map(|bytes| bytes + own), cache: bytes })
    }
}

/// Values of a token that the widest projection of a layer reads or makes.
fn widest(layer: &MixerConfig) -> usize {
    match layer {
        MixerConfig::Mamba(m) => 2 * m.inner,
        MixerConfig::Mamba2(m) => m.inner() + m.conv_channels() + m.heads,
        MixerConfig::Attention(a) => a.conv_channels(),
        MixerConfig::Mlp(m) => {
            if m.gated {
                2 * m.intermediate
            } else {
                m.intermediate
            }
        }
    }
}

/// Milliseconds of a greedy step whose token stays on the device.
fn steps<B: KernelBackend>(decoding: &mut Decoding<B>, n: usize) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..n {
        decoding.advance()?;
    }
    decoding.chosen()?;
    Ok(start.elapsed().as_secs_f64() * 1e3 / n as f64)
}

/// Reads random prompts as generation does: states after the last token of each, `[b, d]`, and the cache.
fn read_random<B: KernelBackend>(
    model: &Decoder<B>,
    ids: &mut RandomIds,
    [batch, length]: [usize; 2],
    device: &B::Device,
) -> Result<(Tensor<B, 2>, Cache<B>)> {
    let prompts: Vec<Vec<u32>> = (0..batch).map(|_| ids.take(length).into_iter().map(|id| id as u32).collect()).collect();
    let rows: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    read_prompts(model, &rows, prefill_chunk::<B>(device), 0, device)
}

/// Milliseconds until the logits after the last token of each row of `[b, l]` random tokens are there.
pub(super) fn prefill<B: KernelBackend>(model: &Decoder<B>, ids: &mut RandomIds, sizes: [usize; 2], device: &B::Device) -> Result<f64> {
    let start = Instant::now();
    let (hidden, _) = read_random(model, ids, sizes, device)?;
    model.logits(hidden).argmax(1).into_data();
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use terrarium_models::presets::preset;

    use super::*;

    /// The models of arXiv 2406.07887 on a device of 80 GB.
    #[test]
    fn what_fits_is_known_by_arithmetic() {
        let config = |name: &str| preset(name).unwrap().decoder().unwrap();
        let (hybrid, transformer) = (config("mamba2-hybrid-8b-3t-128k"), config("gpt3-8b-multi-3.5t-base"));
        let gigabytes = |config: &DecoderConfig, context: usize, batch: usize| {
            let decode = Decode { batch, context, new_tokens: 32, repeats: 5, seed: 0 };
            let (needs, floor) = (decode.needs(config, DType::BF16, 8192) / 1e9, decode.floor(config, DType::BF16) / 1e9);
            assert!(floor < needs, "{floor} {needs}");
            (needs, floor)
        };
        // Weights of 17.1 GB, and for each token 32 layers of keys and values of 4096.
        let (needs, floor) = gigabytes(&transformer, 32768, 1);
        assert!((17.1 + 17.3..17.1 + 17.3 + 2.0).contains(&needs), "{needs}");
        // The embedding is looked up in.
        assert!((floor - (17.08 - 256_000.0 * 4096.0 * 2.0 / 1e9 + 32768.0 * 32.0 * 2.0 * 4096.0 * 2.0 / 1e9)).abs() < 0.05, "{floor}");
        assert!(gigabytes(&transformer, 131_072, 1).0 > 80.0 && gigabytes(&transformer, 8192, 32).0 > 80.0);
        // 4 layers of keys and values of 1024, and 24 states of 4.2 MB.
        let (needs, floor) = gigabytes(&hybrid, 131_072, 8);
        assert!((17.3 + 17.2 + 0.8..17.3 + 17.2 + 0.8 + 2.5).contains(&needs), "{needs}");
        let states = 8.0 * 24.0 * 128.0 * 64.0 * 128.0 * 4.0 / 1e9;
        assert!((floor - (17.31 - 2.1 + 17.18 + 2.0 * states)).abs() < 0.1, "{floor}");
        assert!(gigabytes(&hybrid, 131_072, 32).0 > 80.0);
    }
}
