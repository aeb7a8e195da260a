use burn::tensor::{DType, Int, Tensor};

use super::{Cost, Subject, Work};
use crate::cross_entropy::{CrossEntropyArgs, CrossEntropyOut};
use crate::measure::data::{Deviation, Source, host, host_span, width};
use crate::{KernelBackend, Op};

/// Cross-entropy of the mean over rows.
#[derive(Debug, Clone, Copy)]
pub(in crate::measure) struct CrossEntropy {
    pub rows: usize,
    pub v: usize,
    pub dtype: DType,
}

pub(in crate::measure) struct Set<B: KernelBackend> {
    args: CrossEntropyArgs<B>,
    targets: Vec<i32>,
    /// What the forward leaves for the backward.
    log_sum: Option<Tensor<B, 1>>,
    dloss: Tensor<B, 1>,
}

impl<B: KernelBackend> Subject<B> for CrossEntropy {
    type Set = Set<B>;

    fn op(&self) -> &'static str {
        "cross_entropy"
    }

    fn kernel(&self) -> Op {
        Op::CrossEntropy
    }

    fn shape(&self) -> String {
        format!("rows={} v={}", self.rows, self.v)
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn cost(&self) -> Cost {
        let elements = (self.rows * self.v) as f64;
        let logits = elements * width(self.dtype) as f64;
        let forward = Work { bytes: logits + 12.0 * self.rows as f64, flop: 4.0 * elements };
        Cost { forward, backward: Some(Work { bytes: 2.0 * logits + 12.0 * self.rows as f64, flop: 4.0 * elements }) }
    }

    fn set(&self, source: &Source<B>) -> Set<B> {
        let targets = source.ids(self.rows, self.v);
        let ids = Tensor::<B, 1, Int>::from_data(burn::tensor::TensorData::new(targets.clone(), [self.rows]), source.device);
        let args = CrossEntropyArgs { logits: source.normal([self.rows, self.v]), targets: ids };
        let dloss = Tensor::full([self.rows], 1.0 / self.rows as f32, (source.device, DType::F32));
        Set { args, targets, log_sum: None, dloss }
    }

    fn forward(&self, set: &mut Set<B>) {
        set.log_sum = Some(B::cross_entropy(set.args.clone()).log_sum);
    }

    fn backward(&self, set: &mut Set<B>) -> bool {
        let Some(log_sum) = set.log_sum.take() else { return B::fused(Op::CrossEntropy, self.dtype).is_some() };
        B::cross_entropy_backward(set.args.clone(), log_sum, set.dloss.clone()).is_some()
    }

    fn check(&self, source: &Source<B>, backward: bool, work: usize) -> Vec<Deviation> {
        let (rows, v) = (self.rows, self.v);
        let first = rows - (work / (16 * v)).clamp(1, rows);
        let Set { args, targets, dloss, .. } = self.set(source);
        let logits = host(&args.logits, [first..rows, 0..v]);
        let CrossEntropyOut { loss, log_sum } = B::cross_entropy(args.clone());
        let got = host_span(&loss, first..rows);
        let grad = if backward { B::cross_entropy_backward(args, log_sum, dloss) } else { None };

        let (mut losses, mut grads) = (Vec::new(), Vec::new());
        for (row, target) in logits.chunks_exact(v).zip(&targets[first..]) {
            let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = row.iter().map(|x| (x - largest).exp()).sum();
            losses.push(largest + total.ln() - row[*target as usize]);
            let each = row.iter().enumerate().map(|(i, x)| (x - largest).exp() / total - f64::from(u8::from(i == *target as usize)));
            grads.extend(each.map(|g| g / rows as f64));
        }
        let mut found = vec![Deviation::new("loss", &got, &losses)];
        found.extend(grad.map(|grad| Deviation::new("dlogits", &host(&grad, [first..rows, 0..v]), &grads)));
        found
    }
}
