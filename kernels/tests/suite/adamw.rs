//! Tests of [`terrarium_kernels::adamw`].

use burn::tensor::{DType, Tensor, TensorData};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::adamw::{AdamWArgs, AdamWFactors, AdamWOut, reference};

use crate::common::*;

type B = Plain;

const FACTORS: AdamWFactors =
    AdamWFactors { clip: 0.7, first: (0.9, 0.1), second: (0.95, 0.05), root: 1.3, eps: 1e-6, step: 0.02, keep: 0.99 };

fn tensor(values: &[f64]) -> Tensor<B, 1> {
    let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), (&Default::default(), DType::F32))
}

fn close(got: Tensor<B, 1>, want: &[f64], what: &str) {
    let got: Vec<f64> = got.into_data().iter::<f64>().collect();
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() < 1e-5 * (1.0 + want.abs()), "{what} [{i}]: {got} against {want}");
    }
}

#[test]
fn a_step_follows_the_paper_and_leaves_shared_tensors_alone() {
    for n in [1usize, 5, 64, 1003, 4100] {
        let mut rng = Rng::new(n as u64);
        let [value, grad, first] = [0; 3].map(|_| rng.uniform(-1.0, 1.0, n));
        let second = rng.uniform(0.0, 1.0, n);
        for moments in [false, true] {
            let before = |values: &[f64], i: usize| if moments { values[i] } else { 0.0 };
            let AdamWFactors { clip, first: (b1, c1), second: (b2, c2), root, eps, step, keep } = FACTORS;
            let [clip, b1, c1, b2, c2, root, eps, step, keep] = [clip, b1, c1, b2, c2, root, eps, step, keep].map(f64::from);
            let m: Vec<f64> = (0..n).map(|i| b1 * before(&first, i) + c1 * clip * grad[i]).collect();
            let v: Vec<f64> = (0..n).map(|i| b2 * before(&second, i) + c2 * (clip * grad[i]).powi(2)).collect();
            let w: Vec<f64> = (0..n).map(|i| keep * value[i] - step * m[i] / (root * v[i].sqrt() + eps)).collect();
            let args = || AdamWArgs {
                value: tensor(&value),
                grad: tensor(&grad),
                moments: moments.then(|| (tensor(&first), tensor(&second))),
                factors: FACTORS,
            };
            let held = args();
            for (name, out) in [("reference", reference::adamw(args())), ("alone", B::adamw(args())), ("shared", B::adamw(held.clone()))] {
                let AdamWOut { value, first, second } = out;
                close(value, &w, &format!("{name}: value of {n}"));
                close(first, &m, &format!("{name}: first of {n}"));
                close(second, &v, &format!("{name}: second of {n}"));
            }
            close(held.value, &value, "a value that somebody else holds");
            if let Some((a, b)) = held.moments {
                close(a, &first, "a first moment that somebody else holds");
                close(b, &second, "a second moment that somebody else holds");
            }
        }
    }
}

#[test]
fn squares_are_summed_tensor_by_tensor() {
    let sizes = [3usize, 0, 1, 5000, 4096, 70_001];
    let mut rng = Rng::new(9);
    let values: Vec<Vec<f64>> = sizes.iter().map(|&n| rng.uniform(-2.0, 2.0, n)).collect();
    let tensors: Vec<Tensor<B, 1>> = values.iter().map(|values| tensor(values)).collect();
    let want: Vec<f64> = values.iter().map(|values| values.iter().map(|value| value * value).sum()).collect();
    let got = B::square_sums(&tensors);
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(&want) {
        assert!((got - want).abs() < 1e-5 * (1.0 + want), "{got} against {want}");
    }
    assert!(B::square_sums(&[]).is_empty());
    assert!(B::square_sums(&[tensor(&[1.0, f64::NAN, 2.0])])[0].is_nan());
}
