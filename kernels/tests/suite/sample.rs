//! Tests of [`terrarium_kernels::sample`].

use burn::tensor::{DType, Int, Tensor, TensorData};
use terrarium_kernels::sample::{Draws, SampleOptions, host, sample};

use crate::common::*;

const ALL: SampleOptions = SampleOptions { temperature: 1.0, top_k: 0, top_p: 1.0 };

fn logits(values: &[f32], rows: usize, dtype: DType) -> Tensor<Plain, 2> {
    let v = values.len() / rows;
    Tensor::<Plain, 2>::from_data(TensorData::new(values.to_vec(), [rows, v]), (&Default::default(), DType::F32)).cast(dtype)
}

fn ids(tensor: Tensor<Plain, 2, Int>) -> Vec<i64> {
    tensor.into_data().iter::<i64>().collect()
}

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    Rng::new(seed).uniform(-6.0, 2.0, count).into_iter().enumerate().map(|(i, x)| x as f32 + (i % 13) as f32 * 1e-3).collect()
}

#[test]
fn draws_are_those_of_the_host() {
    let options = [
        ALL,
        SampleOptions { temperature: 0.6, ..ALL },
        SampleOptions { top_k: 1, ..ALL },
        SampleOptions { top_k: 7, temperature: 2.0, ..ALL },
        SampleOptions { top_p: 0.3, ..ALL },
        SampleOptions { top_p: 1e-6, ..ALL },
        SampleOptions { top_k: 20, top_p: 0.9, temperature: 1.5 },
    ];
    // The last takes every part of the kernel.
    let options = if SLOW { &options[6..] } else { &options[..] };
    let dtypes: Vec<DType> = [DType::F32].into_iter().chain(halves().into_iter().map(|(dtype, _)| dtype)).collect();
    let sizes: &[(usize, usize, usize)] = if SLOW { &[(2, 37, 30)] } else { &[(1, 1, 1), (3, 37, 30), (2, 5003, 5003), (1, 50288, 50277)] };
    for &(rows, v, known) in sizes {
        let mut values = numbers(rows * v, v as u64);
        values.chunks_mut(v).for_each(|row| row[known..].fill(9.0));
        for &dtype in &dtypes {
            let given = logits(&values, rows, dtype);
            let rounded: Vec<f32> = given.clone().cast(DType::F32).into_data().iter::<f32>().collect();
            for &options in options {
                // Counts near the end of 32 bits go on from nothing.
                let seeds: Vec<(u64, u32)> = (0..rows as u64).map(|row| (0x1234_5678_9ABC_DEF0 * (row + 1), u32::MAX - 1)).collect();
                let mut draws = Draws::new(&seeds, &Default::default());
                for step in 0..4u32 {
                    let drawn;
                    (drawn, draws) = sample(given.clone(), known, options, draws, None);
                    let draw = |(row, (seed, count)): (usize, &(u64, u32))| {
                        i64::from(host::draw(&rounded[row * v..][..known], options, *seed, count.wrapping_add(step)).unwrap())
                    };
                    let expected: Vec<i64> = seeds.iter().enumerate().map(draw).collect();
                    assert_eq!(ids(drawn), expected, "{rows} x {v}, {known} known, {dtype:?}, {options:?}, step {step}");
                }
            }
        }
    }
}

#[test]
fn kept_tokens_have_their_probabilities() {
    // Halves: 1/2, 1/4, 1/8, ...; of the best three the last has one seventh.
    let values: Vec<f32> = (0..8).map(|i| -(i as f32) * std::f32::consts::LN_2).collect();
    let rows = if SLOW { 16 } else { 256 };
    let many: Vec<f32> = (0..rows).flat_map(|_| values.clone()).collect();
    let count = |options: SampleOptions| {
        let seeds: Vec<(u64, u32)> = (0..rows as u64).map(|seed| (seed, 0)).collect();
        let (mut draws, mut counts) = (Draws::new(&seeds, &Default::default()), [0usize; 8]);
        for _ in 0..16 {
            let drawn;
            (drawn, draws) = sample(logits(&many, rows, DType::F32), 8, options, draws, None);
            ids(drawn).into_iter().for_each(|id| counts[id as usize] += 1);
        }
        counts.map(|count| count as f64 / (16 * rows) as f64)
    };
    let slack = 4.0 * (0.25 / (16 * rows) as f64).sqrt();
    for (options, kept) in [
        (ALL, 8),
        (SampleOptions { top_k: 3, ..ALL }, 3),
        // 1/2 + 1/4 is less than 0.8 of all.
        (SampleOptions { top_p: 0.8, ..ALL }, 3),
        (SampleOptions { top_k: 4, top_p: 0.7, ..ALL }, 2),
    ] {
        let total: f64 = (0..kept).map(|i| 0.5f64.powi(i)).sum();
        for (i, found) in count(options).into_iter().enumerate() {
            let expected = if (i as i32) < kept { 0.5f64.powi(i as i32) / total } else { 0.0 };
            assert!((found - expected).abs() <= if expected == 0.0 { 0.0 } else { slack }, "{options:?}, token {i}: {found} of {expected}");
        }
    }
}

#[test]
fn what_is_not_finite_is_told_from_a_draw() {
    let row = |at: usize, value: f32| (0..40).map(|i| if i == at { value } else { -((i % 7) as f32) * 20.0 }).collect::<Vec<_>>();
    let rows = [row(3, f32::NAN), row(39, f32::INFINITY), row(0, f32::NEG_INFINITY), vec![f32::NEG_INFINITY; 40], row(35, f32::NAN)];
    let found = |known: usize, options: SampleOptions| {
        let draws = Draws::new(&[(1, 0); 5], &Default::default());
        ids(sample(logits(&rows.concat(), 5, DType::F32), known, options, draws, None).0)
    };
    for options in [ALL, SampleOptions { top_k: 5, top_p: 0.9, ..ALL }] {
        let all = found(40, options);
        assert_eq!([all[0], all[1], all[3], all[4]], [-1; 4], "{options:?}");
        assert!(all[2] % 7 == 0 && all[2] > 0, "{all:?}");
        assert!(found(35, options)[1] % 7 == 0, "columns beyond the known ones do not count");
    }
}

#[test]
fn ids_and_draws_are_written_over_others_or_beside_them() {
    let device = Default::default();
    let old = || Tensor::<Plain, 2, Int>::from_data(TensorData::new(vec![5i32, 6], [2, 1]), &device);
    let draws = || Draws::<Plain>::new(&[(3, 0), (4, 9)], &device);
    let best = || logits(&[0.0, 90.0, 0.5, 90.0, 2.0, 1.0], 2, DType::F32);
    let state = |draws: &Draws<Plain>| draws.state().to_data().iter::<i64>().collect::<Vec<_>>();
    let (drawn, after) = sample(best(), 3, ALL, draws(), Some(old()));
    assert_eq!((ids(drawn), state(&after)), (vec![1, 0], vec![3, 0, 1, 4, 0, 10]));
    let (held, kept) = (old(), draws());
    let (drawn, after) = sample(best(), 3, ALL, kept.clone(), Some(held.clone()));
    assert_eq!((ids(drawn), state(&after)), (vec![1, 0], vec![3, 0, 1, 4, 0, 10]));
    assert_eq!((ids(held), state(&kept)), (vec![5, 6], vec![3, 0, 0, 4, 0, 9]));
}
