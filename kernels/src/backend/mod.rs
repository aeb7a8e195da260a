//! The extension trait over Burn's `Backend`, its implementations, and the choice of a device at run time.
//!
//! This is where features are chosen: each backend is a cargo feature, each device a [`DeviceSpec`].

mod device;
#[cfg(feature = "fusion")]
mod fusion;

use std::sync::Arc;

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DType, Int, Tensor};

use crate::Op;
use crate::adamw::{self, AdamWArgs, AdamWOut};
use crate::attention::step::{StepArgs, StepOut};
use crate::attention::{self, AttentionArgs, AttentionGrads};
use crate::causal_conv1d::{self, ConvArgs, ConvGrads, ConvOut};
use crate::collective::Collective;
use crate::cross_entropy::{self, CrossEntropyArgs, CrossEntropyOut};
use crate::glu::{self, GluArgs, GluGrads};
use crate::linear::{self, LinearGrads, LinearKept};
use crate::norm_residual::{self, ResidualNormArgs, ResidualNormGrads, ResidualNormKept, ResidualNormOut};
use crate::record::Recorder;
use crate::rms_norm_gated::{self, NormArgs, NormGrads};
use crate::rotary::{self, RotaryArgs};
use crate::sample::{Draws, SampleOptions};
use crate::selective_scan::{self, ScanArgs, ScanGrads, ScanOut};
use crate::ssd::{self, SsdArgs, SsdGrads, SsdOut};

pub use device::{BackendTask, DeviceError, DeviceSpec, DevicesTask, Found, compiled, discover, with_backend, with_backends};

/// A Burn backend with this crate's operations. Every method has a default: the reference.
///
/// An implementation that reports a fast path for an operation in [`KernelBackend::fused`] overrides the forward
/// method and, for operations with a `_backward` method here, that one as well.
pub trait KernelBackend: Backend {
    /// Name of the fast path for `op` on tensors of `dtype`, if there is one.
    fn fused(_op: Op, _dtype: DType) -> Option<&'static str> {
        None
    }

    /// Whether that path, its backward included, takes a call on `device`: else the reference runs and is differentiated.
    /// `sizes` are `b`, `l`, `e`, `n` of [`Op::SelectiveScan`], the taps of [`Op::CausalConv1d`], the elements of [`Op::Rotary`] and
    /// [`Op::Glu`], none of [`Op::Ssd`]. Kernels of other operations take all sizes, or step aside in both directions.
    fn takes(_op: Op, _sizes: &[usize], _device: &Self::Device) -> bool {
        true
    }

    /// See [`crate::causal_conv1d::causal_conv1d`].
    fn causal_conv1d(args: ConvArgs<Self>) -> ConvOut<Self> {
        causal_conv1d::reference::causal_conv1d(args)
    }

    /// Gradients of [`KernelBackend::causal_conv1d`] from those of its outputs; an absent one is zero. `None` without
    /// a fast path.
    fn causal_conv1d_backward(
        _args: ConvArgs<Self>,
        _dy: Option<Tensor<Self, 3>>,
        _dstate: Option<Tensor<Self, 3>>,
    ) -> Option<ConvGrads<Self>> {
        None
    }

    /// See [`crate::selective_scan::selective_scan`].
    fn selective_scan(args: ScanArgs<Self>) -> ScanOut<Self> {
        selective_scan::reference::selective_scan(args)
    }

    /// Gradients of [`KernelBackend::selective_scan`] from those of its outputs; an absent one is zero. `None` without a
    /// fast path.
    fn selective_scan_backward(
        _args: ScanArgs<Self>,
        _dy: Option<Tensor<Self, 3>>,
        _dstate: Option<Tensor<Self, 3>>,
    ) -> Option<ScanGrads<Self>> {
        None
    }

    /// See [`crate::ssd::ssd`].
    fn ssd(args: SsdArgs<Self>) -> SsdOut<Self> {
        ssd::reference::ssd(args)
    }

    /// Gradients of [`KernelBackend::ssd`] from those of its outputs; an absent one is zero. `None` without a fast path.
    fn ssd_backward(_args: SsdArgs<Self>, _dy: Option<Tensor<Self, 4>>, _dstate: Option<Tensor<Self, 4>>) -> Option<SsdGrads<Self>> {
        None
    }

    /// See [`crate::rms_norm_gated::rms_norm_gated`].
    fn rms_norm_gated(args: NormArgs<Self>) -> Tensor<Self, 3> {
        rms_norm_gated::reference::rms_norm_gated(args)
    }

    /// Gradients of [`KernelBackend::rms_norm_gated`]. `None` without a fast path.
    fn rms_norm_gated_backward(_args: NormArgs<Self>, _dout: Tensor<Self, 3>) -> Option<NormGrads<Self>> {
        None
    }

    /// See [`crate::norm_residual::norm_residual`].
    fn norm_residual(args: ResidualNormArgs<Self>) -> ResidualNormOut<Self> {
        norm_residual::reference::norm_residual(args)
    }

    /// Gradients of [`KernelBackend::norm_residual`]; an absent one of the sum is zero. `None` without a fast path.
    fn norm_residual_backward(
        _kept: ResidualNormKept<Self>,
        _dnormed: Tensor<Self, 3>,
        _dsum: Option<Tensor<Self, 3>>,
    ) -> Option<ResidualNormGrads<Self>> {
        None
    }

    /// See [`crate::attention::attention`].
    fn attention(args: AttentionArgs<Self>) -> Tensor<Self, 4> {
        attention::reference::attention(args)
    }

    /// [`KernelBackend::attention`], with its log-sum-exps if [`KernelBackend::attention_backward`] reads both.
    fn attention_saving(args: AttentionArgs<Self>) -> (Tensor<Self, 4>, Option<Tensor<Self, 3>>) {
        (<Self as KernelBackend>::attention(args), None)
    }

    /// Gradients of [`KernelBackend::attention`], given its output and log-sum-exps where
    /// [`KernelBackend::attention_saving`] returned both. `None` where Burn is to differentiate the reference, fast path
    /// or not.
    fn attention_backward(
        _args: AttentionArgs<Self>,
        _saved: Option<(Tensor<Self, 4>, Tensor<Self, 3>)>,
        _dout: Tensor<Self, 4>,
    ) -> Option<AttentionGrads<Self>> {
        None
    }

    /// Whether [`KernelBackend::attention_backward`] gives gradients for tensors of `dtype`.
    fn attention_trains(_dtype: DType) -> bool {
        false
    }

    /// Whether [`KernelBackend::attention_step`] writes into buffers that stay where they are, and asks the host nothing.
    fn steps_in_place(_device: &Self::Device) -> bool {
        false
    }

    /// See [`crate::attention::step::attention_step`].
    fn attention_step(args: StepArgs<Self>) -> StepOut<Self> {
        attention::step::reference::attention_step(args)
    }

    /// One more for every place, see [`attention::step::Standing`].
    fn next_places(places: Tensor<Self, 1, Int>) -> Tensor<Self, 1, Int> {
        places + 1
    }

    /// See [`crate::rotary::rotary`]. If `back`, the gradient: rotated by the negative angles; a fast path lays it out as
    /// `[b, l, h, p]`, where projections have their channels.
    fn rotary(args: RotaryArgs<Self>, back: bool) -> Tensor<Self, 4> {
        rotary::reference::rotary(args, back)
    }

    /// See [`crate::glu::glu`].
    fn glu(args: GluArgs<Self>) -> Tensor<Self, 3> {
        glu::reference::glu(args)
    }

    /// Gradients of [`KernelBackend::glu`]. `None` without a fast path.
    fn glu_backward(_args: GluArgs<Self>, _dout: Tensor<Self, 3>) -> Option<GluGrads<Self>> {
        None
    }

    /// See [`crate::cross_entropy::cross_entropy`].
    fn cross_entropy(args: CrossEntropyArgs<Self>) -> CrossEntropyOut<Self> {
        cross_entropy::reference::cross_entropy(args)
    }

    /// Gradient of the logits of [`KernelBackend::cross_entropy`], from the logarithms that it gave and the gradient of the
    /// losses. `None` without a fast path.
    fn cross_entropy_backward(
        _args: CrossEntropyArgs<Self>,
        _log_sum: Tensor<Self, 1>,
        _dloss: Tensor<Self, 1>,
    ) -> Option<Tensor<Self, 2>> {
        None
    }

    /// See [`crate::embedding::embedding`].
    fn embed(weight: Tensor<Self, 2>, ids: Tensor<Self, 2, Int>) -> Tensor<Self, 3> {
        burn::tensor::module::embedding(weight, ids)
    }

    /// Gradient of the table of `v` rows of [`KernelBackend::embed`]. `None` without a fast path.
    fn embed_backward(_ids: Tensor<Self, 2, Int>, _v: usize, _dout: Tensor<Self, 3>) -> Option<Tensor<Self, 2>> {
        None
    }

    /// Running sum along the middle of `x [outer, n, inner]`, from the end if `reverse`; see [`crate::cumsum::cumsum`].
    fn running_sum(x: Tensor<Self, 3>, reverse: bool) -> Tensor<Self, 3> {
        crate::cumsum::reference::cumsum(x, reverse)
    }

    /// `x [rows, in]`, `weight [out, in]`, `bias [out]` -> `[rows, out]`; see [`crate::linear::linear`].
    fn linear(x: Tensor<Self, 2>, weight: Tensor<Self, 2>, bias: Option<Tensor<Self, 1>>) -> Tensor<Self, 2> {
        linear::reference::linear(x, weight, bias)
    }

    /// Gradients of [`KernelBackend::linear`] from that of its output.
    fn linear_backward(kept: LinearKept<Self>, dy: Tensor<Self, 2>) -> LinearGrads<Self> {
        linear::reference::gradients(kept, dy)
    }

    /// See [`crate::split::split`].
    fn split(x: Tensor<Self, 3>, widths: &[usize]) -> Vec<Tensor<Self, 3>> {
        crate::split::views(&x, widths)
    }

    /// See [`crate::split::heads`].
    fn heads(x: Tensor<Self, 3>, count: usize) -> Tensor<Self, 4> {
        crate::split::reshaped(x, count)
    }

    /// `[b, l, w]` -> `[b l, w]`, as a view where the backend has views.
    fn flatten_rows(x: Tensor<Self, 3>) -> Tensor<Self, 2> {
        let [b, l, w] = x.dims();
        x.reshape([b * l, w])
    }

    /// Parts `[b, l, width]` beside one another along the last axis.
    fn join(parts: Vec<Tensor<Self, 3>>) -> Tensor<Self, 3> {
        Tensor::cat(parts, 2)
    }

    /// One step of the optimiser; see [`crate::adamw`].
    fn adamw(args: AdamWArgs<Self>) -> AdamWOut<Self> {
        adamw::reference::adamw(args)
    }

    /// See [`crate::argmax::argmax`].
    fn argmax(logits: Tensor<Self, 2>, known: usize, _into: Option<Tensor<Self, 2, Int>>) -> Tensor<Self, 2, Int> {
        crate::argmax::reference::argmax(logits, known)
    }

    /// See [`crate::sample::sample`].
    fn sample(
        logits: Tensor<Self, 2>,
        known: usize,
        options: SampleOptions,
        draws: Draws<Self>,
        _into: Option<Tensor<Self, 2, Int>>,
    ) -> (Tensor<Self, 2, Int>, Draws<Self>) {
        crate::sample::reference(logits, known, options, draws)
    }

    /// What records steps on `device` to replay them, where the backend can; see [`crate::record`].
    fn recorder(_device: &Self::Device) -> Option<Box<dyn Recorder<Self>>> {
        None
    }

    /// What adds tensors up over `devices`, where they can do that among themselves; see [`crate::collective`].
    fn collective(_devices: &[Self::Device]) -> Option<Arc<dyn Collective<Self>>> {
        None
    }

    /// What the pools of `device` hold for the calling thread, where the backend has pools.
    fn memory(_device: &Self::Device) -> Option<Memory> {
        None
    }

    /// Bytes of memory that `device` has, in use or not, where it tells.
    fn capacity(_device: &Self::Device) -> Option<u64> {
        None
    }

    /// Sum of the squares of each of `tensors`, on the host.
    fn square_sums(tensors: &[Tensor<Self, 1>]) -> Vec<f64> {
        adamw::reference::square_sums(tensors)
    }
}

/// Memory of a device, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Of tensors that live.
    pub in_use: u64,
    /// Taken from the device. Pools keep what they have had at once, so this is the most that was needed since they were last cleaned.
    pub reserved: u64,
}

/// The CPU backend of this build: Flex where it is compiled in, else NdArray.
#[cfg(feature = "flex")]
pub type CpuBackend = burn::backend::Flex;
/// The CPU backend of this build: Flex where it is compiled in, else NdArray.
#[cfg(all(feature = "ndarray", not(feature = "flex")))]
pub type CpuBackend = burn::backend::NdArray<f32>;

/// What lies below Burn's fusion decorator.
///
/// Devices are unfused, whatever the features: fusion of Burn 0.21 gives wrong values without a word. A product with one column
/// and a `tanh` after it come out wrong on Vulkan and CUDA (tracel-ai/burn#5122), so does the reference of [`crate::ssd`] for
/// one token on Vulkan; on CUDA a padded input may be taken for a packed one (tracel-ai/burn#5395).
#[cfg(feature = "fusion")]
pub type Unfused<B> = <B as fusion::Decorator>::Below;
/// What lies below Burn's fusion decorator: without the feature `fusion`, the backend itself.
#[cfg(not(feature = "fusion"))]
pub type Unfused<B> = B;

/// CUDA as `--device` takes it.
#[cfg(feature = "cuda")]
pub type Cuda = Unfused<burn::backend::Cuda<f32, i32>>;
/// ROCm as `--device` takes it.
#[cfg(feature = "rocm")]
pub type Rocm = Unfused<burn::backend::Rocm<f32, i32>>;
/// Metal as `--device` takes it.
#[cfg(feature = "metal")]
pub type Metal = Unfused<burn::backend::Metal<f32, i32>>;
/// Vulkan as `--device` takes it.
#[cfg(feature = "vulkan")]
pub type Vulkan = Unfused<burn::backend::Vulkan<f32, i32>>;
/// WebGPU as `--device` takes it.
#[cfg(feature = "wgpu")]
pub type Wgpu = Unfused<burn::backend::WebGpu<f32, i32>>;

/// A backend that trains: autodiff over a backend with this crate's operations.
pub trait TrainBackend: KernelBackend + AutodiffBackend<InnerBackend: KernelBackend> {}

impl<B: KernelBackend + AutodiffBackend<InnerBackend: KernelBackend>> TrainBackend for B {}
