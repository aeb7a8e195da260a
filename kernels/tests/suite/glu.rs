//! Tests of [`terrarium_kernels::glu`].

use burn::tensor::{DType, Tensor};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::glu::{Activation, GluArgs, glu, reference};

use crate::common::*;

#[derive(Debug, Clone)]
struct GluCase {
    b: usize,
    l: usize,
    f: usize,
    activation: Activation,
    gated: bool,
}

/// Error function by its series, for arguments of a few units.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Gelu => 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)),
        Activation::GeluTanh => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
        Activation::Relu2 => x.max(0.0).powi(2),
        Activation::Silu => x / (1.0 + (-x).exp()),
    }
}

impl Case for GluCase {
    fn inputs(&self) -> Bag<Vec<f64>> {
        let count = self.b * self.l * self.f;
        let mut rng = Rng::new(count as u64 + 3);
        // Off the grid of the others, on which a squared ReLU has its corner.
        let mut values = |low| rng.uniform(low, 4.0, count).into_iter().map(|v| v + 1.0 / 128.0).collect();
        let mut inputs = vec![("up", values(-4.0))];
        if self.gated {
            inputs.push(("gate", values(-5.0)));
        }
        Bag(inputs)
    }

    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>> {
        let up = inputs.get("up");
        let act = |x: &f64| activate(self.activation, *x);
        vec![match inputs.opt("gate") {
            Some(gate) => gate.iter().zip(&up).map(|(gate, up)| act(gate) * up).collect(),
            None => up.iter().map(act).collect(),
        }]
    }

    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>> {
        let shaped = |x: Tensor<B, 1>| x.reshape([self.b, self.l, self.f]).cast(dtype);
        let args = GluArgs { up: shaped(inputs.get("up")), gate: inputs.opt("gate").map(shaped), activation: self.activation };
        let out = match way {
            Way::Reference => reference::glu(args),
            _ => glu(args),
        };
        assert_eq!(out.dtype(), dtype);
        vec![flat(out)]
    }
}

/// Every activation with and without a gate.
fn cases([b, l, f]: [usize; 3]) -> impl Iterator<Item = GluCase> {
    let both = move |activation| [true, false].map(|gated| GluCase { b, l, f, activation, gated });
    Activation::ALL.into_iter().flat_map(both)
}

#[test]
fn all_paths_agree_with_the_scalar_loop() {
    for sizes in [[2, 3, 21], [1, 9, 128], [1, 1, 1]] {
        cases(sizes).for_each(|case| check_values(&case, &[Way::Reference, Way::Public]));
    }
    if !SLOW {
        cases([3, 65, 101]).for_each(|case| check_values(&case, &[Way::Reference, Way::Public]));
    }
}

#[test]
fn gradients_agree_with_differences() {
    cases([2, 3, 10]).for_each(|case| check_differences(&case, &[Way::Reference, Way::Public], 1));
}

#[test]
fn public_gradients_agree_with_the_reference() {
    cases([2, 9, 64]).for_each(|case| check_gradients(&case, &Way::Public, 1));
    if !SLOW {
        cases([3, 65, 101]).for_each(|case| check_gradients(&case, &Way::Public, 1));
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    if !SLOW {
        cases([2, 200, 161]).for_each(|case| check_threads(&case, 1));
    }
}

/// Nothing overflows where the function does not.
#[test]
fn large_inputs_give_zero_or_themselves() {
    for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Silu] {
        let up = tensor::<Train>(&[-1e4, -200.0, 0.0, 200.0, 1e4]).require_grad();
        let out = glu(GluArgs { up: up.clone().reshape([1, 1, 5]), gate: None, activation });
        let grads = out.clone().sum().backward();
        close(&format!("{activation:?}"), &values(out.inner()), &[0.0, 0.0, 0.0, 200.0, 1e4], TOLERANCE);
        close(&format!("slope of {activation:?}"), &values(up.grad(&grads).unwrap()), &[0.0, 0.0, 0.5, 1.0, 1.0], TOLERANCE);
    }
}

/// Results may take the place of inputs only where nobody else reads these.
#[test]
fn tensors_that_are_used_again_keep_their_values() {
    let case = GluCase { b: 1, l: 2, f: 8, activation: Activation::Silu, gated: true };
    let inputs = case.inputs();
    let [up, gate] = ["up", "gate"].map(|name| tensor::<Plain>(&inputs.get(name)).reshape([1, 2, 8]) * 1.0);
    let out = glu(GluArgs { up: up.clone(), gate: Some(gate.clone()), activation: case.activation });
    close("out", &values(out), &case.scalar(&inputs)[0], TOLERANCE);
    close("up", &values(up), &inputs.get("up"), 1e-7);
    close("gate", &values(gate), &inputs.get("gate"), 1e-7);
}

#[test]
fn parts_of_wider_tensors_are_read() {
    let (b, l, f) = (2, 3, 24);
    let wide = tensor::<Plain>(&Rng::new(8).uniform(-2.0, 2.0, b * l * 2 * f)).reshape([b, l, 2 * f]);
    let [up, gate] = [0, f].map(|start| wide.clone().narrow(2, start, f));
    let alone = |part: &Tensor<Plain, 3>| Tensor::<Plain, 3>::from_data(part.clone().into_data(), &Default::default());
    let run = |up, gate| values(glu(GluArgs { up, gate: Some(gate), activation: Activation::Gelu }));
    close("parts", &run(up.clone(), gate.clone()), &run(alone(&up), alone(&gate)), 1e-12);
}

#[test]
fn disagreements_are_errors() {
    let make = |f: usize, dtype| Tensor::<Plain, 3>::ones([1, 2, f], (&Default::default(), dtype));
    let check = |gate| GluArgs { up: make(4, DType::F32), gate: Some(gate), activation: Activation::Silu }.check();
    assert!(check(make(4, DType::F32)).is_ok());
    assert!(check(make(5, DType::F32)).unwrap_err().to_string().contains("gate has shape"));
    for (dtype, _) in halves() {
        assert!(check(make(4, dtype)).unwrap_err().to_string().contains("gate is"));
    }
}

#[test]
fn an_empty_batch_is_left_alone() {
    let up = Tensor::<Plain, 3>::empty([0, 2, 4], &Default::default());
    assert_eq!(glu(GluArgs { up, gate: None, activation: Activation::Silu }).dims(), [0, 2, 4]);
}

#[test]
fn half_precision_inputs_round_only_the_outputs() {
    for (dtype, tolerance) in halves() {
        for case in cases([2, 9, 40]) {
            // What the inputs are rounded to.
            let rounded = |values: Vec<f64>| self::values(tensor::<Plain>(&values).cast(dtype).cast(DType::F32));
            let inputs = Bag(case.inputs().0.into_iter().map(|(name, values)| (name, rounded(values))).collect());
            let what = format!("{dtype:?} of {case:?}");
            close_lists(&what, &outputs(&case, &Way::Public, dtype), &case.scalar(&inputs), tolerance);
            let want = gradients(&case, &Way::Reference, dtype, &[0]);
            close_bags(&what, &gradients(&case, &Way::Public, dtype, &[0]), &want, 2.0 * tolerance);
        }
    }
}
