//! Tests of [`terrarium_kernels::attention`].

use burn::tensor::{DType, Tensor};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::attention::{AttentionArgs, AttentionMask, SlotIds, attention, reference};
use terrarium_kernels::path::{Op, fused};

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
                let query = &q[(row * l + t) * p..][..p];
                let slots: Vec<(usize, f64)> = (0..=s - l + t)
                    .filter(|&slot| self.seen(batch, t, slot))
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

    fn tolerance(&self, way: &Way) -> f64 {
        // Scores have factors of up to 2; an exponential makes their errors relative ones.
        if matches!(way, Way::Reference) { 2.0 * PRODUCTS } else { TOLERANCE }
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

const WAYS: &[Way] = &[Way::Reference, Way::Public];

impl AttentionCase {
    /// Gradients in scalar float64 arithmetic, for the loss of [`gradients`].
    fn scalar_gradients(&self) -> Bag<Vec<f64>> {
        let &AttentionCase { b, h, g, l, s, p, .. } = self;
        let inputs = self.inputs();
        let [q, k, v] = ["q", "k", "v"].map(|name| inputs.get(name));
        let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|values| vec![0.0; values.len()]);
        let douts = Rng::new(900).uniform(-1.0, 1.0, q.len());
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for row in 0..b * h {
            let (batch, head) = (row / h, row % h);
            let slots = (batch * g + head / (h / g)) * s;
            for t in 0..l {
                let at = (row * l + t) * p;
                let (query, dout) = (&q[at..at + p], &douts[at..at + p]);
                let seen: Vec<usize> = (0..=s - l + t).filter(|&slot| self.seen(batch, t, slot)).map(|slot| (slots + slot) * p).collect();
                let scores: Vec<f64> = seen.iter().map(|&slot| (dot(query, &k[slot..slot + p]) * SCALE).exp()).collect();
                let sum: f64 = scores.iter().sum();
                let dots: Vec<f64> = seen.iter().map(|&slot| dot(dout, &v[slot..slot + p])).collect();
                let mean = dot(&scores, &dots) / sum;
                for ((&slot, score), value) in seen.iter().zip(&scores).zip(&dots) {
                    let weight = score / sum;
                    let slope = weight * (value - mean) * SCALE;
                    for i in 0..p {
                        dv[slot + i] += weight * dout[i];
                        dk[slot + i] += slope * query[i];
                        dq[at + i] += slope * k[slot + i];
                    }
                }
            }
        }
        Bag(vec![("q", dq), ("k", dk), ("v", dv)])
    }

    fn seen(&self, batch: usize, t: usize, slot: usize) -> bool {
        self.ids.as_ref().is_none_or(|Ids(queries, slots)| {
            let own = queries[batch * self.l + t];
            own >= 0 && own == slots[batch * self.s + slot]
        })
    }
}

fn cases() -> Vec<AttentionCase> {
    let mut cases = vec![
        AttentionCase::new(1, 1),
        AttentionCase::new(1, 9),
        AttentionCase::new(1, 9).documents(),
        AttentionCase::new(4, 4).documents(),
        AttentionCase::new(3, 8),
        AttentionCase::new(5, 12).documents(),
        // More queries than the kernels for decoding take.
        AttentionCase::new(9, 12).documents(),
    ];
    if !SLOW {
        cases.extend([
            AttentionCase::new(1, 300).documents(),
            AttentionCase { p: 64, ..AttentionCase::new(2, 130) },
            AttentionCase { p: 64, b: 1, h: 4, g: 4, ..AttentionCase::new(1, 700) },
            AttentionCase::new(65, 65),
            AttentionCase { p: 20, ..AttentionCase::new(63, 100).documents() },
            AttentionCase { h: 3, g: 3, p: 33, ..AttentionCase::new(200, 200) },
        ]);
    }
    cases
}

/// Cases for 16-bit inputs: every way that the tiles of tensor cores can be cut.
fn wide_cases() -> Vec<AttentionCase> {
    let new = |l, s, p| AttentionCase { h: 4, p, ..AttentionCase::new(l, s) };
    vec![
        new(63, 65, 64),
        new(130, 130, 64).documents(),
        AttentionCase { g: 4, ..new(65, 200, 64).documents() },
        AttentionCase { g: 1, ..new(130, 131, 128).documents() },
        new(65, 65, 128),
        AttentionCase { b: 1, h: 2, ..new(200, 260, 96) },
        AttentionCase { b: 1, h: 2, ..new(20, 20, 32) },
        AttentionCase { b: 1, h: 2, ..new(40, 70, 72) },
        new(3, 300, 64).documents(),
        AttentionCase { g: 1, ..new(1, 300, 128) },
    ]
}

#[test]
fn all_paths_agree_with_the_scalar_loop() {
    for case in cases() {
        check_values(&case, WAYS);
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
fn inputs_may_be_views() {
    let case = AttentionCase { p: 8, ..AttentionCase::new(10, 10) };
    let inputs = case.inputs();
    // In memory as [b, l, h, p].
    let view = |name: &str, heads| {
        let dense = tensor::<Plain>(&inputs.get(name)).reshape([2, heads, 10, 8]);
        Tensor::cat(vec![dense.swap_dims(1, 2)], 1).swap_dims(1, 2)
    };
    let args =
        AttentionArgs { q: view("q", 6), k: view("k", 2), v: view("v", 2), scale: SCALE as f32, mask: AttentionMask::causal(10, 10) };
    close("attention", &values(attention(args)), &case.scalar(&inputs)[0], TOLERANCE);
}

#[test]
fn nothing_gives_nothing() {
    for [b, l] in [[0, 3], [2, 0]] {
        let device = Default::default();
        let [q, k] = [[b, 6, l, 5], [b, 2, l, 5]].map(|shape| Tensor::<Plain, 4>::empty(shape, &device));
        let out = attention(AttentionArgs { q, k: k.clone(), v: k, scale: 1.0, mask: AttentionMask::causal(l, l) });
        assert_eq!(out.dims(), [b, 6, l, 5]);
    }
}

#[test]
fn heads_wider_than_the_kernels_have_gradients() {
    let case = AttentionCase { b: 1, h: 2, g: 1, p: 260, ..AttentionCase::new(3, 4) };
    // The reference, then.
    close_bags("260", &gradients(&case, &Way::Public, DType::F32, &[0]), &case.scalar_gradients(), 4.0 * PRODUCTS);
}

#[test]
fn gradients_agree_with_differences() {
    for case in [AttentionCase { p: 2, ..AttentionCase::new(4, 6).documents() }, AttentionCase { p: 3, ..AttentionCase::new(3, 3) }] {
        check_differences(&case, WAYS, 1);
        close_bags("scalar", &case.scalar_gradients(), &differences(&case, &[0]), 1e-6);
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    if !SLOW {
        check_threads(&AttentionCase { p: 32, ..AttentionCase::new(200, 230) }, 1);
    }
}

#[test]
fn public_gradients_agree_with_the_scalar_loop() {
    for case in cases() {
        close_bags(&format!("{case:?}"), &gradients(&case, &Way::Public, DType::F32, &[0]), &case.scalar_gradients(), 2.0 * TOLERANCE);
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

#[test]
fn half_precision_is_as_good_as_its_rounding() {
    for (dtype, tolerance) in [(DType::BF16, 2e-2), (DType::F16, 4e-3)] {
        // The reference rounds the scores as well.
        if !HALF || fused::<Plain>(Op::Attention, dtype).is_none() {
            continue;
        }
        for case in wide_cases() {
            let what = format!("{dtype:?} {case:?}");
            close_lists(&what, &outputs(&case, &Way::Public, dtype), &case.scalar(&case.inputs()), tolerance);
            close_bags(&what, &gradients(&case, &Way::Public, dtype, &[0]), &case.scalar_gradients(), tolerance);
        }
    }
}
