//! Tests of [`terrarium_kernels::attention::step`].

use burn::tensor::{DType, Tensor, TensorData};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::attention::SlotIds;
use terrarium_kernels::attention::step::{Angles, Standing, StepArgs, StepOut, attention_step};

use crate::common::*;

type B = Plain;

#[derive(Debug, Clone)]
struct Steps {
    b: usize,
    h: usize,
    g: usize,
    p: usize,
    capacity: usize,
    /// Slots in use before the first step.
    slots: usize,
    /// Rotated pairs.
    half: usize,
    /// How many of the first slots of each row are padding, and how many after these are of another document.
    hidden: Option<Vec<[usize; 2]>>,
}

impl Steps {
    fn new(slots: usize, capacity: usize) -> Self {
        Self { b: 2, h: 6, g: 2, p: 8, capacity, slots, half: 4, hidden: None }
    }

    /// Which slots a row's newest token sees.
    fn sees(&self, row: usize, slot: usize) -> bool {
        self.hidden.as_ref().is_none_or(|hidden| slot >= hidden[row][0] + hidden[row][1])
    }

    fn position(&self, row: usize, step: usize) -> usize {
        self.slots + step - self.hidden.as_ref().map_or(0, |hidden| hidden[row][0] + hidden[row][1])
    }

    fn documents(&self) -> Option<SlotIds> {
        let hidden = self.hidden.as_ref()?;
        let slots = hidden.iter().flat_map(|[padding, other]| {
            (0..self.slots).map(move |slot| if slot < *padding { -1 } else { i32::from(slot >= padding + other) })
        });
        Some(SlotIds { batch: self.b, queries: vec![1; self.b], slots: slots.collect() })
    }

    fn frequencies(&self) -> Vec<f64> {
        (0..self.half).map(|i| 100f64.powf(-(i as f64) / self.half as f64)).collect()
    }

    /// Rotates a head in float64.
    fn rotated(&self, x: &[f64], position: usize) -> Vec<f64> {
        let mut out = x.to_vec();
        for (i, w) in self.frequencies().iter().enumerate() {
            let (sin, cos) = (position as f64 * w).sin_cos();
            out[i] = x[i] * cos - x[i + self.half] * sin;
            out[i + self.half] = x[i + self.half] * cos + x[i] * sin;
        }
        out
    }

    /// Takes `count` steps on the device and in scalar float64 arithmetic; the largest difference of outputs and buffers.
    fn check(&self, count: usize, dtype: DType, tolerance: f64) {
        let &Self { b, h, g, p, capacity, .. } = self;
        let device = Default::default();
        let mut rng = Rng::new((capacity + self.slots) as u64);
        let mut buffers = [(); 2].map(|()| {
            let mut values = rng.uniform(-1.0, 1.0, b * g * capacity * p);
            // What is not in use may be anything.
            for (i, value) in values.iter_mut().enumerate() {
                if i / p % capacity >= self.slots {
                    *value = f64::NAN;
                }
            }
            values
        });
        let tensor =
            |values: &[f64]| Tensor::<B, 1>::from_data(TensorData::new(values.to_vec(), [values.len()]), (&device, DType::F32)).cast(dtype);
        let [mut keys, mut values] = buffers.each_ref().map(|buffer| tensor(buffer).reshape([b, g, capacity, p]));
        let positions: Vec<i32> = (0..b).map(|row| self.position(row, 0) as i32).collect();
        let mut standing = Standing::<B>::new(self.slots, &positions, self.documents().as_ref(), capacity, &device).unwrap();
        let angles = (self.half > 0).then(|| Angles::new(&self.frequencies(), capacity, &device));
        for step in 0..count {
            let [q, k, v] = [h, g, g].map(|heads| rng.uniform(-1.0, 1.0, b * heads * p));
            let args = StepArgs {
                q: tensor(&q).reshape([b, h, p]),
                k: tensor(&k).reshape([b, g, p]),
                v: tensor(&v).reshape([b, g, p]),
                keys,
                values,
                angles: angles.clone(),
                scale: 0.375,
                standing: standing.clone(),
            };
            let StepOut { y, keys: new_keys, values: new_values } = attention_step(args);
            (keys, values) = (new_keys, new_values);
            standing = standing.advance();

            let slot = self.slots + step;
            let mut want = vec![0.0; b * h * p];
            for row in 0..b {
                for group in 0..g {
                    let from = (row * g + group) * p;
                    let at = ((row * g + group) * capacity + slot) * p;
                    buffers[0][at..at + p].copy_from_slice(&self.rotated(&k[from..from + p], self.position(row, step)));
                    buffers[1][at..at + p].copy_from_slice(&v[from..from + p]);
                }
                for head in 0..h {
                    let at = (row * h + head) * p;
                    let query = self.rotated(&q[at..at + p], self.position(row, step));
                    let base = (row * g + head / (h / g)) * capacity;
                    let weight = |slot: &usize| -> f64 {
                        let key = &buffers[0][(base + slot) * p..][..p];
                        (0.375 * query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>()).exp()
                    };
                    let seen: Vec<(usize, f64)> =
                        (0..=slot).filter(|slot| self.sees(row, *slot)).map(|slot| (slot, weight(&slot))).collect();
                    let sum: f64 = seen.iter().map(|(_, weight)| weight).sum();
                    for (slot, weight) in seen {
                        for i in 0..p {
                            want[at + i] += weight / sum * buffers[1][(base + slot) * p + i];
                        }
                    }
                }
            }
            let found: Vec<f64> = y.cast(DType::F32).into_data().iter::<f64>().collect();
            let off = found.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, |most, off| if off <= most { most } else { off });
            assert!(off <= tolerance, "{self:?} step {step} {dtype:?}: off by {off}");
        }
        // Used slots are kept, later ones untouched.
        for (name, buffer, tensor) in [("keys", &buffers[0], keys), ("values", &buffers[1], values)] {
            let found: Vec<f64> = tensor.cast(DType::F32).into_data().iter::<f64>().collect();
            let right = |(a, b): (&f64, &f64)| if b.is_nan() { a.is_nan() } else { (a - b).abs() <= tolerance };
            assert!(found.iter().zip(buffer).all(right), "{self:?}: {name}");
        }
        let places: Vec<i64> = standing.places().to_data().iter::<i64>().collect();
        assert_eq!(places[0] as usize, self.slots + count);
        assert!((0..b).all(|row| places[1 + row] as usize == self.position(row, count)), "{places:?}");
    }
}

fn all() -> Vec<Steps> {
    let plain = Steps::new(3, 7);
    vec![
        Steps { half: 0, ..plain.clone() },
        Steps { half: 2, ..plain.clone() },
        // Odd widths, one head per group.
        Steps { p: 5, half: 1, g: 6, ..plain.clone() },
        plain,
        // Several parts, most of them empty; then nearly full.
        Steps::new(5, 400),
        Steps::new(396, 400),
        // Positions beyond the first block of angles.
        Steps { b: 1, h: 2, g: 1, ..Steps::new(1500, 1600) },
        Steps { hidden: Some(vec![[0, 0], [2, 1]]), ..Steps::new(6, 12) },
        Steps { hidden: Some(vec![[100, 20], [0, 129]]), ..Steps::new(130, 300) },
    ]
}

#[test]
fn steps_are_those_of_float64() {
    for case in all() {
        case.check(3, DType::F32, TOLERANCE);
    }
}

#[test]
fn half_precision_is_rounded_once() {
    for (dtype, rounding) in halves() {
        for case in all() {
            case.check(2, dtype, 4.0 * rounding);
        }
    }
}

#[test]
fn wrong_shapes_are_named() {
    let device = Default::default();
    assert!(Standing::<B>::new(5, &[4], None, 4, &device).unwrap_err().to_string().contains("slots in use"));
    let ids = SlotIds { batch: 1, queries: vec![0], slots: vec![0; 3] };
    assert!(Standing::<B>::new(4, &[4], Some(&ids), 8, &device).unwrap_err().to_string().contains("slot ids"));
    let zeros = |heads: usize| Tensor::<B, 3>::zeros([1, heads, 4], &device);
    let args = StepArgs {
        q: zeros(4),
        k: zeros(2),
        v: zeros(2),
        keys: Tensor::zeros([1, 2, 8, 4], &device),
        values: Tensor::zeros([1, 2, 8, 4], &device),
        angles: None,
        scale: 1.0,
        standing: Standing::new(3, &[3], None, 8, &device).unwrap(),
    };
    args.check().unwrap();
    let short = StepArgs { values: Tensor::zeros([1, 2, 7, 4], &device), ..args.clone() };
    assert!(short.check().unwrap_err().to_string().contains("values"));
    let heads = StepArgs { q: zeros(3), ..args.clone() };
    assert!(heads.check().unwrap_err().to_string().contains("query heads"));
    let angles = StepArgs { angles: Some(Angles::new(&[1.0; 3], 8, &device)), ..args };
    assert!(angles.check().unwrap_err().to_string().contains("angles"));
    assert_eq!(B::steps_in_place(&device), cfg!(any(feature = "cuda", feature = "vulkan")));
}
