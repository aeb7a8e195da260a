//! Tests of [`terrarium_kernels::linear`].

use burn::tensor::{DType, Tensor};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::linear::{linear, reference};

use crate::common::*;

#[derive(Debug, Clone, Copy)]
struct LinearCase {
    rows: usize,
    inputs: usize,
    outputs: usize,
    bias: bool,
}

impl LinearCase {
    const fn new(rows: usize, inputs: usize, outputs: usize) -> Self {
        Self { rows, inputs, outputs, bias: false }
    }
}

impl Case for LinearCase {
    fn inputs(&self) -> Bag<Vec<f64>> {
        let mut rng = Rng::new((self.rows * 7 + self.inputs) as u64);
        let mut values = |name, count| (name, rng.uniform(-1.0, 1.0, count));
        let mut bag = vec![values("x", self.rows * self.inputs), values("weight", self.outputs * self.inputs)];
        bag.extend(self.bias.then(|| values("bias", self.outputs)));
        Bag(bag)
    }

    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>> {
        let (x, weight, bias) = (inputs.get("x"), inputs.get("weight"), inputs.opt("bias").unwrap_or(vec![0.0; self.outputs]));
        let dot = |a: &[f64], o: usize| a.iter().zip(&weight[o * self.inputs..]).map(|(a, b)| a * b).sum::<f64>() + bias[o];
        vec![(0..self.rows * self.outputs).map(|i| dot(&x[i / self.outputs * self.inputs..][..self.inputs], i % self.outputs)).collect()]
    }

    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>> {
        let x = inputs.get("x").reshape([self.rows, self.inputs]).cast(dtype);
        let weight = inputs.get("weight").reshape([self.outputs, self.inputs]).cast(dtype);
        let bias = inputs.opt("bias").map(|bias| bias.cast(dtype));
        let out = match way {
            Way::Reference => reference::linear(x, weight, bias),
            _ => linear(x, weight, bias),
        };
        assert_eq!(out.dims(), [self.rows, self.outputs]);
        vec![flat(out)]
    }
}

fn cases() -> Vec<LinearCase> {
    let mut cases = vec![
        LinearCase::new(1, 5, 3),
        LinearCase { bias: true, ..LinearCase::new(3, 36, 18) },
        LinearCase { bias: true, ..LinearCase::new(20, 12, 9) },
    ];
    if !SLOW {
        cases.extend([
            LinearCase::new(1, 96, 1031),
            LinearCase::new(1, 1160, 33),
            LinearCase::new(3, 35, 18),
            LinearCase { bias: true, ..LinearCase::new(7, 100, 67) },
            LinearCase::new(8, 264, 66),
            LinearCase { bias: true, ..LinearCase::new(16, 64, 130) },
            LinearCase::new(17, 63, 65),
            LinearCase::new(37, 50, 41),
            LinearCase::new(70, 48, 31),
            LinearCase { bias: true, ..LinearCase::new(100, 65, 66) },
            LinearCase::new(515, 33, 130),
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
        check_threads(&LinearCase::new(3, 300, 900), 1);
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
    check_differences(&LinearCase { bias: true, ..LinearCase::new(3, 4, 5) }, &[Way::Reference, Way::Public], 1);
}

#[test]
fn a_transposed_weight_and_a_bias_are_honoured() {
    let case = LinearCase::new(2, 9, 20);
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
fn half_precision_rounds_only_results() {
    // The output's gradient is rounded on its way in, and each gradient on its way out. On CPUs the sum with the bias is rounded once
    // more, and gradients in float16 are Burn's own products, which sum in 16 bits.
    let [once, slack] = if cfg!(any(feature = "cuda", feature = "vulkan")) { [1.0, 2.0] } else { [2.0, 16.0] };
    for (dtype, error) in halves() {
        for case in cases() {
            // Inputs are steps that these types represent.
            close_lists(
                &format!("{dtype:?} of {case:?}"),
                &outputs(&case, &Way::Public, dtype),
                &case.scalar(&case.inputs()),
                once * error,
            );
            if case.rows * case.inputs <= 4096 {
                let want = gradients(&case, &Way::Public, DType::F32, &[0]);
                close_bags(&format!("{dtype:?} of {case:?}"), &gradients(&case, &Way::Public, dtype, &[0]), &want, slack * error);
            }
        }
    }
}

#[test]
fn nothing_in_gives_nothing_out() {
    // Burn's reshape takes a zero to mean the old size, so these are made as they are.
    let options = (&Default::default(), DType::F32);
    for (rows, inputs, outputs) in [(0, 5, 3), (2, 0, 3), (2, 5, 0)] {
        let x = Tensor::<Train, 3>::empty([1, rows, inputs], options);
        let bias = match outputs {
            0 => Tensor::<Train, 1>::empty([0], options),
            _ => Tensor::ones([outputs], options).require_grad(),
        };
        let y = linear(x, Tensor::empty([outputs, inputs], options), Some(bias.clone()));
        assert_eq!(y.dims(), [1, rows, outputs]);
        if rows * outputs > 0 {
            assert_eq!(values(y.clone()), vec![1.0; rows * outputs]);
            let grads = y.sum().backward();
            assert_eq!(values(bias.grad(&grads).expect("a gradient")), vec![2.0; outputs]);
        }
    }
}

/// Parts of wider tensors, and matrices by columns, are read as they lie.
#[test]
fn views_are_read_as_they_lie() {
    for rows in [2, 20] {
        let case = LinearCase { bias: true, ..LinearCase::new(rows, 24, 10) };
        let inputs = case.inputs();
        let want = case.scalar(&inputs);
        let mut wide = Rng::new(5).uniform(-1.0, 1.0, (rows + 1) * 40);
        for (i, value) in inputs.get("x").iter().enumerate() {
            wide[(i / 24 + 1) * 40 + 9 + i % 24] = *value;
        }
        let x = tensor::<Plain>(&wide).reshape([rows + 1, 40]).slice([1..rows + 1, 9..33]);
        let mut tall = Rng::new(6).uniform(-1.0, 1.0, 26 * 16);
        for (i, value) in inputs.get("weight").iter().enumerate() {
            tall[(i % 24 + 2) * 16 + 3 + i / 24] = *value;
        }
        let weight = tensor::<Plain>(&tall).reshape([26, 16]).slice([2..26, 3..13]).transpose();
        let got = linear(x, weight, Some(tensor(&inputs.get("bias"))));
        close_lists("a view", &[values(got)], &want, TOLERANCE);
    }
}
