//! Plain tensor operations: the recurrence as written, and a form that takes a few tokens at once, for any backend.

use burn::tensor::activation::silu;
use burn::tensor::backend::Backend;
use burn::tensor::{Bool, DType, Tensor};

use super::{ScanArgs, ScanDims, ScanOut};
use crate::Segments;

/// Tokens of a chunk. A larger one needs fewer operations per token and more memory while it runs.
const CHUNK: usize = 32;

/// Chunk by chunk; the direct recurrence for a single token.
///
/// # Panics
/// When [`ScanArgs::check`] fails.
pub fn selective_scan<B: Backend>(args: ScanArgs<B>) -> ScanOut<B> {
    if args.u.dims()[1] <= 1 { recurrent(args) } else { chunked(args) }
}

/// What both forms start from, in float32.
struct Prepared<B: Backend> {
    u: Tensor<B, 3>,
    /// Step sizes; zero at padding. `[b, l, e]`
    delta: Tensor<B, 3>,
    /// `[b, l, e]`
    fed: Tensor<B, 3>,
    /// `[1, 1, e, n]`
    a: Tensor<B, 4>,
    /// `[b, l, 1, n]`
    b: Tensor<B, 4>,
    /// `[b, l, 1, n]`
    c: Tensor<B, 4>,
    /// `[b, e, n]`
    state: Tensor<B, 3>,
    /// Where a document begins that the state before it does not belong to. `[b, l]`
    begins: Option<Tensor<B, 2, Bool>>,
    dims: ScanDims,
}

impl<B: Backend> Prepared<B> {
    fn new(args: &ScanArgs<B>) -> Self {
        let dims = args.check().unwrap_or_else(|error| panic!("{error}"));
        let ScanDims { b, l, e, n } = dims;
        let u = args.u.clone().cast(DType::F32);
        let delta = step_sizes(args);
        Self {
            fed: delta.clone() * u.clone(),
            u,
            delta,
            a: args.a.clone().cast(DType::F32).reshape([1, 1, e, n]),
            b: args.b.clone().cast(DType::F32).reshape([b, l, 1, n]),
            c: args.c.clone().cast(DType::F32).reshape([b, l, 1, n]),
            state: match &args.state {
                Some(state) => state.clone().cast(DType::F32),
                None => Tensor::zeros([b, e, n], (&args.u.device(), DType::F32)),
            },
            begins: args.segments.as_ref().map(begins),
            dims,
        }
    }

    /// Decays and what is fed to the state for `q` tokens, `[b, q, e, n]` each.
    fn terms(&self, from: usize, q: usize) -> [Tensor<B, 4>; 2] {
        let ScanDims { b, e, n, .. } = self.dims;
        let part = |t: &Tensor<B, 3>| t.clone().narrow(1, from, q).unsqueeze_dim::<4>(3); // [b, q, e, 1]
        let mut decay = (part(&self.delta) * self.a.clone()).exp();
        if let Some(begins) = &self.begins {
            let fresh = begins.clone().narrow(1, from, q).unsqueeze_dims::<4>(&[2, 3]).expand([b, q, e, n]);
            decay = decay.mask_fill(fresh, 0.0);
        }
        [decay, part(&self.fed) * self.b.clone().narrow(1, from, q)]
    }

    /// What tokens read from their states. `[b, q, e]`
    fn read(&self, states: Tensor<B, 4>, from: usize, q: usize) -> Tensor<B, 3> {
        (states * self.c.clone().narrow(1, from, q)).sum_dim(3).squeeze_dim(3)
    }

    /// Joins outputs, and adds skip connection and gate.
    fn finish(&self, ys: Vec<Tensor<B, 3>>, state: Tensor<B, 3>, args: ScanArgs<B>) -> ScanOut<B> {
        let ScanDims { b, l, e, .. } = self.dims;
        let mut y = if ys.is_empty() { Tensor::zeros([b, 0, e], (&state.device(), DType::F32)) } else { Tensor::cat(ys, 1) };
        if let Some(d) = args.d {
            y = y + self.u.clone() * d.cast(DType::F32).reshape([1, 1, e]);
        }
        if let Some(z) = args.z {
            y = y * silu(z.cast(DType::F32));
        }
        if let Some(segments) = args.segments.filter(Segments::padded) {
            y = y.mask_fill(padding(&segments).expand([b, l, e]), 0.0);
        }
        ScanOut { y: y.cast(args.u.dtype()), state }
    }
}

/// Step sizes after bias and softplus; zero at padding. float32 `[b, l, e]`
fn step_sizes<B: Backend>(args: &ScanArgs<B>) -> Tensor<B, 3> {
    let shape = args.delta.dims();
    let mut delta = args.delta.clone().cast(DType::F32);
    if let Some(bias) = &args.delta_bias {
        delta = delta + bias.clone().cast(DType::F32).reshape([1, 1, shape[2]]);
    }
    if args.delta_softplus {
        delta = softplus(delta);
    }
    match &args.segments {
        Some(segments) if segments.padded() => delta.mask_fill(padding(segments).expand(shape), 0.0),
        _ => delta,
    }
}

/// `ln(1 + e^x)`; above 20, where float32 shows no difference, `x`.
fn softplus<B: Backend>(x: Tensor<B, 3>) -> Tensor<B, 3> {
    const LARGE: f32 = 20.0;
    let large = x.clone().greater_elem(LARGE);
    x.clone().clamp_max(LARGE).exp().log1p().mask_where(large, x)
}

/// True at padding. `[b, l, 1]`
fn padding<B: Backend>(segments: &Segments<B>) -> Tensor<B, 3, Bool> {
    segments.valid().bool_not().unsqueeze_dim(2)
}

/// True where the id differs from the one before. `[b, l]`
fn begins<B: Backend>(segments: &Segments<B>) -> Tensor<B, 2, Bool> {
    let ids = segments.filled();
    let first = segments.prev_column();
    let before = match segments.dims()[1] {
        0 => return ids.equal_elem(0),
        1 => first,
        l => Tensor::cat(vec![first, ids.clone().narrow(1, 0, l - 1)], 1),
    };
    ids.not_equal(before)
}

/// One token at a time, exactly as in the module's equations: the judge of every other path.
///
/// # Panics
/// When [`ScanArgs::check`] fails.
pub fn recurrent<B: Backend>(args: ScanArgs<B>) -> ScanOut<B> {
    let prepared = Prepared::new(&args);
    let mut state = prepared.state.clone();
    let mut ys = Vec::with_capacity(prepared.dims.l);
    for t in 0..prepared.dims.l {
        let [decay, fed] = prepared.terms(t, 1);
        let next = decay * state.unsqueeze_dim::<4>(1) + fed; // [b, 1, e, n]
        ys.push(prepared.read(next.clone(), t, 1));
        state = next.squeeze_dim(1);
    }
    prepared.finish(ys, state, args)
}

/// The states of a chunk at once, by doubling: after `k` rounds each token has gathered what the `2^k` tokens up to it
/// were fed, and the product of their decays. Linear in memory; products of decays cannot overflow.
///
/// # Panics
/// When [`ScanArgs::check`] fails.
pub fn chunked<B: Backend>(args: ScanArgs<B>) -> ScanOut<B> {
    let prepared = Prepared::new(&args);
    let l = prepared.dims.l;
    let mut state = prepared.state.clone();
    let mut ys = Vec::with_capacity(l.div_ceil(CHUNK));
    for from in (0..l).step_by(CHUNK) {
        let q = CHUNK.min(l - from);
        let [mut decay, mut states] = prepared.terms(from, q);
        let mut reach = 1;
        while reach < q {
            let (first, rest) =
                (|t: &Tensor<B, 4>| t.clone().narrow(1, 0, reach), |t: &Tensor<B, 4>| t.clone().narrow(1, reach, q - reach));
            let earlier = |t: &Tensor<B, 4>| t.clone().narrow(1, 0, q - reach);
            let gathered = rest(&decay) * earlier(&states) + rest(&states);
            let product = rest(&decay) * earlier(&decay);
            states = Tensor::cat(vec![first(&states), gathered], 1);
            decay = Tensor::cat(vec![first(&decay), product], 1);
            reach *= 2;
        }
        let states = states + decay * state.unsqueeze_dim::<4>(1); // [b, q, e, n]
        ys.push(prepared.read(states.clone(), from, q));
        state = states.narrow(1, q - 1, 1).squeeze_dim(1);
    }
    prepared.finish(ys, state, args)
}
