use burn::tensor::{DType, Int, Tensor, TensorData, TensorPrimitive};

use super::{Cost, Subject, Work};
use crate::measure::data::{Deviation, Source, host, width};
use crate::{KernelBackend, Op};

/// The gradient of a table from those of the rows that were looked up.
#[derive(Debug, Clone, Copy)]
pub(in crate::measure) struct EmbeddingBackward {
    pub tokens: usize,
    pub v: usize,
    pub d: usize,
    pub dtype: DType,
}

pub(in crate::measure) struct Set<B: KernelBackend> {
    places: Vec<i32>,
    /// Its shape and dtype are read, not its values.
    weight: Tensor<B, 2>,
    ids: Tensor<B, 2, Int>,
    dout: Tensor<B, 3>,
}

/// Gradient of the table; by Burn's own operation where there is no other.
fn gradient<B: KernelBackend>(set: &Set<B>) -> Tensor<B, 2> {
    B::embed_backward(set.ids.clone(), set.weight.dims()[0], set.dout.clone()).unwrap_or_else(|| {
        let [weight, dout] = [set.weight.clone().into_primitive(), set.dout.clone().into_primitive()].map(TensorPrimitive::tensor);
        Tensor::from_primitive(TensorPrimitive::Float(B::embedding_backward(weight, dout, set.ids.clone().into_primitive())))
    })
}

impl<B: KernelBackend> Subject<B> for EmbeddingBackward {
    type Set = Set<B>;

    fn op(&self) -> &'static str {
        "embedding_backward"
    }

    fn kernel(&self) -> Op {
        Op::Embedding
    }

    fn shape(&self) -> String {
        format!("tokens={} v={} d={}", self.tokens, self.v, self.d)
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn cost(&self) -> Cost {
        let [tokens, v, d] = [self.tokens, self.v, self.d].map(|n| n as f64);
        let bytes = (tokens + v) * d * width(self.dtype) as f64 + 4.0 * tokens;
        Cost { forward: Work { bytes, flop: tokens * d }, backward: None }
    }

    fn set(&self, source: &Source<B>) -> Set<B> {
        let places = source.ids(self.tokens, self.v);
        let ids = Tensor::from_data(TensorData::new(places.clone(), [1, self.tokens]), source.device);
        let weight = Tensor::empty([self.v, self.d], (source.device, self.dtype));
        Set { places, weight, ids, dout: source.normal([1, self.tokens, self.d]) }
    }

    fn forward(&self, set: &mut Set<B>) {
        drop(gradient(set));
    }

    fn backward(&self, _set: &mut Set<B>) -> bool {
        false
    }

    fn check(&self, source: &Source<B>, _backward: bool, work: usize) -> Vec<Deviation> {
        let Self { tokens, v, d, .. } = *self;
        let set = self.set(source);
        // All rows of the last columns.
        let first = d - (work / (32 * (tokens + v))).clamp(1, d);
        let columns = d - first;
        let given = host(&set.dout, [0..1, 0..tokens, first..d]);
        let mut want = vec![0.0; v * columns];
        for (place, grad) in set.places.iter().zip(given.chunks_exact(columns)) {
            let at = *place as usize * columns;
            want[at..at + columns].iter_mut().zip(grad).for_each(|(sum, grad)| *sum += grad);
        }
        vec![Deviation::new("dweight", &host(&gradient(&set), [0..v, first..d]), &want)]
    }
}
