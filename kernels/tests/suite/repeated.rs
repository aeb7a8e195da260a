//! One tensor as several arguments of an operation: a backend that queues operations must not give it up at the first.

use burn::tensor::Tensor;
use terrarium_kernels::KernelBackend;
use terrarium_kernels::rms_norm_gated::NormArgs;

use crate::common::*;

fn norm(apart: bool) -> Option<Vec<Vec<f64>>> {
    let x = Rng::new(4).uniform(-1.0, 1.0, 2 * 3 * 16);
    let fresh = || tensor::<Plain>(&x).reshape([2, 3, 16]);
    let [y, z, dout] = if apart {
        [fresh(), fresh(), fresh()]
    } else {
        let one = fresh();
        [one.clone(), one.clone(), one]
    };
    let args = NormArgs { y, z: Some(z), weight: Tensor::ones([16], &Default::default()), groups: 1, eps: 1e-5 };
    let grads = <Plain as KernelBackend>::rms_norm_gated_backward(args, dout)?;
    let [y, z] = [grads.y, grads.z.expect("a gate")].map(values::<Plain, 3>);
    Some(vec![y, z, values::<Plain, 1>(grads.weight)])
}

#[test]
fn arguments_may_be_the_same_tensor() {
    if let Some(expected) = norm(true) {
        close_lists("one tensor thrice", &norm(false).expect("as before"), &expected, 1e-12);
    }
}
