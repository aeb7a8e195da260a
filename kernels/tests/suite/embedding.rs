//! Tests of [`terrarium_kernels::embedding`].

use burn::tensor::{DType, Int, Tensor, TensorData};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::embedding::embedding;

use crate::common::*;

#[derive(Debug, Clone)]
struct TableCase {
    b: usize,
    l: usize,
    v: usize,
    d: usize,
    /// Every other token is this one.
    common: usize,
}

impl TableCase {
    fn ids(&self) -> Vec<usize> {
        let free = |i: usize| i.wrapping_mul(i).wrapping_mul(2_654_435_761) / 7 % self.v;
        (0..self.b * self.l).map(|i| if i % 2 == 0 { self.common } else { free(i) }).collect()
    }
}

impl Case for TableCase {
    fn inputs(&self) -> Bag<Vec<f64>> {
        Bag(vec![("weight", Rng::new((self.v + self.d) as u64).uniform(-1.0, 1.0, self.v * self.d))])
    }

    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>> {
        let weight = inputs.get("weight");
        vec![self.ids().into_iter().flat_map(|id| weight[id * self.d..(id + 1) * self.d].to_vec()).collect()]
    }

    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>> {
        let &TableCase { b, l, v, d, .. } = self;
        let weight = inputs.get("weight").reshape([v, d]).cast(dtype);
        let ids: Vec<i32> = self.ids().into_iter().map(|id| id as i32).collect();
        let ids: Tensor<B, 2, Int> = Tensor::from_data(TensorData::new(ids, [b, l]), &Default::default());
        let out = match way {
            Way::Reference => burn::tensor::module::embedding(weight, ids),
            _ => embedding(weight, ids),
        };
        assert_eq!((out.dims(), out.dtype()), ([b, l, d], dtype));
        vec![flat(out)]
    }
}

fn cases() -> Vec<TableCase> {
    let mut cases = vec![
        TableCase { b: 2, l: 9, v: 7, d: 5, common: 3 },
        TableCase { b: 1, l: 300, v: 300, d: 8, common: 299 },
        TableCase { b: 1, l: 1, v: 1, d: 1, common: 0 },
    ];
    if !SLOW {
        cases.extend([
            TableCase { b: 3, l: 63, v: 255, d: 64, common: 254 },
            TableCase { b: 1, l: 1000, v: 256, d: 65, common: 0 },
            TableCase { b: 2, l: 1200, v: 70_000, d: 16, common: 65_535 },
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
    check_differences(&TableCase { b: 2, l: 5, v: 6, d: 3, common: 4 }, &[Way::Reference, Way::Public], 1);
}

#[test]
fn public_gradients_agree_with_the_reference() {
    for case in cases() {
        check_gradients(&case, &Way::Public, 1);
    }
}

/// Many places of one row are summed in a fixed order.
#[test]
fn gradients_are_the_same_in_every_run() {
    let case = TableCase { b: 1, l: if SLOW { 200 } else { 3000 }, v: 40, d: 12, common: 5 };
    let first = gradients(&case, &Way::Public, DType::F32, &[0]);
    assert!(first.0 == gradients(&case, &Way::Public, DType::F32, &[0]).0);
}

#[test]
fn results_do_not_depend_on_threads() {
    if !SLOW {
        check_threads(&TableCase { b: 1, l: 2000, v: 300, d: 128, common: 5 }, 1);
    }
}

#[test]
fn half_precision_gradients_are_rounded_once() {
    for (dtype, tolerance) in halves() {
        let case = TableCase { b: 1, l: 150, v: 20, d: 16, common: 3 };
        let want = gradients(&case, &Way::Reference, DType::F32, &[0]);
        close_bags(&format!("{dtype:?}"), &gradients(&case, &Way::Public, dtype, &[0]), &want, 2.0 * tolerance);
    }
}
