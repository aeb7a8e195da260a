//! Tests of [`terrarium_kernels::cross_entropy`].

use burn::tensor::{DType, Int, Tensor, TensorData};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::cross_entropy::{CrossEntropyArgs, cross_entropy, reference};

use crate::common::*;

#[derive(Debug, Clone)]
struct LossCase {
    rows: usize,
    v: usize,
    /// Largest logit, about.
    scale: f64,
}

impl LossCase {
    /// Every third row is left out, if there are several.
    fn targets(&self) -> Vec<i32> {
        (0..self.rows).map(|row| if row % 3 == 1 { -1 } else { ((row * 37 + self.v - 1) % self.v) as i32 }).collect()
    }

    fn ids<B: KernelBackend>(&self) -> Tensor<B, 1, Int> {
        Tensor::from_data(TensorData::new(self.targets(), [self.rows]), &Default::default())
    }
}

impl Case for LossCase {
    fn inputs(&self) -> Bag<Vec<f64>> {
        let mut rng = Rng::new((self.rows * 7 + self.v) as u64);
        Bag(vec![("logits", rng.uniform(-self.scale, self.scale, self.rows * self.v))])
    }

    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>> {
        let logits = inputs.get("logits");
        let loss = self.targets().into_iter().zip(logits.chunks(self.v)).map(|(target, row)| {
            let Ok(target) = usize::try_from(target) else { return 0.0 };
            let largest = row.iter().copied().fold(f64::MIN, f64::max);
            largest + row.iter().map(|x| (x - largest).exp()).sum::<f64>().ln() - row[target]
        });
        vec![loss.collect()]
    }

    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>> {
        let logits = inputs.get("logits").reshape([self.rows, self.v]).cast(dtype);
        let args = CrossEntropyArgs { logits, targets: self.ids() };
        let loss = match way {
            Way::Reference => reference::cross_entropy(args).loss,
            _ => cross_entropy(args),
        };
        assert_eq!(loss.dtype(), DType::F32);
        vec![loss]
    }
}

fn cases() -> Vec<LossCase> {
    let mut cases =
        vec![LossCase { rows: 1, v: 1, scale: 1.0 }, LossCase { rows: 3, v: 65, scale: 30.0 }, LossCase { rows: 2, v: 1000, scale: 2.0 }];
    if !SLOW {
        cases.extend([
            LossCase { rows: 4, v: 63, scale: 100.0 },
            LossCase { rows: 130, v: 257, scale: 4.0 },
            LossCase { rows: 5, v: 16_384, scale: 8.0 },
            LossCase { rows: 3, v: 50_257, scale: 8.0 },
        ]);
    }
    cases
}

#[test]
fn all_paths_agree_with_the_scalar_loop() {
    for case in cases() {
        check_values(&case, &[Way::Reference, Way::Public]);
    }
}

#[test]
fn gradients_agree_with_differences() {
    check_differences(&LossCase { rows: 4, v: 21, scale: 2.0 }, &[Way::Reference, Way::Public], 1);
}

#[test]
fn public_gradients_agree_with_the_reference() {
    for case in cases() {
        check_gradients(&case, &Way::Public, 1);
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    if !SLOW {
        check_threads(&LossCase { rows: 130, v: 1003, scale: 4.0 }, 1);
    }
}

/// The gradient may be computed over the logits only where nobody else reads them.
#[test]
fn logits_that_are_used_again_keep_their_values() {
    let case = LossCase { rows: 3, v: 40, scale: 2.0 };
    let leaf = tensor::<Train>(&case.inputs().get("logits")).require_grad();
    let logits = leaf.clone().reshape([3, 40]) * 1.0;
    let loss = cross_entropy(CrossEntropyArgs { logits: logits.clone(), targets: case.ids() });
    let grads = loss.sum().backward();
    assert!(leaf.grad(&grads).is_some());
    close("logits", &values(logits.inner()), &case.inputs().get("logits"), 1e-7);
}

#[test]
fn infinite_logits_are_left_out_and_nan_is_passed_on() {
    let run = |logits: Vec<f32>| {
        let logits = Tensor::<Plain, 2>::from_data(TensorData::new(logits, [1, 4]), &Default::default());
        let targets = Tensor::from_data(TensorData::new(vec![1i32], [1]), &Default::default());
        values(cross_entropy(CrossEntropyArgs { logits, targets }))[0]
    };
    close("one is left", &[run(vec![f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY, 1.0])], &[2.0f64.ln()], TOLERANCE);
    assert!(run(vec![0.0, 1.0, f32::NAN, 0.0]).is_nan());
}

#[test]
fn no_rows_give_no_losses() {
    let logits = Tensor::<Plain, 2>::empty([0, 5], &Default::default());
    let targets = Tensor::from_data(TensorData::new(Vec::<i32>::new(), [0]), &Default::default());
    assert_eq!(cross_entropy(CrossEntropyArgs { logits, targets }).dims(), [0]);
}

#[test]
fn half_precision_logits_round_only_the_gradient() {
    for (dtype, tolerance) in halves() {
        let case = LossCase { rows: 5, v: 200, scale: 2.0 };
        close_lists(&format!("{dtype:?}"), &outputs(&case, &Way::Public, dtype), &case.scalar(&case.inputs()), TOLERANCE);
        let want = gradients(&case, &Way::Reference, DType::F32, &[0]);
        close_bags(&format!("{dtype:?}"), &gradients(&case, &Way::Public, dtype, &[0]), &want, 2.0 * tolerance);
    }
}
