//! Documents packed into one row do not see each other; padding changes nothing.

use terrarium::burn::tensor::Tensor;
use terrarium::models::{Decoder, Layout};

use crate::common::*;

/// Documents of one packed row, and where they start.
const DOCUMENTS: [usize; 4] = [5, 1, 9, 8];

fn document_ids(pad: usize) -> Vec<i32> {
    let mut ids: Vec<i32> = DOCUMENTS.iter().enumerate().flat_map(|(i, &len)| vec![3 * i as i32; len]).collect();
    ids.extend(vec![-1; pad]);
    ids
}

/// Logits of each document alone, one after another.
fn alone<T: terrarium::kernels::KernelBackend>(model: &Decoder<T>, all: &[i32], device: &T::Device) -> Tensor<T, 3> {
    let mut start = 0;
    let pieces = DOCUMENTS.iter().map(|&len| {
        let ids = tensor(&all[start..start + len], [1, len], device);
        start += len;
        model.forward(ids, None, &Layout::full(1, len)).0
    });
    Tensor::cat(pieces.collect(), 1)
}

#[test]
fn packed_documents_equal_the_documents_alone() {
    let device = device();
    let total: usize = DOCUMENTS.iter().sum();
    for config in configs() {
        for pad in [0, 3] {
            let model = model::<A>(&config, 21, &device);
            let mut row = ids(7, total, 61);
            let separate = alone(&model, &row, &device);
            row.extend(vec![0; pad]);
            let layout = Layout::documents(1, total + pad, document_ids(pad)).unwrap();
            let packed = model.forward(tensor(&row, [1, total + pad], &device), None, &layout).0.narrow(1, 0, total);
            let what = format!("{} with {pad} padding", config.family);
            assert_close(&what, &floats(packed.clone()), &floats(separate.clone()), 2e-5);
            let found = gradients(&model, &packed.powi_scalar(2).mean().backward());
            let expected = gradients(&model, &separate.powi_scalar(2).mean().backward());
            assert_same_gradients(&what, &found, &expected, 1e-4);
        }
    }
}

#[test]
fn a_packed_row_may_be_cut_anywhere() {
    let device = device();
    let total: usize = DOCUMENTS.iter().sum();
    let documents = document_ids(0);
    for config in configs() {
        let model = model::<B>(&config, 22, &device);
        let row = ids(8, total, 61);
        let whole = floats(alone(&model, &row, &device));
        for cut in [1, 5, 6, 11, 15, total - 1] {
            let piece = |from: usize, to: usize, cache| {
                let layout = Layout::documents(1, to - from, documents[from..to].to_vec()).unwrap();
                model.forward(tensor(&row[from..to], [1, to - from], &device), cache, &layout)
            };
            let (first, cache) = piece(0, cut, None);
            let (second, _) = piece(cut, total, Some(cache));
            assert_close(&format!("{} cut at {cut}", config.family), &floats(Tensor::cat(vec![first, second], 1)), &whole, 2e-5);
        }
    }
}

#[test]
fn ragged_rows_equal_the_rows_alone_and_continue_alike() {
    let device = device();
    let lengths = [4, 9, 1];
    let rows: Vec<Vec<i32>> = lengths.iter().enumerate().map(|(i, &len)| ids(30 + i as u32, len, 61)).collect();
    for config in configs() {
        let model = model::<B>(&config, 23, &device);
        for left in [false, true] {
            let layout = if left { Layout::left_padded(&lengths, 9) } else { Layout::ragged(&lengths, 9) };
            let padded: Vec<i32> = rows
                .iter()
                .flat_map(|row| {
                    let pad = vec![0; 9 - row.len()];
                    if left { [pad, row.clone()].concat() } else { [row.clone(), pad].concat() }
                })
                .collect();
            let (logits, cache) = model.forward(tensor(&padded, [3, 9], &device), None, &layout);
            let (step, cache) = model.forward(tensor(&[3, 4, 5], [3, 1], &device), Some(cache), &Layout::full(3, 1));
            let (again, _) = model.forward(tensor(&[6, 7, 8, 9, 10, 11], [3, 2], &device), Some(cache), &Layout::full(3, 2));
            for (i, row) in rows.iter().enumerate() {
                let what = format!("{} row {i}, padding on the {}", config.family, if left { "left" } else { "right" });
                let n = row.len();
                let (expected, cache) = model.forward(tensor(row, [1, n], &device), None, &Layout::full(1, n));
                let from = if left { 9 - n } else { 0 };
                let found = logits.clone().narrow(0, i, 1).narrow(1, from, n);
                assert_close(&what, &floats(found), &floats(expected), 2e-5);
                let i32s = i as i32;
                let (expected, cache) = model.forward(tensor(&[3 + i32s], [1, 1], &device), Some(cache), &Layout::full(1, 1));
                assert_close(&what, &floats(step.clone().narrow(0, i, 1)), &floats(expected), 2e-5);
                let next = [6 + 2 * i32s, 7 + 2 * i32s];
                let (expected, _) = model.forward(tensor(&next, [1, 2], &device), Some(cache), &Layout::full(1, 2));
                assert_close(&what, &floats(again.clone().narrow(0, i, 1)), &floats(expected), 2e-5);
            }
        }
    }
}

#[test]
fn padding_between_tokens_changes_nothing() {
    let device = device();
    for config in configs() {
        let model = model::<B>(&config, 24, &device);
        let row = ids(40, 6, 61);
        let expected = floats(model.forward(tensor(&row, [1, 6], &device), None, &Layout::full(1, 6)).0);
        let holes = [0, -1, 0, 0, -1, -1, 0, 0, 0];
        let mut next = row.iter();
        let spread: Vec<i32> = holes.iter().map(|&id| if id == 0 { *next.next().unwrap() } else { 1 }).collect();
        let layout = Layout::documents(1, 9, holes.to_vec()).unwrap();
        let logits = floats(model.forward(tensor(&spread, [1, 9], &device), None, &layout).0);
        let found: Vec<f32> = logits.chunks(61).zip(holes).filter(|(_, id)| *id == 0).flat_map(|(row, _)| row.to_vec()).collect();
        assert_close(config.family.name(), &found, &expected, 2e-5);
    }
}

#[test]
fn a_row_of_padding_keeps_its_state() {
    let device = device();
    for config in configs() {
        let model = model::<B>(&config, 25, &device);
        let all = ids(50, 8, 61);
        let (_, cache) = model.forward(tensor(&all, [2, 4], &device), None, &Layout::full(2, 4));
        let layout = Layout::ragged(&[0, 3], 3);
        let (_, padded) = model.forward(tensor(&[1, 1, 1, 5, 6, 7], [2, 3], &device), Some(cache.clone()), &layout);
        let step = |cache| floats(model.forward(tensor(&[9, 9], [2, 1], &device), Some(cache), &Layout::full(2, 1)).0);
        assert_close(config.family.name(), &step(padded)[..61], &step(cache)[..61], 2e-5);
    }
}
