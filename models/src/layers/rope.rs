//! Rotary position embedding, rotate-half form (arXiv 2104.09864, in the order of Hugging Face checkpoints).

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::rotary::{RotaryArgs, rotary};

/// Rotary positions over the first `dim` of a head's channels.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Rotated channels per head, even; the rest pass through.
    pub dim: usize,
    /// Change of frequencies for long contexts.
    pub scaling: RopeScaling,
}

/// Change of frequencies for long contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths longer than `original / low` are divided.
        low: f64,
        /// Wavelengths shorter than `original / high` are kept.
        high: f64,
        /// Context length before scaling.
        original: f64,
    },
}

impl RopeConfig {
    /// Angle per position for each rotated pair, `dim / 2` values.
    pub(crate) fn frequencies(&self) -> Vec<f64> {
        (0..self.dim / 2).map(|i| self.scaling.apply(self.theta.powf(-2.0 * i as f64 / self.dim as f64))).collect()
    }
}

impl RopeScaling {
    fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::Default => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low, high, original } => {
                let wavelength = std::f64::consts::TAU / frequency;
                let ramp = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - ramp) * frequency / factor + ramp * frequency
            }
        }
    }
}

/// Cosines and sines, float32, `[b or 1, 1, l, dim / 2]`.
#[derive(Debug, Clone)]
pub(crate) struct RopeTables<B: Backend> {
    cos: Tensor<B, 4>,
    sin: Tensor<B, 4>,
}

impl<B: Backend> RopeTables<B> {
    /// Tables for row-major `[b, l]` positions; one row when all rows agree. Angles are computed in float64: at position
    /// 100 000 a float32 angle is off by 0.004.
    pub fn new(config: &RopeConfig, positions: &[i32], [b, l]: [usize; 2], device: &B::Device) -> Self {
        let first = &positions[..l];
        let rows = if positions.chunks(l.max(1)).all(|row| row == first) { 1 } else { b };
        let frequencies = config.frequencies();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> =
                positions[..rows * l].iter().flat_map(|&t| frequencies.iter().map(move |w| f(f64::from(t) * w) as f32)).collect();
            Tensor::from_data(TensorData::new(values, [rows, 1, l, frequencies.len()]), (device, DType::F32))
        };
        Self { cos: table(f64::cos), sin: table(f64::sin) }
    }
}

/// Rotates pairs `(i, i + dim / 2)` of `[b, h, l, p]` by their position's angle.
pub(crate) fn rotate<B: KernelBackend>(x: Tensor<B, 4>, tables: &RopeTables<B>) -> Tensor<B, 4> {
    rotary(RotaryArgs { x, cos: tables.cos.clone(), sin: tables.sin.clone() })
}
