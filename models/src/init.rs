//! Starting values, as the papers' code draws them, from a generator on the host: the same on every backend.

use burn::tensor::TensorData;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::params::{ParamInit, ParamSource, ParamSpec};

/// A family's scheme for linear layers and embeddings. Decay rates, step sizes, skips and convolutions are drawn the
/// same way in all of them (arXiv 2405.21060 and its code).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// The mamba_ssm code: linears uniform in `1 / sqrt(in)`, embeddings normal 0.02, outputs scaled by
    /// `1 / sqrt(layers)`.
    MambaSsm,
    /// Megatron-LM, used by the 8B study (arXiv 2406.07887): normal `std`; outputs into the residual stream
    /// `std / sqrt(2 * blocks)`, of Mamba layers `std / sqrt(blocks)`.
    Megatron {
        /// Standard deviation of linears and embeddings.
        std: f32,
    },
    /// GPT-NeoX as Pythia was trained: normal `sqrt(2 / (5 d))`; outputs into the residual stream `2 / (blocks * sqrt(d))`.
    SmallWang,
}

/// What a mixer needs to know to choose its starting values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InitScale {
    pub scheme: Init,
    /// Published layers, which outputs are scaled for.
    pub blocks: usize,
    /// Model width.
    pub width: usize,
}

impl InitScale {
    fn small(&self) -> ParamInit {
        ParamInit::Normal { std: (0.4 / self.width as f32).sqrt() }
    }

    pub fn embedding(&self) -> ParamInit {
        match self.scheme {
            Init::MambaSsm => ParamInit::Normal { std: 0.02 },
            Init::Megatron { std } => ParamInit::Normal { std },
            Init::SmallWang => self.small(),
        }
    }

    pub fn linear(&self, inputs: usize) -> ParamInit {
        match self.scheme {
            Init::MambaSsm => kaiming(inputs),
            Init::Megatron { std } => ParamInit::Normal { std },
            Init::SmallWang => self.small(),
        }
    }

    /// The input projection of a Mamba layer.
    pub fn ssm_input(&self, inputs: usize) -> ParamInit {
        kaiming(inputs)
    }

    /// A projection back into the residual stream.
    pub fn output(&self, inputs: usize, ssm: bool) -> ParamInit {
        let blocks = self.blocks.max(1) as f32;
        match self.scheme {
            Init::MambaSsm => ParamInit::Uniform { bound: 1.0 / ((inputs as f32).sqrt() * blocks.sqrt()) },
            Init::Megatron { std } => ParamInit::Normal { std: std / if ssm { blocks } else { 2.0 * blocks }.sqrt() },
            Init::SmallWang => ParamInit::Normal { std: 2.0 / (blocks * (self.width as f32).sqrt()) },
        }
    }
}

/// PyTorch's default for linears and convolutions: `kaiming_uniform(a = sqrt 5)`.
pub(crate) fn kaiming(inputs: usize) -> ParamInit {
    ParamInit::Uniform { bound: 1.0 / (inputs as f32).sqrt() }
}

/// Draws every parameter from its own stream, seeded by its path: changing one layer leaves the others as they were.
#[derive(Debug, Clone)]
pub struct RandomSource {
    seed: u64,
}

impl RandomSource {
    /// A source for `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }
}

impl ParamSource for RandomSource {
    fn param(&mut self, spec: &ParamSpec) -> TensorData {
        let mut rng = StdRng::seed_from_u64(self.seed ^ fnv1a(&spec.path));
        let columns = spec.shape.last().copied().unwrap_or(1).max(1);
        let values: Vec<f32> = match spec.init {
            ParamInit::S4dReal => (0..spec.len()).map(|i| ((i % columns + 1) as f32).ln()).collect(),
            init => (0..spec.len()).map(|_| draw(init, &mut rng)).collect(),
        };
        TensorData::new(values, spec.shape.clone())
    }
}

fn draw(init: ParamInit, rng: &mut StdRng) -> f32 {
    match init {
        ParamInit::Zeros | ParamInit::S4dReal => 0.0,
        ParamInit::Ones => 1.0,
        ParamInit::Normal { std } => std * normal(rng),
        ParamInit::Uniform { bound } => rng.random_range(-bound..bound),
        ParamInit::ALog => rng.random_range(1f32..16.0).ln(),
        ParamInit::DtBias => {
            let (low, high) = (0.001f64.ln(), 0.1f64.ln());
            let dt = rng.random_range(low..high).exp().max(1e-4);
            (dt + (-(-dt).exp_m1()).ln()) as f32 // softplus of this is dt
        }
    }
}

/// Box-Muller.
fn normal(rng: &mut StdRng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    (radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()) as f32
}

fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(init: ParamInit) -> Vec<f32> {
        let spec = ParamSpec::new("w", [4000], init);
        RandomSource::new(3).param(&spec).to_vec().unwrap()
    }

    #[test]
    fn step_sizes_lie_between_their_limits() {
        let dt: Vec<f32> = sample(ParamInit::DtBias).iter().map(|v| v.exp().ln_1p()).collect();
        assert!(dt.iter().all(|v| (0.00099..0.1001).contains(v)));
        let geometric_mean = (dt.iter().map(|v| v.ln()).sum::<f32>() / dt.len() as f32).exp();
        assert!((0.0095..0.0105).contains(&geometric_mean), "{geometric_mean}");
    }

    #[test]
    fn decay_rates_are_uniform_between_one_and_sixteen() {
        let a: Vec<f32> = sample(ParamInit::ALog).iter().map(|v| v.exp()).collect();
        assert!(a.iter().all(|v| (1.0..16.001).contains(v)));
        assert!((a.iter().sum::<f32>() / a.len() as f32 - 8.5).abs() < 0.3);
    }

    #[test]
    fn real_s4d_rows_count_from_one() {
        let spec = ParamSpec::new("a_log", [3, 4], ParamInit::S4dReal);
        let a: Vec<f32> = RandomSource::new(3).param(&spec).iter::<f32>().map(f32::exp).collect();
        assert!(a.chunks(4).all(|row| row.iter().zip([1.0, 2.0, 3.0, 4.0]).all(|(a, n)| (a - n).abs() < 1e-5)), "{a:?}");
    }

    #[test]
    fn pythia_starts_small_and_its_outputs_smaller() {
        let scale = InitScale { scheme: Init::SmallWang, blocks: 12, width: 768 };
        assert_eq!(scale.linear(3072), ParamInit::Normal { std: (2.0f32 / (5.0 * 768.0)).sqrt() });
        assert_eq!(scale.output(3072, false), ParamInit::Normal { std: 2.0 / (12.0 * 768f32.sqrt()) });
    }

    #[test]
    fn normal_has_its_deviation_and_seeds_differ_by_path() {
        let values = sample(ParamInit::Normal { std: 0.02 });
        let std = (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
        assert!((std - 0.02).abs() < 0.001, "{std}");
        let other = RandomSource::new(3).param(&ParamSpec::new("v", [4000], ParamInit::Normal { std: 0.02 }));
        assert_ne!(values, other.to_vec::<f32>().unwrap());
    }
}
