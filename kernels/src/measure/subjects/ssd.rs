use burn::tensor::{DType, Tensor};

use super::{Cost, Subject, Work};
use crate::measure::data::{Deviation, Documents, Source, host, host_span, row_ids, width};
use crate::measure::truth::ssd::{Cotangents, Problem, run};
use crate::ssd::{SsdArgs, SsdGrads, SsdOptions};
use crate::{KernelBackend, Op};

/// The scan of Mamba-2; with one token the decoding step.
#[derive(Debug, Clone, Copy)]
pub(in crate::measure) struct Ssd {
    pub b: usize,
    pub l: usize,
    pub h: usize,
    pub p: usize,
    pub g: usize,
    pub n: usize,
    pub dtype: DType,
    /// A state comes in, and the one that goes out has a gradient.
    pub state: bool,
    /// `dt` passes through bias and softplus.
    pub softplus: bool,
    pub documents: Documents,
}

pub(in crate::measure) struct Set<B: KernelBackend> {
    args: SsdArgs<B>,
    dy: Tensor<B, 4>,
    dstate: Option<Tensor<B, 4>>,
}

impl Ssd {
    fn step(&self) -> bool {
        self.l == 1 && self.state
    }

    /// The last row and as many of its last heads as `work` allows, but not fewer than four: where the gradient of `A` of one head
    /// nearly cancels, its relative error says nothing.
    fn part(&self, work: usize) -> (usize, usize) {
        let heads = (work / (self.l * self.p * self.n)).clamp(4.min(self.h), self.h);
        (self.b - 1, self.h - heads)
    }
}

impl<B: KernelBackend> Subject<B> for Ssd {
    type Set = Set<B>;

    fn op(&self) -> &'static str {
        if self.step() { "ssd_step" } else { "ssd" }
    }

    fn kernel(&self) -> Op {
        Op::Ssd
    }

    fn shape(&self) -> String {
        let Self { b, l, h, p, g, n, .. } = *self;
        if self.step() {
            return format!("b={b} h={h} p={p} g={g} n={n}");
        }
        let state = if self.state { " state" } else { "" };
        let softplus = if self.softplus { " softplus" } else { "" };
        format!("b={b} l={l} h={h} p={p} g={g} n={n}{state}{softplus}{}", self.documents.suffix())
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn cost(&self) -> Cost {
        let [b, l, h, p, g, n] = [self.b, self.l, self.h, self.p, self.g, self.n].map(|v| v as f64);
        let size = width(self.dtype) as f64;
        let (x, dt, bc, state) = (b * l * h * p * size, b * l * h * 4.0, b * l * g * n * size, b * h * p * n * 4.0);
        let inputs = x + dt + 2.0 * bc + if self.state { state } else { 0.0 };
        let chunk = l.min(256.0);
        let flop = b * l * if self.step() { 6.0 * h * p * n } else { h * (chunk * p + 4.0 * p * n) + chunk * g * n };
        let forward = Work { bytes: inputs + x + state, flop };
        let backward = Work { bytes: 2.0 * inputs + x + if self.state { state } else { 0.0 }, flop: 2.5 * flop };
        Cost { forward, backward: (!self.step()).then_some(backward) }
    }

    fn set(&self, source: &Source<B>) -> Set<B> {
        let Self { b, l, h, p, g, n, .. } = *self;
        // As in the published benchmarks of the reference kernels.
        let args = SsdArgs {
            x: source.normal([b, l, h, p]),
            dt: if self.softplus { source.normal32([b, l, h]) } else { source.steps32([b, l, h]) },
            a: source.uniform32([h], -16.0, -1.0),
            b: source.normal([b, l, g, n]),
            c: source.normal([b, l, g, n]),
            d: Some(source.normal32([h])),
            dt_bias: self.softplus.then(|| source.uniform32([h], -6.0, -3.0)),
            state: self.state.then(|| source.normal32([b, h, p, n])),
            segments: self.documents.segments(b, l, source.device),
            options: SsdOptions { dt_softplus: self.softplus, ..SsdOptions::default() },
        };
        Set { args, dy: source.normal([b, l, h, p]), dstate: (self.state && !self.step()).then(|| source.normal32([b, h, p, n])) }
    }

    fn forward(&self, set: &mut Set<B>) {
        let args = set.args.clone();
        if self.step() {
            // Nobody else holds the state, as in decoding: it may be updated in place.
            set.args.state = None;
            set.args.state = Some(B::ssd(args).state);
        } else {
            drop(B::ssd(args));
        }
    }

    fn backward(&self, set: &mut Set<B>) -> bool {
        B::ssd_backward(set.args.clone(), Some(set.dy.clone()), set.dstate.clone()).is_some()
    }

    fn check(&self, source: &Source<B>, backward: bool, work: usize) -> Vec<Deviation> {
        let Self { b, l, h, p, g, n, .. } = *self;
        let (row, first) = self.part(work);
        let ratio = h / g;
        let (heads, groups) = (first..h, first / ratio..g);
        let Set { args, dy, dstate } = self.set(source);
        let everything = |n: usize| 0..n;
        let dy = source.only(dy, [row..b, everything(l), heads.clone(), everything(p)]);
        let dstate = dstate.map(|dstate| source.only(dstate, [row..b, heads.clone(), everything(p), everything(n)]));

        let sequence = |t: &Tensor<B, 4>| host(t, [row..b, 0..l, heads.clone(), 0..p]);
        let grouped = |t: &Tensor<B, 4>| host(t, [row..b, 0..l, groups.clone(), 0..n]);
        let states = |t: &Tensor<B, 4>| host(t, [row..b, heads.clone(), 0..p, 0..n]);
        let head = |t: &Tensor<B, 1>| host_span(t, heads.clone());
        let steps = |t: &Tensor<B, 3>| host(t, [row..b, 0..l, heads.clone()]);
        let problem = Problem {
            l,
            h: h - first,
            p,
            g: g - groups.start,
            n,
            group: heads.clone().map(|head| head / ratio - groups.start).collect(),
            x: sequence(&args.x),
            dt: steps(&args.dt),
            a: head(&args.a),
            b: grouped(&args.b),
            c: grouped(&args.c),
            d: args.d.as_ref().map(head).unwrap_or_default(),
            dt_bias: args.dt_bias.as_ref().map(head).unwrap_or_default(),
            state: args.state.as_ref().map(states).unwrap_or_default(),
            ids: row_ids(args.segments.as_ref(), row),
            softplus: self.softplus,
        };
        let out = B::ssd(args.clone());
        let (y, state) = (sequence(&out.y), states(&out.state));
        drop(out);
        let cotangents = Cotangents { y: sequence(&dy), state: dstate.as_ref().map(states).unwrap_or_default() };
        let grads = if backward && !self.step() { B::ssd_backward(args, Some(dy), dstate) } else { None };
        let truth = run(&problem, grads.is_some().then_some(&cotangents));

        let mut found = vec![Deviation::new("y", &y, &truth.y)];
        // What the recurrence gives, without the skip connection that dominates it.
        let bare = |values: &[f64]| -> Vec<f64> {
            let skip = |i: usize| problem.d.get(i / p % (h - first)).copied().unwrap_or(0.0) * problem.x[i];
            // Padding has no skip either.
            values.iter().enumerate().map(|(i, v)| if truth.y[i] == 0.0 { *v } else { v - skip(i) }).collect()
        };
        found.push(Deviation::new("y-dx", &bare(&y), &bare(&truth.y)));
        found.push(Deviation::new("state", &state, &truth.state));
        let Some(SsdGrads { x, dt, a, b, c, d, dt_bias, state }) = grads else { return found };
        found.push(Deviation::new("dx", &sequence(&x), &truth.dx));
        found.push(Deviation::new("ddt", &steps(&dt), &truth.ddt));
        found.push(Deviation::new("da", &head(&a), &truth.da));
        found.push(Deviation::new("db", &grouped(&b), &truth.db));
        found.push(Deviation::new("dc", &grouped(&c), &truth.dc));
        found.extend(d.map(|d| Deviation::new("dd", &head(&d), &truth.dd)));
        found.extend(dt_bias.map(|bias| Deviation::new("dbias", &head(&bias), &truth.ddt_bias)));
        found.extend(state.map(|state| Deviation::new("dstate", &states(&state), &truth.dstate)));
        found
    }
}
