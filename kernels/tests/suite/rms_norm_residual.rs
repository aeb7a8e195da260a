//! Tests of [`terrarium_kernels::rms_norm_residual`].

use burn::tensor::{DType, Tensor};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::rms_norm_residual::{ResidualNormArgs, reference, rms_norm_residual};

use crate::common::*;

#[derive(Debug, Clone)]
struct ResidualCase {
    b: usize,
    l: usize,
    d: usize,
    /// The residual stays in float32, whatever the branch is in.
    wide: bool,
}

impl Case for ResidualCase {
    fn inputs(&self) -> Bag<Vec<f64>> {
        let &ResidualCase { b, l, d, .. } = self;
        let mut rng = Rng::new((l * 17 + d) as u64);
        let mut values = |low, high, count| rng.uniform(low, high, count);
        Bag(vec![("x", values(-1.0, 1.0, b * l * d)), ("residual", values(-1.0, 1.0, b * l * d)), ("weight", values(0.5, 1.5, d))])
    }

    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>> {
        let weight = inputs.get("weight");
        let sum: Vec<f64> = inputs.get("x").iter().zip(&inputs.get("residual")).map(|(x, r)| x + r).collect();
        let mut normed = Vec::with_capacity(sum.len());
        for row in sum.chunks(self.d) {
            let scale = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / self.d as f64 + EPS).sqrt();
            normed.extend(row.iter().zip(&weight).map(|(v, w)| v * scale * w));
        }
        vec![normed, sum]
    }

    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>> {
        let &ResidualCase { b, l, d, wide } = self;
        let above = if wide { DType::F32 } else { dtype };
        let args = ResidualNormArgs {
            x: inputs.get("x").reshape([b, l, d]).cast(dtype),
            residual: inputs.get("residual").reshape([b, l, d]).cast(above),
            weight: inputs.get("weight"),
            eps: EPS as f32,
        };
        let out = match way {
            Way::Reference => reference::rms_norm_residual(args),
            _ => rms_norm_residual(args),
        };
        assert_eq!((out.normed.dtype(), out.sum.dtype()), (dtype, above));
        vec![flat(out.normed), flat(out.sum)]
    }
}

const EPS: f64 = 1e-5;

fn cases() -> Vec<ResidualCase> {
    let mut cases = vec![ResidualCase { b: 2, l: 3, d: 21, wide: false }, ResidualCase { b: 1, l: 9, d: 128, wide: false }];
    if !SLOW {
        cases.extend([
            ResidualCase { b: 2, l: 65, d: 63, wide: false },
            ResidualCase { b: 1, l: 200, d: 1000, wide: false },
            ResidualCase { b: 1, l: 2, d: 4001, wide: false },
        ]);
    }
    cases
}

#[test]
fn all_paths_agree_with_the_scalar_loop() {
    // Of a single channel only the sign is left, and of its gradient the rounding: values alone.
    let single = ResidualCase { b: 1, l: 3, d: 1, wide: false };
    for case in cases().into_iter().chain([single]) {
        check_values(&case, &[Way::Reference, Way::Public]);
    }
}

/// Wider than the registers of a cube when it is read element by element.
#[test]
fn rows_of_any_width_are_normed() {
    if !SLOW {
        let case = ResidualCase { b: 1, l: 2, d: 17_001, wide: false };
        close_lists("wide", &outputs(&case, &Way::Public, DType::F32), &case.scalar(&case.inputs()), 4.0 * TOLERANCE);
        check_gradients(&case, &Way::Public, 2);
    }
}

#[test]
fn gradients_agree_with_differences() {
    check_differences(&ResidualCase { b: 2, l: 3, d: 10, wide: false }, &[Way::Reference, Way::Public], 2);
}

#[test]
fn public_gradients_agree_with_the_reference() {
    for case in cases() {
        check_gradients(&case, &Way::Public, 2);
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    if !SLOW {
        check_threads(&ResidualCase { b: 2, l: 200, d: 320, wide: false }, 2);
    }
}

#[test]
fn an_empty_batch_is_left_alone() {
    let empty = || Tensor::<Plain, 3>::empty([0, 2, 4], &Default::default());
    let out = rms_norm_residual(ResidualNormArgs { x: empty(), residual: empty(), weight: tensor(&[1.0; 4]), eps: EPS as f32 });
    assert_eq!((out.normed.dims(), out.sum.dims()), ([0, 2, 4], [0, 2, 4]));
}

#[test]
fn half_precision_inputs_round_only_the_outputs() {
    for (dtype, tolerance) in halves() {
        for wide in [false, true] {
            let case = ResidualCase { b: 2, l: 9, d: 40, wide };
            close_lists(&format!("{dtype:?}"), &outputs(&case, &Way::Public, dtype), &case.scalar(&case.inputs()), tolerance);
            let want = gradients(&case, &Way::Reference, DType::F32, &[0, 1]);
            close_bags(&format!("{dtype:?}"), &gradients(&case, &Way::Public, dtype, &[0, 1]), &want, 4.0 * tolerance);
        }
    }
}
