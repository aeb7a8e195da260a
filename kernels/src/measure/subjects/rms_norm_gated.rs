use burn::tensor::{DType, Tensor};

use super::{Cost, Subject, Work};
use crate::measure::data::{Deviation, Source, host, host_all, width};
use crate::measure::truth::rms_norm::{Problem, run};
use crate::rms_norm_gated::{NormArgs, NormGrads};
use crate::{KernelBackend, Op};

/// The norm, gated or plain.
#[derive(Debug, Clone, Copy)]
pub(in crate::measure) struct Norm {
    pub b: usize,
    pub l: usize,
    pub e: usize,
    pub groups: usize,
    pub dtype: DType,
    pub gate: bool,
}

pub(in crate::measure) struct Set<B: KernelBackend> {
    args: NormArgs<B>,
    dout: Tensor<B, 3>,
}

impl<B: KernelBackend> Subject<B> for Norm {
    type Set = Set<B>;

    fn op(&self) -> &'static str {
        if self.gate { "rms_norm_gated" } else { "rms_norm" }
    }

    fn kernel(&self) -> Op {
        Op::RmsNormGated
    }

    fn shape(&self) -> String {
        let Self { b, l, e, groups, .. } = *self;
        format!("b={b} l={l} e={e} groups={groups}")
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn cost(&self) -> Cost {
        let elements = (self.b * self.l * self.e) as f64;
        let signal = elements * width(self.dtype) as f64;
        let inputs = signal * if self.gate { 2.0 } else { 1.0 };
        let forward = Work { bytes: inputs + signal, flop: 8.0 * elements };
        Cost { forward, backward: Some(Work { bytes: 2.0 * inputs + signal, flop: 16.0 * elements }) }
    }

    fn set(&self, source: &Source<B>) -> Set<B> {
        let Self { b, l, e, groups, .. } = *self;
        let args = NormArgs {
            y: source.normal([b, l, e]),
            z: self.gate.then(|| source.normal([b, l, e])),
            weight: source.uniform32([e], 0.5, 1.5),
            groups,
            eps: 1e-5,
        };
        Set { args, dout: source.normal([b, l, e]) }
    }

    fn forward(&self, set: &mut Set<B>) {
        drop(B::rms_norm_gated(set.args.clone()));
    }

    fn backward(&self, set: &mut Set<B>) -> bool {
        B::rms_norm_gated_backward(set.args.clone(), set.dout.clone()).is_some()
    }

    fn check(&self, source: &Source<B>, backward: bool, work: usize) -> Vec<Deviation> {
        let Self { b, l, e, groups, .. } = *self;
        let (row, first) = (b - 1, l - (work / (32 * e)).clamp(1, l));
        let Set { args, dout } = self.set(source);
        let dout = source.only(dout, [row..b, first..l, 0..e]);
        let tokens = |t: &Tensor<B, 3>| host(t, [row..b, first..l, 0..e]);
        let problem = Problem {
            rows: l - first,
            e,
            groups,
            eps: f64::from(args.eps),
            y: tokens(&args.y),
            z: args.z.as_ref().map(tokens).unwrap_or_default(),
            weight: host_all(Some(&args.weight)),
            bias: Vec::new(),
        };
        let out = tokens(&B::rms_norm_gated(args.clone()));
        let cotangent = tokens(&dout);
        let grads = if backward { B::rms_norm_gated_backward(args, dout) } else { None };
        let truth = run(&problem, grads.is_some().then_some(&cotangent));

        let mut found = vec![Deviation::new("out", &out, &truth.out)];
        let Some(NormGrads { y, z, weight }) = grads else { return found };
        found.push(Deviation::new("dy", &tokens(&y), &truth.dy));
        found.extend(z.map(|z| Deviation::new("dz", &tokens(&z), &truth.dz)));
        found.push(Deviation::new("dweight", &host_all(Some(&weight)), &truth.dweight));
        found
    }
}
