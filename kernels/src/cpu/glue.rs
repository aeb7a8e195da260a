//! [`KernelBackend`] for every backend whose tensors can be read in place.

use std::borrow::Cow;

use burn::tensor::{DType, Int, Tensor, bf16, f16};

use super::host::HostBackend;
use super::{Documents, NAME};
use crate::adamw::{self, AdamWArgs, AdamWOut};
use crate::attention::{self, AttentionArgs, AttentionGrads};
use crate::causal_conv1d::{self, ConvArgs, ConvGrads, ConvOut};
use crate::cross_entropy::{self, CrossEntropyArgs, CrossEntropyOut};
use crate::glu::{self, GluArgs, GluGrads};
use crate::linear::cpu::Weight;
use crate::linear::{self, LinearGrads, LinearKept};
use crate::norm_residual::{self, ResidualNormArgs, ResidualNormGrads, ResidualNormKept, ResidualNormOut};
use crate::path::{KernelChoice, choice, fused};
use crate::rms_norm_gated::{self, NormArgs, NormGrads};
use crate::rotary::{self, RotaryArgs};
use crate::selective_scan::{self, ScanArgs, ScanGrads, ScanOut};
use crate::ssd::{self, SsdArgs, SsdGrads, SsdOut};
use crate::{KernelBackend, Op, Segments, embedding};

impl<B: HostBackend> KernelBackend for B {
    fn fused(op: Op, dtype: DType) -> Option<&'static str> {
        let there = match op {
            // Burn multiplies float16 at the speed of memory, and bfloat16 far slower than that.
            Op::Linear | Op::Attention => matches!(dtype, DType::F32 | DType::BF16) && B::accepts(dtype),
            // The reference is linear in time here.
            Op::Cumsum => false,
            _ => B::accepts(dtype),
        };
        there.then_some(NAME)
    }

    fn causal_conv1d(args: ConvArgs<B>) -> ConvOut<B> {
        let dtype = args.x.dtype();
        if fused::<B>(Op::CausalConv1d, dtype).is_none() {
            return causal_conv1d::reference::causal_conv1d(args);
        }
        let input = ConvValues::read(args);
        let [b, l, e, k] = input.dims;
        let (y, state) = causal_conv1d::cpu::forward(&input.borrow());
        ConvOut { y: B::write(y, [b, l, e], dtype), state: B::write(state, [b, k - 1, e], dtype) }
    }

    fn causal_conv1d_backward(args: ConvArgs<B>, dy: Option<Tensor<B, 3>>, dstate: Option<Tensor<B, 3>>) -> Option<ConvGrads<B>> {
        let dtype = args.x.dtype();
        fused::<B>(Op::CausalConv1d, dtype)?;
        let input = ConvValues::read(args);
        let (dy, dstate) = (dy.map(B::read), dstate.map(B::read));
        let [b, l, e, k] = input.dims;
        let grads = causal_conv1d::cpu::backward(&input.borrow(), dy.as_deref(), dstate.as_deref());
        Some(ConvGrads {
            x: B::write(grads.x, [b, l, e], dtype),
            weight: B::write(grads.weight, [e, k], input.dtypes[0]),
            bias: input.bias.as_ref().map(|_| B::write(grads.bias, [e], input.dtypes[1])),
            state: input.state.as_ref().map(|_| B::write(grads.state, [b, k - 1, e], input.dtypes[2])),
        })
    }

    fn selective_scan(mut args: ScanArgs<B>) -> ScanOut<B> {
        let dtype = args.u.dtype();
        if fused::<B>(Op::SelectiveScan, dtype).is_none() {
            return selective_scan::reference::selective_scan(args);
        }
        let few = args.u.dims()[1] <= selective_scan::cpu::FEW;
        let past = if few { args.state.take() } else { None };
        let input = ScanValues::read(args);
        let selective_scan::ScanDims { b, l, e, n } = input.dims;
        let (y, state) = if few {
            let mut state = past.map_or_else(|| vec![0.0; b * e * n], B::take);
            (selective_scan::cpu::steps(&input.borrow(), &mut state), state)
        } else {
            selective_scan::cpu::forward(&input.borrow())
        };
        ScanOut { y: B::write(y, [b, l, e], dtype), state: B::write(state, [b, e, n], DType::F32) }
    }

    fn selective_scan_backward(args: ScanArgs<B>, dy: Option<Tensor<B, 3>>, dstate: Option<Tensor<B, 3>>) -> Option<ScanGrads<B>> {
        fused::<B>(Op::SelectiveScan, args.u.dtype())?;
        let input = ScanValues::read(args);
        let (dy, dstate) = (dy.map(B::read), dstate.map(B::read));
        let selective_scan::ScanDims { b, l, e, n } = input.dims;
        let grads = selective_scan::cpu::backward(&input.borrow(), dy.as_deref(), dstate.as_deref());
        let [u, delta, a, bs, cs, d, z, bias, state] = input.dtypes;
        Some(ScanGrads {
            u: B::write(grads.u, [b, l, e], u),
            delta: B::write(grads.delta, [b, l, e], delta),
            a: B::write(grads.a, [e, n], a),
            b: B::write(grads.b, [b, l, n], bs),
            c: B::write(grads.c, [b, l, n], cs),
            d: input.d.as_ref().map(|_| B::write(grads.d, [e], d)),
            z: input.z.as_ref().map(|_| B::write(grads.z, [b, l, e], z)),
            delta_bias: input.delta_bias.as_ref().map(|_| B::write(grads.delta_bias, [e], bias)),
            state: input.state.as_ref().map(|_| B::write(grads.state, [b, e, n], state)),
        })
    }

    fn ssd(mut args: SsdArgs<B>) -> SsdOut<B> {
        let dtype = args.x.dtype();
        if fused::<B>(Op::Ssd, dtype).is_none() {
            return ssd::reference::ssd(args);
        }
        let few = args.x.dims()[1] <= ssd::cpu::FEW;
        let past = if few { args.state.take() } else { None };
        let input = SsdValues::read(args);
        let ssd::SsdDims { b, l, h, p, n, .. } = input.dims;
        let (y, state) = if few {
            let mut state = past.map_or_else(|| vec![0.0; b * h * p * n], B::take);
            (ssd::cpu::steps(&input.borrow(), &mut state), state)
        } else {
            ssd::cpu::forward(&input.borrow())
        };
        SsdOut { y: B::write(y, [b, l, h, p], dtype), state: B::write(state, [b, h, p, n], DType::F32) }
    }

    fn ssd_backward(args: SsdArgs<B>, dy: Option<Tensor<B, 4>>, dstate: Option<Tensor<B, 4>>) -> Option<SsdGrads<B>> {
        fused::<B>(Op::Ssd, args.x.dtype())?;
        let input = SsdValues::read(args);
        let (dy, dstate) = (dy.map(B::read), dstate.map(B::read));
        let ssd::SsdDims { b, l, h, p, g, n } = input.dims;
        let grads = ssd::cpu::backward(&input.borrow(), dy.as_deref(), dstate.as_deref());
        let [x, dt, a, bs, cs, d, bias, state] = input.dtypes;
        Some(SsdGrads {
            x: B::write(grads.x, [b, l, h, p], x),
            dt: B::write(grads.dt, [b, l, h], dt),
            a: B::write(grads.a, [h], a),
            b: B::write(grads.b, [b, l, g, n], bs),
            c: B::write(grads.c, [b, l, g, n], cs),
            d: input.d.as_ref().map(|_| B::write(grads.d, [h], d)),
            dt_bias: input.dt_bias.as_ref().map(|_| B::write(grads.dt_bias, [h], bias)),
            state: input.state.as_ref().map(|_| B::write(grads.state, [b, h, p, n], state)),
        })
    }

    fn rms_norm_gated(args: NormArgs<B>) -> Tensor<B, 3> {
        let (dtype, shape) = (args.y.dtype(), args.y.dims());
        if fused::<B>(Op::RmsNormGated, dtype).is_none() {
            return rms_norm_gated::reference::rms_norm_gated(args);
        }
        let (y, z, weight) = (B::read(args.y), args.z.map(B::read), B::read(args.weight));
        let input = rms_norm_gated::cpu::NormInput { y: &y, z: z.as_deref(), weight: &weight, groups: args.groups, eps: args.eps };
        B::write(rms_norm_gated::cpu::forward(&input), shape, dtype)
    }

    fn rms_norm_gated_backward(args: NormArgs<B>, dout: Tensor<B, 3>) -> Option<NormGrads<B>> {
        let (dtypes, shape) = ([args.y.dtype(), args.weight.dtype()], args.y.dims());
        let gate = args.z.as_ref().map(Tensor::dtype);
        fused::<B>(Op::RmsNormGated, dtypes[0])?;
        let (y, z, weight) = (B::read(args.y), args.z.map(B::read), B::read(args.weight));
        let dout = B::read(dout);
        let input = rms_norm_gated::cpu::NormInput { y: &y, z: z.as_deref(), weight: &weight, groups: args.groups, eps: args.eps };
        let [dy, dz, dw] = rms_norm_gated::cpu::backward(&input, &dout);
        Some(NormGrads {
            y: B::write(dy, shape, dtypes[0]),
            z: gate.map(|dtype| B::write(dz, shape, dtype)),
            weight: B::write(dw, [shape[2]], dtypes[1]),
        })
    }

    fn norm_residual(args: ResidualNormArgs<B>) -> ResidualNormOut<B> {
        let (dtype, wide, shape) = (args.dtype(), args.residual.dtype(), args.residual.dims());
        if fused::<B>(Op::NormResidual, dtype).is_none() || !B::accepts(wide) {
            return norm_residual::reference::norm_residual(args);
        }
        let (weight, bias) = (B::read(args.weight), args.bias.map(B::read));
        let norm = norm_residual::cpu::Norm { weight: &weight, bias: bias.as_deref(), eps: args.eps };
        let Some(x) = args.x else {
            let normed = norm_residual::cpu::alone(&B::read(args.residual.clone()), &norm);
            return ResidualNormOut { normed: B::write(normed, shape, dtype), sum: args.residual };
        };
        let round: Option<fn(f32) -> f32> = match wide {
            DType::BF16 => Some(|value| bf16::from_f32(value).to_f32()),
            DType::F16 => Some(|value| f16::from_f32(value).to_f32()),
            _ => None,
        };
        let (mut sum, residual) = B::writable(args.residual);
        let normed = norm_residual::cpu::forward(&mut sum, residual.as_deref(), &B::read(x), &norm, round);
        ResidualNormOut { normed: B::write(normed, shape, dtype), sum: B::write(sum, shape, wide) }
    }

    fn norm_residual_backward(
        kept: ResidualNormKept<B>,
        dnormed: Tensor<B, 3>,
        dsum: Option<Tensor<B, 3>>,
    ) -> Option<ResidualNormGrads<B>> {
        fused::<B>(Op::NormResidual, kept.dtype)?;
        let (wide, shape) = (kept.sum.dtype(), kept.sum.dims());
        if !B::accepts(wide) {
            return Some(norm_residual::gradients::gradients(kept, dnormed, dsum));
        }
        let weight_dtype = kept.weight.dtype();
        let (sum, weight, dsum) = (B::read(kept.sum), B::read(kept.weight), dsum.map(B::read));
        let (mut grad, dnormed) = B::writable(dnormed);
        let layer = kept.bias.is_some();
        let [dw, db] = norm_residual::cpu::backward(&mut grad, dnormed.as_deref(), &sum, dsum.as_deref(), &weight, layer, kept.eps);
        let residual = B::write(grad, shape, wide);
        let (x, width) = (residual.clone().cast(kept.dtype), [shape[2]]);
        let bias = kept.bias.map(|dtype| B::write(db, width, dtype));
        Some(ResidualNormGrads { x, residual, weight: B::write(dw, width, weight_dtype), bias })
    }

    fn attention(args: AttentionArgs<B>) -> Tensor<B, 4> {
        let dtype = args.q.dtype();
        if fused::<B>(Op::Attention, dtype).is_none() {
            return attention::reference::attention(args);
        }
        let input = AttentionValues::read(args);
        input.output(attention::cpu::forward(&input.borrow()).out, dtype)
    }

    fn attention_saving(args: AttentionArgs<B>) -> (Tensor<B, 4>, Option<Tensor<B, 3>>) {
        let dtype = args.q.dtype();
        if fused::<B>(Op::Attention, dtype).is_none() {
            return (attention::reference::attention(args), None);
        }
        let input = AttentionValues::read(args);
        let [b, h, _, l, ..] = input.dims;
        let attention::cpu::Outcome { out, log_sums } = attention::cpu::forward(&input.borrow());
        (input.output(out, dtype), Some(B::write(log_sums, [b, h, l], DType::F32)))
    }

    fn attention_trains(dtype: DType) -> bool {
        fused::<B>(Op::Attention, dtype).is_some()
    }

    fn attention_backward(
        args: AttentionArgs<B>,
        saved: Option<(Tensor<B, 4>, Tensor<B, 3>)>,
        dout: Tensor<B, 4>,
    ) -> Option<AttentionGrads<B>> {
        let dtype = args.q.dtype();
        fused::<B>(Op::Attention, dtype)?;
        let (queries, slots) = (args.q.dims(), args.k.dims());
        let input = AttentionValues::read(args);
        let dout = B::read(dout);
        let [q, k, v] = match saved {
            Some((out, log_sums)) => {
                // As it was written.
                let (out, log_sums) = (B::read(out.swap_dims(1, 2)), B::read(log_sums));
                attention::cpu::backward(&input.borrow(), &out, &log_sums, &dout)
            }
            None => {
                let attention::cpu::Outcome { out, log_sums } = attention::cpu::forward(&input.borrow());
                attention::cpu::backward(&input.borrow(), &out, &log_sums, &dout)
            }
        };
        Some(AttentionGrads { q: B::write(q, queries, dtype), k: B::write(k, slots, dtype), v: B::write(v, slots, dtype) })
    }

    fn rotary(args: RotaryArgs<B>, back: bool) -> Tensor<B, 4> {
        let (dtype, dims) = (args.x.dtype(), args.x.dims());
        if fused::<B>(Op::Rotary, dtype).is_none() {
            return rotary::reference::rotary(args, back);
        }
        let [b, h, l, p] = dims;
        let half = args.cos.dims()[3];
        let (cos, sin) = (B::read(args.cos), B::read(args.sin));
        // On the way back values change places.
        let (mut out, x, [outer, middle, inner, _]) = match if back { Err(args.x) } else { B::owned(args.x) } {
            Ok(values) => (values, None, [0; 4]),
            Err(x) => {
                let (values, strides) = B::read_strided(x);
                (vec![0.0; b * h * l * p], Some(values), strides)
            }
        };
        let strides = [outer, middle, inner];
        rotary::cpu::rotate(&mut out, &rotary::cpu::RotaryInput { dims, x: x.as_deref(), strides, cos: &cos, sin: &sin, half, back });
        match back {
            true => B::write(out, [b, l, h, p], dtype).swap_dims(1, 2),
            false => B::write(out, dims, dtype),
        }
    }

    fn glu(args: GluArgs<B>) -> Tensor<B, 3> {
        let (dtype, shape) = (args.up.dtype(), args.up.dims());
        if fused::<B>(Op::Glu, dtype).is_none() {
            return glu::reference::glu(args);
        }
        let gate = args.gate.map(B::read);
        let (mut out, up) = B::writable(args.up);
        glu::cpu::forward(&mut out, up.as_deref(), gate.as_deref(), args.activation);
        B::write(out, shape, dtype)
    }

    fn glu_backward(args: GluArgs<B>, dout: Tensor<B, 3>) -> Option<GluGrads<B>> {
        let (dtype, shape) = (args.up.dtype(), args.up.dims());
        fused::<B>(Op::Glu, dtype)?;
        let (up, gate) = (B::read(args.up), args.gate.map(B::read));
        let (mut grad, dout) = B::writable(dout);
        let dgate = glu::cpu::backward(&mut grad, dout.as_deref(), &up, gate.as_deref(), args.activation);
        Some(GluGrads { up: B::write(grad, shape, dtype), gate: gate.map(|_| B::write(dgate, shape, dtype)) })
    }

    fn embed_backward(ids: Tensor<B, 2, Int>, v: usize, dout: Tensor<B, 3>) -> Option<Tensor<B, 2>> {
        let (dtype, [_, _, d]) = (dout.dtype(), dout.dims());
        fused::<B>(Op::Embedding, dtype)?;
        Some(B::write(embedding::cpu::backward(&integers(ids), &B::read(dout), v, d), [v, d], dtype))
    }

    fn cross_entropy(args: CrossEntropyArgs<B>) -> CrossEntropyOut<B> {
        if fused::<B>(Op::CrossEntropy, args.logits.dtype()).is_none() {
            return cross_entropy::reference::cross_entropy(args);
        }
        let [rows, v] = args.logits.dims();
        let sums = cross_entropy::cpu::forward(&B::read(args.logits), &integers(args.targets), v);
        let [loss, log_sum] = sums.map(|values| B::write(values, [rows], DType::F32));
        CrossEntropyOut { loss, log_sum }
    }

    fn cross_entropy_backward(args: CrossEntropyArgs<B>, log_sum: Tensor<B, 1>, dloss: Tensor<B, 1>) -> Option<Tensor<B, 2>> {
        let (dtype, shape) = (args.logits.dtype(), args.logits.dims());
        fused::<B>(Op::CrossEntropy, dtype)?;
        let mut logits = B::take(args.logits);
        cross_entropy::cpu::backward(&mut logits, &integers(args.targets), &B::read(log_sum), &B::read(dloss), shape[1]);
        Some(B::write(logits, shape, dtype))
    }

    fn linear(x: Tensor<B, 2>, weight: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Tensor<B, 2> {
        let ([rows, inputs], [outputs, _]) = (x.dims(), weight.dims());
        let dtype = x.dtype();
        if rows == 0 || fused::<B>(Op::Linear, dtype).is_none() {
            return linear::reference::linear(x, weight, bias);
        }
        let product = |weight: Weight<'_>| linear::cpu::forward(&B::read(x.clone()), weight, rows, inputs, outputs);
        let wide = B::borrow(&weight).map(|values| product(Weight::F32(&values)));
        let Some(values) = wide.or_else(|| B::with_bf16(&weight, |values| product(Weight::Bf16(values)))) else {
            return linear::reference::linear(x, weight, bias);
        };
        let y = B::write(values, [rows, outputs], dtype);
        match bias {
            Some(bias) => y + bias.unsqueeze(),
            None => y,
        }
    }
    fn linear_backward(kept: LinearKept<B>, dy: Tensor<B, 2>) -> LinearGrads<B> {
        let ([rows, outputs], dtype) = (dy.dims(), dy.dtype());
        if rows * outputs == 0 || fused::<B>(Op::Linear, dtype).is_none() {
            return linear::reference::gradients(kept, dy);
        }
        let dy = B::read(dy);
        let of = |other: &Tensor<B, 2>| [rows, other.dims()[1], outputs];
        LinearGrads {
            bias: kept.bias.then(|| B::write(linear::cpu::bias_gradient(&dy, outputs), [outputs], dtype)),
            x: kept.weight.map(|weight| {
                let sizes = of(&weight);
                B::write(linear::cpu::input_gradient(&dy, &B::read(weight), sizes), [rows, sizes[1]], dtype)
            }),
            weight: kept.x.map(|x| {
                let sizes = of(&x);
                B::write(linear::cpu::weight_gradient(&dy, &B::read(x), sizes), [outputs, sizes[1]], dtype)
            }),
        }
    }
    fn adamw(args: AdamWArgs<B>) -> AdamWOut<B> {
        let ([n], dtype) = (args.value.dims(), args.value.dtype());
        if choice() == KernelChoice::Reference || !B::accepts(dtype) || !B::accepts(args.grad.dtype()) {
            return adamw::reference::adamw(args);
        }
        let AdamWArgs { value, grad, moments, factors } = args;
        let (mut value, grad) = (B::take(value), B::read(grad));
        let [mut first, mut second] = match moments {
            Some((first, second)) => [first, second].map(B::take),
            None => [(); 2].map(|()| vec![0.0; n]),
        };
        adamw::cpu::adamw([&mut value, &mut first, &mut second], &grad, factors);
        let [first, second] = [first, second].map(|moment| B::write(moment, [n], DType::F32));
        AdamWOut { value: B::write(value, [n], dtype), first, second }
    }

    fn square_sums(tensors: &[Tensor<B, 1>]) -> Vec<f64> {
        if choice() == KernelChoice::Reference || tensors.iter().any(|tensor| !B::accepts(tensor.dtype())) {
            return adamw::reference::square_sums(tensors);
        }
        tensors.iter().map(|tensor| adamw::cpu::square_sum(&B::read(tensor.clone()))).collect()
    }
}

/// Ids, row-major.
fn integers<B: HostBackend, const D: usize>(tensor: Tensor<B, D, Int>) -> Vec<i32> {
    tensor.into_data().iter::<i32>().collect()
}

/// Readable arguments of attention.
struct AttentionValues<B: HostBackend> {
    dims: [usize; 6],
    q: B::Values,
    k: (B::Values, [usize; 2]),
    v: (B::Values, [usize; 2]),
    scale: f32,
    mask: attention::AttentionMask<B>,
}

impl<B: HostBackend> AttentionValues<B> {
    fn read(args: AttentionArgs<B>) -> Self {
        let ([b, h, l, p], [_, g, s, _]) = (args.q.dims(), args.k.dims());
        let (q, [k, v]) = (B::read(args.q), [args.k, args.v].map(B::read_matrices));
        Self { dims: [b, h, g, l, s, p], q, k, v, scale: args.scale, mask: args.mask }
    }

    /// The output as it was computed, as a tensor.
    fn output(&self, out: Vec<f32>, dtype: DType) -> Tensor<B, 4> {
        let [b, h, _, l, _, p] = self.dims;
        B::write(out, [b, l, h, p], dtype).swap_dims(1, 2)
    }

    fn borrow(&self) -> attention::cpu::AttentionInput<'_> {
        let [k, v] = [&self.k, &self.v].map(|(values, strides)| attention::cpu::Matrices {
            values: Cow::Borrowed(values),
            strides: *strides,
            groups: self.dims[2],
        });
        attention::cpu::AttentionInput { dims: self.dims, q: &self.q, k, v, scale: self.scale, ids: self.mask.ids() }
    }
}

/// Readable arguments of the convolution.
struct ConvValues<B: HostBackend> {
    dims: [usize; 4],
    x: B::Values,
    weight: B::Values,
    bias: Option<B::Values>,
    state: Option<B::Values>,
    segments: Option<Segments<B>>,
    silu: bool,
    /// Of weight, bias and state.
    dtypes: [DType; 3],
}

impl<B: HostBackend> ConvValues<B> {
    fn read(args: ConvArgs<B>) -> Self {
        let [b, l, e] = args.x.dims();
        let own = args.x.dtype();
        Self {
            dims: [b, l, e, args.weight.dims()[1]],
            dtypes: [
                args.weight.dtype(),
                args.bias.as_ref().map_or(own, |bias| bias.dtype()),
                args.state.as_ref().map_or(own, |state| state.dtype()),
            ],
            x: B::read(args.x),
            weight: B::read(args.weight),
            bias: args.bias.map(B::read),
            state: args.state.map(B::read),
            segments: args.segments,
            silu: args.silu,
        }
    }

    fn borrow(&self) -> causal_conv1d::cpu::ConvInput<'_> {
        causal_conv1d::cpu::ConvInput {
            dims: self.dims,
            x: &self.x,
            weight: &self.weight,
            bias: self.bias.as_deref(),
            state: self.state.as_deref(),
            documents: documents(self.dims[1], self.segments.as_ref()),
            silu: self.silu,
        }
    }
}

/// Rows of a tensor and the distances between them.
type RowValues<B> = (<B as HostBackend>::Values, [usize; 2]);

/// Readable arguments of the selective scan.
struct ScanValues<B: HostBackend> {
    dims: selective_scan::ScanDims,
    u: RowValues<B>,
    delta: RowValues<B>,
    a: B::Values,
    b: RowValues<B>,
    c: RowValues<B>,
    d: Option<B::Values>,
    z: Option<RowValues<B>>,
    delta_bias: Option<B::Values>,
    state: Option<B::Values>,
    segments: Option<Segments<B>>,
    delta_softplus: bool,
    /// Of the nine tensors, in the order of the fields.
    dtypes: [DType; 9],
}

fn rows<B: HostBackend>((values, strides): &RowValues<B>, width: usize) -> selective_scan::cpu::Rows<'_> {
    selective_scan::cpu::Rows { values, strides: *strides, width }
}

impl<B: HostBackend> ScanValues<B> {
    fn read(args: ScanArgs<B>) -> Self {
        let dims = args.check().unwrap_or_else(|error| panic!("{error}"));
        let vector = |tensor: &Option<Tensor<B, 1>>| tensor.as_ref().map_or(DType::F32, |t| t.dtype());
        let batch = |tensor: &Option<Tensor<B, 3>>| tensor.as_ref().map_or(DType::F32, |t| t.dtype());
        let dtypes = [
            args.u.dtype(),
            args.delta.dtype(),
            args.a.dtype(),
            args.b.dtype(),
            args.c.dtype(),
            vector(&args.d),
            batch(&args.z),
            vector(&args.delta_bias),
            batch(&args.state),
        ];
        Self {
            dims,
            u: B::read_rows(args.u),
            delta: B::read_rows(args.delta),
            a: B::read(args.a),
            b: B::read_rows(args.b),
            c: B::read_rows(args.c),
            d: args.d.map(B::read),
            z: args.z.map(B::read_rows),
            delta_bias: args.delta_bias.map(B::read),
            state: args.state.map(B::read),
            segments: args.segments,
            delta_softplus: args.delta_softplus,
            dtypes,
        }
    }

    fn borrow(&self) -> selective_scan::cpu::ScanInput<'_> {
        let selective_scan::ScanDims { l, e, n, .. } = self.dims;
        selective_scan::cpu::ScanInput {
            dims: self.dims,
            u: rows::<B>(&self.u, e),
            delta: rows::<B>(&self.delta, e),
            a: &self.a,
            b: rows::<B>(&self.b, n),
            c: rows::<B>(&self.c, n),
            d: self.d.as_deref(),
            z: self.z.as_ref().map(|z| rows::<B>(z, e)),
            delta_bias: self.delta_bias.as_deref(),
            state: self.state.as_deref(),
            documents: documents(l, self.segments.as_ref()),
            delta_softplus: self.delta_softplus,
        }
    }
}

/// Readable arguments of the scan.
struct SsdValues<B: HostBackend> {
    dims: ssd::SsdDims,
    x: B::Values,
    dt: B::Values,
    a: B::Values,
    b: B::Values,
    c: B::Values,
    d: Option<B::Values>,
    dt_bias: Option<B::Values>,
    state: Option<B::Values>,
    segments: Option<Segments<B>>,
    options: ssd::SsdOptions,
    /// Of the eight tensors, in the order of the fields.
    dtypes: [DType; 8],
}

impl<B: HostBackend> SsdValues<B> {
    fn read(args: SsdArgs<B>) -> Self {
        let dims = args.check().unwrap_or_else(|error| panic!("{error}"));
        let optional = |tensor: &Option<Tensor<B, 1>>| tensor.as_ref().map_or(DType::F32, |t| t.dtype());
        let dtypes = [
            args.x.dtype(),
            args.dt.dtype(),
            args.a.dtype(),
            args.b.dtype(),
            args.c.dtype(),
            optional(&args.d),
            optional(&args.dt_bias),
            args.state.as_ref().map_or(DType::F32, |state| state.dtype()),
        ];
        Self {
            dims,
            x: B::read(args.x),
            dt: B::read(args.dt),
            a: B::read(args.a),
            b: B::read(args.b),
            c: B::read(args.c),
            d: args.d.map(B::read),
            dt_bias: args.dt_bias.map(B::read),
            state: args.state.map(B::read),
            segments: args.segments,
            options: args.options,
            dtypes,
        }
    }

    fn borrow(&self) -> ssd::cpu::SsdInput<'_> {
        ssd::cpu::SsdInput {
            dims: self.dims,
            x: &self.x,
            dt: &self.dt,
            a: &self.a,
            b: &self.b,
            c: &self.c,
            d: self.d.as_deref(),
            dt_bias: self.dt_bias.as_deref(),
            state: self.state.as_deref(),
            documents: documents(self.dims.l, self.segments.as_ref()),
            options: self.options,
        }
    }
}

fn documents<B: HostBackend>(l: usize, segments: Option<&Segments<B>>) -> Documents<'_> {
    Documents { l, rows: segments.map(|segments| (segments.ids(), segments.prev(), segments.lengths())) }
}
