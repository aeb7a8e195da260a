//! Tests of [`terrarium_kernels::cumsum`].

use burn::tensor::{DType, Tensor};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::cumsum::{cumsum, reference};

use crate::common::*;

#[derive(Debug, Clone)]
struct SumCase {
    outer: usize,
    n: usize,
    inner: usize,
}

impl Case for SumCase {
    fn inputs(&self) -> Bag<Vec<f64>> {
        let count = self.outer * self.n * self.inner;
        Bag(vec![("x", Rng::new(count as u64).uniform(-1.0, 1.0, count))])
    }

    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>> {
        let &SumCase { outer, n, inner } = self;
        let mut sums = inputs.get("x");
        for block in 0..outer {
            for at in inner..n * inner {
                sums[block * n * inner + at] += sums[block * n * inner + at - inner];
            }
        }
        vec![sums]
    }

    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>> {
        let &SumCase { outer, n, inner } = self;
        let x = inputs.get("x").reshape([outer, n, inner]).cast(dtype);
        let out = match way {
            Way::Reference => reference::cumsum(x, false),
            _ if inner == 1 => cumsum(x.reshape([outer, n]), 1).reshape([outer, n, inner]),
            _ => cumsum(x, 1),
        };
        assert_eq!(out.dtype(), dtype);
        vec![flat(out)]
    }
}

fn cases() -> Vec<SumCase> {
    let mut cases =
        vec![SumCase { outer: 3, n: 65, inner: 1 }, SumCase { outer: 2, n: 65, inner: 3 }, SumCase { outer: 1, n: 1, inner: 1 }];
    if !SLOW {
        cases.extend([
            SumCase { outer: 1, n: 1000, inner: 1 },
            SumCase { outer: 2, n: 2500, inner: 1 },
            SumCase { outer: 5, n: 63, inner: 7 },
            SumCase { outer: 2, n: 200, inner: 8200 },
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
    for case in [SumCase { outer: 2, n: 9, inner: 1 }, SumCase { outer: 1, n: 5, inner: 3 }] {
        check_differences(&case, &[Way::Reference, Way::Public], 1);
    }
}

#[test]
fn public_gradients_agree_with_the_reference() {
    for case in cases() {
        check_gradients(&case, &Way::Public, 1);
    }
}

#[test]
fn nothing_sums_to_nothing() {
    assert_eq!(cumsum(Tensor::<Plain, 3>::empty([2, 0, 3], &Default::default()), 1).dims(), [2, 0, 3]);
}

#[test]
fn half_precision_sums_are_rounded_once() {
    for (dtype, tolerance) in halves() {
        for case in [SumCase { outer: 2, n: 200, inner: 1 }, SumCase { outer: 1, n: 200, inner: 3 }] {
            close_lists(&format!("{dtype:?}"), &outputs(&case, &Way::Public, dtype), &case.scalar(&case.inputs()), tolerance);
        }
    }
}
