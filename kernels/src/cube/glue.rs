//! [`KernelBackend`] for every CubeCL backend: each operation asks its kernel, and runs the reference where the kernel
//! declines.

use std::sync::Arc;

use burn::tensor::{DType, Int, Tensor};
use burn_cubecl::element::BoolElement;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};

use super::{Device, NAME, collective, down, down_int, record, up};
use crate::adamw::{self, AdamWArgs, AdamWOut};
use crate::attention::step::{StepArgs, StepOut};
use crate::attention::{self, AttentionArgs, AttentionGrads};
use crate::backend::Memory;
use crate::causal_conv1d::{self, ConvArgs, ConvGrads, ConvOut};
use crate::collective::Collective;
use crate::cross_entropy::{self, CrossEntropyArgs, CrossEntropyOut};
use crate::glu::{self, GluArgs, GluGrads};
use crate::linear::{self, LinearGrads, LinearKept};
use crate::norm_residual::{self, ResidualNormArgs, ResidualNormGrads, ResidualNormKept, ResidualNormOut};
use crate::path::{KernelChoice, choice, fused, runs};
use crate::record::Recorder;
use crate::rms_norm_gated::{self, NormArgs, NormGrads};
use crate::rotary::{self, RotaryArgs};
use crate::sample::{self, Draws, SampleOptions};
use crate::selective_scan::{self, ScanArgs, ScanDims, ScanGrads, ScanOut};
use crate::ssd::{self, SsdArgs, SsdGrads, SsdOut};
use crate::{KernelBackend, Op, argmax, cumsum, embedding, split};

impl<R, F, I, BT> KernelBackend for CubeBackend<R, F, I, BT>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    fn fused(op: Op, dtype: DType) -> Option<&'static str> {
        let float = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
        let there = match op {
            Op::CausalConv1d => causal_conv1d::cube::READY,
            Op::SelectiveScan => selective_scan::cube::READY,
            Op::Ssd => ssd::cube::READY,
            Op::RmsNormGated => rms_norm_gated::cube::READY,
            Op::Attention => attention::cube::READY,
            Op::Linear => return float.then(linear::cube::path::<R>),
            Op::NormResidual => norm_residual::cube::READY,
            Op::Embedding => embedding::cube::READY,
            Op::Cumsum => cumsum::cube::READY,
            Op::CrossEntropy => cross_entropy::cube::READY,
            Op::Rotary => rotary::cube::READY,
            Op::Glu => glu::cube::READY,
        };
        (there && float).then_some(NAME)
    }

    fn takes(op: Op, sizes: &[usize], device: &Self::Device) -> bool {
        let device = Device::of(&R::client(device));
        match (op, sizes) {
            (Op::CausalConv1d, &[k]) => causal_conv1d::cube::takes(&device, k),
            (Op::SelectiveScan, &[b, l, e, n]) => selective_scan::cube::takes(&device, ScanDims { b, l, e, n }),
            (Op::Ssd, _) => ssd::cube::takes(&device),
            // Kernels count in 32 bits.
            (Op::Rotary | Op::Glu, &[elements]) => u32::try_from(elements).is_ok(),
            _ => true,
        }
    }

    fn causal_conv1d(args: ConvArgs<Self>) -> ConvOut<Self> {
        match runs::<Self>(Op::CausalConv1d, args.x.dtype(), &args.sizes(), &args.x.device()) {
            true => causal_conv1d::cube::forward(args),
            false => causal_conv1d::reference::causal_conv1d(args),
        }
    }

    fn causal_conv1d_backward(
        args: ConvArgs<Self>,
        dy: Option<Tensor<Self, 3>>,
        dstate: Option<Tensor<Self, 3>>,
    ) -> Option<ConvGrads<Self>> {
        fused::<Self>(Op::CausalConv1d, args.x.dtype()).map(|_| causal_conv1d::cube::backward(args, dy, dstate))
    }

    fn selective_scan(args: ScanArgs<Self>) -> ScanOut<Self> {
        match runs::<Self>(Op::SelectiveScan, args.u.dtype(), &args.sizes(), &args.u.device()) {
            true => selective_scan::cube::forward(args),
            false => selective_scan::reference::selective_scan(args),
        }
    }

    fn selective_scan_backward(
        args: ScanArgs<Self>,
        dy: Option<Tensor<Self, 3>>,
        dstate: Option<Tensor<Self, 3>>,
    ) -> Option<ScanGrads<Self>> {
        fused::<Self>(Op::SelectiveScan, args.u.dtype()).map(|_| selective_scan::cube::backward(args, dy, dstate))
    }

    fn ssd(args: SsdArgs<Self>) -> SsdOut<Self> {
        match runs::<Self>(Op::Ssd, args.x.dtype(), &[], &args.x.device()) {
            true => ssd::cube::forward(args),
            false => ssd::reference::ssd(args),
        }
    }

    fn ssd_backward(args: SsdArgs<Self>, dy: Option<Tensor<Self, 4>>, dstate: Option<Tensor<Self, 4>>) -> Option<SsdGrads<Self>> {
        fused::<Self>(Op::Ssd, args.x.dtype()).map(|_| ssd::cube::backward(args, dy, dstate))
    }

    fn rms_norm_gated(args: NormArgs<Self>) -> Tensor<Self, 3> {
        match fused::<Self>(Op::RmsNormGated, args.y.dtype()) {
            Some(_) => rms_norm_gated::cube::forward(args),
            None => rms_norm_gated::reference::rms_norm_gated(args),
        }
    }

    fn rms_norm_gated_backward(args: NormArgs<Self>, dout: Tensor<Self, 3>) -> Option<NormGrads<Self>> {
        fused::<Self>(Op::RmsNormGated, args.y.dtype()).map(|_| rms_norm_gated::cube::backward(args, dout))
    }

    fn norm_residual(args: ResidualNormArgs<Self>) -> ResidualNormOut<Self> {
        match fused::<Self>(Op::NormResidual, args.dtype()) {
            Some(_) => norm_residual::cube::forward(args),
            None => norm_residual::reference::norm_residual(args),
        }
    }

    fn norm_residual_backward(
        kept: ResidualNormKept<Self>,
        dnormed: Tensor<Self, 3>,
        dsum: Option<Tensor<Self, 3>>,
    ) -> Option<ResidualNormGrads<Self>> {
        fused::<Self>(Op::NormResidual, kept.dtype).map(|_| norm_residual::cube::backward(kept, dnormed, dsum))
    }

    fn attention(args: AttentionArgs<Self>) -> Tensor<Self, 4> {
        match fused::<Self>(Op::Attention, args.q.dtype()) {
            Some(_) => attention::cube::forward(args),
            None => attention::reference::attention(args),
        }
    }

    fn attention_saving(args: AttentionArgs<Self>) -> (Tensor<Self, 4>, Option<Tensor<Self, 3>>) {
        let saved = fused::<Self>(Op::Attention, args.q.dtype()).and_then(|_| attention::cube::forward_saving(args.clone()));
        match saved {
            Some((out, lse)) => (out, Some(lse)),
            None => (attention::reference::attention(args), None),
        }
    }

    fn attention_backward(
        args: AttentionArgs<Self>,
        saved: Option<(Tensor<Self, 4>, Tensor<Self, 3>)>,
        dout: Tensor<Self, 4>,
    ) -> Option<AttentionGrads<Self>> {
        fused::<Self>(Op::Attention, args.q.dtype()).map(|_| attention::cube::backward(args, saved, dout))
    }

    fn attention_trains(dtype: DType) -> bool {
        fused::<Self>(Op::Attention, dtype).is_some()
    }

    fn rotary(args: RotaryArgs<Self>, back: bool) -> Tensor<Self, 4> {
        match runs::<Self>(Op::Rotary, args.x.dtype(), &[args.x.shape().num_elements()], &args.x.device()) {
            true => rotary::cube::rotary(args, back),
            false => rotary::reference::rotary(args, back),
        }
    }

    fn glu(args: GluArgs<Self>) -> Tensor<Self, 3> {
        match runs::<Self>(Op::Glu, args.up.dtype(), &args.sizes(), &args.up.device()) {
            true => glu::cube::forward(args),
            false => glu::reference::glu(args),
        }
    }

    fn glu_backward(args: GluArgs<Self>, dout: Tensor<Self, 3>) -> Option<GluGrads<Self>> {
        fused::<Self>(Op::Glu, args.up.dtype()).map(|_| glu::cube::backward(args, dout))
    }

    fn embed(weight: Tensor<Self, 2>, ids: Tensor<Self, 2, Int>) -> Tensor<Self, 3> {
        match fused::<Self>(Op::Embedding, weight.dtype()) {
            Some(_) => up(embedding::cube::forward(down(weight), down_int(ids))),
            None => burn::tensor::module::embedding(weight, ids),
        }
    }

    fn embed_backward(ids: Tensor<Self, 2, Int>, v: usize, dout: Tensor<Self, 3>) -> Option<Tensor<Self, 2>> {
        fused::<Self>(Op::Embedding, dout.dtype()).map(|_| embedding::cube::backward(ids, v, dout))
    }

    fn running_sum(x: Tensor<Self, 3>, reverse: bool) -> Tensor<Self, 3> {
        match fused::<Self>(Op::Cumsum, x.dtype()) {
            Some(_) => cumsum::cube::forward(x, reverse),
            None => cumsum::reference::cumsum(x, reverse),
        }
    }

    fn cross_entropy(args: CrossEntropyArgs<Self>) -> CrossEntropyOut<Self> {
        match fused::<Self>(Op::CrossEntropy, args.logits.dtype()) {
            Some(_) => cross_entropy::cube::forward(args),
            None => cross_entropy::reference::cross_entropy(args),
        }
    }

    fn cross_entropy_backward(args: CrossEntropyArgs<Self>, log_sum: Tensor<Self, 1>, dloss: Tensor<Self, 1>) -> Option<Tensor<Self, 2>> {
        fused::<Self>(Op::CrossEntropy, args.logits.dtype()).map(|_| cross_entropy::cube::backward(args, log_sum, dloss))
    }

    fn split(x: Tensor<Self, 3>, widths: &[usize]) -> Vec<Tensor<Self, 3>> {
        split::cube::split(&down(x), widths).into_iter().map(up).collect()
    }

    fn heads(x: Tensor<Self, 3>, count: usize) -> Tensor<Self, 4> {
        match split::cube::heads(&down(x.clone()), count) {
            Some(view) => up(view),
            None => split::reshaped(x, count),
        }
    }

    fn flatten_rows(x: Tensor<Self, 3>) -> Tensor<Self, 2> {
        let [b, l, w] = x.dims();
        match split::cube::flatten_rows(&down(x.clone())) {
            Some(view) => up(view),
            None => x.reshape([b * l, w]),
        }
    }

    fn join(parts: Vec<Tensor<Self, 3>>) -> Tensor<Self, 3> {
        match split::cube::join(parts.iter().cloned().map(down).collect()) {
            Some(joined) => up(joined),
            None => Tensor::cat(parts, 2),
        }
    }

    fn adamw(args: AdamWArgs<Self>) -> AdamWOut<Self> {
        if choice() == KernelChoice::Reference { adamw::reference::adamw(args) } else { adamw::cube::adamw(args) }
    }

    fn square_sums(tensors: &[Tensor<Self, 1>]) -> Vec<f64> {
        if choice() == KernelChoice::Reference { adamw::reference::square_sums(tensors) } else { adamw::cube::square_sums(tensors) }
    }

    fn argmax(logits: Tensor<Self, 2>, known: usize, into: Option<Tensor<Self, 2, Int>>) -> Tensor<Self, 2, Int> {
        if choice() != KernelChoice::Reference
            && let Some(ids) = argmax::cube::argmax(down(logits.clone()), known, into.map(down_int), I::dtype())
        {
            return Tensor::from_primitive(ids);
        }
        argmax::reference::argmax(logits, known)
    }

    fn sample(
        logits: Tensor<Self, 2>,
        known: usize,
        options: SampleOptions,
        draws: Draws<Self>,
        into: Option<Tensor<Self, 2, Int>>,
    ) -> (Tensor<Self, 2, Int>, Draws<Self>) {
        let (numbers, state) = (down(logits), down_int(draws.state));
        if choice() != KernelChoice::Reference && sample::cube::takes(&numbers, &state) {
            let (ids, state) = sample::cube::sample(numbers, known, options, state, into.map(down_int), I::dtype());
            return (Tensor::from_primitive(ids), Draws { state: Tensor::from_primitive(state) });
        }
        sample::reference(up(numbers), known, options, Draws { state: Tensor::from_primitive(state) })
    }

    fn steps_in_place(_device: &Self::Device) -> bool {
        choice() != KernelChoice::Reference
    }

    fn attention_step(args: StepArgs<Self>) -> StepOut<Self> {
        match fused::<Self>(Op::Attention, args.q.dtype()) {
            Some(_) if attention::cube::step::takes(&args) => attention::cube::step::step(args),
            _ => attention::step::reference::attention_step(args),
        }
    }

    fn next_places(places: Tensor<Self, 1, Int>) -> Tensor<Self, 1, Int> {
        let places = down_int(places);
        match attention::cube::step::readable(&places) {
            true => Tensor::from_primitive(attention::cube::step::next_places(places)),
            false => Tensor::from_primitive(places) + 1,
        }
    }

    fn recorder(device: &Self::Device) -> Option<Box<dyn Recorder<Self>>> {
        record::recorder::<R, F, I, BT>(device)
    }

    fn collective(devices: &[Self::Device]) -> Option<Arc<dyn Collective<Self>>> {
        collective::collective::<R, F, I, BT>(devices)
    }

    fn memory(device: &Self::Device) -> Option<Memory> {
        let usage = R::client(device).memory_usage().ok()?;
        Some(Memory { in_use: usage.bytes_in_use, reserved: usage.bytes_reserved })
    }

    fn capacity(device: &Self::Device) -> Option<u64> {
        crate::cube::capacity::<R>(device)
    }

    fn linear(x: Tensor<Self, 2>, weight: Tensor<Self, 2>, bias: Option<Tensor<Self, 1>>) -> Tensor<Self, 2> {
        match fused::<Self>(Op::Linear, x.dtype()) {
            Some(_) => linear::cube::forward(x, weight, bias),
            None => linear::reference::linear(x, weight, bias),
        }
    }

    fn linear_backward(kept: LinearKept<Self>, dy: Tensor<Self, 2>) -> LinearGrads<Self> {
        match fused::<Self>(Op::Linear, dy.dtype()) {
            Some(_) => linear::cube::backward(kept, dy),
            None => linear::reference::gradients(kept, dy),
        }
    }
}
