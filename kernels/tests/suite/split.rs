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

/// Widths that GPUs read in vectors, in parts that begin on and off their alignment: as views, joined, and as arguments.
#[test]
fn wide_parts_are_views_that_operations_read() {
    use terrarium_kernels::KernelBackend;
    use terrarium_kernels::cross_entropy::{CrossEntropyArgs, cross_entropy};
    use terrarium_kernels::rms_norm_gated::{NormArgs, rms_norm_gated};
    type P = Plain;
    let device = Default::default();
    let (b, l, widths) = (2, 3, [256, 192, 24]);
    let width = widths.iter().sum::<usize>();
    let mut rng = Rng::new(5);
    let values: Vec<f32> = rng.uniform(-1.0, 1.0, b * l * width).into_iter().map(|value| value as f32).collect();
    let x = Tensor::<P, 3>::from_data(TensorData::new(values, [b, l, width]), (&device, DType::F32));
    let parts = split(x.clone(), widths);
    let mut start = 0;
    for (part, width) in parts.iter().zip(widths) {
        let narrow = x.clone().narrow(2, start, width).into_data();
        assert_eq!(part.clone().into_data(), narrow, "at {start}");
        // The same values without a place in a wider tensor.
        let alone = Tensor::<P, 3>::from_data(narrow, (&device, DType::F32));
        let y = Tensor::<P, 3>::ones([b, l, width], (&device, DType::F32));
        let weight = Tensor::<P, 1>::ones([width], (&device, DType::F32));
        let norm = |z: Tensor<P, 3>| {
            let args = NormArgs { y: y.clone(), z: Some(z), weight: weight.clone(), groups: 1, eps: 1e-5 };
            let grads = P::rms_norm_gated_backward(args.clone(), y.clone());
            (rms_norm_gated(args).into_data(), grads.map(|grads| grads.z.expect("a gate").into_data()))
        };
        assert_eq!(norm(part.clone()), norm(alone.clone()), "the gate at {start}");
        let rows = [b * l, width];
        let loss = |logits: Tensor<P, 3>| {
            // A row of the batch is enough: rows of more would be copied on the way to two axes.
            let logits = logits.narrow(0, 1, 1).squeeze_dim::<2>(0);
            let targets = Tensor::from_data(TensorData::new(vec![3i32, 0, width as i32 - 1], [l]), &device);
            let args = CrossEntropyArgs { logits, targets };
            let out = P::cross_entropy(args.clone());
            let ones = Tensor::<P, 1>::ones([l], (&device, DType::F32));
            let grad = P::cross_entropy_backward(args.clone(), out.log_sum, ones).map(Tensor::into_data);
            (cross_entropy(args).into_data(), grad)
        };
        assert_eq!(loss(part.clone()), loss(alone), "logits at {start} of {rows:?}");
        start += width;
    }
    assert_eq!(P::join(parts.to_vec()).into_data(), x.into_data());
}

/// Heads of a part, and a part's rows in a product: values and gradients of Burn's own reshapes.
#[test]
fn heads_and_rows_of_parts_are_those_of_reshapes() {
    use terrarium_kernels::linear::linear;
    use terrarium_kernels::split::heads;
    let (widths, mut rng) = ([16, 48, 24], Rng::new(9));
    for [b, l] in [[2, 5], [3, 1], [1, 4], [1, 1]] {
        let values = rng.uniform(-1.0, 1.0, b * l * 88);
        let weight = rng.uniform(-1.0, 1.0, 7 * 24);
        let run = |ours: bool| {
            let x = tensor(&values, [b, l, 88]).require_grad();
            let weight = tensor(&weight, [1, 7, 24]).squeeze_dim::<2>(0);
            let [first, second, third] = split(x.clone(), widths);
            let (wide, product) = if ours {
                (heads(second, 6), linear(third, weight, None))
            } else {
                let product = third.reshape([b * l, 24]).matmul(weight.transpose()).reshape([b, l, 7]);
                (second.reshape([b, l, 6, 8]), product)
            };
            let loss = (wide.clone() * wide.clone()).sum() + (product.clone() * product.clone()).sum() + first.sum();
            let grad = x.grad(&loss.backward()).unwrap();
            (wide.into_data(), product.into_data(), grad.into_data())
        };
        let ((wide, product, grad), (want_wide, want_product, want_grad)) = (run(true), run(false));
        assert_eq!(wide, want_wide, "{b} x {l}");
        let near = burn::tensor::Tolerance::absolute(PRODUCTS as f32 * 10.0);
        product.assert_approx_eq::<f32>(&want_product, near);
        grad.assert_approx_eq::<f32>(&want_grad, near);
    }
}
