//! The operations under Burn's autodiff decorator.
//!
//! Where the backend below has a fast path, the operation becomes one node of the graph with a hand-written backward
//! that keeps the inputs alone; elsewhere the reference runs on autodiff tensors and Burn differentiates it.
//!
//! A step of Burn's graph has one output. An operation with two is a trunk, whose parents are the inputs, with two
//! leaves, whose parent is the trunk. Leaves lie deeper, so they run first, and leave their gradients in slots where the
//! trunk finds them.

use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use burn::backend::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Int, Tensor, TensorPrimitive};

use crate::attention::{self, AttentionArgs, AttentionMask};
use crate::backend::Memory;
use crate::causal_conv1d::{self, ConvArgs, ConvOut};
use crate::cross_entropy::{self, CrossEntropyArgs, CrossEntropyOut};
use crate::glu::{self, Activation, GluArgs};
use crate::linear::LinearKept;
use crate::norm_residual::{self, ResidualNormArgs, ResidualNormKept, ResidualNormOut};
use crate::path::{fused, runs};
use crate::rms_norm_gated::{self, NormArgs};
use crate::rotary::RotaryArgs;
use crate::selective_scan::{self, ScanArgs, ScanOut};
use crate::ssd::{self, SsdArgs, SsdOptions, SsdOut};
use crate::{KernelBackend, Op, Segments};

/// An operation that is one node: what it keeps besides tensors, and its backward.
trait Node<B: KernelBackend, const N: usize>: Clone + Debug + Send + 'static {
    /// Which inputs the backward reads, given which need a gradient.
    fn reads(_tracked: [bool; N]) -> [bool; N] {
        [true; N]
    }

    /// Gradients of the inputs from those of the outputs. Of the inputs only those it reads are there; gradients are
    /// needed where `tracked` says so.
    fn backward(self, inputs: [Input<B>; N], tracked: [bool; N], douts: [Input<B>; 2]) -> [Input<B>; N];
}

type Input<B> = Option<FloatTensor<B>>;
type Slot<B> = Arc<Mutex<Input<B>>>;

/// A kept input.
#[derive(Clone, Debug)]
enum Saved<B: Backend> {
    /// In the graph's own checkpoints.
    Node(NodeId),
    /// Not part of the graph.
    Value(FloatTensor<B>),
    /// Absent, or never read.
    Nothing,
}

/// State of a node: what the operation keeps, and where the gradients of its outputs arrive.
#[derive(Clone, Debug)]
struct Kept<B: Backend, O, const N: usize> {
    node: O,
    inputs: [Saved<B>; N],
    /// Absent for an operation with one output, whose gradient is the step's own.
    slots: Option<[Slot<B>; 2]>,
}

#[derive(Debug)]
struct Trunk<O>(PhantomData<O>);

impl<B: KernelBackend, O: Node<B, N>, const N: usize> Backward<B, N> for Trunk<O> {
    type State = Kept<B, O, N>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let Kept { node, inputs, slots } = ops.state;
        let inputs = inputs.map(|saved| match saved {
            Saved::Node(id) => Some(checkpointer.retrieve_node_output(id)),
            Saved::Value(value) => Some(value),
            Saved::Nothing => None,
        });
        let douts = match slots {
            None => [Some(grads.consume::<B>(&ops.node)), None],
            Some(slots) => slots.map(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).take()),
        };
        let tracked = std::array::from_fn(|i| ops.parents[i].is_some());
        let results = node.backward(inputs, tracked, douts);
        for (parent, grad) in ops.parents.into_iter().zip(results) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad.expect("a gradient for every tracked input"));
            }
        }
    }
}

#[derive(Debug)]
struct Leaf;

impl<B: Backend> Backward<B, 1> for Leaf {
    type State = Slot<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        *ops.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(grad);
    }
}

type Outer<B, C> = FloatTensor<Autodiff<B, C>>;

/// Runs `forward` below autodiff and records `node`. A second output of `None` means there is only one.
fn record<B, C, O, const N: usize>(
    node: O,
    inputs: [Option<Outer<B, C>>; N],
    forward: impl FnOnce([Input<B>; N]) -> (FloatTensor<B>, Input<B>),
) -> (Outer<B, C>, Option<Outer<B, C>>)
where
    B: KernelBackend,
    C: CheckpointStrategy,
    O: Node<B, N>,
{
    let present = inputs.iter().flatten().next().expect("an operation has inputs").primitive.clone();
    // A constant stands in for an absent input among the parents.
    let nodes = std::array::from_fn(|i| match &inputs[i] {
        Some(input) => input.node.clone(),
        None => <Autodiff<B, C> as AutodiffBackend>::from_inner(present.clone()).node,
    });
    drop(present);
    let tracked = std::array::from_fn(|i| inputs[i].as_ref().is_some_and(|input| input.is_tracked()));
    let below = |inputs: [Option<Outer<B, C>>; N]| inputs.map(|input| input.map(|input| input.primitive));
    match Trunk::<O>(PhantomData).prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::UnTracked(prep) => {
            let (first, second) = forward(below(inputs));
            (prep.finish(first), second.map(<Autodiff<B, C> as AutodiffBackend>::from_inner))
        }
        OpsKind::Tracked(mut prep) => {
            let reads = O::reads(tracked);
            let saved = std::array::from_fn(|i| match &inputs[i] {
                Some(input) if reads[i] && tracked[i] => Saved::Node(prep.checkpoint(input)),
                Some(input) if reads[i] => Saved::Value(input.primitive.clone()),
                _ => Saved::Nothing,
            });
            let (first, second) = forward(below(inputs));
            let Some(second) = second else {
                return (prep.finish(Kept { node, inputs: saved, slots: None }, first), None);
            };
            let slots: [Slot<B>; 2] = Default::default();
            // Nobody reads the trunk's own value.
            let trunk = prep.finish(Kept { node, inputs: saved, slots: Some(slots.clone()) }, first.clone());
            let leaf = |slot: Slot<B>, value| match Leaf.prepare::<C>([trunk.node.clone()]).compute_bound().stateful() {
                OpsKind::Tracked(prep) => prep.finish(slot, value),
                OpsKind::UnTracked(_) => unreachable!("the trunk is tracked"),
            };
            let [first_slot, second_slot] = slots;
            (leaf(first_slot, first), Some(leaf(second_slot, second)))
        }
    }
}

fn down<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}

fn up<B: Backend, const D: usize>(primitive: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

const READ: &str = "an input that the backward reads";

#[derive(Clone, Debug)]
struct Conv<B: Backend> {
    segments: Option<Segments<B>>,
    silu: bool,
}

impl<B: Backend> Conv<B> {
    fn args(self, [x, weight, bias, state]: [Input<B>; 4]) -> ConvArgs<B> {
        ConvArgs {
            x: up(x.expect(READ)),
            weight: up(weight.expect(READ)),
            bias: bias.map(up),
            state: state.map(up),
            segments: self.segments,
            silu: self.silu,
        }
    }
}

impl<B: KernelBackend> Node<B, 4> for Conv<B> {
    fn backward(self, inputs: [Input<B>; 4], _tracked: [bool; 4], [dy, dstate]: [Input<B>; 2]) -> [Input<B>; 4] {
        let grads = B::causal_conv1d_backward(self.args(inputs), dy.map(up), dstate.map(up)).expect("a fast path has a backward");
        [Some(down(grads.x)), Some(down(grads.weight)), grads.bias.map(down), grads.state.map(down)]
    }
}

#[derive(Clone, Debug)]
struct SelectiveScan<B: Backend> {
    segments: Option<Segments<B>>,
    delta_softplus: bool,
}

impl<B: Backend> SelectiveScan<B> {
    fn args(self, [u, delta, a, b, c, d, z, delta_bias, state]: [Input<B>; 9]) -> ScanArgs<B> {
        ScanArgs {
            u: up(u.expect(READ)),
            delta: up(delta.expect(READ)),
            a: up(a.expect(READ)),
            b: up(b.expect(READ)),
            c: up(c.expect(READ)),
            d: d.map(up),
            z: z.map(up),
            delta_bias: delta_bias.map(up),
            state: state.map(up),
            segments: self.segments,
            delta_softplus: self.delta_softplus,
        }
    }
}

impl<B: KernelBackend> Node<B, 9> for SelectiveScan<B> {
    fn backward(self, inputs: [Input<B>; 9], _tracked: [bool; 9], [dy, dstate]: [Input<B>; 2]) -> [Input<B>; 9] {
        let grads = B::selective_scan_backward(self.args(inputs), dy.map(up), dstate.map(up)).expect("a fast path has a backward");
        let [u, delta, b, c] = [grads.u, grads.delta, grads.b, grads.c].map(|grad| Some(down(grad)));
        let [z, state] = [grads.z, grads.state].map(|grad| grad.map(down));
        [u, delta, Some(down(grads.a)), b, c, grads.d.map(down), z, grads.delta_bias.map(down), state]
    }
}

#[derive(Clone, Debug)]
struct Scan<B: Backend> {
    segments: Option<Segments<B>>,
    options: SsdOptions,
}

impl<B: Backend> Scan<B> {
    fn args(self, [x, dt, a, b, c, d, dt_bias, state]: [Input<B>; 8]) -> SsdArgs<B> {
        SsdArgs {
            x: up(x.expect(READ)),
            dt: up(dt.expect(READ)),
            a: up(a.expect(READ)),
            b: up(b.expect(READ)),
            c: up(c.expect(READ)),
            d: d.map(up),
            dt_bias: dt_bias.map(up),
            state: state.map(up),
            segments: self.segments,
            options: self.options,
        }
    }
}

impl<B: KernelBackend> Node<B, 8> for Scan<B> {
    fn backward(self, inputs: [Input<B>; 8], _tracked: [bool; 8], [dy, dstate]: [Input<B>; 2]) -> [Input<B>; 8] {
        let grads = B::ssd_backward(self.args(inputs), dy.map(up), dstate.map(up)).expect("a fast path has a backward");
        let [x, b, c] = [grads.x, grads.b, grads.c].map(|grad| Some(down(grad)));
        let (dt, a) = (Some(down(grads.dt)), Some(down(grads.a)));
        [x, dt, a, b, c, grads.d.map(down), grads.dt_bias.map(down), grads.state.map(down)]
    }
}

#[derive(Clone, Debug)]
struct Norm {
    groups: usize,
    eps: f32,
}

impl Norm {
    fn args<B: Backend>(self, [y, z, weight]: [Input<B>; 3]) -> NormArgs<B> {
        NormArgs { y: up(y.expect(READ)), z: z.map(up), weight: up(weight.expect(READ)), groups: self.groups, eps: self.eps }
    }
}

impl<B: KernelBackend> Node<B, 3> for Norm {
    fn backward(self, inputs: [Input<B>; 3], _tracked: [bool; 3], [dout, _]: [Input<B>; 2]) -> [Input<B>; 3] {
        let dout = up(dout.expect("the output's gradient"));
        let grads = B::rms_norm_gated_backward(self.args(inputs), dout).expect("a fast path has a backward");
        [Some(down(grads.y)), grads.z.map(down), Some(down(grads.weight))]
    }
}

/// Output and log-sum-exps of attention.
type Outcome<B> = (Tensor<B, 4>, Tensor<B, 3>);

#[derive(Clone, Debug)]
struct ResidualNorm<B: Backend> {
    eps: f32,
    /// Dtype of what is normed.
    dtype: DType,
    /// That of the bias of a layer norm.
    bias: Option<DType>,
    /// Given by the forward.
    sum: Arc<OnceLock<Tensor<B, 3>>>,
}

impl<B: KernelBackend> Node<B, 4> for ResidualNorm<B> {
    /// The sum is kept in place of what was added.
    fn reads(_tracked: [bool; 4]) -> [bool; 4] {
        [false, false, true, false]
    }

    fn backward(self, [_, _, weight, _]: [Input<B>; 4], _tracked: [bool; 4], [dnormed, dsum]: [Input<B>; 2]) -> [Input<B>; 4] {
        let sum = self.sum.get().expect("the forward has run").clone();
        let dnormed = match dnormed {
            Some(dnormed) => up(dnormed),
            None => Tensor::zeros(sum.dims(), (&sum.device(), self.dtype)),
        };
        let kept = ResidualNormKept { sum, weight: up(weight.expect(READ)), bias: self.bias, eps: self.eps, dtype: self.dtype };
        let grads = B::norm_residual_backward(kept, dnormed, dsum.map(up)).expect("a fast path has a backward");
        [Some(down(grads.x)), Some(down(grads.residual)), Some(down(grads.weight)), grads.bias.map(down)]
    }
}

#[derive(Clone, Debug)]
struct Attention<B: Backend> {
    scale: f32,
    mask: AttentionMask<B>,
    /// Output and log-sum-exps, for a backend whose backward reads them.
    saved: Arc<Mutex<Option<Outcome<B>>>>,
}

impl<B: Backend> Attention<B> {
    fn args(self, [q, k, v]: [Input<B>; 3]) -> AttentionArgs<B> {
        AttentionArgs { q: up(q.expect(READ)), k: up(k.expect(READ)), v: up(v.expect(READ)), scale: self.scale, mask: self.mask }
    }
}

impl<B: KernelBackend> Node<B, 3> for Attention<B> {
    fn backward(self, inputs: [Input<B>; 3], _tracked: [bool; 3], [dout, _]: [Input<B>; 2]) -> [Input<B>; 3] {
        let dout = up(dout.expect("the output's gradient"));
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take();
        let grads = B::attention_backward(self.args(inputs), saved, dout).expect("the backend promised gradients");
        [grads.q, grads.k, grads.v].map(|grad| Some(down(grad)))
    }
}

/// Tables of angles, of which no gradient is taken.
#[derive(Clone, Debug)]
struct Rotary<B: Backend> {
    cos: Tensor<B, 4>,
    sin: Tensor<B, 4>,
    back: bool,
}

impl<B: KernelBackend> Node<B, 1> for Rotary<B> {
    fn reads(_tracked: [bool; 1]) -> [bool; 1] {
        [false]
    }

    fn backward(self, _inputs: [Input<B>; 1], _tracked: [bool; 1], [dout, _]: [Input<B>; 2]) -> [Input<B>; 1] {
        let x = up(dout.expect("the output's gradient"));
        [Some(down(B::rotary(RotaryArgs { x, cos: self.cos, sin: self.sin }, !self.back)))]
    }
}

#[derive(Clone, Debug)]
struct Glu {
    activation: Activation,
}

impl Glu {
    fn args<B: Backend>(self, [x, gate]: [Input<B>; 2]) -> GluArgs<B> {
        GluArgs { up: up(x.expect(READ)), gate: gate.map(up), activation: self.activation }
    }
}

impl<B: KernelBackend> Node<B, 2> for Glu {
    fn backward(self, inputs: [Input<B>; 2], _tracked: [bool; 2], [dout, _]: [Input<B>; 2]) -> [Input<B>; 2] {
        let dout = up(dout.expect("the output's gradient"));
        let grads = B::glu_backward(self.args(inputs), dout).expect("a fast path has a backward");
        [Some(down(grads.up)), grads.gate.map(down)]
    }
}

#[derive(Clone, Debug)]
struct CrossEntropy<B: Backend> {
    targets: Tensor<B, 1, Int>,
    /// Given by the forward.
    log_sum: Arc<OnceLock<Tensor<B, 1>>>,
}

impl<B: KernelBackend> Node<B, 1> for CrossEntropy<B> {
    fn backward(self, [logits]: [Input<B>; 1], _tracked: [bool; 1], [dloss, _]: [Input<B>; 2]) -> [Input<B>; 1] {
        let args = CrossEntropyArgs { logits: up(logits.expect(READ)), targets: self.targets };
        let log_sum = self.log_sum.get().expect("the forward has run").clone();
        let dloss = up(dloss.expect("the output's gradient"));
        [Some(down(B::cross_entropy_backward(args, log_sum, dloss).expect("a fast path has a backward")))]
    }
}

/// The last axis in two.
#[derive(Clone, Debug)]
struct Heads;

impl<B: KernelBackend> Node<B, 1> for Heads {
    fn reads(_tracked: [bool; 1]) -> [bool; 1] {
        [false]
    }

    fn backward(self, _inputs: [Input<B>; 1], _tracked: [bool; 1], [dout, _]: [Input<B>; 2]) -> [Input<B>; 1] {
        let dout: Tensor<B, 4> = up(dout.expect("the output's gradient"));
        let [b, l, count, width] = dout.dims();
        [Some(down(dout.reshape([b, l, count * width])))]
    }
}

#[derive(Clone, Debug)]
struct Embedding<B: Backend> {
    ids: Tensor<B, 2, Int>,
    v: usize,
}

impl<B: KernelBackend> Node<B, 1> for Embedding<B> {
    fn reads(_tracked: [bool; 1]) -> [bool; 1] {
        [false]
    }

    fn backward(self, _inputs: [Input<B>; 1], _tracked: [bool; 1], [dout, _]: [Input<B>; 2]) -> [Input<B>; 1] {
        let dout = up(dout.expect("the output's gradient"));
        [Some(down(B::embed_backward(self.ids, self.v, dout).expect("a fast path has a backward")))]
    }
}

/// A running sum, whose gradient is one from the other end.
#[derive(Clone, Debug)]
struct RunningSum {
    reverse: bool,
}

impl<B: KernelBackend> Node<B, 1> for RunningSum {
    fn reads(_tracked: [bool; 1]) -> [bool; 1] {
        [false]
    }

    fn backward(self, _inputs: [Input<B>; 1], _tracked: [bool; 1], [dout, _]: [Input<B>; 2]) -> [Input<B>; 1] {
        [Some(down(B::running_sum(up(dout.expect("the output's gradient")), !self.reverse)))]
    }
}

#[derive(Clone, Debug)]
struct Linear;

impl<B: KernelBackend> Node<B, 3> for Linear {
    /// Each gradient reads the other input: activations before a frozen weight are not kept.
    fn reads([x, weight, _]: [bool; 3]) -> [bool; 3] {
        [weight, x, false]
    }

    fn backward(self, [x, weight, _]: [Input<B>; 3], [_, _, bias]: [bool; 3], [dy, _]: [Input<B>; 2]) -> [Input<B>; 3] {
        let kept = LinearKept { x: x.map(up), weight: weight.map(up), bias };
        let grads = B::linear_backward(kept, up(dy.expect("the output's gradient")));
        [grads.x.map(down), grads.weight.map(down), grads.bias.map(down)]
    }
}

impl<B: KernelBackend, C: CheckpointStrategy> KernelBackend for Autodiff<B, C> {
    fn fused(op: Op, dtype: DType) -> Option<&'static str> {
        if op == Op::Attention && !B::attention_trains(dtype) { None } else { B::fused(op, dtype) }
    }

    fn memory(device: &Self::Device) -> Option<Memory> {
        B::memory(device)
    }

    fn capacity(device: &Self::Device) -> Option<u64> {
        B::capacity(device)
    }

    fn causal_conv1d(args: ConvArgs<Self>) -> ConvOut<Self> {
        if !runs::<B>(Op::CausalConv1d, args.x.dtype(), &args.sizes(), &args.x.device()) {
            return causal_conv1d::reference::causal_conv1d(args);
        }
        let node = Conv { segments: args.segments.as_ref().map(Segments::inner), silu: args.silu };
        let inputs = [Some(down(args.x)), Some(down(args.weight)), args.bias.map(down), args.state.map(down)];
        let (y, state) = record::<B, C, _, 4>(node.clone(), inputs, |inputs| {
            let out = B::causal_conv1d(node.args(inputs));
            (down(out.y), Some(down(out.state)))
        });
        ConvOut { y: up(y), state: up(state.expect("two outputs")) }
    }

    fn selective_scan(args: ScanArgs<Self>) -> ScanOut<Self> {
        if !runs::<B>(Op::SelectiveScan, args.u.dtype(), &args.sizes(), &args.u.device()) {
            return selective_scan::reference::selective_scan(args);
        }
        let node = SelectiveScan { segments: args.segments.as_ref().map(Segments::inner), delta_softplus: args.delta_softplus };
        let [u, delta, b, c] = [args.u, args.delta, args.b, args.c].map(|tensor| Some(down(tensor)));
        let [z, state] = [args.z, args.state].map(|tensor| tensor.map(down));
        let inputs = [u, delta, Some(down(args.a)), b, c, args.d.map(down), z, args.delta_bias.map(down), state];
        let (y, state) = record::<B, C, _, 9>(node.clone(), inputs, |inputs| {
            let out = B::selective_scan(node.args(inputs));
            (down(out.y), Some(down(out.state)))
        });
        ScanOut { y: up(y), state: up(state.expect("two outputs")) }
    }

    fn ssd(args: SsdArgs<Self>) -> SsdOut<Self> {
        if !runs::<B>(Op::Ssd, args.x.dtype(), &[], &args.x.device()) {
            return ssd::reference::ssd(args);
        }
        let node = Scan { segments: args.segments.as_ref().map(Segments::inner), options: args.options };
        let [x, b, c] = [args.x, args.b, args.c].map(|tensor| Some(down(tensor)));
        let (dt, a) = (Some(down(args.dt)), Some(down(args.a)));
        let inputs = [x, dt, a, b, c, args.d.map(down), args.dt_bias.map(down), args.state.map(down)];
        let (y, state) = record::<B, C, _, 8>(node.clone(), inputs, |inputs| {
            let out = B::ssd(node.args(inputs));
            (down(out.y), Some(down(out.state)))
        });
        SsdOut { y: up(y), state: up(state.expect("two outputs")) }
    }

    fn rms_norm_gated(args: NormArgs<Self>) -> Tensor<Self, 3> {
        if fused::<B>(Op::RmsNormGated, args.y.dtype()).is_none() {
            return rms_norm_gated::reference::rms_norm_gated(args);
        }
        let node = Norm { groups: args.groups, eps: args.eps };
        let inputs = [Some(down(args.y)), args.z.map(down), Some(down(args.weight))];
        up(record::<B, C, _, 3>(node.clone(), inputs, |inputs| (down(B::rms_norm_gated(node.args(inputs))), None)).0)
    }

    fn norm_residual(args: ResidualNormArgs<Self>) -> ResidualNormOut<Self> {
        let dtype = args.dtype();
        if fused::<B>(Op::NormResidual, dtype).is_none() {
            return norm_residual::reference::norm_residual(args);
        }
        let eps = args.eps;
        let node = ResidualNorm { eps, dtype, bias: args.bias.as_ref().map(Tensor::dtype), sum: Arc::default() };
        let kept = node.sum.clone();
        let inputs = [args.x.map(down), Some(down(args.residual)), Some(down(args.weight)), args.bias.map(down)];
        let (normed, sum) = record::<B, C, _, 4>(node, inputs, |[x, residual, weight, bias]| {
            let (residual, weight) = (up(residual.expect(READ)), up(weight.expect(READ)));
            let out = B::norm_residual(ResidualNormArgs { x: x.map(up), residual, weight, bias: bias.map(up), eps });
            // A node that runs once sets it once.
            let _ = kept.set(out.sum.clone());
            (down(out.normed), Some(down(out.sum)))
        });
        ResidualNormOut { normed: up(normed), sum: up(sum.expect("two outputs")) }
    }

    fn attention(args: AttentionArgs<Self>) -> Tensor<Self, 4> {
        let dtype = args.q.dtype();
        let [q, k, v] = [args.q, args.k, args.v].map(down);
        let tracked = q.is_tracked() || k.is_tracked() || v.is_tracked();
        if tracked && !B::attention_trains(dtype) {
            return attention::reference::attention(AttentionArgs { q: up(q), k: up(k), v: up(v), ..args });
        }
        let saved = Arc::default();
        let node = Attention { scale: args.scale, mask: args.mask.inner(), saved: Arc::clone(&saved) };
        up(record::<B, C, _, 3>(node.clone(), [Some(q), Some(k), Some(v)], |inputs| {
            if !tracked {
                return (down(<B as KernelBackend>::attention(node.args(inputs))), None);
            }
            let (out, lse) = B::attention_saving(node.args(inputs));
            *saved.lock().unwrap_or_else(PoisonError::into_inner) = lse.map(|lse| (out.clone(), lse));
            (down(out), None)
        })
        .0)
    }

    fn rotary(args: RotaryArgs<Self>, back: bool) -> Tensor<Self, 4> {
        let node = Rotary { cos: args.cos.inner(), sin: args.sin.inner(), back };
        let (cos, sin) = (node.cos.clone(), node.sin.clone());
        let turn = |[x]: [Input<B>; 1]| (down(B::rotary(RotaryArgs { x: up(x.expect(READ)), cos, sin }, back)), None);
        up(record::<B, C, _, 1>(node, [Some(down(args.x))], turn).0)
    }

    fn glu(args: GluArgs<Self>) -> Tensor<Self, 3> {
        if !runs::<B>(Op::Glu, args.up.dtype(), &args.sizes(), &args.up.device()) {
            return glu::reference::glu(args);
        }
        let node = Glu { activation: args.activation };
        let inputs = [Some(down(args.up)), args.gate.map(down)];
        up(record::<B, C, _, 2>(node.clone(), inputs, |inputs| (down(B::glu(node.args(inputs))), None)).0)
    }

    fn embed(weight: Tensor<Self, 2>, ids: Tensor<Self, 2, Int>) -> Tensor<Self, 3> {
        if fused::<B>(Op::Embedding, weight.dtype()).is_none() {
            return burn::tensor::module::embedding(weight, ids);
        }
        let node = Embedding { ids: ids.inner(), v: weight.dims()[0] };
        let ids = node.ids.clone();
        up(record::<B, C, _, 1>(node, [Some(down(weight))], |[weight]| (down(B::embed(up(weight.expect(READ)), ids)), None)).0)
    }

    fn running_sum(x: Tensor<Self, 3>, reverse: bool) -> Tensor<Self, 3> {
        up(record::<B, C, _, 1>(RunningSum { reverse }, [Some(down(x))], |[x]| (down(B::running_sum(up(x.expect(READ)), reverse)), None)).0)
    }

    fn cross_entropy(args: CrossEntropyArgs<Self>) -> CrossEntropyOut<Self> {
        if fused::<B>(Op::CrossEntropy, args.logits.dtype()).is_none() {
            return cross_entropy::reference::cross_entropy(args);
        }
        let node = CrossEntropy { targets: args.targets.inner(), log_sum: Arc::default() };
        let (targets, log_sum) = (node.targets.clone(), node.log_sum.clone());
        let (loss, _) = record::<B, C, _, 1>(node, [Some(down(args.logits))], |[logits]| {
            let out = B::cross_entropy(CrossEntropyArgs { logits: up(logits.expect(READ)), targets });
            // A node that runs once sets it once.
            let _ = log_sum.set(out.log_sum);
            (down(out.loss), None)
        });
        let log_sum = log_sum.get().expect("set above").clone();
        CrossEntropyOut { loss: up(loss), log_sum: Tensor::from_inner(log_sum) }
    }

    fn linear(x: Tensor<Self, 2>, weight: Tensor<Self, 2>, bias: Option<Tensor<Self, 1>>) -> Tensor<Self, 2> {
        let inputs = [Some(down(x)), Some(down(weight)), bias.map(down)];
        up(record::<B, C, _, 3>(Linear, inputs, |[x, weight, bias]| {
            (down(<B as KernelBackend>::linear(up(x.expect(READ)), up(weight.expect(READ)), bias.map(up))), None)
        })
        .0)
    }

    fn split(x: Tensor<Self, 3>, widths: &[usize]) -> Vec<Tensor<Self, 3>> {
        crate::split::record(x, widths)
    }

    fn heads(x: Tensor<Self, 3>, count: usize) -> Tensor<Self, 4> {
        up(record::<B, C, _, 1>(Heads, [Some(down(x))], |[x]| (down(B::heads(up(x.expect(READ)), count)), None)).0)
    }
}
