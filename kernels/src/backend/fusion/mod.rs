//! [`KernelBackend`] for Burn's fusion decorator: a fast path is queued as one operation of the stream.
//!
//! Neighbours before and after it are still fused among themselves. Where the backend below has no fast path, the reference
//! runs on the decorated tensors, so that its pieces are fused.

mod args;
mod call;

use burn::tensor::{DType, Int, Tensor};
use burn_fusion::{Fusion, FusionBackend};

use self::args::{attention_args, conv_args, glu_args, norm_args, residual_args, residual_kept, rotary_args, scan_args, ssd_args};
use self::call::Call;
pub use self::call::Decorator;
use crate::adamw::{self, AdamWArgs, AdamWOut};
use crate::attention::{self, AttentionArgs, AttentionGrads};
use crate::backend::Memory;
use crate::causal_conv1d::{self, ConvArgs, ConvGrads, ConvOut};
use crate::cross_entropy::{self, CrossEntropyArgs, CrossEntropyOut};
use crate::cube::down;
use crate::glu::{self, GluArgs, GluGrads};
use crate::linear::{self, LinearGrads, LinearKept};
use crate::norm_residual::{self, ResidualNormArgs, ResidualNormGrads, ResidualNormKept, ResidualNormOut};
use crate::path::{KernelChoice, choice, fused};
use crate::rms_norm_gated::{self, NormArgs, NormGrads};
use crate::rotary::{self, RotaryArgs};
use crate::selective_scan::{self, ScanArgs, ScanGrads, ScanOut};
use crate::ssd::{self, SsdArgs, SsdGrads, SsdOut};
use crate::{KernelBackend, Op};

const PROMISED: &str = "a fast path has a backward";

/// Gradients in the order of their declaration: the required ones, then those that are there.
macro_rules! gradients {
    ($grads:ident: $($required:ident),* ; $($optional:ident),*) => {{
        #[allow(unused_mut, reason = "some operations have no optional inputs")]
        let mut all = vec![$(down($grads.$required)),*];
        $(all.extend($grads.$optional.map(down));)*
        all
    }};
}

impl<B: FusionBackend + KernelBackend> KernelBackend for Fusion<B> {
    fn fused(op: Op, dtype: DType) -> Option<&'static str> {
        B::fused(op, dtype)
    }

    fn takes(op: Op, sizes: &[usize], device: &Self::Device) -> bool {
        B::takes(op, sizes, device)
    }

    fn memory(device: &Self::Device) -> Option<Memory> {
        B::memory(device)
    }

    fn capacity(device: &Self::Device) -> Option<u64> {
        B::capacity(device)
    }

    fn causal_conv1d(args: ConvArgs<Self>) -> ConvOut<Self> {
        if fused::<B>(Op::CausalConv1d, args.x.dtype()).is_none() {
            return causal_conv1d::reference::causal_conv1d(args);
        }
        let ([b, _, e], [_, k]) = (args.x.dims(), args.weight.dims());
        let mut call = Call::<B>::new("causal_conv1d");
        call.out_like(&args.x);
        call.out([b, k - 1, e], args.x.dtype());
        let args = conv_args(&mut call, args);
        let mut out = call.queue(move |taken| {
            let out = B::causal_conv1d(args(taken));
            vec![down(out.y), down(out.state)]
        });
        ConvOut { y: out.next(), state: out.next() }
    }

    fn causal_conv1d_backward(
        args: ConvArgs<Self>,
        dy: Option<Tensor<Self, 3>>,
        dstate: Option<Tensor<Self, 3>>,
    ) -> Option<ConvGrads<Self>> {
        fused::<B>(Op::CausalConv1d, args.x.dtype())?;
        let mut call = Call::<B>::new("causal_conv1d_backward");
        call.out_like(&args.x);
        call.out_like(&args.weight);
        let (bias, state) = (call.out_maybe(&args.bias), call.out_maybe(&args.state));
        let (dy, dstate) = (call.maybe(dy), call.maybe(dstate));
        let args = conv_args(&mut call, args);
        let mut out = call.queue(move |taken| {
            let (args, dy, dstate) = (args(taken), taken.maybe(dy), taken.maybe(dstate));
            let grads = B::causal_conv1d_backward(args, dy, dstate).expect(PROMISED);
            gradients!(grads: x, weight; bias, state)
        });
        Some(ConvGrads { x: out.next(), weight: out.next(), bias: out.next_if(bias), state: out.next_if(state) })
    }

    fn selective_scan(args: ScanArgs<Self>) -> ScanOut<Self> {
        if fused::<B>(Op::SelectiveScan, args.u.dtype()).is_none() {
            return selective_scan::reference::selective_scan(args);
        }
        let ([b, _, e], [_, n]) = (args.u.dims(), args.a.dims());
        let mut call = Call::<B>::new("selective_scan");
        call.out_like(&args.u);
        call.out([b, e, n], DType::F32);
        let args = scan_args(&mut call, args);
        let mut out = call.queue(move |taken| {
            let out = B::selective_scan(args(taken));
            vec![down(out.y), down(out.state)]
        });
        ScanOut { y: out.next(), state: out.next() }
    }

    fn selective_scan_backward(
        args: ScanArgs<Self>,
        dy: Option<Tensor<Self, 3>>,
        dstate: Option<Tensor<Self, 3>>,
    ) -> Option<ScanGrads<Self>> {
        fused::<B>(Op::SelectiveScan, args.u.dtype())?;
        let mut call = Call::<B>::new("selective_scan_backward");
        call.out_like(&args.u);
        call.out_like(&args.delta);
        call.out_like(&args.a);
        call.out_like(&args.b);
        call.out_like(&args.c);
        let there = [call.out_maybe(&args.d), call.out_maybe(&args.z), call.out_maybe(&args.delta_bias), call.out_maybe(&args.state)];
        let (dy, dstate) = (call.maybe(dy), call.maybe(dstate));
        let args = scan_args(&mut call, args);
        let mut out = call.queue(move |taken| {
            let (args, dy, dstate) = (args(taken), taken.maybe(dy), taken.maybe(dstate));
            let grads = B::selective_scan_backward(args, dy, dstate).expect(PROMISED);
            gradients!(grads: u, delta, a, b, c; d, z, delta_bias, state)
        });
        Some(ScanGrads {
            u: out.next(),
            delta: out.next(),
            a: out.next(),
            b: out.next(),
            c: out.next(),
            d: out.next_if(there[0]),
            z: out.next_if(there[1]),
            delta_bias: out.next_if(there[2]),
            state: out.next_if(there[3]),
        })
    }

    fn ssd(args: SsdArgs<Self>) -> SsdOut<Self> {
        if fused::<B>(Op::Ssd, args.x.dtype()).is_none() {
            return ssd::reference::ssd(args);
        }
        let ([b, _, h, p], [_, _, _, n]) = (args.x.dims(), args.b.dims());
        let mut call = Call::<B>::new("ssd");
        call.out_like(&args.x);
        call.out([b, h, p, n], DType::F32);
        let args = ssd_args(&mut call, args);
        let mut out = call.queue(move |taken| {
            let out = B::ssd(args(taken));
            vec![down(out.y), down(out.state)]
        });
        SsdOut { y: out.next(), state: out.next() }
    }

    fn ssd_backward(args: SsdArgs<Self>, dy: Option<Tensor<Self, 4>>, dstate: Option<Tensor<Self, 4>>) -> Option<SsdGrads<Self>> {
        fused::<B>(Op::Ssd, args.x.dtype())?;
        let mut call = Call::<B>::new("ssd_backward");
        call.out_like(&args.x);
        call.out_like(&args.dt);
        call.out_like(&args.a);
        call.out_like(&args.b);
        call.out_like(&args.c);
        let there = [call.out_maybe(&args.d), call.out_maybe(&args.dt_bias), call.out_maybe(&args.state)];
        let (dy, dstate) = (call.maybe(dy), call.maybe(dstate));
        let args = ssd_args(&mut call, args);
        let mut out = call.queue(move |taken| {
            let (args, dy, dstate) = (args(taken), taken.maybe(dy), taken.maybe(dstate));
            let grads = B::ssd_backward(args, dy, dstate).expect(PROMISED);
            gradients!(grads: x, dt, a, b, c; d, dt_bias, state)
        });
        Some(SsdGrads {
            x: out.next(),
            dt: out.next(),
            a: out.next(),
            b: out.next(),
            c: out.next(),
            d: out.next_if(there[0]),
            dt_bias: out.next_if(there[1]),
            state: out.next_if(there[2]),
        })
    }

    fn rms_norm_gated(args: NormArgs<Self>) -> Tensor<Self, 3> {
        if fused::<B>(Op::RmsNormGated, args.y.dtype()).is_none() {
            return rms_norm_gated::reference::rms_norm_gated(args);
        }
        let mut call = Call::<B>::new("rms_norm_gated");
        call.out_like(&args.y);
        let args = norm_args(&mut call, args);
        call.queue(move |taken| vec![down(B::rms_norm_gated(args(taken)))]).next()
    }

    fn rms_norm_gated_backward(args: NormArgs<Self>, dout: Tensor<Self, 3>) -> Option<NormGrads<Self>> {
        fused::<B>(Op::RmsNormGated, args.y.dtype())?;
        let mut call = Call::<B>::new("rms_norm_gated_backward");
        call.out_like(&args.y);
        call.out_like(&args.weight);
        let gate = call.out_maybe(&args.z);
        let dout = call.float(dout);
        let args = norm_args(&mut call, args);
        let mut out = call.queue(move |taken| {
            let (args, dout) = (args(taken), taken.float(dout));
            let grads = B::rms_norm_gated_backward(args, dout).expect(PROMISED);
            gradients!(grads: y, weight; z)
        });
        Some(NormGrads { y: out.next(), weight: out.next(), z: out.next_if(gate) })
    }

    fn norm_residual(args: ResidualNormArgs<Self>) -> ResidualNormOut<Self> {
        if fused::<B>(Op::NormResidual, args.dtype()).is_none() {
            return norm_residual::reference::norm_residual(args);
        }
        let mut call = Call::<B>::new("norm_residual");
        call.out(args.residual.dims(), args.dtype());
        call.out_like(&args.residual);
        let args = residual_args(&mut call, args);
        let mut out = call.queue(move |taken| {
            let out = B::norm_residual(args(taken));
            vec![down(out.normed), down(out.sum)]
        });
        ResidualNormOut { normed: out.next(), sum: out.next() }
    }

    fn norm_residual_backward(
        kept: ResidualNormKept<Self>,
        dnormed: Tensor<Self, 3>,
        dsum: Option<Tensor<Self, 3>>,
    ) -> Option<ResidualNormGrads<Self>> {
        fused::<B>(Op::NormResidual, kept.dtype)?;
        let layer = kept.bias;
        let mut call = Call::<B>::new(if layer.is_some() { "layer_norm_residual_backward" } else { "norm_residual_backward" });
        call.out(kept.sum.dims(), kept.dtype);
        call.out_like(&kept.sum);
        call.out_like(&kept.weight);
        if let Some(dtype) = layer {
            call.out(kept.weight.dims(), dtype);
        }
        let (dnormed, dsum) = (call.float(dnormed), call.maybe(dsum));
        let kept = residual_kept(&mut call, kept);
        let mut out = call.queue(move |taken| {
            let (kept, dnormed, dsum) = (kept(taken), taken.float(dnormed), taken.maybe(dsum));
            let grads = B::norm_residual_backward(kept, dnormed, dsum).expect(PROMISED);
            gradients!(grads: x, residual, weight; bias)
        });
        Some(ResidualNormGrads { x: out.next(), residual: out.next(), weight: out.next(), bias: out.next_if(layer.is_some()) })
    }

    fn attention(args: AttentionArgs<Self>) -> Tensor<Self, 4> {
        if fused::<B>(Op::Attention, args.q.dtype()).is_none() {
            return attention::reference::attention(args);
        }
        let mut call = Call::<B>::new("attention");
        call.out_like(&args.q);
        let args = attention_args(&mut call, args);
        call.queue(move |taken| vec![down(<B as KernelBackend>::attention(args(taken)))]).next()
    }

    /// Where the backend below will decline, zeros stand for its log-sum-exps: its backward declines as well then, and reads
    /// neither.
    fn attention_saving(args: AttentionArgs<Self>) -> (Tensor<Self, 4>, Option<Tensor<Self, 3>>) {
        if fused::<B>(Op::Attention, args.q.dtype()).is_none() {
            return (attention::reference::attention(args), None);
        }
        let [b, h, l, _] = args.q.dims();
        let sums = [b, h, l.next_multiple_of(attention::cube::PADDING)];
        let mut call = Call::<B>::new("attention_saving");
        call.out_like(&args.q);
        call.out(sums, DType::F32);
        let args = attention_args(&mut call, args);
        let mut out = call.queue(move |taken| {
            let (out, lse) = B::attention_saving(args(taken));
            let lse = lse.unwrap_or_else(|| Tensor::zeros(sums, (&out.device(), DType::F32)));
            vec![down(out), down(lse)]
        });
        (out.next(), Some(out.next()))
    }

    fn attention_backward(
        args: AttentionArgs<Self>,
        saved: Option<(Tensor<Self, 4>, Tensor<Self, 3>)>,
        dout: Tensor<Self, 4>,
    ) -> Option<AttentionGrads<Self>> {
        if fused::<B>(Op::Attention, args.q.dtype()).is_none() || !B::attention_trains(args.q.dtype()) {
            return None;
        }
        let mut call = Call::<B>::new("attention_backward");
        call.out_like(&args.q);
        call.out_like(&args.k);
        call.out_like(&args.v);
        let (out, lse) = saved.unzip();
        let (dout, out, lse) = (call.float(dout), call.maybe(out), call.maybe(lse));
        let args = attention_args(&mut call, args);
        let mut out = call.queue(move |taken| {
            let (args, dout) = (args(taken), taken.float(dout));
            let saved = taken.maybe(out).zip(taken.maybe(lse));
            let grads = B::attention_backward(args, saved, dout).expect(PROMISED);
            gradients!(grads: q, k, v;)
        });
        Some(AttentionGrads { q: out.next(), k: out.next(), v: out.next() })
    }

    fn attention_trains(dtype: DType) -> bool {
        B::attention_trains(dtype)
    }

    fn cross_entropy(args: CrossEntropyArgs<Self>) -> CrossEntropyOut<Self> {
        if fused::<B>(Op::CrossEntropy, args.logits.dtype()).is_none() {
            return cross_entropy::reference::cross_entropy(args);
        }
        let rows = args.logits.dims()[0];
        let mut call = Call::<B>::new("cross_entropy");
        call.out([rows], DType::F32);
        call.out([rows], DType::F32);
        let (logits, targets) = (call.float(args.logits), call.int(args.targets));
        let mut out = call.queue(move |taken| {
            let out = B::cross_entropy(CrossEntropyArgs { logits: taken.float(logits), targets: taken.int(targets) });
            vec![down(out.loss), down(out.log_sum)]
        });
        CrossEntropyOut { loss: out.next(), log_sum: out.next() }
    }

    fn cross_entropy_backward(args: CrossEntropyArgs<Self>, log_sum: Tensor<Self, 1>, dloss: Tensor<Self, 1>) -> Option<Tensor<Self, 2>> {
        fused::<B>(Op::CrossEntropy, args.logits.dtype())?;
        let mut call = Call::<B>::new("cross_entropy_backward");
        call.out_like(&args.logits);
        let (logits, targets) = (call.float(args.logits), call.int(args.targets));
        let (log_sum, dloss) = (call.float(log_sum), call.float(dloss));
        let mut out = call.queue(move |taken| {
            let args = CrossEntropyArgs { logits: taken.float(logits), targets: taken.int(targets) };
            vec![down(B::cross_entropy_backward(args, taken.float(log_sum), taken.float(dloss)).expect(PROMISED))]
        });
        Some(out.next())
    }

    fn rotary(args: RotaryArgs<Self>, back: bool) -> Tensor<Self, 4> {
        if fused::<B>(Op::Rotary, args.x.dtype()).is_none() {
            return rotary::reference::rotary(args, back);
        }
        let mut call = Call::<B>::new(if back { "rotary_back" } else { "rotary" });
        call.out_like(&args.x);
        let args = rotary_args(&mut call, args);
        call.queue(move |taken| vec![down(B::rotary(args(taken), back))]).next()
    }

    fn glu(args: GluArgs<Self>) -> Tensor<Self, 3> {
        if fused::<B>(Op::Glu, args.up.dtype()).is_none() {
            return glu::reference::glu(args);
        }
        let mut call = Call::<B>::new("glu");
        call.out_like(&args.up);
        let args = glu_args(&mut call, args);
        call.queue(move |taken| vec![down(B::glu(args(taken)))]).next()
    }

    fn glu_backward(args: GluArgs<Self>, dout: Tensor<Self, 3>) -> Option<GluGrads<Self>> {
        fused::<B>(Op::Glu, args.up.dtype())?;
        let mut call = Call::<B>::new("glu_backward");
        call.out_like(&args.up);
        let gated = call.out_maybe(&args.gate);
        let dout = call.float(dout);
        let args = glu_args(&mut call, args);
        let mut out = call.queue(move |taken| {
            let (args, dout) = (args(taken), taken.float(dout));
            let grads = B::glu_backward(args, dout).expect(PROMISED);
            gradients!(grads: up; gate)
        });
        Some(GluGrads { up: out.next(), gate: out.next_if(gated) })
    }

    fn embed_backward(ids: Tensor<Self, 2, Int>, v: usize, dout: Tensor<Self, 3>) -> Option<Tensor<Self, 2>> {
        fused::<B>(Op::Embedding, dout.dtype())?;
        let mut call = Call::<B>::new("embed_backward");
        call.out([v, dout.dims()[2]], dout.dtype());
        let (ids, dout) = (call.int(ids), call.float(dout));
        Some(call.queue(move |taken| vec![down(B::embed_backward(taken.int(ids), v, taken.float(dout)).expect(PROMISED))]).next())
    }

    fn running_sum(x: Tensor<Self, 3>, reverse: bool) -> Tensor<Self, 3> {
        if fused::<B>(Op::Cumsum, x.dtype()).is_none() {
            return crate::cumsum::reference::cumsum(x, reverse);
        }
        let mut call = Call::<B>::new(if reverse { "running_sum_back" } else { "running_sum" });
        call.out_like(&x);
        let x = call.float(x);
        call.queue(move |taken| vec![down(B::running_sum(taken.float(x), reverse))]).next()
    }

    fn linear(x: Tensor<Self, 2>, weight: Tensor<Self, 2>, bias: Option<Tensor<Self, 1>>) -> Tensor<Self, 2> {
        if fused::<B>(Op::Linear, x.dtype()).is_none() {
            return linear::reference::linear(x, weight, bias);
        }
        let mut call = Call::<B>::new("linear");
        call.out([x.dims()[0], weight.dims()[0]], x.dtype());
        let (x, weight, bias) = (call.float(x), call.float(weight), call.maybe(bias));
        call.queue(move |taken| {
            let (x, weight, bias) = (taken.float(x), taken.float(weight), taken.maybe(bias));
            vec![down(<B as KernelBackend>::linear(x, weight, bias))]
        })
        .next()
    }

    fn linear_backward(kept: LinearKept<Self>, dy: Tensor<Self, 2>) -> LinearGrads<Self> {
        if fused::<B>(Op::Linear, dy.dtype()).is_none() {
            return linear::reference::gradients(kept, dy);
        }
        let ([rows, outputs], dtype) = (dy.dims(), dy.dtype());
        let LinearKept { x, weight, bias } = kept;
        let mut call = Call::<B>::new(if bias { "linear_backward with bias" } else { "linear_backward" });
        let there = [weight.is_some(), x.is_some()];
        weight.iter().for_each(|weight| call.out([rows, weight.dims()[1]], dtype));
        x.iter().for_each(|x| call.out([outputs, x.dims()[1]], dtype));
        if bias {
            call.out([outputs], dtype);
        }
        if call.is_silent() {
            return LinearGrads { x: None, weight: None, bias: None };
        }
        let (x, weight, dy) = (call.maybe(x), call.maybe(weight), call.float(dy));
        let mut out = call.queue(move |taken| {
            let kept = LinearKept { x: taken.maybe(x), weight: taken.maybe(weight), bias };
            let grads = B::linear_backward(kept, taken.float(dy));
            gradients!(grads: ; x, weight, bias)
        });
        LinearGrads { x: out.next_if(there[0]), weight: out.next_if(there[1]), bias: out.next_if(bias) }
    }

    fn adamw(args: AdamWArgs<Self>) -> AdamWOut<Self> {
        if choice() == KernelChoice::Reference {
            return adamw::reference::adamw(args);
        }
        let AdamWArgs { value, grad, moments, factors } = args;
        let mut call = Call::<B>::new("adamw");
        call.out_like(&value);
        call.out(value.dims(), DType::F32);
        call.out(value.dims(), DType::F32);
        let (first, second) = moments.unzip();
        let (value, grad, first, second) = (call.float(value), call.float(grad), call.maybe(first), call.maybe(second));
        let mut out = call.queue(move |taken| {
            let (value, grad, moments) = (taken.float(value), taken.float(grad), taken.maybe(first).zip(taken.maybe(second)));
            let out = B::adamw(AdamWArgs { value, grad, moments, factors });
            vec![down(out.value), down(out.first), down(out.second)]
        });
        AdamWOut { value: out.next(), first: out.next(), second: out.next() }
    }
}
