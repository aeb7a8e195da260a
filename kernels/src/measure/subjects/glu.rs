use burn::tensor::{DType, Tensor};

use super::{Cost, Subject, Work};
use crate::glu::{Activation, GluArgs};
use crate::measure::data::{Deviation, Source, host, width};
use crate::measure::truth::activate;
use crate::{KernelBackend, Op};

/// Activation of a feed-forward block.
#[derive(Debug, Clone, Copy)]
pub(in crate::measure) struct Glu {
    pub b: usize,
    pub l: usize,
    pub f: usize,
    pub activation: Activation,
    pub gated: bool,
    pub dtype: DType,
}

pub(in crate::measure) struct Set<B: KernelBackend> {
    args: GluArgs<B>,
    dout: Tensor<B, 3>,
}

impl<B: KernelBackend> Subject<B> for Glu {
    type Set = Set<B>;

    fn op(&self) -> &'static str {
        "glu"
    }

    fn kernel(&self) -> Op {
        Op::Glu
    }

    fn shape(&self) -> String {
        let name = format!("{:?}", self.activation).to_lowercase();
        let gate = if self.gated { "" } else { " no gate" };
        format!("b={} l={} f={} {name}{gate}", self.b, self.l, self.f)
    }

    fn sizes(&self) -> Vec<usize> {
        vec![self.b * self.l * self.f]
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn cost(&self) -> Cost {
        let elements = (self.b * self.l * self.f) as f64;
        let (size, inputs) = (elements * width(self.dtype) as f64, if self.gated { 2.0 } else { 1.0 });
        let forward = Work { bytes: (inputs + 1.0) * size, flop: 8.0 * elements };
        Cost { forward, backward: Some(Work { bytes: (2.0 * inputs + 1.0) * size, flop: 16.0 * elements }) }
    }

    fn set(&self, source: &Source<B>) -> Set<B> {
        let shape = [self.b, self.l, self.f];
        let (up, gate) = (source.normal(shape), self.gated.then(|| source.normal(shape)));
        Set { args: GluArgs { up, gate, activation: self.activation }, dout: source.normal(shape) }
    }

    fn forward(&self, set: &mut Set<B>) {
        drop(B::glu(set.args.clone()));
    }

    fn backward(&self, set: &mut Set<B>) -> bool {
        B::glu_backward(set.args.clone(), set.dout.clone()).is_some()
    }

    fn check(&self, source: &Source<B>, backward: bool, work: usize) -> Vec<Deviation> {
        let Self { b, l, f, activation, .. } = *self;
        let Set { args, dout } = self.set(source);
        let (row, first) = (b - 1, l - (work / (256 * f)).clamp(1, l));
        let part = |t: &Tensor<B, 3>| host(t, [row..b, first..l, 0..f]);
        let (up, dout_part) = (part(&args.up), part(&dout));
        let gate = args.gate.as_ref().map(part);
        let got = part(&B::glu(args.clone()));
        let grads = if backward { B::glu_backward(args, dout) } else { None };

        // Values and slopes of what is activated; of the other factor there is none without a gate.
        let both: Vec<(f64, f64)> = gate.as_ref().unwrap_or(&up).iter().map(|&x| activate(activation, x)).collect();
        let factor = |i: usize| if gate.is_some() { up[i] } else { 1.0 };
        let each = |value: &dyn Fn(usize) -> f64| -> Vec<f64> { (0..up.len()).map(value).collect() };
        let mut found = vec![Deviation::new("out", &got, &each(&|i| both[i].0 * factor(i)))];
        let Some(grads) = grads else { return found };
        let slopes = each(&|i| dout_part[i] * both[i].1 * factor(i));
        match &grads.gate {
            Some(dgate) => {
                found.push(Deviation::new("dup", &part(&grads.up), &each(&|i| dout_part[i] * both[i].0)));
                found.push(Deviation::new("dgate", &part(dgate), &slopes));
            }
            None => found.push(Deviation::new("dup", &part(&grads.up), &slopes)),
        }
        found
    }
}
