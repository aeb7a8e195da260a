use burn::tensor::{DType, Tensor};

use super::{Cost, Subject, Work};
use crate::linear::LinearKept;
use crate::measure::data::{Deviation, Source, host, host_span, width};
use crate::measure::truth::linear::{Problem, run};
use crate::{KernelBackend, Op};

/// A linear layer.
#[derive(Debug, Clone, Copy)]
pub(in crate::measure) struct Linear {
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub dtype: DType,
    pub bias: bool,
}

pub(in crate::measure) struct Set<B: KernelBackend> {
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
    dy: Tensor<B, 2>,
}

impl<B: KernelBackend> Set<B> {
    fn forward(&self) -> Tensor<B, 2> {
        <B as KernelBackend>::linear(self.x.clone(), self.weight.clone(), self.bias.clone())
    }

    fn kept(&self) -> LinearKept<B> {
        LinearKept { x: Some(self.x.clone()), weight: Some(self.weight.clone()), bias: self.bias.is_some() }
    }
}

/// Up to here a call is one of decoding, which is never differentiated.
const FEW: usize = 128;

impl<B: KernelBackend> Subject<B> for Linear {
    type Set = Set<B>;

    fn op(&self) -> &'static str {
        "linear"
    }

    fn kernel(&self) -> Op {
        Op::Linear
    }

    fn shape(&self) -> String {
        let Self { rows, inputs, outputs, bias, .. } = *self;
        format!("rows={rows} in={inputs} out={outputs}{}", if bias { " bias" } else { "" })
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn cost(&self) -> Cost {
        let [rows, inputs, outputs] = [self.rows, self.inputs, self.outputs].map(|n| n as f64);
        let (x, weight, y) = (rows * inputs, inputs * outputs, rows * outputs);
        let bytes = |elements: f64| elements * width(self.dtype) as f64;
        let flop = 2.0 * rows * inputs * outputs;
        let backward = Work { bytes: bytes(2.0 * (x + weight) + y), flop: 2.0 * flop };
        let trains = self.rows > FEW || self.inputs < 1024;
        Cost { forward: Work { bytes: bytes(x + weight + y), flop }, backward: trains.then_some(backward) }
    }

    fn set(&self, source: &Source<B>) -> Set<B> {
        let Self { rows, inputs, outputs, .. } = *self;
        let [x, dy] = [[rows, inputs], [rows, outputs]].map(|shape| source.normal(shape));
        Set { x, weight: source.normal([outputs, inputs]), bias: self.bias.then(|| source.normal([outputs])), dy }
    }

    fn forward(&self, set: &mut Set<B>) {
        drop(set.forward());
    }

    fn backward(&self, set: &mut Set<B>) -> bool {
        drop(B::linear_backward(set.kept(), set.dy.clone()));
        true
    }

    fn check(&self, source: &Source<B>, backward: bool, work: usize) -> Vec<Deviation> {
        let Self { rows, inputs, outputs, .. } = *self;
        // The last rows and outputs, where a ragged tile would go wrong.
        let first = rows - rows.min(65);
        let left = outputs - (work / (4 * inputs * (rows - first))).clamp(1, outputs);
        let mut set = self.set(source);
        set.dy = source.only(set.dy, [first..rows, left..outputs]);
        let problem = Problem {
            inputs,
            outputs: outputs - left,
            x: host(&set.x, [first..rows, 0..inputs]),
            weight: host(&set.weight, [left..outputs, 0..inputs]),
            bias: set.bias.as_ref().map(|bias| host_span(bias, left..outputs)).unwrap_or_default(),
            dy: host(&set.dy, [first..rows, left..outputs]),
        };
        let truth = run(&problem);
        let mut found = vec![Deviation::new("y", &host(&set.forward(), [first..rows, left..outputs]), &truth.y)];
        if !backward {
            return found;
        }
        let grads = B::linear_backward(set.kept(), set.dy);
        let mut add = |name, got: Option<Vec<f64>>, want: &[f64]| found.extend(got.map(|got| Deviation::new(name, &got, want)));
        add("dx", grads.x.map(|dx| host(&dx, [first..rows, 0..inputs])), &truth.dx);
        add("dweight", grads.weight.map(|dw| host(&dw, [left..outputs, 0..inputs])), &truth.dweight);
        add("dbias", grads.bias.map(|db| host_span(&db, left..outputs)), &truth.dbias);
        found
    }
}
