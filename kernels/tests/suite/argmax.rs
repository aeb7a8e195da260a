//! Tests of [`terrarium_kernels::argmax`].

use burn::tensor::{DType, Int, Tensor, TensorData};
use terrarium_kernels::argmax::argmax;

use crate::common::*;

fn logits(values: Vec<f32>, rows: usize, dtype: DType) -> Tensor<Plain, 2> {
    let v = values.len() / rows;
    Tensor::<Plain, 2>::from_data(TensorData::new(values, [rows, v]), (&Default::default(), DType::F32)).cast(dtype)
}

fn ids(tensor: Tensor<Plain, 2, Int>) -> Vec<i64> {
    tensor.into_data().iter::<i64>().collect()
}

#[test]
fn the_first_of_the_largest_known_columns_is_found() {
    let dtypes: Vec<DType> = [DType::F32].into_iter().chain(halves().into_iter().map(|(dtype, _)| dtype)).collect();
    for (rows, v, known) in [(1, 1, 1), (3, 7, 7), (2, 64, 50), (5, 1000, 999), (2, 5003, 5003), (1, 50288, 50277)] {
        // Steps of 1/64 repeat often; the columns beyond `known` are the largest.
        let mut values: Vec<f32> = Rng::new(v as u64).uniform(-2.0, 2.0, rows * v).into_iter().map(|x| x as f32).collect();
        values.chunks_mut(v).for_each(|row| row[known..].fill(9.0));
        for &dtype in &dtypes {
            let of = |row: &[f32]| {
                let best = row[..known].iter().copied().fold(f32::NEG_INFINITY, f32::max);
                row.iter().position(|x| *x == best).unwrap() as i64
            };
            let expected: Vec<i64> = values.chunks(v).map(of).collect();
            let found = argmax(logits(values.clone(), rows, dtype), known, None);
            assert_eq!(found.dims(), [rows, 1]);
            assert_eq!(ids(found), expected, "{rows} x {v}, {known} known, {dtype:?}");
        }
    }
}

#[test]
fn what_is_not_finite_is_told_from_a_choice() {
    let row = |at: usize, value: f32| (0..40).map(|i| if i == at { value } else { (i % 7) as f32 }).collect::<Vec<_>>();
    let rows = [row(3, f32::NAN), row(39, f32::INFINITY), row(6, f32::NEG_INFINITY), vec![f32::NEG_INFINITY; 40], row(35, f32::NAN)];
    let found = |known| ids(argmax(logits(rows.concat(), rows.len(), DType::F32), known, None));
    assert_eq!(found(40), [-1, -1, 13, 0, -1]);
    assert_eq!(found(35), [-1, 6, 13, 0, 6], "columns beyond the known ones do not count");
}

#[test]
fn ids_are_written_over_others_or_beside_them() {
    let device = Default::default();
    let old = || Tensor::<Plain, 2, Int>::from_data(TensorData::new(vec![5i32, 6], [2, 1]), &device);
    let new = || logits(vec![0.0, 1.0, 0.5, 3.0, 2.0, 1.0], 2, DType::F32);
    assert_eq!(ids(argmax(new(), 3, Some(old()))), [1, 0]);
    let held = old();
    assert_eq!(ids(argmax(new(), 3, Some(held.clone()))), [1, 0]);
    assert_eq!(ids(held), [5, 6]);
}
