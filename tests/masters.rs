//! Float32 parameters with products in bf16: every family trains so, and its gradients are float32.

use terrarium::burn::tensor::DType;
use terrarium::burn::tensor::backend::Backend;
use terrarium::models::Decoder;
use terrarium::train::data::{Batch, IGNORED};
use terrarium::train::gradients::Gradients;
use terrarium::train::loss;

use crate::common::*;

fn batch() -> Batch {
    let (rows, length) = (2, 11);
    let ids = ids(5, rows * length, 61);
    let labels = ids.chunks(length).flat_map(|row| row[1..].iter().copied().chain([IGNORED])).collect();
    Batch { rows, length, ids, labels, documents: vec![0; rows * length] }
}

fn run(model: &Decoder<A>) -> (f64, Gradients<B>) {
    let batch = batch();
    let mut grads = Gradients::default();
    let loss = loss::backward(model, &batch, 1.0 / batch.labelled() as f64, 0, &mut grads, &device());
    (loss.into_data().iter::<f64>().sum::<f64>() / batch.labelled() as f64, grads)
}

#[test]
fn products_in_bf16_leave_parameters_and_gradients_in_float32() {
    if !B::supports_dtype(&device(), DType::BF16) {
        eprintln!("this backend has no bf16");
        return;
    }
    for config in configs() {
        let family = config.family.name();
        let model = Decoder::<A>::init(&config, 7, &device());
        let (full, mut wanted) = run(&model);
        let (rounded, mut found) = run(&model.computing_in(DType::BF16));
        assert!((full - rounded).abs() < 0.02 * full, "{family}: loss {rounded} in bf16, {full} in float32");
        let paths: Vec<String> = wanted.paths().map(str::to_string).collect();
        assert_eq!(paths, found.paths().map(str::to_string).collect::<Vec<_>>(), "{family}");
        let (mut distance, mut norm) = (0.0, 0.0);
        for path in paths {
            let (wanted, found) = (wanted.remove(&path).unwrap(), found.remove(&path).unwrap());
            assert_eq!(found.dtype(), DType::F32, "{family} {path}");
            let (wanted, found) = (wanted.into_data(), found.into_data());
            distance += wanted.iter::<f64>().zip(found.iter::<f64>()).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            norm += wanted.iter::<f64>().map(|a| a * a).sum::<f64>();
        }
        let error = (distance / norm).sqrt();
        // bf16 has three digits; a product that read float32 as bf16 would be off by its whole size.
        assert!(error < 0.05, "{family}: gradients differ by {error}");
        assert!(error > 1e-5, "{family}: nothing was rounded");
    }
}
