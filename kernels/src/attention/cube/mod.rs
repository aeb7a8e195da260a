//! CubeCL kernels: flash attention. Scores never reach memory.
//!
//! | variant | where |
//! | --- | --- |
//! | [`mma`] | CUDA from sm_80, bf16 and f16, `p` a multiple of 16 up to 128 |
//! | [`decode`] | any device, any dtype, `p` up to 256, at most [`decode::QUERIES`] queries, without gradients |
//! | [`tiled`] | any device, any dtype, `p` up to 256 |
//! | [`step`] | one token against buffers, where [`decode`] reads how far these are filled on the device |
//!
//! The backward recomputes the weights from the scores and the saved log-sum-exps, in two kernels without atomics: one
//! walks the slots for the queries' gradient, one the queries (of all heads of a group) for those of keys and values.

mod decode;
mod mma;
mod plain;
pub(super) mod plan;
mod row_sums;
mod shared;
pub(crate) mod step;
mod tiled;

use burn::tensor::{DType, Tensor};
use burn_cubecl::element::BoolElement;
use burn_cubecl::ops::permute;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::*;

use self::shared::{SizesLaunch, StridesLaunch};
use super::{AttentionArgs, AttentionGrads, reference};
use crate::cube::{Device, array, cast, down, down_int, empty, packed, up};

/// Whether the kernels are there.
pub(crate) const READY: bool = true;
/// Widest head of a kernel; wider ones take the reference.
const WIDEST: usize = 256;
/// Rows of log-sum-exps are padded to a multiple of this, the largest tile.
pub(crate) const PADDING: usize = 128;

/// What a forward pass leaves behind.
struct Saved<R: CubeRuntime> {
    out: CubeTensor<R>,
    /// `[b, h, l rounded up]`
    lse: CubeTensor<R>,
}

/// A call, down to primitives.
struct Call<R: CubeRuntime> {
    q: View<R>,
    k: View<R>,
    v: View<R>,
    /// See [`plan::plan`]; a dummy when all rows are one document.
    ids: CubeTensor<R>,
    has_ids: bool,
    /// Runs [`mma`], else [`tiled`].
    tensor_cores: bool,
    scale: f32,
    b: usize,
    h: usize,
    g: usize,
    l: usize,
    s: usize,
    p: usize,
}

/// A `[batch, heads, rows, p]` tensor whose last axis is dense.
#[derive(Clone)]
struct View<R: CubeRuntime> {
    tensor: CubeTensor<R>,
    strides: [usize; 3],
}

impl<R: CubeRuntime> View<R> {
    /// Packs `tensor` unless its rows are dense and begin at multiples of `align` elements.
    fn new(tensor: CubeTensor<R>, align: usize) -> Self {
        let view = Self::over(tensor);
        if view.tensor.meta.strides()[3] == 1 && view.aligned(align) { view } else { Self::over(packed(view.tensor)) }
    }

    fn over(tensor: CubeTensor<R>) -> Self {
        let strides = tensor.meta.strides();
        Self { strides: [strides[0], strides[1], strides[2]], tensor }
    }

    fn aligned(&self, elements: usize) -> bool {
        let start = self.tensor.handle.offset_start.unwrap_or(0) as usize;
        let [.., p] = self.shape();
        let bytes = elements * self.tensor.dtype.size();
        p.is_multiple_of(elements) && start.is_multiple_of(bytes) && self.strides.iter().all(|stride| stride.is_multiple_of(elements))
    }

    /// Elements of the widest vector of at most `bytes` bytes that its rows can be read in.
    fn vector(&self, bytes: usize) -> usize {
        let most = bytes / self.tensor.dtype.size();
        [8, 4, 2].into_iter().find(|&elements| elements <= most && self.aligned(elements)).unwrap_or(1)
    }

    fn shape(&self) -> [usize; 4] {
        self.tensor.meta.shape().dims()
    }

    /// A tensor of the same shape, not initialised, whose heads and rows are ordered in memory as these.
    fn alike(&self) -> Self {
        let [batch, heads, rows, p] = self.shape();
        let [_, head, row] = self.strides;
        let dtype = self.tensor.dtype;
        Self::over(match head < row {
            true => permute(empty(&self.tensor, [batch, rows, heads, p], dtype), &[0, 2, 1, 3]),
            false => empty(&self.tensor, [batch, heads, rows, p], dtype),
        })
    }

    fn array(&self) -> ArrayArg<R> {
        array(&self.tensor)
    }

    fn strides(&self, unit: usize) -> StridesLaunch<R> {
        let [batch, head, row] = self.strides.map(|stride| (stride / unit) as u32);
        StridesLaunch::new(batch, head, row)
    }

    /// Elements that the tensor spans.
    fn span(&self) -> usize {
        let shape = self.shape();
        (0..3).map(|i| (shape[i].max(1) - 1) * self.strides[i]).sum::<usize>() + shape[3]
    }
}

impl<R: CubeRuntime> Call<R> {
    /// `None` where the reference has to do it.
    fn new<F: FloatElement, I: IntElement, BT: BoolElement>(args: AttentionArgs<CubeBackend<R, F, I, BT>>) -> Option<(Self, Device)> {
        let [b, h, l, p] = args.q.dims();
        let [_, g, s, _] = args.k.dims();
        let some = b > 0 && h > 0 && l > 0 && l <= s && (1..=WIDEST).contains(&p);
        // Offsets are 32-bit.
        let small = [b * h * (l + PADDING) * p, b * g * s * p, b * (l + s) * 4].iter().all(|&count| count < 1 << 31);
        let dtype = args.q.dtype();
        if !some || !small || args.k.dtype() != dtype || args.v.dtype() != dtype {
            return None;
        }
        let plan = args.mask.plan(&args.q.device());
        let [q, k, v] = [args.q, args.k, args.v].map(down);
        let device = Device::of(&q.client);
        let stored = match dtype {
            DType::F32 => true,
            DType::F16 => device.f16,
            DType::BF16 => device.bf16,
            _ => false,
        };
        let tensor_cores = mma::fits(&device, dtype, p, args.scale);
        if !stored || !tensor_cores && !tiled::fits(&device, p) {
            return None;
        }
        let [q, k, v] = [q, k, v].map(|tensor| View::new(tensor, if tensor_cores { mma::VECTOR } else { 1 }));
        if [&q, &k, &v].iter().any(|view| view.span() >= 1 << 31) {
            return None;
        }
        let has_ids = plan.is_some();
        let ids = plan.map_or_else(|| empty(&q.tensor, [1], DType::I32), down_int);
        Some((Self { q, k, v, ids, has_ids, tensor_cores, scale: args.scale, b, h, g, l, s, p }, device))
    }

    fn forward(&self, device: &Device) -> Option<Saved<R>> {
        if self.tensor_cores { Some(mma::forward(self)) } else { tiled::forward(self, device) }
    }

    fn lp(&self) -> usize {
        self.l.next_multiple_of(PADDING)
    }

    fn sizes(&self) -> SizesLaunch<R> {
        let [batch, heads, groups, l, s, lp] = [self.b, self.h, self.g, self.l, self.s, self.lp()].map(|size| size as u32);
        SizesLaunch::new(batch, heads, groups, l, s, lp)
    }

    fn dtype(&self) -> DType {
        self.q.tensor.dtype
    }
}

/// Cubes along one axis, folded where a device has short axes. A kernel checks its position.
fn cubes(count: usize, device: &Device) -> CubeCount {
    let x = count.min(device.max_cubes.0 as usize).min(if device.max_cubes.0 > 65535 { usize::MAX } else { 32768 });
    CubeCount::Static(x as u32, count.div_ceil(x) as u32, 1)
}

type Back<R, F, I, BT> = CubeBackend<R, F, I, BT>;

/// Output and log-sum-exps. `None` where the reference has to do it.
#[allow(clippy::type_complexity)]
pub(crate) fn forward_saving<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: AttentionArgs<Back<R, F, I, BT>>,
) -> Option<(Tensor<Back<R, F, I, BT>, 4>, Tensor<Back<R, F, I, BT>, 3>)> {
    let (call, device) = Call::new(args)?;
    let saved = call.forward(&device)?;
    Some((up::<Back<R, F, I, BT>, 4>(saved.out), up::<Back<R, F, I, BT>, 3>(saved.lse)))
}

pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: AttentionArgs<Back<R, F, I, BT>>,
) -> Tensor<Back<R, F, I, BT>, 4> {
    let out = Call::new(args.clone()).and_then(|(call, device)| match call.l {
        ..=decode::QUERIES => Some(decode::forward(&call, &device, None)),
        _ => call.forward(&device).map(|saved| saved.out),
    });
    match out {
        Some(out) => up::<Back<R, F, I, BT>, 4>(out),
        None => reference::attention(args),
    }
}

/// Gradients, given what [`forward_saving`] returned.
#[allow(clippy::type_complexity)]
pub(crate) fn backward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: AttentionArgs<Back<R, F, I, BT>>,
    saved: Option<(Tensor<Back<R, F, I, BT>, 4>, Tensor<Back<R, F, I, BT>, 3>)>,
    dout: Tensor<Back<R, F, I, BT>, 4>,
) -> AttentionGrads<Back<R, F, I, BT>> {
    let grads = saved.or_else(|| forward_saving(args.clone())).zip(Call::new(args.clone())).and_then(|((out, lse), (call, device))| {
        let saved = Saved { out: down(out), lse: down(lse) };
        let dout = cast(down(dout.clone()), call.dtype());
        if call.tensor_cores { Some(mma::backward(&call, &device, saved, dout)) } else { tiled::backward(&call, &device, saved, dout) }
    });
    match grads {
        Some(grads) => {
            let [q, k, v] = grads.map(up::<Back<R, F, I, BT>, 4>);
            AttentionGrads { q, k, v }
        }
        None => plain::attention_backward(args, dout),
    }
}
