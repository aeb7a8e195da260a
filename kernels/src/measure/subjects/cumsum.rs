use burn::tensor::{DType, Tensor};

use super::{Cost, Subject, Work};
use crate::measure::data::{Deviation, Source, host};
use crate::{KernelBackend, Op};

/// Running sum along the middle, float32.
#[derive(Debug, Clone, Copy)]
pub(in crate::measure) struct RunningSum {
    pub outer: usize,
    pub n: usize,
    pub inner: usize,
}

impl<B: KernelBackend> Subject<B> for RunningSum {
    type Set = Tensor<B, 3>;

    fn op(&self) -> &'static str {
        "cumsum"
    }

    fn kernel(&self) -> Op {
        Op::Cumsum
    }

    fn shape(&self) -> String {
        format!("outer={} n={} inner={}", self.outer, self.n, self.inner)
    }

    fn dtype(&self) -> DType {
        DType::F32
    }

    fn cost(&self) -> Cost {
        let elements = (self.outer * self.n * self.inner) as f64;
        Cost { forward: Work { bytes: 8.0 * elements, flop: elements }, backward: None }
    }

    fn set(&self, source: &Source<B>) -> Tensor<B, 3> {
        source.normal32([self.outer, self.n, self.inner])
    }

    fn forward(&self, set: &mut Tensor<B, 3>) {
        drop(B::running_sum(set.clone(), false));
    }

    fn backward(&self, _set: &mut Tensor<B, 3>) -> bool {
        false
    }

    fn check(&self, source: &Source<B>, _backward: bool, work: usize) -> Vec<Deviation> {
        let Self { outer, n, inner } = *self;
        let first = outer - (work / (32 * n * inner)).clamp(1, outer);
        let x = self.set(source);
        let part = |t: &Tensor<B, 3>| host(t, [first..outer, 0..n, 0..inner]);
        let mut want = part(&x);
        for row in want.chunks_exact_mut(n * inner) {
            for i in inner..row.len() {
                row[i] += row[i - inner];
            }
        }
        vec![Deviation::new("out", &part(&B::running_sum(x, false)), &want)]
    }
}
