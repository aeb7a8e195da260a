//! Plain tensor operations: the recurrence as written, and the chunked form that any backend can run.

use burn::tensor::activation::softplus;
use burn::tensor::backend::Backend;
use burn::tensor::{Bool, DType, Int, Tensor};

use super::{SsdArgs, SsdDims, SsdOptions, SsdOut};
use crate::Segments;

/// Chunked form for any length; the direct recurrence for a single token.
///
/// # Panics
/// When [`SsdArgs::check`] fails.
pub fn ssd<B: Backend>(args: SsdArgs<B>) -> SsdOut<B> {
    if args.x.dims()[1] <= 1 { recurrent(args) } else { chunked(args) }
}

/// Step sizes after bias, softplus and limits; zero at padding. float32 `[b, l, h]`
fn step_sizes<B: Backend>(
    dt: Tensor<B, 3>,
    bias: Option<Tensor<B, 1>>,
    segments: Option<&Segments<B>>,
    options: SsdOptions,
) -> Tensor<B, 3> {
    let [b, l, h] = dt.dims();
    let mut delta = dt.cast(DType::F32);
    if let Some(bias) = bias {
        delta = delta + bias.cast(DType::F32).reshape([1, 1, h]);
    }
    if options.dt_softplus {
        delta = softplus(delta, 1.0);
    }
    let (min, max) = options.dt_limit;
    // Softplus is never negative, so the usual limit of zero needs no work after it.
    if min > 0.0 || !options.dt_softplus {
        delta = delta.clamp_min(min);
    }
    if max.is_finite() {
        delta = delta.clamp_max(max);
    }
    match segments {
        Some(segments) if segments.padded() => delta.mask_fill(padding(segments).expand([b, l, h]), 0.0),
        _ => delta,
    }
}

/// True at padding. `[b, l, 1]`
fn padding<B: Backend>(segments: &Segments<B>) -> Tensor<B, 3, Bool> {
    segments.valid().bool_not().unsqueeze_dim(2)
}

/// One token at a time, exactly as in the module's equations: the judge of every other path.
///
/// # Panics
/// When [`SsdArgs::check`] fails.
pub fn recurrent<B: Backend>(args: SsdArgs<B>) -> SsdOut<B> {
    let SsdDims { b, l, h, p, g, n } = args.check().unwrap_or_else(|error| panic!("{error}"));
    let r = h / g;
    let device = args.x.device();
    let dtype = args.x.dtype();
    let delta = step_sizes(args.dt, args.dt_bias, args.segments.as_ref(), args.options);
    let a = args.a.cast(DType::F32).reshape([1, h, 1, 1]);
    let x = args.x.cast(DType::F32);
    // [b, l, g, n] -> [b, l, h, n]
    let to_heads = |t: Tensor<B, 4>| t.cast(DType::F32).unsqueeze_dim::<5>(3).expand([b, l, g, r, n]).reshape([b, l, h, n]);
    let (bs, cs) = (to_heads(args.b), to_heads(args.c));
    let resets = args.segments.as_ref().map(|segments| (segments.filled(), segments.prev_column()));

    let mut state = args.state.map_or_else(|| Tensor::zeros([b, h, p, n], (&device, DType::F32)), |state| state.cast(DType::F32));
    let mut ys = Vec::with_capacity(l);
    for t in 0..l {
        if let Some((ids, prev)) = &resets {
            let before = if t == 0 { prev.clone() } else { ids.clone().narrow(1, t - 1, 1) };
            let fresh = ids.clone().narrow(1, t, 1).not_equal(before); // [b, 1]
            state = state.mask_fill(fresh.unsqueeze_dims::<4>(&[2, 3]).expand([b, h, p, n]), 0.0);
        }
        let step = delta.clone().narrow(1, t, 1).reshape([b, h, 1, 1]);
        let x_t = x.clone().narrow(1, t, 1).reshape([b, h, p, 1]);
        let b_t = bs.clone().narrow(1, t, 1).reshape([b, h, 1, n]);
        let c_t = cs.clone().narrow(1, t, 1).reshape([b, h, 1, n]);
        state = state * (step.clone() * a.clone()).exp() + (x_t * step) * b_t;
        ys.push((state.clone() * c_t).sum_dim(3).reshape([b, 1, h, p]));
    }
    let mut y = if ys.is_empty() { Tensor::zeros([b, 0, h, p], (&device, DType::F32)) } else { Tensor::cat(ys, 1) };
    if let Some(d) = args.d {
        y = y + x * d.cast(DType::F32).reshape([1, 1, h, 1]);
    }
    SsdOut { y: blank_padding(y, args.segments.as_ref()).cast(dtype), state }
}

/// Zeros at padding.
fn blank_padding<B: Backend>(y: Tensor<B, 4>, segments: Option<&Segments<B>>) -> Tensor<B, 4> {
    match segments {
        Some(segments) if segments.padded() => {
            let shape = y.dims();
            // Both axes at once: behind an axis of length 1, Burn 0.21 loses the strides of padded rows (tracel-ai/burn#5071).
            y.mask_fill(segments.valid().bool_not().unsqueeze_dims::<4>(&[2, 3]).expand(shape), 0.0)
        }
        _ => y,
    }
}

/// Pads dimension 1 with zeros up to `len`.
fn extend<B: Backend, const D: usize>(t: Tensor<B, D>, len: usize) -> Tensor<B, D> {
    let mut shape = t.dims();
    if shape[1] == len {
        return t;
    }
    shape[1] = len - shape[1];
    let zeros = Tensor::zeros(shape, (&t.device(), t.dtype()));
    Tensor::cat(vec![t, zeros], 1)
}

/// Ids of one call laid out in chunks.
struct ChunkIds<B: Backend> {
    /// `[b, c, q]`.
    ids: Tensor<B, 3, Int>,
    /// Id at each chunk's end, `[b, c, 1]`.
    end: Tensor<B, 3, Int>,
    /// Id before each chunk, `[b, c, 1]`.
    before: Tensor<B, 3, Int>,
}

impl<B: Backend> ChunkIds<B> {
    fn new(segments: &Segments<B>, c: usize, q: usize) -> Self {
        let [b, l] = segments.dims();
        let mut ids = segments.filled();
        if c * q > l {
            ids = Tensor::cat(vec![ids, segments.last_column().expand([b, c * q - l])], 1);
        }
        let ids = ids.reshape([b, c, q]);
        let end = ids.clone().narrow(2, q - 1, 1);
        let first = segments.prev_column().unsqueeze_dim(2); // [b, 1, 1]
        let before = if c > 1 { Tensor::cat(vec![first, end.clone().narrow(1, 0, c - 1)], 1) } else { first };
        Self { ids, end, before }
    }
}

/// Chunked form (arXiv 2405.21060, section 6): quadratic inside a chunk, a short recurrence over chunk states.
///
/// # Panics
/// When [`SsdArgs::check`] fails.
pub fn chunked<B: Backend>(args: SsdArgs<B>) -> SsdOut<B> {
    let SsdDims { b, l, h, p, g, n } = args.check().unwrap_or_else(|error| panic!("{error}"));
    let r = h / g;
    let q = args.options.chunk.clamp(1, l.max(1));
    let c = l.div_ceil(q).max(1);
    let device = args.x.device();
    let dtype = args.x.dtype();

    let delta = step_sizes(args.dt, args.dt_bias, args.segments.as_ref(), args.options);
    let x = args.x.cast(DType::F32);
    let skip = args.d.map(|d| x.clone() * d.cast(DType::F32).reshape([1, 1, h, 1]));
    // Tokens beyond l have delta = 0: they neither decay nor feed the state.
    let decay = extend(delta.clone() * args.a.cast(DType::F32).reshape([1, 1, h]), c * q); // [b, cq, h]
    let x = extend(x * delta.unsqueeze_dim::<4>(3), c * q).reshape([b, c, q, g, r, p]).permute([0, 1, 3, 4, 2, 5]); // [b, c, g, r, q, p]
    let to_chunks = |t: Tensor<B, 4>| extend(t.cast(DType::F32), c * q).reshape([b, c, q, g, n]).swap_dims(2, 3); // [b, c, g, q, n]
    let (bs, cs) = (to_chunks(args.b), to_chunks(args.c));
    let ids = args.segments.as_ref().map(|segments| ChunkIds::new(segments, c, q));

    // s_i = sum of decays up to and including i. [b, c, g, r, q]
    let sums = decay.reshape([b, c, q, g, r]).permute([0, 1, 3, 4, 2]).cumsum(4);
    let total = sums.clone().narrow(4, q - 1, 1); // [b, c, g, r, 1]

    // L[i, j] = exp(s_i - s_j) for i >= j in the same document; masked before the exponential.
    let mut hidden = Tensor::<B, 2, Bool>::tril_mask([q, q], 0, &device).unsqueeze::<6>().expand([b, c, g, r, q, q]);
    if let Some(ids) = &ids {
        let other = ids
            .ids
            .clone()
            .unsqueeze_dim::<4>(3)
            .expand([b, c, q, q])
            .not_equal(ids.ids.clone().unsqueeze_dim::<4>(2).expand([b, c, q, q]));
        hidden = hidden.bool_or(other.unsqueeze_dims::<6>(&[2, 3]).expand([b, c, g, r, q, q]));
    }
    let spread = sums.clone().unsqueeze_dim::<6>(5) - sums.clone().unsqueeze_dim::<6>(4); // [b, c, g, r, q, q]
    let within = spread.mask_fill(hidden, f32::NEG_INFINITY).exp();
    let products = cs.clone().matmul(bs.clone().swap_dims(3, 4)); // [b, c, g, q, q]
    let mut y = (within * products.unsqueeze_dim::<6>(3)).matmul(x.clone()); // [b, c, g, r, q, p]

    // What each chunk adds to the state that leaves it. [b, c, g, r, p, n]
    let keep = |values: Tensor<B, 5>, at: Option<(Tensor<B, 3, Int>, Tensor<B, 3, Int>)>| match at {
        None => values,
        Some((left, right)) => {
            let shape = values.dims();
            let differ = left.not_equal(right).unsqueeze_dims::<5>(&[2, 3]);
            values.mask_fill(differ.expand(shape), 0.0)
        }
    };
    let wide = |t: &Tensor<B, 3, Int>| t.clone().expand([b, c, q]);
    let to_end = keep((total.clone() - sums.clone()).exp(), ids.as_ref().map(|i| (i.ids.clone(), wide(&i.end))));
    let fed = (x * to_end.unsqueeze_dim::<6>(5)).swap_dims(4, 5).matmul(bs.unsqueeze_dim::<6>(3).expand([b, c, g, r, q, n]));

    // Pass states from chunk to chunk.
    let carry = keep(total.exp(), ids.as_ref().map(|i| (i.end.clone(), i.before.clone())));
    let mut state = args
        .state
        .map_or_else(|| Tensor::zeros([b, h, p, n], (&device, DType::F32)), |state| state.cast(DType::F32))
        .reshape([b, 1, g, r, p, n]);
    let mut entering = Vec::with_capacity(c);
    for i in 0..c {
        entering.push(state.clone());
        state = state * carry.clone().narrow(1, i, 1).unsqueeze_dim::<6>(5) + fed.clone().narrow(1, i, 1);
    }
    let entering = Tensor::cat(entering, 1); // [b, c, g, r, p, n]

    // What the entering state adds to each token.
    let from_start = keep(sums.exp(), ids.as_ref().map(|i| (i.ids.clone(), wide(&i.before))));
    let read = cs.unsqueeze_dim::<6>(3).expand([b, c, g, r, q, n]).matmul(entering.swap_dims(4, 5)); // [b, c, g, r, q, p]
    y = y + read * from_start.unsqueeze_dim::<6>(5);

    let mut y = y.permute([0, 1, 4, 2, 3, 5]).reshape([b, c * q, h, p]).narrow(1, 0, l);
    if let Some(skip) = skip {
        y = y + skip;
    }
    SsdOut { y: blank_padding(y, args.segments.as_ref()).cast(dtype), state: state.reshape([b, h, p, n]) }
}
