//! Every operation with a fast path, compared with its reference on the user's own device.

use std::fmt;

use serde::Serialize;
use terrarium::burn::tensor::{DType, Int, Tensor, TensorData};
use terrarium::kernels::attention::{self, AttentionArgs, AttentionMask};
use terrarium::kernels::causal_conv1d::{self, ConvArgs};
use terrarium::kernels::cross_entropy::{self, CrossEntropyArgs};
use terrarium::kernels::cumsum;
use terrarium::kernels::glu::{self, Activation, GluArgs};
use terrarium::kernels::norm_residual::{self, ResidualNormArgs};
use terrarium::kernels::rms_norm_gated::{self, NormArgs};
use terrarium::kernels::rotary::{self, RotaryArgs};
use terrarium::kernels::selective_scan::{self, ScanArgs};
use terrarium::kernels::ssd::{self, SsdArgs, SsdOptions};
use terrarium::kernels::{KernelBackend, Op, linear, path};

/// Largest difference that rounding explains at these sizes in float32.
const TOLERANCE: f32 = 2e-4;

/// How one comparison went.
#[derive(Debug, Serialize)]
pub struct Outcome {
    pub op: &'static str,
    /// The fast path, if there is one.
    pub path: Option<&'static str>,
    /// Largest difference, relative to the largest value.
    pub difference: f32,
    pub passed: bool,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, path, difference, passed } = self;
        let word = if *passed { "ok " } else { "NO " };
        match path {
            Some(path) => write!(f, "{word} {op:<15} {path}: differs by {difference:.1e} at most"),
            None => write!(f, "{word} {op:<15} reference: nothing to compare"),
        }
    }
}

/// Compares all operations; sizes are odd on purpose.
pub fn all<B: KernelBackend>(device: &B::Device) -> Vec<Outcome> {
    let mut noise = Noise { state: 0x9e37_79b9_7f4a_7c15, device: device.clone() };
    Op::ALL.into_iter().map(|op| compare::<B>(op, &mut noise)).collect()
}

fn compare<B: KernelBackend>(op: Op, noise: &mut Noise<B>) -> Outcome {
    let fast = path::fused::<B>(op, DType::F32);
    let difference = match op {
        Op::Linear => linear_difference(noise),
        Op::CausalConv1d => conv_difference(noise),
        Op::Ssd => ssd_difference(noise),
        Op::SelectiveScan => scan_difference(noise),
        Op::RmsNormGated => norm_difference(noise),
        Op::Attention => attention_difference(noise),
        Op::CrossEntropy => cross_entropy_difference(noise),
        Op::NormResidual => residual_difference(noise),
        Op::Embedding => embedding_difference(noise),
        Op::Cumsum => cumsum_difference(noise),
        Op::Rotary => rotary_difference(noise),
        Op::Glu => glu_difference(noise),
    };
    Outcome { op: op.name(), path: fast, difference, passed: difference <= TOLERANCE }
}

fn linear_difference<B: KernelBackend>(noise: &mut Noise<B>) -> f32 {
    let (x, weight) = (noise.tensor([65, 63]), noise.tensor([129, 63]));
    difference([(linear::linear(x.clone(), weight.clone(), None), linear::reference::linear(x, weight, None))])
}

fn conv_difference<B: KernelBackend>(noise: &mut Noise<B>) -> f32 {
    let args = ConvArgs {
        x: noise.tensor([2, 65, 33]),
        weight: noise.tensor([33, 4]),
        bias: Some(noise.tensor([33])),
        state: Some(noise.tensor([2, 3, 33])),
        segments: None,
        silu: true,
    };
    let (fast, slow) = (causal_conv1d::causal_conv1d(args.clone()), causal_conv1d::reference::causal_conv1d(args));
    difference([(fast.y, slow.y), (fast.state, slow.state)])
}

fn ssd_difference<B: KernelBackend>(noise: &mut Noise<B>) -> f32 {
    let args = SsdArgs {
        x: noise.tensor([2, 130, 6, 16]),
        dt: noise.tensor([2, 130, 6]),
        a: -noise.tensor::<1>([6]).exp(),
        b: noise.tensor([2, 130, 2, 16]),
        c: noise.tensor([2, 130, 2, 16]),
        d: Some(noise.tensor([6])),
        dt_bias: Some(noise.tensor([6])),
        state: Some(noise.tensor([2, 6, 16, 16])),
        segments: None,
        options: SsdOptions::default(),
    };
    let (fast, slow) = (ssd::ssd(args.clone()), ssd::reference::ssd(args));
    difference([(fast.y, slow.y), (fast.state, slow.state)])
}

fn scan_difference<B: KernelBackend>(noise: &mut Noise<B>) -> f32 {
    let args = ScanArgs {
        u: noise.tensor([2, 65, 33]),
        delta: noise.tensor([2, 65, 33]),
        a: -noise.tensor::<2>([33, 5]).exp(),
        b: noise.tensor([2, 65, 5]),
        c: noise.tensor([2, 65, 5]),
        d: Some(noise.tensor([33])),
        z: Some(noise.tensor([2, 65, 33])),
        delta_bias: Some(noise.tensor([33])),
        state: Some(noise.tensor([2, 33, 5])),
        segments: None,
        delta_softplus: true,
    };
    let (fast, slow) = (selective_scan::selective_scan(args.clone()), selective_scan::reference::selective_scan(args));
    difference([(fast.y, slow.y), (fast.state, slow.state)])
}

fn norm_difference<B: KernelBackend>(noise: &mut Noise<B>) -> f32 {
    let args =
        NormArgs { y: noise.tensor([2, 33, 96]), z: Some(noise.tensor([2, 33, 96])), weight: noise.tensor([96]), groups: 3, eps: 1e-5 };
    difference([(rms_norm_gated::rms_norm_gated(args.clone()), rms_norm_gated::reference::rms_norm_gated(args))])
}

fn attention_difference<B: KernelBackend>(noise: &mut Noise<B>) -> f32 {
    let args = AttentionArgs {
        q: noise.tensor([2, 6, 33, 16]),
        k: noise.tensor([2, 2, 65, 16]),
        v: noise.tensor([2, 2, 65, 16]),
        scale: 0.25,
        mask: AttentionMask::causal(33, 65),
    };
    difference([(attention::attention(args.clone()), attention::reference::attention(args))])
}

fn cross_entropy_difference<B: KernelBackend>(noise: &mut Noise<B>) -> f32 {
    let args = CrossEntropyArgs { logits: noise.tensor([33, 1001]), targets: noise.numbers([33], 1001) };
    difference([(cross_entropy::cross_entropy(args.clone()), cross_entropy::reference::cross_entropy(args).loss)])
}

fn residual_difference<B: KernelBackend>(noise: &mut Noise<B>) -> f32 {
    let (x, residual) = (noise.tensor([2, 33, 96]), noise.tensor([2, 33, 96]));
    let (weight, bias) = (noise.tensor([96]), noise.tensor([96]));
    let rms = ResidualNormArgs { x: Some(x), residual, weight, bias: None, eps: 1e-5 };
    let layer = ResidualNormArgs { bias: Some(bias), ..rms.clone() };
    let [[normed, sum], [layer_normed, layer_sum]] = [rms, layer].map(|args| {
        let (fast, slow) = (norm_residual::norm_residual(args.clone()), norm_residual::reference::norm_residual(args));
        [(fast.normed, slow.normed), (fast.sum, slow.sum)]
    });
    difference([normed, sum, layer_normed, layer_sum])
}

/// The lookup is Burn's; what is ours is its gradient, here against a product with ones where a row was used.
fn embedding_difference<B: KernelBackend>(noise: &mut Noise<B>) -> f32 {
    let (ids, dout) = (noise.numbers([2, 65], 17), noise.tensor([2, 65, 33]));
    let used: Tensor<B, 3> = ids.clone().one_hot::<3>(17).float();
    let slow = used.reshape([130, 17]).transpose().matmul(dout.clone().reshape([130, 33]));
    B::embed_backward(ids, 17, dout).map_or(0.0, |fast| difference([(fast, slow)]))
}

fn cumsum_difference<B: KernelBackend>(noise: &mut Noise<B>) -> f32 {
    let x: Tensor<B, 3> = noise.tensor([3, 129, 5]);
    difference([(cumsum::cumsum(x.clone(), 1), cumsum::reference::cumsum(x, false))])
}

fn rotary_difference<B: KernelBackend>(noise: &mut Noise<B>) -> f32 {
    let angles: Tensor<B, 4> = noise.tensor([2, 1, 33, 7]) * 3.0;
    let args = RotaryArgs { x: noise.tensor([2, 33, 3, 16]).swap_dims(1, 2), cos: angles.clone().cos(), sin: angles.sin() };
    difference([(rotary::rotary(args.clone()), rotary::reference::rotary(args, false))])
}

fn glu_difference<B: KernelBackend>(noise: &mut Noise<B>) -> f32 {
    let (up, gate): (Tensor<B, 3>, Tensor<B, 3>) = (noise.tensor([2, 33, 65]) * 4.0, noise.tensor([2, 33, 65]) * 4.0);
    difference(Activation::ALL.map(|activation| {
        let args = GluArgs { up: up.clone(), gate: Some(gate.clone()), activation };
        (glu::glu(args.clone()), glu::reference::glu(args))
    }))
}

/// Largest absolute difference over the largest absolute value; infinite where a value is no number.
fn difference<B: KernelBackend, const D: usize, const N: usize>(pairs: [(Tensor<B, D>, Tensor<B, D>); N]) -> f32 {
    let mut worst = 0.0_f32;
    for (fast, slow) in pairs {
        let (fast, slow) = (fast.into_data(), slow.into_data());
        let scale = slow.iter::<f32>().fold(1e-6_f32, |most, value| most.max(value.abs()));
        for (fast, slow) in fast.iter::<f32>().zip(slow.iter::<f32>()) {
            let gap = (fast - slow).abs() / scale;
            worst = if gap.is_finite() { worst.max(gap) } else { f32::INFINITY };
        }
    }
    worst
}

/// Numbers in [-1, 1) that are the same everywhere (xorshift).
struct Noise<B: KernelBackend> {
    state: u64,
    device: B::Device,
}

impl<B: KernelBackend> Noise<B> {
    fn tensor<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<B, D> {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.next()).collect();
        Tensor::from_data(TensorData::new(values, shape), (&self.device, DType::F32))
    }

    /// Whole numbers below `end`.
    fn numbers<const D: usize>(&mut self, shape: [usize; D], end: usize) -> Tensor<B, D, Int> {
        let values: Vec<i32> = (0..shape.iter().product()).map(|_| ((self.next() + 1.0) / 2.0 * end as f32) as i32).collect();
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    fn next(&mut self) -> f32 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}
