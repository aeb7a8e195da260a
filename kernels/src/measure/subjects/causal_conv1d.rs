use burn::tensor::{DType, Tensor};

use super::{Cost, Subject, Work};
use crate::causal_conv1d::{ConvArgs, ConvGrads};
use crate::measure::data::{Deviation, Documents, Source, host, host_span, row_ids, width};
use crate::measure::truth::causal_conv1d::{Problem, run};
use crate::{KernelBackend, Op};

/// The convolution with SiLU; with one token the decoding step.
#[derive(Debug, Clone, Copy)]
pub(in crate::measure) struct Conv {
    pub b: usize,
    pub l: usize,
    pub e: usize,
    pub k: usize,
    pub dtype: DType,
    /// A state comes in.
    pub state: bool,
    pub documents: Documents,
}

pub(in crate::measure) struct Set<B: KernelBackend> {
    args: ConvArgs<B>,
    dy: Tensor<B, 3>,
}

impl Conv {
    fn step(&self) -> bool {
        self.l == 1 && self.state
    }
}

impl<B: KernelBackend> Subject<B> for Conv {
    type Set = Set<B>;

    fn op(&self) -> &'static str {
        if self.step() { "causal_conv1d_step" } else { "causal_conv1d" }
    }

    fn kernel(&self) -> Op {
        Op::CausalConv1d
    }

    fn shape(&self) -> String {
        let Self { b, l, e, k, .. } = *self;
        if self.step() {
            return format!("b={b} e={e} k={k}");
        }
        format!("b={b} l={l} e={e} k={k}{}{}", if self.state { " state" } else { "" }, self.documents.suffix())
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn cost(&self) -> Cost {
        let [b, l, e, k] = [self.b, self.l, self.e, self.k].map(|v| v as f64);
        let size = width(self.dtype) as f64;
        let (x, state) = (b * l * e * size, b * (k - 1.0) * e * size);
        let incoming = if self.state { state } else { 0.0 };
        let flop = 2.0 * k * b * l * e;
        let forward = Work { bytes: 2.0 * x + state + incoming, flop };
        let backward = Work { bytes: 3.0 * x + 2.0 * incoming, flop: 2.0 * flop };
        Cost { forward, backward: (!self.step()).then_some(backward) }
    }

    fn set(&self, source: &Source<B>) -> Set<B> {
        let Self { b, l, e, k, .. } = *self;
        let args = ConvArgs {
            x: source.normal([b, l, e]),
            weight: source.uniform32([e, k], -0.5, 0.5),
            bias: Some(source.uniform32([e], -0.5, 0.5)),
            state: self.state.then(|| source.normal([b, k - 1, e])),
            segments: self.documents.segments(b, l, source.device),
            silu: true,
        };
        Set { args, dy: source.normal([b, l, e]) }
    }

    fn forward(&self, set: &mut Set<B>) {
        let args = set.args.clone();
        if self.step() {
            set.args.state = None;
            set.args.state = Some(B::causal_conv1d(args).state);
        } else {
            drop(B::causal_conv1d(args));
        }
    }

    fn backward(&self, set: &mut Set<B>) -> bool {
        B::causal_conv1d_backward(set.args.clone(), Some(set.dy.clone()), None).is_some()
    }

    fn check(&self, source: &Source<B>, backward: bool, work: usize) -> Vec<Deviation> {
        let Self { b, l, e, k, .. } = *self;
        let (row, first) = (b - 1, e - (work / (8 * l * k)).clamp(1, e));
        let Set { args, dy } = self.set(source);
        let dy = source.only(dy, [row..b, 0..l, first..e]);

        let sequence = |t: &Tensor<B, 3>| host(t, [row..b, 0..l, first..e]);
        let states = |t: &Tensor<B, 3>| host(t, [row..b, 0..k - 1, first..e]);
        let weights = |t: &Tensor<B, 2>| host(t, [first..e, 0..k]);
        let channel = |t: &Tensor<B, 1>| host_span(t, first..e);
        let problem = Problem {
            l,
            e: e - first,
            k,
            x: sequence(&args.x),
            weight: weights(&args.weight),
            bias: args.bias.as_ref().map(channel).unwrap_or_default(),
            state: args.state.as_ref().map(states).unwrap_or_default(),
            ids: row_ids(args.segments.as_ref(), row),
            silu: args.silu,
        };
        let y = sequence(&B::causal_conv1d(args.clone()).y);
        let cotangent = sequence(&dy);
        let grads = if backward && !self.step() { B::causal_conv1d_backward(args, Some(dy), None) } else { None };
        let truth = run(&problem, grads.is_some().then_some(&cotangent));

        let mut found = vec![Deviation::new("y", &y, &truth.y)];
        let Some(ConvGrads { x, weight, bias, state }) = grads else { return found };
        found.push(Deviation::new("dx", &sequence(&x), &truth.dx));
        found.push(Deviation::new("dweight", &weights(&weight), &truth.dweight));
        found.extend(bias.map(|bias| Deviation::new("dbias", &channel(&bias), &truth.dbias)));
        found.extend(state.map(|state| Deviation::new("dstate", &states(&state), &truth.dstate)));
        found
    }
}
