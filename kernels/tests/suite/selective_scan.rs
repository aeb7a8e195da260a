//! Tests of [`terrarium_kernels::selective_scan`].

use std::path::Path;

use burn::tensor::{DType, Tensor};
use safetensors::SafeTensors;
use terrarium_kernels::KernelBackend;
use terrarium_kernels::Segments;
use terrarium_kernels::selective_scan::{ScanArgs, ScanOut, reference, selective_scan};

use crate::common::*;

#[derive(Debug, Clone)]
struct ScanCase {
    b: usize,
    l: usize,
    e: usize,
    n: usize,
    skip: bool,
    gate: bool,
    bias: bool,
    state: bool,
    softplus: bool,
    /// Gate, `b` and `c` are parts of wider tensors.
    wide: bool,
    segments: Option<Ids>,
}

impl ScanCase {
    /// All options on.
    fn new(l: usize, e: usize, n: usize) -> Self {
        Self { b: 2, l, e, n, skip: true, gate: true, bias: true, state: true, softplus: true, wide: true, segments: None }
    }

    fn segmented(self) -> Self {
        let segments = Some(three_rows(self.l));
        Self { b: 3, segments, ..self }
    }

    fn bare(self) -> Self {
        Self { skip: false, gate: false, bias: false, state: false, wide: false, ..self }
    }

    fn linear_delta(self) -> Self {
        Self { softplus: false, ..self }
    }

    /// Tokens `from..to` as a call of its own.
    fn args<B: KernelBackend>(
        &self,
        inputs: &Bag<Tensor<B, 1>>,
        (from, to): (usize, usize),
        state: Option<Tensor<B, 3>>,
        dtype: DType,
    ) -> ScanArgs<B> {
        let &ScanCase { b, l, e, n, wide, .. } = self;
        let rows = |values: Tensor<B, 1>, width| values.reshape([b, l, width]).narrow(1, from, to - from).cast(dtype);
        let part = |values: Tensor<B, 1>, width| {
            let values = rows(values, width);
            if wide { Tensor::cat(vec![values.clone(), values], 2).narrow(2, width, width) } else { values }
        };
        let segments = self.segments.as_ref().map(|Ids(ids, prev)| {
            let (ids, prev) = piece(ids, prev, l, from, to);
            Segments::new(b, to - from, ids, prev, &Default::default()).unwrap()
        });
        ScanArgs {
            u: rows(inputs.get("u"), e),
            delta: rows(inputs.get("delta"), e),
            a: inputs.get("a").reshape([e, n]),
            b: part(inputs.get("b"), n),
            c: part(inputs.get("c"), n),
            d: inputs.opt("d"),
            z: inputs.opt("z").map(|z| part(z, e)),
            delta_bias: inputs.opt("delta_bias"),
            state,
            segments,
            delta_softplus: self.softplus,
        }
    }
}

impl Case for ScanCase {
    fn inputs(&self) -> Bag<Vec<f64>> {
        let &ScanCase { b, l, e, n, .. } = self;
        let mut rng = Rng::new((l * 31 + e) as u64);
        let mut inputs = vec![
            ("u", rng.uniform(-1.0, 1.0, b * l * e)),
            ("delta", rng.uniform(if self.softplus { -1.5 } else { 0.05 }, 1.0, b * l * e)),
            ("a", rng.uniform(-1.9, -0.05, e * n)),
            ("b", rng.uniform(-1.0, 1.0, b * l * n)),
            ("c", rng.uniform(-1.0, 1.0, b * l * n)),
        ];
        if self.skip {
            inputs.push(("d", rng.uniform(-1.0, 1.0, e)));
        }
        if self.gate {
            inputs.push(("z", rng.uniform(-2.0, 2.0, b * l * e)));
        }
        if self.bias {
            inputs.push(("delta_bias", rng.uniform(-1.0, 0.5, e)));
        }
        if self.state {
            inputs.push(("state", rng.uniform(-1.0, 1.0, b * e * n)));
        }
        Bag(inputs)
    }

    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>> {
        let &ScanCase { b, l, e, n, .. } = self;
        let [u, delta, a, bs, cs] = ["u", "delta", "a", "b", "c"].map(|name| inputs.get(name));
        let [d, z, bias] = ["d", "z", "delta_bias"].map(|name| inputs.opt(name));
        let mut state = inputs.opt("state").unwrap_or_else(|| vec![0.0; b * e * n]);
        let mut y = vec![0.0; b * l * e];
        for row in 0..b {
            let mut last = self.segments.as_ref().map_or(0, |Ids(_, prev)| prev[row]);
            for t in 0..l {
                let id = self.segments.as_ref().map_or(0, |Ids(ids, _)| ids[row * l + t]);
                if id < 0 {
                    continue;
                }
                for i in 0..e {
                    let at = (row * l + t) * e + i;
                    let mut step = delta[at] + bias.as_ref().map_or(0.0, |bias| bias[i]);
                    if self.softplus {
                        step = if step > 20.0 { step } else { step.exp().ln_1p() };
                    }
                    let mut sum = d.as_ref().map_or(0.0, |d| d[i] * u[at]);
                    for j in 0..n {
                        let h = &mut state[(row * e + i) * n + j];
                        let decay = if id == last { (step * a[i * n + j]).exp() } else { 0.0 };
                        *h = *h * decay + step * bs[(row * l + t) * n + j] * u[at];
                        sum += *h * cs[(row * l + t) * n + j];
                    }
                    y[at] = sum * z.as_ref().map_or(1.0, |z| z[at] / (1.0 + (-z[at]).exp()));
                }
                last = id;
            }
        }
        vec![y, state]
    }

    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>> {
        let &ScanCase { b, l, e, n, .. } = self;
        let start = inputs.opt("state").map(|state| state.reshape([b, e, n]));
        let whole = |state| self.args(inputs, (0, l), state, dtype);
        let ScanOut { y, state } = match way {
            Way::Reference => reference::chunked(whole(start)),
            Way::Recurrent => reference::recurrent(whole(start)),
            Way::Public => selective_scan(whole(start)),
            Way::Pieces(ends) | Way::Separate(ends) => {
                let mut state = start;
                let mut ys = Vec::new();
                let mut from = 0;
                for &to in ends {
                    let mut args = self.args(inputs, (from, to), state, dtype);
                    if matches!(way, Way::Separate(_)) {
                        args.segments = None;
                        args.state = None;
                    }
                    let out = selective_scan(args);
                    ys.push(out.y);
                    state = Some(out.state);
                    from = to;
                }
                ScanOut { y: Tensor::cat(ys, 1), state: state.unwrap() }
            }
        };
        assert_eq!((y.dims(), state.dims()), ([b, l, e], [b, e, n]));
        assert_eq!((y.dtype(), state.dtype()), (dtype, DType::F32));
        vec![flat(y), flat(state)]
    }
}

/// Lengths, channels and states at their awkward values.
fn cases() -> Vec<ScanCase> {
    let mut cases = vec![
        ScanCase::new(1, 6, 16),
        ScanCase::new(1, 7, 5).segmented(),
        ScanCase::new(2, 3, 1).segmented(),
        ScanCase::new(17, 5, 5).bare(),
        ScanCase::new(33, 7, 1).linear_delta(),
        ScanCase::new(63, 7, 5).segmented(),
    ];
    if !SLOW {
        cases.extend([
            ScanCase::new(4, 67, 17).segmented(),
            ScanCase::new(5, 67, 17),
            ScanCase::new(63, 65, 16),
            ScanCase::new(65, 131, 16).segmented(),
            ScanCase::new(65, 33, 5).bare(),
            ScanCase::new(70, 19, 64),
            ScanCase { b: 1, ..ScanCase::new(9, 3, 700) },
            ScanCase { b: 1, ..ScanCase::new(9, 256, 16) },
            ScanCase::new(130, 35, 16).linear_delta().segmented(),
            ScanCase { b: 1, ..ScanCase::new(1, 200, 16) },
            ScanCase { b: 1, ..ScanCase::new(200, 1, 1) },
        ]);
    }
    cases
}

#[test]
fn references_agree_with_the_scalar_loop() {
    for case in cases() {
        check_values(&case, &[Way::Reference, Way::Recurrent]);
    }
}

#[test]
fn public_path_agrees_with_the_scalar_loop() {
    for case in cases() {
        check_values(&case, &[Way::Public]);
    }
    if !SLOW {
        check_values(&ScanCase { b: 1, ..ScanCase::new(1000, 19, 16) }, &[Way::Reference, Way::Public]);
    }
}

#[test]
fn states_of_a_channel_on_several_units_agree_with_the_scalar_loop() {
    // Widths at which devices of 16 and of 132 processors divide a channel's states in four and in two, and one they cannot divide.
    for (b, e, n) in [(1, 1600, 8), (1, 4001, 4), (1, 9001, 8), (2, 13_000, 4), (1, 9000, 6)] {
        let case = ScanCase { b, ..ScanCase::new(if SLOW { 18 } else { 37 }, e, n) };
        check_values(&case, &[Way::Public]);
        check_values(&case.clone().bare(), &[Way::Public]);
        check_values(&case.segmented(), &[Way::Public]);
    }
}

#[test]
fn a_row_without_tokens_keeps_the_state() {
    let case = ScanCase { wide: false, ..ScanCase::new(1, 6, 4) };
    let inputs = Bag(case.inputs().0.iter().map(|(name, v)| (*name, tensor::<Plain>(v))).collect());
    let state = inputs.get("state").reshape([case.b, case.e, case.n]);
    let none = |width: usize| Tensor::<Plain, 3>::empty([case.b, 0, width], &Default::default());
    let args = case.args(&inputs, (0, 1), Some(state.clone()), DType::F32);
    let args = ScanArgs { u: none(case.e), delta: none(case.e), b: none(case.n), c: none(case.n), z: Some(none(case.e)), ..args };
    let out = selective_scan(args);
    assert_eq!(out.y.dims(), [case.b, 0, case.e]);
    close("state", &values(out.state), &values(state), 0.0);
}

#[test]
fn gradients_agree_with_differences() {
    let small = |l, n| ScanCase { b: 1, ..ScanCase::new(l, 3, n) };
    check_differences(&small(9, 2), &[Way::Reference, Way::Recurrent, Way::Public], 2);
    check_differences(&small(7, 5).segmented(), &[Way::Reference, Way::Recurrent, Way::Public], 2);
    check_differences(&small(1, 3), &[Way::Recurrent, Way::Public], 2);
    check_differences(&small(37, 1).bare(), &[Way::Reference, Way::Public], 2);
    check_differences(&small(5, 3).linear_delta(), &[Way::Reference, Way::Public], 2);
}

#[test]
fn results_do_not_depend_on_threads() {
    if !SLOW {
        check_threads(&ScanCase::new(130, 150, 16), 2);
    }
}

#[test]
fn public_gradients_agree_with_the_reference() {
    for case in cases() {
        check_gradients(&case, &Way::Public, 2);
    }
}

#[test]
fn pieces_agree_with_the_whole() {
    let ends = if SLOW { vec![1, 5, 21] } else { vec![1, 5, 37, 38, 101, 130] };
    let l = *ends.last().unwrap();
    for case in [ScanCase::new(l, 7, 5), ScanCase::new(l, 20, 16).segmented()] {
        check_values(&case, &[Way::Pieces(ends.clone())]);
        check_gradients(&case, &Way::Pieces(ends.clone()), 2);
    }
}

#[test]
fn steps_agree_with_the_whole() {
    let l = if SLOW { 6 } else { 40 };
    for case in [ScanCase::new(l, 19, 16), ScanCase::new(l, 7, 5).segmented()] {
        check_values(&case, &[Way::Pieces((1..=l).collect())]);
        check_gradients(&case, &Way::Pieces((1..=l).collect()), 2);
    }
}

#[test]
fn packed_documents_agree_with_separate_ones() {
    let (first, l) = if SLOW { (9, 21) } else { (39, 110) };
    let ids = (0..l).map(|t| i32::from(t >= first)).collect();
    let case = ScanCase { b: 1, state: false, segments: Some(Ids(ids, vec![0])), ..ScanCase::new(l, 7, 5) };
    check_values(&case, &[Way::Separate(vec![first, l])]);
    check_gradients(&case, &Way::Separate(vec![first, l]), 2);
}

/// Values of every way, with some inputs replaced, against the scalar loop.
#[track_caller]
fn check_with(case: &ScanCase, ways: &[Way], replace: impl Fn(&str, &mut Vec<f64>)) {
    let mut inputs = case.inputs();
    inputs.0.iter_mut().for_each(|(name, values)| replace(name, values));
    let want = case.scalar(&inputs);
    let tensors = Bag(inputs.0.iter().map(|(name, v)| (*name, tensor::<Plain>(v))).collect());
    for way in ways {
        let got: Vec<_> = case.run(&tensors, way, DType::F32).into_iter().map(values).collect();
        close_lists(&format!("{way:?}"), &got, &want, TOLERANCE);
    }
}

#[test]
fn an_input_far_behind_strong_decay_stays_finite() {
    // Decays below float32's exponent range must give zeros, not NaN, in values and gradients alike.
    let l = if SLOW { 20 } else { 150 };
    let case = ScanCase { b: 1, ..ScanCase::new(l, 5, 5) };
    let steps = Way::Pieces((1..=l).collect());
    let ways = [Way::Reference, Way::Recurrent, Way::Public, steps];
    check_with(&case, &ways, |name, values| {
        if name == "a" {
            values.iter_mut().enumerate().for_each(|(i, a)| *a = if i % 2 == 0 { -200.0 } else { *a });
        }
    });
    for way in [Way::Reference, Way::Public] {
        let leaves = Bag(case.inputs().0.into_iter().map(|(name, v)| (name, tensor::<Train>(&v).require_grad())).collect());
        let mut scaled = leaves.clone();
        scaled.0.iter_mut().filter(|(name, _)| *name == "a").for_each(|(_, a)| *a = a.clone() * 200.0);
        let out = case.run(&scaled, &way, DType::F32);
        let grads = (out[0].clone().sum() + out[1].clone().sum()).backward();
        for (name, leaf) in &leaves.0 {
            assert!(values(leaf.grad(&grads).unwrap()).iter().all(|v| v.is_finite()), "{way:?}, gradient of {name}");
        }
    }
}

#[test]
fn large_step_sizes_pass_softplus_unchanged() {
    let case = ScanCase { b: 1, ..ScanCase::new(if SLOW { 9 } else { 70 }, 5, 5) };
    check_with(&case, &[Way::Reference, Way::Recurrent, Way::Public], |name, values| {
        if name == "delta" {
            values.iter_mut().enumerate().for_each(|(i, v)| *v = [-120.0, -30.0, 15.0, 25.0, 120.0, *v][i % 6]);
        }
    });
}

#[test]
fn half_precision_inputs_round_only_the_output() {
    for (dtype, tolerance) in halves() {
        for case in [ScanCase::new(if SLOW { 20 } else { 70 }, 19, 16), ScanCase::new(1, 7, 5)] {
            let want = case.scalar(&case.inputs());
            let got = outputs(&case, &Way::Public, dtype);
            close("y", &got[0], &want[0], tolerance);
            close("state", &got[1], &want[1], TOLERANCE);
            let want = gradients(&case, &Way::Reference, DType::F32, &[0, 1]);
            let got = gradients(&case, &Way::Public, dtype, &[0, 1]);
            close_bags(&format!("{dtype:?}"), &got, &want, 4.0 * tolerance);
        }
    }
}

/// A fixture of the workspace, with its tensors in float64.
struct Fixture(Vec<u8>);

impl Fixture {
    fn open(path: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(path);
        Self(std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    /// Shape and values.
    fn tensor(&self, name: &str) -> (Vec<usize>, Vec<f64>) {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).unwrap();
        let values = match view.dtype() {
            safetensors::Dtype::F64 => view.data().chunks_exact(8).map(|v| f64::from_le_bytes(v.try_into().unwrap())).collect(),
            safetensors::Dtype::F32 => view.data().chunks_exact(4).map(|v| f32::from_le_bytes(v.try_into().unwrap()).into()).collect(),
            other => panic!("{name} is {other:?}"),
        };
        (view.shape().to_vec(), values)
    }

    fn values(&self, name: &str) -> Vec<f64> {
        self.tensor(name).1
    }

    /// `[b, e, l]` values in the order `[b, l, e]`.
    fn turned(&self, name: &str) -> Vec<f64> {
        let (shape, values) = self.tensor(name);
        let [b, e, l] = shape.try_into().unwrap();
        (0..b * l * e).map(|i| values[(i / (l * e) * e + i % e) * l + i / e % l]).collect()
    }
}

#[test]
fn values_and_gradients_agree_with_float64_pytorch() {
    let fixture = Fixture::open("ops-s17/ops.safetensors");
    let [b, e, l] = fixture.tensor("scan.u").0.try_into().unwrap();
    let n = fixture.tensor("scan.A").0[1];
    let case = ScanCase { b, state: false, ..ScanCase::new(l, e, n) };
    let rows = |name: &str| fixture.turned(&format!("scan.{name}"));
    let flat = |name: &str| fixture.values(&format!("scan.{name}"));
    let bag = |before: &str| {
        let rows = |name: &str| rows(&format!("{before}{name}"));
        let flat = |name: &str| flat(&format!("{before}{name}"));
        Bag(vec![
            ("u", rows("u")),
            ("delta", rows("delta")),
            ("a", flat("A")),
            ("b", rows("B")),
            ("c", rows("C")),
            ("d", flat("D")),
            ("z", rows("z")),
            ("delta_bias", flat("delta_bias")),
        ])
    };
    let (inputs, want) = (bag(""), [rows("out"), flat("last_state")]);
    close_lists("the scalar loop", &case.scalar(&inputs), &want, 1e-12);
    for way in [Way::Reference, Way::Recurrent, Way::Public] {
        let leaves = Bag(inputs.0.iter().map(|(name, v)| (*name, tensor::<Train>(v).require_grad())).collect());
        let out = case.run(&leaves, &way, DType::F32);
        let grads = (out[0].clone() * tensor::<Train>(&rows("dout"))).sum().backward();
        close_lists(&format!("{way:?}"), &out.into_iter().map(values).collect::<Vec<_>>(), &want, TOLERANCE);
        let got = Bag(leaves.0.iter().map(|(name, leaf)| (*name, values(leaf.grad(&grads).unwrap()))).collect());
        close_bags(&format!("{way:?}"), &got, &bag("grad."), 2.0 * TOLERANCE);
    }
}

#[test]
fn trained_blocks() {
    let fixture = Fixture::open("typeseg/scan.safetensors");
    let [blocks, l, e] = fixture.tensor("u").0.try_into().unwrap();
    let n = fixture.tensor("a").0[2];
    let pick = |name: &str, block: usize| {
        let values = fixture.values(name);
        let size = values.len() / blocks;
        values[block * size..][..size].to_vec()
    };
    for block in 0..blocks {
        let case = ScanCase { b: 1, state: false, ..ScanCase::new(l, e, n) };
        let names = ["u", "delta", "a", "b", "c", "d", "z", "delta_bias"];
        let inputs = Bag(names.map(|name| (name, pick(name, block))).to_vec());
        let want = [pick("y", block), pick("state", block)];
        // Expected values are stored in float32.
        close_lists("the scalar loop", &case.scalar(&inputs), &want, 2e-7);
        let tensors = Bag(inputs.0.iter().map(|(name, v)| (*name, tensor::<Plain>(v))).collect());
        for way in [Way::Reference, Way::Recurrent, Way::Public, Way::Pieces((1..=l).collect())] {
            let got: Vec<_> = case.run(&tensors, &way, DType::F32).into_iter().map(values).collect();
            close_lists(&format!("block {block}, {way:?}"), &got, &want, TOLERANCE);
        }
        // The blocks as trained raise every step size by 1e-4.
        let raised = ScanCase { bias: false, ..case.linear_delta() };
        check_with(&raised, &[Way::Reference, Way::Public], |name, values| {
            *values = inputs.get(name);
            if name == "delta" {
                let bias = inputs.get("delta_bias");
                values.iter_mut().enumerate().for_each(|(i, v)| *v = (*v + bias[i % e]).exp().ln_1p() + 1e-4);
            }
        });
    }
}

#[test]
fn no_states_pass_the_input_through() {
    let (b, e) = (2, 6);
    for l in [0, 1, 3] {
        let case = ScanCase { b, state: false, ..ScanCase::new(l, e, 0) };
        let inputs = case.inputs();
        let leaf = |name: &str| tensor::<Train>(&inputs.get(name)).require_grad();
        let (d, device) = (leaf("d"), Default::default());
        // Burn reads a zero in a shape as "as before".
        let full = |name: &str| match l {
            0 => Tensor::<Train, 3>::empty([b, 0, e], &device),
            _ => Tensor::from_inner(tensor::<Plain>(&inputs.get(name)).reshape([b, l, e])),
        };
        let u = full("u").require_grad();
        let out = selective_scan(ScanArgs {
            u: u.clone(),
            delta: full("delta"),
            a: Tensor::empty([e, 0], &device),
            b: Tensor::empty([b, l, 0], &device),
            c: Tensor::empty([b, l, 0], &device),
            d: Some(d.clone()),
            z: Some(full("z")),
            delta_bias: None,
            state: None,
            segments: None,
            delta_softplus: true,
        });
        assert_eq!((out.y.dims(), out.state.dims()), ([b, l, e], [b, e, 0]));
        if l == 0 {
            continue;
        }
        let want = case.scalar(&inputs);
        close("y", &values(out.y.clone()), &want[0], TOLERANCE);
        let grads = out.y.sum().backward();
        let [x, z, skip] = ["u", "z", "d"].map(|name| inputs.get(name));
        let gate = |i: usize| z[i] / (1.0 + (-z[i]).exp());
        let du: Vec<f64> = (0..b * l * e).map(|i| skip[i % e] * gate(i)).collect();
        close("gradient of u", &values(u.grad(&grads).unwrap()), &du, 4.0 * TOLERANCE);
        let dd: Vec<f64> = (0..e).map(|c| (c..b * l * e).step_by(e).map(|i| x[i] * gate(i)).sum()).collect();
        close("gradient of d", &values(d.grad(&grads).unwrap()), &dd, 4.0 * TOLERANCE);
    }
}

#[test]
fn more_states_than_shared_memory_holds_are_scanned() {
    let case = ScanCase { b: 1, ..ScanCase::new(3, 2, 9000) };
    check_values(&case, &[Way::Public]);
    check_gradients(&case, &Way::Public, 2);
}
