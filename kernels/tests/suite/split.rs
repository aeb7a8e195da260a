//! Tests of [`terrarium_kernels::split`].

use burn::tensor::{DType, Tensor, TensorData};
use terrarium_kernels::split::split;

use crate::common::*;

type B = Train;

fn tensor(values: &[f64], shape: [usize; 3]) -> Tensor<B, 3> {
    let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
    Tensor::from_data(TensorData::new(values, shape), (&Default::default(), DType::F32))
}

#[test]
fn parts_and_their_gradients_are_those_of_narrow() {
    let (shape, widths) = ([2, 5, 9], [4, 2, 3]);
    let mut rng = Rng::new(3);
    let values = rng.uniform(-1.0, 1.0, 90);
    let seeds: Vec<Vec<f64>> = widths.iter().map(|width| rng.uniform(-1.0, 1.0, 10 * width)).collect();
    // All parts read, one left out, one read twice.
    for reads in [vec![0, 1, 2], vec![0, 2], vec![1, 1, 2]] {
        let run = |ours: bool| {
            let x = tensor(&values, shape).require_grad();
            let parts = if ours {
                split(x.clone(), widths)
            } else {
                [x.clone().narrow(2, 0, 4), x.clone().narrow(2, 4, 2), x.clone().narrow(2, 6, 3)]
            };
            let seed = |part: usize| tensor(&seeds[part], [2, 5, widths[part]]);
            let terms = reads.iter().map(|&part| (parts[part].clone() * parts[part].clone() * seed(part)).sum());
            let loss = terms.reduce(|a, b| a + b).unwrap();
            let grads = loss.clone().backward();
            (loss.into_data(), x.grad(&grads).unwrap().into_data(), parts.map(Tensor::into_data))
        };
        let ((loss, grad, parts), (want_loss, want_grad, want_parts)) = (run(true), run(false));
        assert_eq!(parts, want_parts);
        loss.assert_approx_eq::<f32>(&want_loss, burn::tensor::Tolerance::absolute(1e-5));
        grad.assert_approx_eq::<f32>(&want_grad, burn::tensor::Tolerance::absolute(1e-6));
    }
}
