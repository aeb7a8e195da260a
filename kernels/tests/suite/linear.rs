//! Tests of [`terrarium_kernels::linear`].

use burn::tensor::{DType, Tensor};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::linear::{linear, reference};

use crate::common::*;

#[derive(Debug, Clone)]
struct LinearCase {
    rows: usize,
    inputs: usize,
    outputs: usize,
}

impl Case for LinearCase {
    fn inputs(&self) -> Bag<Vec<f64>> {
        let mut rng = Rng::new((self.rows * 7 + self.inputs) as u64);
        Bag(vec![("x", rng.uniform(-1.0, 1.0, self.rows * self.inputs)), ("weight", rng.uniform(-1.0, 1.0, self.outputs * self.inputs))])
    }

    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>> {
        let (x, weight) = (inputs.get("x"), inputs.get("weight"));
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        vec![x.chunks(self.inputs).flat_map(|row| weight.chunks(self.inputs).map(move |column| dot(row, column))).collect()]
    }

    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>> {
        let x = inputs.get("x").reshape([self.rows, self.inputs]).cast(dtype);
        let weight = inputs.get("weight").reshape([self.outputs, self.inputs]).cast(dtype);
        let out = match way {
            Way::Reference => reference::linear(x, weight),
            _ => linear(x, weight, None),
        };
        assert_eq!(out.dims(), [self.rows, self.outputs]);
        vec![flat(out)]
    }
}

fn cases() -> Vec<LinearCase> {
    let mut cases = vec![
        LinearCase { rows: 1, inputs: 5, outputs: 3 },
        LinearCase { rows: 3, inputs: 35, outputs: 18 },
        LinearCase { rows: 20, inputs: 12, outputs: 9 },
    ];
    if !SLOW {
        cases.extend([
            LinearCase { rows: 1, inputs: 96, outputs: 1031 },
            LinearCase { rows: 7, inputs: 100, outputs: 67 },
            LinearCase { rows: 16, inputs: 64, outputs: 130 },
            LinearCase { rows: 37, inputs: 50, outputs: 41 },
            LinearCase { rows: 70, inputs: 48, outputs: 31 },
            LinearCase { rows: 515, inputs: 33, outputs: 130 },
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
fn results_do_not_depend_on_threads() {
    if !SLOW {
        check_threads(&LinearCase { rows: 3, inputs: 300, outputs: 900 }, 1);
    }
}

#[test]
fn public_gradients_agree_with_the_reference() {
    for case in cases() {
        check_gradients(&case, &Way::Public, 1);
    }
}

#[test]
fn gradients_agree_with_differences() {
    check_differences(&LinearCase { rows: 3, inputs: 4, outputs: 5 }, &[Way::Reference, Way::Public], 1);
}

#[test]
fn a_transposed_weight_and_a_bias_are_honoured() {
    let case = LinearCase { rows: 2, inputs: 9, outputs: 20 };
    let inputs = case.inputs();
    let want = case.scalar(&inputs).remove(0);
    let x = tensor::<Plain>(&inputs.get("x")).reshape([2, 1, 9]);
    let weight = inputs.get("weight");
    let turned: Vec<f64> = (0..9 * 20).map(|i| weight[i % 20 * 9 + i / 20]).collect();
    let weight = tensor::<Plain>(&turned).reshape([9, 20]).transpose();
    let bias: Vec<f64> = (0..20).map(f64::from).collect();
    let got = linear(x, weight, Some(tensor(&bias)));
    assert_eq!(got.dims(), [2, 1, 20]);
    let want: Vec<f64> = want.iter().enumerate().map(|(i, v)| v + bias[i % 20]).collect();
    close("linear", &values(got), &want, TOLERANCE);
}

#[test]
fn half_precision_products_round_only_the_output() {
    if !HALF {
        return;
    }
    let case = LinearCase { rows: 2, inputs: 32, outputs: 40 };
    close_lists("bf16", &outputs(&case, &Way::Public, DType::BF16), &case.scalar(&case.inputs()), 4.1e-3);
}
