use burn::tensor::{DType, Tensor};

use super::{Cost, Subject, Work};
use crate::measure::data::{Deviation, Documents, Source, host, host_span, row_ids, width};
use crate::measure::truth::selective_scan::{Cotangents, Problem, run};
use crate::selective_scan::{ScanArgs, ScanGrads};
use crate::{KernelBackend, Op};

/// The scan of Mamba-1; with one token the decoding step.
#[derive(Debug, Clone, Copy)]
pub(in crate::measure) struct Scan {
    pub b: usize,
    pub l: usize,
    pub e: usize,
    pub n: usize,
    pub dtype: DType,
    /// A state comes in, and the one that goes out has a gradient.
    pub state: bool,
    /// The output is gated.
    pub gate: bool,
    pub documents: Documents,
}

pub(in crate::measure) struct Set<B: KernelBackend> {
    args: ScanArgs<B>,
    dy: Tensor<B, 3>,
    dstate: Option<Tensor<B, 3>>,
}

impl Scan {
    fn step(&self) -> bool {
        self.l == 1 && self.state
    }
}

impl<B: KernelBackend> Subject<B> for Scan {
    type Set = Set<B>;

    fn op(&self) -> &'static str {
        if self.step() { "selective_scan_step" } else { "selective_scan" }
    }

    fn kernel(&self) -> Op {
        Op::SelectiveScan
    }

    fn shape(&self) -> String {
        let Self { b, l, e, n, .. } = *self;
        let gate = if self.gate { " z" } else { "" };
        if self.step() {
            return format!("b={b} e={e} n={n}{gate}");
        }
        let state = if self.state { " state" } else { "" };
        format!("b={b} l={l} e={e} n={n}{gate}{state}{}", self.documents.suffix())
    }

    fn sizes(&self) -> Vec<usize> {
        vec![self.b, self.l, self.e, self.n]
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn cost(&self) -> Cost {
        let [b, l, e, n] = [self.b, self.l, self.e, self.n].map(|v| v as f64);
        let size = width(self.dtype) as f64;
        let (u, bc, state) = (b * l * e * size, b * l * n * size, b * e * n * 4.0);
        let inputs = u * if self.gate { 3.0 } else { 2.0 } + 2.0 * bc + if self.state { state } else { 0.0 };
        let flop = 9.0 * b * l * e * n;
        let forward = Work { bytes: inputs + u + state, flop };
        let backward = Work { bytes: 2.0 * inputs + u + if self.state { state } else { 0.0 }, flop: 2.5 * flop };
        Cost { forward, backward: (!self.step()).then_some(backward) }
    }

    fn set(&self, source: &Source<B>) -> Set<B> {
        let Self { b, l, e, n, .. } = *self;
        let args = ScanArgs {
            u: source.normal([b, l, e]),
            delta: source.normal([b, l, e]),
            a: source.uniform32([e, n], -(n as f64), -1.0),
            b: source.normal([b, l, n]),
            c: source.normal([b, l, n]),
            d: Some(source.normal32([e])),
            z: self.gate.then(|| source.normal([b, l, e])),
            delta_bias: Some(source.uniform32([e], -6.9, -2.3)),
            state: self.state.then(|| source.normal32([b, e, n])),
            segments: self.documents.segments(b, l, source.device),
            delta_softplus: true,
        };
        Set { args, dy: source.normal([b, l, e]), dstate: (self.state && !self.step()).then(|| source.normal32([b, e, n])) }
    }

    fn forward(&self, set: &mut Set<B>) {
        let args = set.args.clone();
        if self.step() {
            set.args.state = None;
            set.args.state = Some(B::selective_scan(args).state);
        } else {
            drop(B::selective_scan(args));
        }
    }

    fn backward(&self, set: &mut Set<B>) -> bool {
        B::selective_scan_backward(set.args.clone(), Some(set.dy.clone()), set.dstate.clone()).is_some()
    }

    fn check(&self, source: &Source<B>, backward: bool, work: usize) -> Vec<Deviation> {
        let Self { b, l, e, n, .. } = *self;
        // The last row and as many of its last channels as `work` allows; an exponential counts for several products.
        let (row, first) = (b - 1, e - (work / (16 * l * n)).clamp(1, e));
        let Set { args, dy, dstate } = self.set(source);
        let dy = source.only(dy, [row..b, 0..l, first..e]);
        let dstate = dstate.map(|dstate| source.only(dstate, [row..b, first..e, 0..n]));

        let sequence = |t: &Tensor<B, 3>| host(t, [row..b, 0..l, first..e]);
        let shared = |t: &Tensor<B, 3>| host(t, [row..b, 0..l, 0..n]);
        let states = |t: &Tensor<B, 3>| host(t, [row..b, first..e, 0..n]);
        let channel = |t: &Tensor<B, 1>| host_span(t, first..e);
        let rates = |t: &Tensor<B, 2>| host(t, [first..e, 0..n]);
        let problem = Problem {
            l,
            e: e - first,
            n,
            u: sequence(&args.u),
            delta: sequence(&args.delta),
            a: rates(&args.a),
            b: shared(&args.b),
            c: shared(&args.c),
            d: args.d.as_ref().map(channel).unwrap_or_default(),
            z: args.z.as_ref().map(sequence).unwrap_or_default(),
            delta_bias: args.delta_bias.as_ref().map(channel).unwrap_or_default(),
            state: args.state.as_ref().map(states).unwrap_or_default(),
            ids: row_ids(args.segments.as_ref(), row),
            softplus: true,
        };
        let out = B::selective_scan(args.clone());
        let (y, state) = (sequence(&out.y), states(&out.state));
        drop(out);
        let cotangents = Cotangents { y: sequence(&dy), state: dstate.as_ref().map(states).unwrap_or_default() };
        let grads = if backward && !self.step() { B::selective_scan_backward(args, Some(dy), dstate) } else { None };
        let truth = run(&problem, grads.is_some().then_some(&cotangents));

        let mut found = vec![Deviation::new("y", &y, &truth.y), Deviation::new("state", &state, &truth.state)];
        let Some(ScanGrads { u, delta, a, b, c, d, z, delta_bias, state }) = grads else { return found };
        found.push(Deviation::new("du", &sequence(&u), &truth.du));
        found.push(Deviation::new("ddelta", &sequence(&delta), &truth.ddelta));
        found.push(Deviation::new("da", &rates(&a), &truth.da));
        found.push(Deviation::new("db", &shared(&b), &truth.db));
        found.push(Deviation::new("dc", &shared(&c), &truth.dc));
        found.extend(d.map(|d| Deviation::new("dd", &channel(&d), &truth.dd)));
        found.extend(z.map(|z| Deviation::new("dz", &sequence(&z), &truth.dz)));
        found.extend(delta_bias.map(|bias| Deviation::new("dbias", &channel(&bias), &truth.ddelta_bias)));
        found.extend(state.map(|state| Deviation::new("dstate", &states(&state), &truth.dstate)));
        found
    }
}
