//! Tests of [`terrarium_kernels::rms_norm_gated`].

use burn::tensor::{DType, Tensor};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::rms_norm_gated::{NormArgs, reference, rms_norm_gated};

use crate::common::*;

#[derive(Debug, Clone)]
struct NormCase {
    b: usize,
    l: usize,
    e: usize,
    groups: usize,
    gated: bool,
}

impl Case for NormCase {
    fn inputs(&self) -> Bag<Vec<f64>> {
        let &NormCase { b, l, e, .. } = self;
        let mut rng = Rng::new((l * 13 + e) as u64);
        let mut inputs = vec![("y", rng.uniform(-1.0, 1.0, b * l * e)), ("weight", rng.uniform(0.5, 1.5, e))];
        if self.gated {
            inputs.push(("z", rng.uniform(-2.0, 2.0, b * l * e)));
        }
        Bag(inputs)
    }

    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>> {
        let (y, weight) = (inputs.get("y"), inputs.get("weight"));
        let width = self.e / self.groups;
        let gated: Vec<f64> = match self.gated {
            true => y.iter().zip(&inputs.get("z")).map(|(y, z)| y * z / (1.0 + (-z).exp())).collect(),
            false => y.to_vec(),
        };
        let mut out = Vec::with_capacity(gated.len());
        for (i, group) in gated.chunks(width).enumerate() {
            let scale = 1.0 / (group.iter().map(|v| v * v).sum::<f64>() / width as f64 + EPS).sqrt();
            let offset = i % self.groups * width;
            out.extend(group.iter().zip(&weight[offset..]).map(|(v, w)| v * scale * w));
        }
        vec![out]
    }

    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>> {
        let &NormCase { b, l, e, groups, gated } = self;
        let args = NormArgs {
            y: inputs.get("y").reshape([b, l, e]).cast(dtype),
            z: gated.then(|| inputs.get("z").reshape([b, l, e]).cast(dtype)),
            weight: inputs.get("weight"),
            groups,
            eps: EPS as f32,
        };
        let out = match way {
            Way::Reference => reference::rms_norm_gated(args),
            _ => rms_norm_gated(args),
        };
        assert_eq!(out.dtype(), dtype);
        vec![flat(out)]
    }
}

const EPS: f64 = 1e-5;

fn cases() -> Vec<NormCase> {
    let mut cases = vec![NormCase { b: 1, l: 1, e: 6, groups: 1, gated: true }, NormCase { b: 2, l: 3, e: 36, groups: 2, gated: true }];
    cases.push(NormCase { b: 2, l: 3, e: 21, groups: 1, gated: false });
    cases.push(NormCase { b: 1, l: 9, e: 128, groups: 1, gated: true });
    if !SLOW {
        cases.extend([
            NormCase { b: 2, l: 65, e: 60, groups: 3, gated: false },
            NormCase { b: 3, l: 65, e: 60, groups: 3, gated: true },
            NormCase { b: 1, l: 1, e: 1536, groups: 1, gated: true },
            NormCase { b: 1, l: 200, e: 320, groups: 1, gated: true },
            NormCase { b: 1, l: 63, e: 1000, groups: 8, gated: true },
            NormCase { b: 1, l: 3, e: 65, groups: 5, gated: true },
            NormCase { b: 1, l: 2, e: 4001, groups: 1, gated: false },
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

/// Wider than the registers of a cube when it is read element by element.
#[test]
fn rows_of_any_width_are_normed() {
    if !SLOW {
        let case = NormCase { b: 1, l: 2, e: 17_001, groups: 1, gated: true };
        close_lists("wide", &outputs(&case, &Way::Public, DType::F32), &case.scalar(&case.inputs()), 4.0 * TOLERANCE);
        check_gradients(&case, &Way::Public, 1);
    }
}

#[test]
fn gradients_agree_with_differences() {
    for case in [NormCase { b: 1, l: 3, e: 10, groups: 2, gated: true }, NormCase { b: 2, l: 1, e: 21, groups: 1, gated: false }] {
        check_differences(&case, &[Way::Reference, Way::Public], 1);
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    if !SLOW {
        check_threads(&NormCase { b: 2, l: 200, e: 320, groups: 2, gated: true }, 1);
    }
}

#[test]
fn public_gradients_agree_with_the_reference() {
    for case in cases() {
        check_gradients(&case, &Way::Public, 1);
    }
}

#[test]
fn an_empty_batch_is_left_alone() {
    let args = NormArgs {
        y: Tensor::<Plain, 3>::empty([0, 3, 8], &Default::default()),
        z: None,
        weight: tensor(&[1.0; 8]),
        groups: 2,
        eps: EPS as f32,
    };
    assert_eq!(rms_norm_gated(args).dims(), [0, 3, 8]);
}

#[test]
fn half_precision_inputs_round_only_the_output() {
    for (dtype, tolerance) in halves() {
        let case = NormCase { b: 2, l: 9, e: 40, groups: 2, gated: true };
        close_lists(&format!("{dtype:?}"), &outputs(&case, &Way::Public, dtype), &case.scalar(&case.inputs()), tolerance);
        let want = gradients(&case, &Way::Reference, DType::F32, &[0]);
        close_bags(&format!("{dtype:?}"), &gradients(&case, &Way::Public, dtype, &[0]), &want, 4.0 * tolerance);
    }
}
