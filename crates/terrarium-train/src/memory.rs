//! Memory that a training step takes, by arithmetic: known before a run begins, so that one which will not fit is named at once.
//!
//! It errs upwards, by 15 to 20 % of the peak on a CPU for models of 70M to 135M parameters: gradients come while activations go, and are counted as if all were there at once.

use std::fmt;

use burn::tensor::DType;
use serde::Serialize;
use terrarium_models::{DecoderConfig, MixerConfig};

/// Bytes by what they hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Estimate {
    /// Weights, gradients and the two moments of AdamW, in float32.
    pub states: u64,
    /// Weights of products in a narrower type, kept from the forward to the backward pass.
    pub copies: u64,
    /// What the layers keep for the backward pass.
    pub activations: u64,
    /// Gradients within the layer that keeps most, and one slice of logits with its gradient.
    pub working: u64,
}

impl Estimate {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.states + self.copies + self.activations + self.working
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        write!(f, "about {:.2} GB: {:.2} for weights, gradients and moments, ", gb(self.total()), gb(self.states))?;
        if self.copies > 0 {
            write!(f, "{:.2} for weights in bf16, ", gb(self.copies))?;
        }
        write!(f, "{:.2} for activations, {:.2} to work in", gb(self.activations), gb(self.working))
    }
}

/// What a step takes.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Tokens of a pass: rows times length.
    pub positions: usize,
    /// What products are computed in.
    pub compute: DType,
    /// Layers of a segment of gradient checkpointing; 0 without it.
    pub segment: usize,
    /// Bytes of the largest slice of logits.
    pub logits: u64,
    /// Bytes of weights, gradients and moments.
    pub states: u64,
}

impl Load {
    /// The memory that it takes with `model`.
    pub fn estimate(&self, model: &DecoderConfig) -> Estimate {
        let size = self.compute.size() as u64;
        let positions = self.positions as u64;
        let d = model.hidden_size as u64;
        // The stream is float32, as the weights are.
        let stream = 4 * d;
        let layers: Vec<u64> = model.layers.iter().map(|layer| stream + size * (d + kept(layer))).collect();
        let most = layers.iter().copied().max().unwrap_or(0);
        let ends = stream + size * d;
        let activations = match self.segment {
            0 => layers.iter().sum::<u64>(),
            segment => {
                // The stream and the branch that enter each segment, and the layers of the heaviest one.
                let entries = layers.len().div_ceil(segment) as u64 * (stream + size * d);
                entries + layers.chunks(segment).map(|layers| layers.iter().sum()).max().unwrap_or(0)
            }
        };
        let narrow = size < 4;
        let products: usize =
            model.parameter_specs().iter().filter(|spec| spec.shape.len() == 2 && !spec.float32).map(|spec| spec.len()).sum();
        Estimate {
            states: self.states,
            copies: if narrow { size * products as u64 } else { 0 },
            activations: positions * (activations + ends),
            // The gradient of the stream lives beside those of the layer.
            working: positions * (most + stream) + 2 * self.logits,
        }
    }
}

/// Values of a token that a mixer keeps, beside its input.
fn kept(layer: &MixerConfig) -> u64 {
    let values = match layer {
        // Input projection, convolution, scan parameters and step sizes, what is scanned and gated.
        MixerConfig::Mamba(m) => 2 * m.inner + m.inner + (m.dt_rank + 2 * m.state) + m.inner + m.inner,
        // Input projection, convolution, what is scanned, what is gated.
        MixerConfig::Mamba2(m) => (m.inner() + m.conv_channels() + m.heads) + m.conv_channels() + 2 * m.inner(),
        // Projections, convolved where they are, queries and keys as they are rotated, output.
        MixerConfig::Attention(a) => {
            let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
            let all = q + 2 * kv;
            all + a.conv_kernel.map_or(0, |_| all) + a.rope.as_ref().map_or(0, |_| q + kv) + q
        }
        MixerConfig::Mlp(m) => m.intermediate * if m.gated { 3 } else { 2 },
    };
    values as u64
}

#[cfg(test)]
mod tests {
    use terrarium_models::presets::preset;

    use super::*;

    fn load(positions: usize, compute: DType, segment: usize) -> Load {
        Load { positions, compute, segment, logits: 0, states: 0 }
    }

    #[test]
    fn layers_keep_what_their_backward_reads() {
        let model = preset("smollm2-135m").unwrap().decoder().unwrap();
        let estimate = load(1, DType::F32, 0).estimate(&model);
        // 30 times attention (9 heads of 64, 3 of them with keys) and a gated MLP of 1536; each reads a norm of 576 and a stream of 576.
        let attention = (15 + 12 + 9) * 64;
        let mlp = 3 * 1536;
        assert_eq!(estimate.activations, 4 * (30 * (attention + mlp + 4 * 576) + 2 * 576));
        assert_eq!((estimate.copies, estimate.states), (0, 0));
        assert_eq!(load(7, DType::F32, 0).estimate(&model).activations, 7 * estimate.activations);
    }

    #[test]
    fn bf16_halves_all_but_the_stream_and_keeps_narrow_weights() {
        let model = preset("mamba2-130m").unwrap().decoder().unwrap();
        let [wide, narrow] = [DType::F32, DType::BF16].map(|compute| load(1000, compute, 0).estimate(&model));
        let stream = 25 * 4 * 768 * 1000;
        assert_eq!(2 * (narrow.activations - stream), wide.activations - stream);
        assert!(narrow.copies > 2 * 128_000_000 && narrow.copies < 2 * model.parameters() as u64, "{narrow:?}");
    }

    #[test]
    fn checkpointing_keeps_the_entries_and_one_segment() {
        let model = preset("mamba2-130m").unwrap().decoder().unwrap();
        let all = load(1000, DType::F32, 0).estimate(&model).activations;
        let [one, four, whole] = [1, 4, 24].map(|segment| load(1000, DType::F32, segment).estimate(&model).activations);
        assert!(one < four && four < all / 3 && whole > all, "{one} {four} {whole} {all}");
    }
}
