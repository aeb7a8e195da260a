use burn::tensor::{DType, Tensor};

use super::{Cost, Subject, Work};
use crate::measure::data::{Deviation, Source, host, width};
use crate::rotary::RotaryArgs;
use crate::{KernelBackend, Op};

/// Rotation of heads that lie behind tokens; all rows at the same positions.
#[derive(Debug, Clone, Copy)]
pub(in crate::measure) struct Rotary {
    pub b: usize,
    pub l: usize,
    pub h: usize,
    pub p: usize,
    /// Rotated pairs of a head.
    pub half: usize,
    pub dtype: DType,
}

pub(in crate::measure) struct Set<B: KernelBackend> {
    args: RotaryArgs<B>,
    dout: Tensor<B, 4>,
}

impl<B: KernelBackend> Subject<B> for Rotary {
    type Set = Set<B>;

    fn op(&self) -> &'static str {
        "rotary"
    }

    fn kernel(&self) -> Op {
        Op::Rotary
    }

    fn shape(&self) -> String {
        let part = if 2 * self.half == self.p { String::new() } else { format!(" rotated={}", 2 * self.half) };
        format!("b={} l={} h={} p={}{part}", self.b, self.l, self.h, self.p)
    }

    fn sizes(&self) -> Vec<usize> {
        vec![self.b * self.l * self.h * self.p]
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn cost(&self) -> Cost {
        let heads = (self.b * self.l * self.h) as f64;
        let bytes = 2.0 * heads * (self.p * width(self.dtype)) as f64 + 8.0 * (self.l * self.half) as f64;
        let each = Work { bytes, flop: 6.0 * heads * self.half as f64 };
        Cost { forward: each, backward: Some(each) }
    }

    fn set(&self, source: &Source<B>) -> Set<B> {
        let Self { b, l, h, p, half, .. } = *self;
        let angles = source.uniform32([1, 1, l, half], -3.0, 3.0);
        let x = source.normal([b, l, h, p]).swap_dims(1, 2);
        Set { args: RotaryArgs { x, cos: angles.clone().cos(), sin: angles.sin() }, dout: source.normal([b, h, l, p]) }
    }

    fn forward(&self, set: &mut Set<B>) {
        drop(B::rotary(set.args.clone(), false));
    }

    fn backward(&self, set: &mut Set<B>) -> bool {
        drop(B::rotary(RotaryArgs { x: set.dout.clone(), ..set.args.clone() }, true));
        true
    }

    fn check(&self, source: &Source<B>, backward: bool, work: usize) -> Vec<Deviation> {
        let Self { b, l, h, p, half, .. } = *self;
        let Set { args, dout } = self.set(source);
        let (row, first) = (b - 1, l - (work / (8 * h * p)).clamp(1, l));
        let part = |t: &Tensor<B, 4>| host(t, [row..b, 0..h, first..l, 0..p]);
        let table = |t: &Tensor<B, 4>| host(t, [0..1, 0..1, first..l, 0..half]);
        let (cos, sin) = (table(&args.cos), table(&args.sin));
        let turned = |x: Vec<f64>, sign: f64| -> Vec<f64> {
            let mut out = x.clone();
            for (at, (x, out)) in x.chunks_exact(p).zip(out.chunks_exact_mut(p)).enumerate() {
                for i in 0..half {
                    let angle = at % (l - first) * half + i;
                    let (c, s) = (cos[angle], sin[angle] * sign);
                    out[i] = x[i] * c - x[half + i] * s;
                    out[half + i] = x[half + i] * c + x[i] * s;
                }
            }
            out
        };
        let mut found = vec![Deviation::new("out", &part(&B::rotary(args.clone(), false)), &turned(part(&args.x), 1.0))];
        if backward {
            let want = turned(part(&dout), -1.0);
            found.push(Deviation::new("dx", &part(&B::rotary(RotaryArgs { x: dout, ..args }, true)), &want));
        }
        found
    }
}
