//! Tests of [`terrarium_kernels::attention`].

use burn::tensor::{DType, Tensor};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::attention::{AttentionArgs, AttentionMask, SlotIds, attention, reference};

use crate::common::*;

#[derive(Debug, Clone)]
struct AttentionCase {
    b: usize,
    h: usize,
    g: usize,
    l: usize,
    s: usize,
    p: usize,
    /// Document ids of queries and slots.
    ids: Option<Ids>,
}

impl AttentionCase {
    fn new(l: usize, s: usize) -> Self {
        Self { b: 2, h: 6, g: 2, l, s, p: 5, ids: None }
    }

    /// Two documents and padding; the slots before the queries belong to the first document.
    fn documents(self) -> Self {
        let &AttentionCase { l, s, .. } = &self;
        let row =
            |split: usize, pad: usize| -> Vec<i32> { (0..s).map(|t| if t + pad >= s { -1 } else { i32::from(t >= split) }).collect() };
        let slots = [row(s / 2 + 1, 0), row(s.saturating_sub(2), usize::from(l > 1))].concat();
        let queries = slots.chunks(s).flat_map(|row| row[s - l..].to_vec()).collect();
        Self { ids: Some(Ids(queries, slots)), ..self }
    }
}

impl Case for AttentionCase {
    fn inputs(&self) -> Bag<Vec<f64>> {
        let &AttentionCase { b, h, g, l, s, p, .. } = self;
        let mut rng = Rng::new((l * 11 + s) as u64);
        Bag(vec![
            ("q", rng.uniform(-2.0, 2.0, b * h * l * p)),
            ("k", rng.uniform(-2.0, 2.0, b * g * s * p)),
            ("v", rng.uniform(-1.0, 1.0, b * g * s * p)),
        ])
    }

    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>> {
        let &AttentionCase { b, h, g, l, s, p, .. } = self;
        let [q, k, v] = ["q", "k", "v"].map(|name| inputs.get(name));
        let mut out = vec![0.0; b * h * l * p];
        for row in 0..b * h {
            let (batch, head) = (row / h, row % h);
            let slots = (batch * g + head / (h / g)) * s;
            for t in 0..l {
                let seen = |slot: usize| match &self.ids {
                    None => true,
                    Some(Ids(queries, ids)) => queries[batch * l + t] >= 0 && queries[batch * l + t] == ids[batch * s + slot],
                };
                let query = &q[(row * l + t) * p..][..p];
                let slots: Vec<(usize, f64)> = (0..=s - l + t)
                    .filter(|&slot| seen(slot))
                    .map(|slot| (slots + slot, query.iter().zip(&k[(slots + slot) * p..]).map(|(q, k)| q * k).sum::<f64>() * SCALE))
                    .collect();
                let sum: f64 = slots.iter().map(|(_, score)| score.exp()).sum();
                for (slot, score) in slots {
                    for i in 0..p {
                        out[(row * l + t) * p + i] += score.exp() / sum * v[slot * p + i];
                    }
                }
            }
        }
        vec![out]
    }

    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>> {
        let &AttentionCase { b, h, g, l, s, p, .. } = self;
        let mask = match &self.ids {
            None => AttentionMask::causal(l, s),
            Some(Ids(queries, slots)) => {
                AttentionMask::documents(l, s, SlotIds { batch: b, queries: queries.clone(), slots: slots.clone() }).unwrap()
            }
        };
        let args = AttentionArgs {
            q: inputs.get("q").reshape([b, h, l, p]).cast(dtype),
            k: inputs.get("k").reshape([b, g, s, p]).cast(dtype),
            v: inputs.get("v").reshape([b, g, s, p]).cast(dtype),
            scale: SCALE as f32,
            mask,
        };
        let out = match way {
            Way::Reference => reference::attention(args),
            _ => attention(args),
        };
        assert_eq!((out.dims(), out.dtype()), ([b, h, l, p], dtype));
        vec![flat(out)]
    }
}

const SCALE: f64 = 0.375;

fn cases() -> Vec<AttentionCase> {
    let mut cases = vec![
        AttentionCase::new(1, 1),
        AttentionCase::new(1, 9),
        AttentionCase::new(1, 9).documents(),
        AttentionCase::new(4, 4).documents(),
        AttentionCase::new(3, 8),
        AttentionCase::new(5, 12).documents(),
    ];
    if !SLOW {
        cases.extend([
            AttentionCase::new(1, 300).documents(),
            AttentionCase { p: 64, ..AttentionCase::new(2, 130) },
            AttentionCase::new(65, 65),
            AttentionCase { p: 20, ..AttentionCase::new(63, 100).documents() },
            AttentionCase { h: 3, g: 3, p: 33, ..AttentionCase::new(200, 200) },
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
fn a_part_of_a_larger_cache_serves_as_keys() {
    let case = AttentionCase::new(1, 9);
    let inputs = case.inputs();
    let [q, k, v] = ["q", "k", "v"].map(|name| tensor::<Plain>(&inputs.get(name)));
    let cached = |t: Tensor<Plain, 1>| {
        let spare = Tensor::full([2, 2, 7, 5], f32::NAN, &Default::default());
        Tensor::cat(vec![t.reshape([2, 2, 9, 5]), spare], 2).narrow(2, 0, 9)
    };
    let args =
        AttentionArgs { q: q.reshape([2, 6, 1, 5]), k: cached(k), v: cached(v), scale: SCALE as f32, mask: AttentionMask::causal(1, 9) };
    close("attention", &values(attention(args)), &case.scalar(&inputs)[0], TOLERANCE);
}

#[test]
fn gradients_agree_with_differences() {
    for case in [AttentionCase { p: 2, ..AttentionCase::new(4, 6).documents() }, AttentionCase { p: 3, ..AttentionCase::new(3, 3) }] {
        check_differences(&case, &[Way::Reference, Way::Public], 1);
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    if !SLOW {
        check_threads(&AttentionCase { p: 32, ..AttentionCase::new(200, 230) }, 1);
    }
}

#[test]
fn public_gradients_agree_with_the_reference() {
    for case in cases() {
        check_gradients(&case, &Way::Public, 1);
    }
}

#[test]
fn half_precision_inputs_keep_their_dtype() {
    if !HALF {
        return;
    }
    // The reference rounds the weights of the average as well.
    let case = AttentionCase::new(5, 12).documents();
    close_lists("bf16", &outputs(&case, &Way::Public, DType::BF16), &case.scalar(&case.inputs()), 2e-2);
}
