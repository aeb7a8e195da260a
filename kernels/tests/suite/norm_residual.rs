//! Tests of [`terrarium_kernels::norm_residual`].

use burn::tensor::{DType, Tensor};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::norm_residual::{ResidualNormArgs, norm_residual, reference};

use crate::common::*;

#[derive(Debug, Clone, Copy)]
struct ResidualCase {
    b: usize,
    l: usize,
    d: usize,
    /// The residual stays in float32, whatever the branch is in.
    wide: bool,
    /// There is a branch.
    added: bool,
    /// Layer norm.
    layer: bool,
    /// Mean of the residual.
    offset: f64,
}

impl ResidualCase {
    fn new(b: usize, l: usize, d: usize) -> Self {
        Self { b, l, d, wide: false, added: true, layer: false, offset: 0.0 }
    }

    /// With and without a branch, both norms, and the layer norm of values far from zero.
    fn kinds(self) -> [Self; 6] {
        let layer = Self { layer: true, ..self };
        let far = Self { offset: 100.0, ..layer };
        [self, Self { added: false, ..self }, layer, Self { added: false, ..layer }, far, Self { added: false, ..far }]
    }
}

impl Case for ResidualCase {
    fn inputs(&self) -> Bag<Vec<f64>> {
        let &ResidualCase { b, l, d, added, layer, offset, .. } = self;
        let mut rng = Rng::new((l * 17 + d) as u64);
        let mut values = |low, high, count| rng.uniform(low, high, count);
        let mut inputs = vec![("x", values(-1.0, 1.0, b * l * d)), ("residual", values(offset - 1.0, offset + 1.0, b * l * d))];
        inputs.extend([("weight", values(0.5, 1.5, d)), ("bias", values(-1.0, 1.0, d))]);
        inputs.retain(|(name, _)| (*name != "x" || added) && (*name != "bias" || layer));
        Bag(inputs)
    }

    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>> {
        let (weight, bias) = (inputs.get("weight"), inputs.opt("bias"));
        let mut sum = inputs.get("residual");
        if let Some(x) = inputs.opt("x") {
            sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
        }
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / self.d as f64;
        let mut normed = Vec::with_capacity(sum.len());
        for row in sum.chunks(self.d) {
            let centre = if bias.is_some() { mean(&mut row.iter().copied()) } else { 0.0 };
            let scale = 1.0 / (mean(&mut row.iter().map(|v| (v - centre).powi(2))) + EPS).sqrt();
            let shift = |i: usize| bias.as_ref().map_or(0.0, |bias| bias[i]);
            normed.extend(row.iter().enumerate().map(|(i, v)| (v - centre) * scale * weight[i] + shift(i)));
        }
        vec![normed, sum]
    }

    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>> {
        let &ResidualCase { b, l, d, wide, added, .. } = self;
        let above = if wide { DType::F32 } else { dtype };
        let args = ResidualNormArgs {
            x: inputs.opt("x").map(|x| x.reshape([b, l, d]).cast(dtype)),
            residual: inputs.get("residual").reshape([b, l, d]).cast(above),
            weight: inputs.get("weight"),
            bias: inputs.opt("bias"),
            eps: EPS as f32,
        };
        let out = match way {
            Way::Reference => reference::norm_residual(args),
            _ => norm_residual(args),
        };
        assert_eq!((out.normed.dtype(), out.sum.dtype()), (if added { dtype } else { above }, above));
        vec![flat(out.normed), flat(out.sum)]
    }
}

const EPS: f64 = 1e-5;

fn cases() -> Vec<ResidualCase> {
    let mut cases = vec![ResidualCase::new(2, 3, 21), ResidualCase::new(1, 9, 128)];
    if !SLOW {
        cases.extend([ResidualCase::new(2, 65, 63), ResidualCase::new(1, 200, 1000), ResidualCase::new(1, 2, 4001)]);
    }
    cases.into_iter().flat_map(ResidualCase::kinds).collect()
}

#[test]
fn all_paths_agree_with_the_scalar_loop() {
    // Of a single channel only the sign is left, and of its gradient the rounding: values alone.
    for case in cases().into_iter().chain([ResidualCase::new(1, 3, 1)]) {
        check_values(&case, &[Way::Reference, Way::Public]);
    }
}

/// Wider than the registers of a cube when it is read element by element.
#[test]
fn rows_of_any_width_are_normed() {
    if !SLOW {
        let case = ResidualCase::new(1, 2, 17_001);
        for case in [case, ResidualCase { layer: true, ..case }] {
            close_lists("wide", &outputs(&case, &Way::Public, DType::F32), &case.scalar(&case.inputs()), 4.0 * TOLERANCE);
            check_gradients(&case, &Way::Public, 2);
        }
    }
}

#[test]
fn gradients_agree_with_differences() {
    for case in ResidualCase::new(2, 3, 10).kinds() {
        check_differences(&case, &[Way::Reference, Way::Public], 2);
    }
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
        for case in ResidualCase::new(2, 200, 320).kinds() {
            check_threads(&case, 2);
        }
    }
}

#[test]
fn an_empty_batch_is_left_alone() {
    let empty = || Tensor::<Plain, 3>::empty([0, 2, 4], &Default::default());
    for x in [None, Some(empty())] {
        let args = ResidualNormArgs { x, residual: empty(), weight: tensor(&[1.0; 4]), bias: Some(tensor(&[0.0; 4])), eps: EPS as f32 };
        let out = norm_residual(args);
        assert_eq!((out.normed.dims(), out.sum.dims()), ([0, 2, 4], [0, 2, 4]));
    }
}

#[test]
fn shapes_that_disagree_are_refused() {
    let signal = |d| Tensor::<Plain, 3>::zeros([1, 2, d], &Default::default());
    let right =
        ResidualNormArgs { x: Some(signal(4)), residual: signal(4), weight: tensor(&[1.0; 4]), bias: Some(tensor(&[0.0; 4])), eps: 1e-5 };
    assert!(right.check().is_ok());
    assert!(ResidualNormArgs { x: Some(signal(3)), ..right.clone() }.check().is_err());
    assert!(ResidualNormArgs { weight: tensor(&[1.0; 3]), ..right.clone() }.check().is_err());
    assert!(ResidualNormArgs { bias: Some(tensor(&[1.0])), ..right }.check().is_err());
}

#[test]
fn half_precision_inputs_round_only_the_outputs() {
    for (dtype, tolerance) in halves() {
        for kind in ResidualCase::new(2, 9, 40).kinds().into_iter().filter(|kind| kind.offset == 0.0) {
            for wide in [false, true] {
                let case = ResidualCase { wide, ..kind };
                close_lists(
                    &format!("{dtype:?} of {case:?}"),
                    &outputs(&case, &Way::Public, dtype),
                    &case.scalar(&case.inputs()),
                    tolerance,
                );
                let want = gradients(&case, &Way::Reference, DType::F32, &[0, 1]);
                close_bags(&format!("{dtype:?} of {case:?}"), &gradients(&case, &Way::Public, dtype, &[0, 1]), &want, 4.0 * tolerance);
            }
        }
    }
}
