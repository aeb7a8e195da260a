//! Tests of [`terrarium_kernels::rotary`].

use burn::tensor::{DType, Tensor, TensorData};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::rotary::{RotaryArgs, reference, rotary};

use crate::common::*;

#[derive(Debug, Clone)]
struct RotaryCase {
    b: usize,
    h: usize,
    l: usize,
    p: usize,
    half: usize,
    /// Rows of the batch stand at positions of their own.
    apart: bool,
    /// Heads lie behind tokens, as projections leave them.
    view: bool,
}

impl RotaryCase {
    fn rows(&self) -> usize {
        if self.apart { self.b } else { 1 }
    }

    /// Of row, token and pair.
    fn angle(&self, row: usize, token: usize, pair: usize) -> f64 {
        let row = if self.apart { row } else { 0 };
        (token + 3 * row) as f64 * 10f64.powf(-(pair as f64) / self.half as f64)
    }

    fn table<B: KernelBackend>(&self, f: fn(f64) -> f64) -> Tensor<B, 4> {
        let &RotaryCase { l, half, .. } = self;
        let angles = (0..self.rows() * l * half).map(|i| self.angle(i / (l * half), i / half % l, i % half));
        let values: Vec<f32> = angles.map(|angle| f(angle) as f32).collect();
        Tensor::from_data(TensorData::new(values, [self.rows(), 1, l, half]), (&Default::default(), DType::F32))
    }

    /// `[b, h, l, p]` of what lies as the case says.
    fn x<B: KernelBackend>(&self, flat: Tensor<B, 1>) -> Tensor<B, 4> {
        let &RotaryCase { b, h, l, p, .. } = self;
        if self.view { flat.reshape([b, l, h, p]).swap_dims(1, 2) } else { flat.reshape([b, h, l, p]) }
    }
}

impl Case for RotaryCase {
    fn inputs(&self) -> Bag<Vec<f64>> {
        let count = self.b * self.h * self.l * self.p;
        Bag(vec![("x", Rng::new(count as u64 + 11).uniform(-1.0, 1.0, count))])
    }

    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>> {
        let &RotaryCase { b, h, l, p, half, view, .. } = self;
        let x = inputs.get("x");
        let mut out = Vec::with_capacity(x.len());
        for row in 0..b * h * l {
            let (batch, head, token) = (row / (h * l), row / l % h, row % l);
            let from = if view { ((batch * l + token) * h + head) * p } else { row * p };
            out.extend((0..p).map(|i| {
                let (pair, sign) = (i % half.max(1), if i < half { -1.0 } else { 1.0 });
                let angle = self.angle(batch, token, pair);
                match i < 2 * half {
                    true => x[from + i] * angle.cos() + sign * x[from + (i + half) % (2 * half)] * angle.sin(),
                    false => x[from + i],
                }
            }));
        }
        vec![out]
    }

    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>> {
        let args = RotaryArgs { x: self.x(inputs.get("x").cast(dtype)), cos: self.table(f64::cos), sin: self.table(f64::sin) };
        let out = match way {
            Way::Reference => reference::rotary(args, false),
            _ => rotary(args),
        };
        assert_eq!((out.dtype(), out.dims()), (dtype, [self.b, self.h, self.l, self.p]));
        vec![flat(out)]
    }
}

fn cases() -> Vec<RotaryCase> {
    let mut cases = Vec::new();
    let sizes = [(2, 3, 5, 16, 8), (1, 2, 7, 24, 6), (2, 1, 4, 10, 3), (3, 2, 1, 8, 4), (1, 1, 1, 2, 1)];
    let large = if SLOW { vec![] } else { vec![(2, 3, 65, 64, 32), (1, 9, 130, 80, 16), (2, 2, 33, 31, 15)] };
    for (b, h, l, p, half) in sizes.into_iter().chain(large) {
        for (apart, view) in [(false, true), (true, true), (true, false)] {
            cases.push(RotaryCase { b, h, l, p, half, apart, view });
        }
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
fn gradients_agree_with_differences() {
    let case = RotaryCase { b: 2, h: 3, l: 4, p: 10, half: 4, apart: true, view: true };
    check_differences(&case, &[Way::Reference, Way::Public], 1);
    check_differences(&RotaryCase { view: false, apart: false, ..case }, &[Way::Reference, Way::Public], 1);
}

#[test]
fn public_gradients_agree_with_the_reference() {
    for case in cases() {
        check_gradients(&case, &Way::Public, 1);
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    if !SLOW {
        check_threads(&RotaryCase { b: 2, h: 5, l: 130, p: 64, half: 32, apart: true, view: true }, 1);
    }
}

/// The way back undoes the way there, whatever the layout of what comes in.
#[test]
fn back_is_the_inverse() {
    for case in cases() {
        let flat = tensor::<Plain>(&case.inputs().get("x"));
        let there = rotary(RotaryArgs { x: case.x(flat.clone()), cos: case.table(f64::cos), sin: case.table(f64::sin) });
        for x in [there.clone(), there.swap_dims(1, 2).mul_scalar(1.0).swap_dims(1, 2)] {
            let back = Plain::rotary(RotaryArgs { x, cos: case.table(f64::cos), sin: case.table(f64::sin) }, true);
            close(&format!("{case:?}"), &values(back), &values(case.x(flat.clone())), TOLERANCE);
        }
    }
}

/// A tensor may be rotated in its place only where nobody else reads it.
#[test]
fn a_tensor_that_is_used_again_keeps_its_values() {
    let case = RotaryCase { b: 1, h: 2, l: 3, p: 8, half: 4, apart: false, view: false };
    let inputs = case.inputs();
    let x = case.x(tensor::<Plain>(&inputs.get("x"))) * 1.0;
    let run = |x| values(rotary(RotaryArgs { x, cos: case.table(f64::cos), sin: case.table(f64::sin) }));
    let want = case.scalar(&inputs);
    close("shared", &run(x.clone()), &want[0], TOLERANCE);
    close("x", &values(x.clone()), &inputs.get("x"), 1e-7);
    close("alone", &run(x), &want[0], TOLERANCE);
}

/// Heads of a part of a wider projection, from a place that vectors may not begin at.
#[test]
fn parts_of_wider_tensors_are_read() {
    let (b, h, l, p) = (2, 3, 5, 16);
    let case = RotaryCase { b, h, l, p, half: 8, apart: true, view: true };
    for start in [0, 3, 8, 64] {
        let wide = tensor::<Plain>(&Rng::new(21).uniform(-1.0, 1.0, b * l * 128)).reshape([b, l, 128]);
        let part = wide.narrow(2, start, h * p);
        let alone = Tensor::<Plain, 3>::from_data(part.clone().into_data(), &Default::default());
        let run = |x: Tensor<Plain, 3>| {
            let x = terrarium_kernels::split::heads(x, h).swap_dims(1, 2);
            values(rotary(RotaryArgs { x, cos: case.table(f64::cos), sin: case.table(f64::sin) }))
        };
        close(&format!("from {start}"), &run(part), &run(alone), 1e-12);
    }
}

#[test]
fn disagreements_are_errors() {
    let make = |shape| Tensor::<Plain, 4>::ones(shape, (&Default::default(), DType::F32));
    let check = |cos, sin| RotaryArgs { x: make([2, 3, 4, 10]), cos: make(cos), sin: make(sin) }.check();
    assert!(check([2, 1, 4, 5], [2, 1, 4, 5]).is_ok() && check([1, 1, 4, 3], [1, 1, 4, 3]).is_ok());
    for (cos, sin, what) in [
        ([1, 1, 4, 6], [1, 1, 4, 6], "cos has shape"),
        ([3, 1, 4, 5], [3, 1, 4, 5], "cos has shape"),
        ([1, 1, 5, 5], [1, 1, 5, 5], "cos has shape"),
        ([1, 1, 4, 5], [2, 1, 4, 5], "sin has shape"),
    ] {
        assert!(check(cos, sin).unwrap_err().to_string().contains(what), "{cos:?} {sin:?}");
    }
    for (dtype, _) in halves() {
        let args = RotaryArgs { x: make([1, 1, 2, 4]), cos: make([1, 1, 2, 2]).cast(dtype), sin: make([1, 1, 2, 2]) };
        assert!(args.check().unwrap_err().to_string().contains("cos is"));
    }
}

#[test]
fn nothing_to_rotate_is_left_alone() {
    let make = |shape: [usize; 4]| Tensor::<Plain, 4>::empty(shape, (&Default::default(), DType::F32));
    let run = |x, table| rotary(RotaryArgs { x: make(x), cos: make(table), sin: make(table) }).dims();
    assert_eq!(run([0, 2, 4, 8], [1, 1, 4, 4]), [0, 2, 4, 8]);
    assert_eq!(run([1, 2, 4, 8], [1, 1, 4, 0]), [1, 2, 4, 8]);
}

#[test]
fn half_precision_inputs_round_only_the_outputs() {
    for (dtype, tolerance) in halves() {
        let case = RotaryCase { b: 2, h: 2, l: 9, p: 40, half: 16, apart: true, view: true };
        close_lists(&format!("{dtype:?}"), &outputs(&case, &Way::Public, dtype), &case.scalar(&case.inputs()), tolerance);
        let want = gradients(&case, &Way::Reference, DType::F32, &[0]);
        close_bags(&format!("{dtype:?}"), &gradients(&case, &Way::Public, dtype, &[0]), &want, 2.0 * tolerance);
    }
}
