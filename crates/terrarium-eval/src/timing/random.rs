//! Weights and ids of no meaning.

use burn::tensor::{DType, Element, TensorData, bf16, f16};
use terrarium_kernels::KernelBackend;
use terrarium_models::init::RandomSource;
use terrarium_models::params::{ParamSource, ParamSpec};
use terrarium_models::{Decoder, DecoderConfig};

/// A model with random weights, made in `dtype` one by one: at no time does it take much more than these.
pub fn random_model<B: KernelBackend>(config: &DecoderConfig, seed: u64, dtype: DType, device: &B::Device) -> Decoder<B> {
    Decoder::build(config, &mut Tiled { source: RandomSource::new(seed), dtype }, dtype, device)
}

/// Random values, of which large tensors repeat the first: billions of them would take minutes to draw, and even a million for each a second per layer.
struct Tiled {
    source: RandomSource,
    dtype: DType,
}

impl ParamSource for Tiled {
    fn param(&mut self, spec: &ParamSpec) -> TensorData {
        const DRAWN: usize = 1 << 16;
        if spec.len() <= DRAWN {
            return self.source.param(spec);
        }
        // Not a whole number of rows, so that rows differ.
        let drawn = self.source.param(&ParamSpec { shape: vec![DRAWN - 3], ..spec.clone() });
        match self.dtype {
            DType::BF16 if !spec.float32 => tiled::<bf16>(&drawn, spec),
            DType::F16 if !spec.float32 => tiled::<f16>(&drawn, spec),
            _ => tiled::<f32>(&drawn, spec),
        }
    }
}

fn tiled<E: Element>(drawn: &TensorData, spec: &ParamSpec) -> TensorData {
    let drawn: Vec<E> = drawn.iter::<E>().collect();
    let mut values = Vec::with_capacity(spec.len());
    while values.len() < spec.len() {
        values.extend_from_slice(&drawn[..drawn.len().min(spec.len() - values.len())]);
    }
    TensorData::new(values, spec.shape.clone())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_tensors_are_made_in_their_type() {
        let config = DecoderConfig::from_json(
            r#"{"model_type": "mamba2", "vocab_size": 20000, "hidden_size": 64, "num_hidden_layers": 1,
            "num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16}"#,
        )
        .unwrap();
        let spec = config.parameter_specs().swap_remove(0);
        assert!(spec.len() > 1 << 20);
        let made = |dtype, float32| {
            let data = Tiled { source: RandomSource::new(3), dtype }.param(&ParamSpec { float32, ..spec.clone() });
            assert_eq!(data.shape.to_vec(), spec.shape);
            (data.dtype, data.iter::<f32>().collect::<Vec<f32>>())
        };
        let (dtype, values) = made(DType::F32, false);
        assert_eq!(dtype, DType::F32);
        let spread = (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt();
        assert!((0.019..0.021).contains(&spread), "{spread}");
        let (dtype, rounded) = made(DType::BF16, false);
        assert_eq!(dtype, DType::BF16);
        assert!(values.iter().zip(&rounded).all(|(x, y)| bf16::from_f32(*x).to_f32() == *y));
        assert_eq!(made(DType::BF16, true), (DType::F32, values));
    }
}
