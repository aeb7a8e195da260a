//! Tests of [`terrarium_kernels::causal_conv1d`].

use burn::tensor::{DType, Tensor};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::Segments;
use terrarium_kernels::causal_conv1d::{ConvArgs, ConvOut, causal_conv1d, reference};

use crate::common::*;

#[derive(Debug, Clone)]
struct ConvCase {
    b: usize,
    l: usize,
    e: usize,
    k: usize,
    bias: bool,
    state: bool,
    silu: bool,
    /// The input is part of a wider tensor.
    wide: bool,
    segments: Option<Ids>,
}

impl ConvCase {
    fn new(l: usize, e: usize, k: usize) -> Self {
        Self { b: 2, l, e, k, bias: true, state: true, silu: true, wide: false, segments: None }
    }

    fn bare(self) -> Self {
        Self { bias: false, state: false, silu: false, ..self }
    }

    fn segmented(self) -> Self {
        let segments = Some(three_rows(self.l));
        Self { b: 3, segments, ..self }
    }

    fn args<B: KernelBackend>(
        &self,
        inputs: &Bag<Tensor<B, 1>>,
        (from, to): (usize, usize),
        state: Option<Tensor<B, 3>>,
        dtype: DType,
    ) -> ConvArgs<B> {
        let &ConvCase { b, l, e, k, .. } = self;
        let segments = self.segments.as_ref().map(|Ids(ids, prev)| {
            let (ids, prev) = piece(ids, prev, l, from, to);
            Segments::new(b, to - from, ids, prev, &Default::default()).unwrap()
        });
        let x = inputs.get("x").reshape([b, l, e]).narrow(1, from, to - from).cast(dtype);
        ConvArgs {
            x: if self.wide { Tensor::cat(vec![x.clone(), x], 2).narrow(2, e, e) } else { x },
            weight: inputs.get("weight").reshape([e, k]).cast(dtype),
            bias: inputs.opt("bias").map(|bias| bias.cast(dtype)),
            state: state.map(|state| state.cast(dtype)),
            segments,
            silu: self.silu,
        }
    }
}

impl Case for ConvCase {
    fn inputs(&self) -> Bag<Vec<f64>> {
        let &ConvCase { b, l, e, k, .. } = self;
        let mut rng = Rng::new((l * 17 + e) as u64);
        let mut inputs = vec![("x", rng.uniform(-1.0, 1.0, b * l * e)), ("weight", rng.uniform(-1.0, 1.0, e * k))];
        if self.bias {
            inputs.push(("bias", rng.uniform(-1.0, 1.0, e)));
        }
        if self.state {
            inputs.push(("state", rng.uniform(-1.0, 1.0, b * (k - 1) * e)));
        }
        Bag(inputs)
    }

    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>> {
        let &ConvCase { b, l, e, k, .. } = self;
        let (x, weight, bias) = (inputs.get("x"), inputs.get("weight"), inputs.opt("bias"));
        let past = inputs.opt("state").unwrap_or_else(|| vec![0.0; b * (k - 1) * e]);
        let mut y = vec![0.0; b * l * e];
        let mut state = vec![0.0; b * (k - 1) * e];
        for row in 0..b {
            let prev = self.segments.as_ref().map_or(0, |Ids(_, prev)| prev[row]);
            let ids: Vec<i32> = (0..l).map(|t| self.segments.as_ref().map_or(0, |Ids(ids, _)| ids[row * l + t])).collect();
            let length = ids.iter().filter(|&&id| id >= 0).count();
            // Input `t` positions after the row's start, negative in the state; zero under another id.
            let input = |t: isize, channel: usize, id: i32| {
                let (value, own) = match usize::try_from(t) {
                    Ok(t) => (x[(row * l + t) * e + channel], ids[t]),
                    Err(_) => (past[(row * (k - 1) + (t + k as isize - 1) as usize) * e + channel], prev),
                };
                if own == id { value } else { 0.0 }
            };
            for channel in 0..e {
                for t in 0..length {
                    let mut sum = bias.as_ref().map_or(0.0, |bias| bias[channel]);
                    for j in 0..k {
                        sum += weight[channel * k + j] * input((t + j) as isize - (k as isize - 1), channel, ids[t]);
                    }
                    y[(row * l + t) * e + channel] = if self.silu { sum / (1.0 + (-sum).exp()) } else { sum };
                }
                let last = if length == 0 { prev } else { ids[length - 1] };
                for j in 0..k - 1 {
                    state[(row * (k - 1) + j) * e + channel] = input((length + j) as isize - (k as isize - 1), channel, last);
                }
            }
        }
        vec![y, state]
    }

    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>> {
        let &ConvCase { b, l, e, k, .. } = self;
        let start = inputs.opt("state").map(|state| state.reshape([b, k - 1, e]));
        let whole = |state| self.args(inputs, (0, l), state, dtype);
        let ConvOut { y, state } = match way {
            Way::Reference | Way::Recurrent => reference::causal_conv1d(whole(start)),
            Way::Public => causal_conv1d(whole(start)),
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
                    let out = causal_conv1d(args);
                    ys.push(out.y);
                    state = Some(out.state);
                    from = to;
                }
                ConvOut { y: Tensor::cat(ys, 1), state: state.unwrap() }
            }
        };
        assert_eq!(y.dims(), [b, l, e]);
        assert_eq!(state.dims(), [b, k - 1, e]);
        assert_eq!((y.dtype(), state.dtype()), (dtype, dtype));
        vec![flat(y), flat(state)]
    }
}

fn cases() -> Vec<ConvCase> {
    let mut cases = vec![
        ConvCase::new(1, 10, 4),
        ConvCase::new(2, 5, 4).segmented(),
        ConvCase::new(1, 33, 2).segmented(),
        ConvCase::new(3, 5, 2).bare(),
        ConvCase::new(12, 6, 3).segmented(),
        ConvCase { wide: true, ..ConvCase::new(5, 128, 4) },
        ConvCase { wide: true, ..ConvCase::new(3, 6, 2) },
    ];
    if !SLOW {
        cases.extend([
            ConvCase::new(63, 19, 4).segmented(),
            ConvCase::new(65, 40, 4),
            ConvCase::new(200, 7, 2).segmented(),
            ConvCase::new(1000, 3, 4),
            ConvCase::new(50, 300, 4).bare(),
            ConvCase::new(1, 1800, 4),
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
fn a_single_tap_keeps_no_state() {
    let case = ConvCase { state: false, ..ConvCase::new(3, 6, 1) };
    let want = &case.scalar(&case.inputs())[0];
    let inputs = Bag(case.inputs().0.iter().map(|(name, v)| (*name, tensor::<Plain>(v))).collect());
    let out = causal_conv1d(case.args(&inputs, (0, case.l), None, DType::F32));
    assert_eq!(out.state.dims(), [case.b, 0, case.e]);
    close("y", &values(out.y), want, TOLERANCE);
}

#[test]
fn a_row_without_tokens_keeps_the_state() {
    let case = ConvCase::new(1, 6, 4);
    let inputs = Bag(case.inputs().0.iter().map(|(name, v)| (*name, tensor::<Plain>(v))).collect());
    let state = inputs.get("state").reshape([case.b, case.k - 1, case.e]);
    let x = Tensor::empty([case.b, 0, case.e], &Default::default());
    let out = causal_conv1d(ConvArgs { x, ..case.args(&inputs, (0, 1), Some(state.clone()), DType::F32) });
    assert_eq!(out.y.dims(), [case.b, 0, case.e]);
    close("state", &values(out.state), &values(state), 0.0);
}

#[test]
fn gradients_agree_with_differences() {
    for case in [ConvCase::new(6, 3, 4).segmented(), ConvCase::new(2, 3, 4), ConvCase::new(5, 2, 2).bare()] {
        check_differences(&case, &[Way::Reference, Way::Public], 2);
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    if !SLOW {
        check_threads(&ConvCase::new(300, 300, 4), 2);
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
    let ends = vec![1, 3, 12, 21];
    for case in [ConvCase::new(21, 6, 4), ConvCase::new(21, 6, 4).segmented()] {
        check_values(&case, &[Way::Pieces(ends.clone())]);
        check_gradients(&case, &Way::Pieces(ends.clone()), 2);
    }
}

#[test]
fn packed_documents_agree_with_separate_ones() {
    let ids = (0..21).map(|t| i32::from(t >= 8)).collect();
    let case = ConvCase { b: 1, state: false, segments: Some(Ids(ids, vec![0])), ..ConvCase::new(21, 6, 4) };
    check_values(&case, &[Way::Separate(vec![8, 21])]);
    check_gradients(&case, &Way::Separate(vec![8, 21]), 2);
}

#[test]
fn half_precision_inputs_round_only_the_output() {
    for (dtype, tolerance) in halves() {
        let case = ConvCase::new(if SLOW { 12 } else { 40 }, 32, 4).segmented();
        let want = case.scalar(&case.inputs());
        close_lists(&format!("{dtype:?}"), &outputs(&case, &Way::Public, dtype), &want, tolerance);
        let want = gradients(&case, &Way::Reference, DType::F32, &[0, 1]);
        close_bags(&format!("{dtype:?}"), &gradients(&case, &Way::Public, dtype, &[0, 1]), &want, 4.0 * tolerance);
    }
}

#[test]
fn kernels_longer_than_the_fast_ones_are_convolved() {
    let case = ConvCase { b: 1, ..ConvCase::new(5, 3, 40) };
    check_values(&case, &[Way::Public]);
    check_gradients(&case, &Way::Public, 2);
}
