//! All at once, in any pieces, and one token at a time: the same outputs, caches and gradients.

use terrarium::burn::module::AutodiffModule;
use terrarium::burn::tensor::Tensor;
use terrarium::models::{Cache, Decoder, DecoderConfig, Layout};

use crate::common::*;

const LENGTH: usize = 23;
const BATCH: usize = 2;

/// Runs the pieces one after another; logits over all of them, and the last cache.
fn in_pieces<T: terrarium::kernels::KernelBackend>(
    model: &Decoder<T>,
    all: &[i32],
    pieces: &[usize],
    device: &T::Device,
) -> (Tensor<T, 3>, Cache<T>) {
    let mut cache = None;
    let mut outputs = Vec::new();
    let mut start = 0;
    for &len in pieces {
        let ids: Vec<i32> = all.chunks(LENGTH).flat_map(|row| row[start..start + len].to_vec()).collect();
        let (logits, next) = model.forward(tensor(&ids, [BATCH, len], device), cache.take(), &Layout::full(BATCH, len));
        outputs.push(logits);
        cache = Some(next);
        start += len;
    }
    assert_eq!(start, LENGTH);
    (Tensor::cat(outputs, 1), cache.unwrap())
}

fn splits() -> Vec<Vec<usize>> {
    vec![vec![1; LENGTH], vec![5, 1, 1, 9, 7], vec![8, 8, 7], vec![LENGTH - 1, 1], vec![1, LENGTH - 1], vec![3, 20]]
}

#[test]
fn any_chunking_gives_the_same_outputs_and_caches() {
    let device = device();
    for config in configs() {
        let model = model::<B>(&config, 7, &device);
        let all = ids(1, BATCH * LENGTH, 61);
        let (whole, cache) = in_pieces(&model, &all, &[LENGTH], &device);
        let whole = floats(whole);
        for pieces in splits() {
            let what = format!("{} in {pieces:?}", config.family);
            let (logits, streamed) = in_pieces(&model, &all, &pieces, &device);
            assert_close(&what, &floats(logits), &whole, 2e-5);
            assert_eq!(streamed.context, cache.context, "{what}: context");
            for ((name, found), (_, expected)) in streamed.tensors().into_iter().zip(cache.tensors()) {
                assert_close(&format!("{what}: {name}"), &floats(found), &floats(expected), 2e-5);
            }
        }
    }
}

#[test]
fn gradients_flow_through_the_state() {
    let device = device();
    for config in configs() {
        let model = model::<A>(&config, 8, &device);
        let all = ids(2, BATCH * LENGTH, 61);
        let loss_of = |pieces: &[usize]| {
            let (logits, cache) = in_pieces(&model, &all, pieces, &device);
            // The last cache counts too, so that gradients of final states are part of the comparison.
            let states = cache.tensors().into_iter().fold(Tensor::<A, 1>::zeros([1], &device), |sum, (_, t)| sum + t.powi_scalar(2).mean());
            (logits.powi_scalar(2).mean() + states).backward()
        };
        let whole = gradients(&model, &loss_of(&[LENGTH]));
        for pieces in splits() {
            let streamed = gradients(&model, &loss_of(&pieces));
            assert_same_gradients(&format!("{} in {pieces:?}", config.family), &streamed, &whole, 1e-4);
        }
    }
}

#[test]
fn a_detached_cache_cuts_the_gradient() {
    let device = device();
    let config = &configs()[0];
    let model = model::<A>(config, 9, &device);
    let (_, cache) = model.forward(tensor(&ids(3, 8, 61), [1, 8], &device), None, &Layout::full(1, 8));
    let second = |cache| {
        let (logits, _) = model.forward(tensor(&ids(4, 8, 61), [1, 8], &device), Some(cache), &Layout::full(1, 8));
        let value = floats(logits.clone());
        (value, gradients(&model, &logits.powi_scalar(2).mean().backward()))
    };
    let (attached, through) = second(cache.clone());
    let (detached, cut) = second(cache.detach());
    assert_eq!(attached, detached);
    let differs =
        through["layers.0.mixer.in_proj.weight"].iter().zip(&cut["layers.0.mixer.in_proj.weight"]).any(|(a, b)| (a - b).abs() > 1e-6);
    assert!(differs, "the gradient reached the first piece in both cases, or in neither");
}

#[test]
fn a_clone_of_a_cache_is_a_snapshot() {
    let device = device();
    for config in configs() {
        let model = model::<A>(&config, 10, &device).valid();
        let (_, cache) = model.forward(tensor(&ids(5, 6, 61), [1, 6], &device), None, &Layout::full(1, 6));
        let next = |id: i32, cache| floats(model.forward(tensor(&[id], [1, 1], &device), Some(cache), &Layout::full(1, 1)).0);
        let before = next(11, cache.clone());
        let _ = next(12, cache.clone());
        assert_eq!(before, next(11, cache), "{}", config.family);
    }
}

#[test]
fn rows_can_leave_a_batch() {
    let device = device();
    for config in configs() {
        let model = model::<B>(&config, 11, &device);
        let all = ids(6, 3 * 7, 61);
        let (_, cache) = model.forward(tensor(&all, [3, 7], &device), None, &Layout::full(3, 7));
        let (_, alone) = model.forward(tensor(&all[14..], [1, 7], &device), None, &Layout::full(1, 7));
        let step =
            |cache, rows: usize| floats(model.forward(tensor(&vec![4; rows], [rows, 1], &device), Some(cache), &Layout::full(rows, 1)).0);
        let kept = step(cache.select_rows(&[2, 0]), 2);
        assert_close(config.family.name(), &kept[..61], &step(alone, 1), 2e-5);
    }
}

#[test]
#[should_panic(expected = "made by another model")]
fn a_cache_of_other_layers_is_refused() {
    let device = device();
    let table = |pattern: &str| {
        DecoderConfig::from_json(&format!(
            r#"{{"model_type":"nemotron_h","vocab_size":61,"hidden_size":24,"hybrid_override_pattern":"{pattern}","num_attention_heads":6,
                "head_dim":4,"intermediate_size":40,"mamba_num_heads":6,"mamba_head_dim":4,"n_groups":2,"ssm_state_size":5}}"#
        ))
        .unwrap()
    };
    let ids = tensor(&ids(7, 3, 61), [1, 3], &device);
    let (_, cache) = model::<B>(&table("M"), 1, &device).forward(ids.clone(), None, &Layout::full(1, 3));
    model::<B>(&table("-"), 1, &device).forward(ids, Some(cache), &Layout::full(1, 3));
}
