//! What every variant shares: step sizes and cumulative log decays on the way in, gradients of `dt`, `a` and `dt_bias`
//! on the way out.

use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::ir::AddressType;
use cubecl::prelude::*;

use crate::Segments;
use crate::cube::{Device, array, cast, down_int, empty, packed};
use crate::ssd::{SsdDims, SsdOptions};

/// Units of a cube of the kernels here.
const UNITS: usize = 256;

/// Document boundaries on the device.
#[derive(Clone)]
pub(crate) struct Documents<R: CubeRuntime> {
    /// [`Segments::filled`], i32 `[b, l]`.
    pub filled: CubeTensor<R>,
    /// Per row the number of real tokens and the id of the incoming state, i32 `[b, 2]`. Padding only follows real
    /// tokens, so the number says which tokens are padding.
    pub bounds: CubeTensor<R>,
}

impl<R: CubeRuntime> Documents<R> {
    pub(crate) fn new<F: FloatElement, I: IntElement, BT: BoolElement>(segments: &Segments<CubeBackend<R, F, I, BT>>) -> Self {
        let ready = |tensor| packed(cast(tensor, DType::I32));
        Self { filled: ready(down_int(segments.filled())), bounds: ready(down_int(segments.bounds())) }
    }
}

/// Step sizes and decays, head by head.
pub(crate) struct Prepared<R: CubeRuntime> {
    /// f32 `[b, h, lp]`: step sizes after bias, softplus and limits; 0 at padding and beyond `l`.
    pub delta: CubeTensor<R>,
    /// f32 `[b, h, lp]`: inclusive cumulative sum of `delta * a` inside each chunk of `q` tokens.
    pub sums: CubeTensor<R>,
    /// `l` rounded up to a multiple of `q`.
    pub lp: usize,
}

/// Gradients of what [`prepare`] read, each in its argument's dtype.
pub(crate) struct StepGrads<R: CubeRuntime> {
    /// `[b, l, h]`
    pub dt: CubeTensor<R>,
    /// `[h]`
    pub a: CubeTensor<R>,
    /// `[h]`
    pub dt_bias: Option<CubeTensor<R>>,
}

/// Comptime choices of the kernels here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct StepPlan {
    /// Tokens of a tile.
    q: usize,
    /// Heads of a tile, a power of two.
    heads: usize,
    bias: bool,
    softplus: bool,
    segments: bool,
}

impl StepPlan {
    fn new(q: usize, dims: SsdDims, bias: bool, softplus: bool, segments: bool) -> Self {
        // Both tiles of the way back within 16 KiB.
        let fits = (2000 / (q + 1)).max(1).next_power_of_two() / 2;
        Self { q, heads: dims.h.next_power_of_two().min(fits.clamp(1, 32)), bias, softplus, segments }
    }
}

/// A grid of `cubes` cubes in a line, folded where an axis is too short: kernels go by `CUBE_POS` and leave beyond it.
pub(crate) fn line(cubes: usize, device: &Device) -> CubeCount {
    let x = cubes.min(device.max_cubes.0.min(65535) as usize).max(1);
    let y = cubes.div_ceil(x).min(device.max_cubes.1.min(65535) as usize).max(1);
    CubeCount::Static(x as u32, y as u32, cubes.div_ceil(x * y) as u32)
}

/// What it takes to index the largest of `tensors`.
pub(crate) fn addresses<R: CubeRuntime>(tensors: &[&CubeTensor<R>]) -> AddressType {
    tensors.iter().map(|tensor| tensor.required_address_type()).max().unwrap_or_default()
}

/// `(step size, its derivative)` of a raw one.
#[cube]
pub(crate) fn step_size(raw: f32, min: f32, max: f32, #[comptime] softplus: bool) -> (f32, f32) {
    let mut step = raw;
    let mut slope = 1.0f32;
    if comptime!(softplus) {
        // log(1 + e) = 2 atanh(e / (2 + e)), a series without cancellation for small e.
        let e = (0.0f32 - raw.abs()).exp();
        let s = e / (2.0f32 + e);
        let z = s * s;
        let series = 1.0f32
            + z * (1.0f32 / 3.0f32
                + z * (0.2f32
                    + z * (1.0f32 / 7.0f32
                        + z * (1.0f32 / 9.0f32 + z * (1.0f32 / 11.0f32 + z * (1.0f32 / 13.0f32 + z * (1.0f32 / 15.0f32)))))));
        let positive = raw > 0.0f32;
        step = 2.0f32 * s * series + select(positive, raw, 0.0f32);
        slope = select(positive, 1.0f32, e) / (1.0f32 + e);
    }
    if step < min {
        step = min;
        slope = 0.0f32;
    } else if step > max {
        step = max;
        slope = 0.0f32;
    }
    (step, slope)
}

#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
fn prepare_kernel<D: Float>(
    dt: &Array<D>,
    bias: &Array<f32>,
    a: &Array<f32>,
    bounds: &Array<i32>,
    delta: &mut Array<f32>,
    sums: &mut Array<f32>,
    cubes: u32,
    l: u32,
    h: u32,
    lp: u32,
    min: f32,
    max: f32,
    #[comptime] plan: StepPlan,
    #[define(D)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let q = comptime!(plan.q);
    let heads = comptime!(plan.heads);
    let width = comptime!(plan.q + 1);
    let lanes = comptime!(UNITS / plan.heads);
    let mut tile = SharedMemory::<f32>::new(comptime!(plan.heads * (plan.q + 1)));
    let mut parts = SharedMemory::<f32>::new(UNITS);
    let (l, h, lp) = (l as usize, h as usize, lp as usize);
    let unit = UNIT_POS as usize;
    let blocks = h.div_ceil(heads);
    let first = (CUBE_POS % blocks) * heads;
    let chunk = (CUBE_POS / blocks) % (lp / q);
    let row = CUBE_POS / blocks / (lp / q);
    let from = chunk * q;
    let mut real = l;
    if comptime!(plan.segments) {
        real = bounds[row * 2] as usize;
    }

    let head = first + unit % heads;
    let mut t = unit / heads;
    while t < q {
        let mut step = 0.0f32;
        if head < h && from + t < real {
            let mut raw = f32::cast_from(dt[(row * l + from + t) * h + head]);
            if comptime!(plan.bias) {
                raw += bias[head];
            }
            let (value, _) = step_size(raw, min, max, plan.softplus);
            step = value;
        }
        tile[(unit % heads) * width + t] = step;
        t += lanes;
    }
    sync_cube();
    let mut i = unit;
    while i < heads * q {
        if first + i / q < h {
            delta[(row * h + first + i / q) * lp + from + i % q] = tile[i / q * width + i % q];
        }
        i += UNITS;
    }
    sync_cube();

    // A head's tokens in `lanes` runs: each run by itself, then with all that comes before it.
    let run = comptime!(plan.q.div_ceil(UNITS / plan.heads));
    let start = (unit % lanes) * run;
    let line = unit / lanes * width;
    let mut rate = 0.0f32;
    if first + unit / lanes < h {
        rate = a[first + unit / lanes];
    }
    let mut sum = 0.0f32;
    #[unroll]
    for j in 0..run {
        if start + j < q {
            sum += rate * tile[line + start + j];
            tile[line + start + j] = sum;
        }
    }
    parts[unit] = sum;
    sync_cube();
    let mut before = 0.0f32;
    for j in 0..unit % lanes {
        before += parts[unit - unit % lanes + j];
    }
    #[unroll]
    for j in 0..run {
        if start + j < q {
            tile[line + start + j] += before;
        }
    }
    sync_cube();
    let mut i = unit;
    while i < heads * q {
        if first + i / q < h {
            sums[(row * h + first + i / q) * lp + from + i % q] = tile[i / q * width + i % q];
        }
        i += UNITS;
    }
}

/// Step sizes and cumulative log decays for chunks of `q` tokens. `dt` is `[b, l, h]`, `dt_bias` and `a` `[h]`, of any
/// float dtype. Nothing may be empty.
pub(crate) fn prepare<R: CubeRuntime>(
    dt: &CubeTensor<R>,
    dt_bias: Option<&CubeTensor<R>>,
    a: &CubeTensor<R>,
    documents: Option<&Documents<R>>,
    dims: SsdDims,
    options: SsdOptions,
    q: usize,
) -> Prepared<R> {
    let SsdDims { b, l, h, .. } = dims;
    let lp = l.next_multiple_of(q);
    let delta = empty(dt, [b, h, lp], DType::F32);
    let sums = empty(dt, [b, h, lp], DType::F32);
    let plan = StepPlan::new(q, dims, dt_bias.is_some(), options.dt_softplus, documents.is_some());
    let cubes = b * (lp / q) * h.div_ceil(plan.heads);
    let dt = packed(dt.clone());
    let a = flat_f32(a);
    let bias = dt_bias.map_or_else(|| a.clone(), flat_f32);
    // SAFETY: the kernel guards tokens and heads.
    unsafe {
        prepare_kernel::launch_unchecked::<R>(
            &dt.client,
            line(cubes, &Device::of(&dt.client)),
            CubeDim::new_1d(UNITS as u32),
            addresses(&[&dt, &delta]),
            array(&dt),
            array(&bias),
            array(&a),
            array(documents.map_or(&a, |documents| &documents.bounds)),
            array(&delta),
            array(&sums),
            cubes as u32,
            l as u32,
            h as u32,
            lp as u32,
            options.dt_limit.0,
            options.dt_limit.1,
            plan,
            dt.dtype().into(),
        );
    }
    Prepared { delta, sums, lp }
}

/// A small tensor as packed float32.
pub(crate) fn flat_f32<R: CubeRuntime>(tensor: &CubeTensor<R>) -> CubeTensor<R> {
    packed(cast(tensor.clone(), DType::F32))
}

#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
fn finish_kernel<D: Float>(
    dt: &Array<D>,
    bias: &Array<f32>,
    a: &Array<f32>,
    bounds: &Array<i32>,
    ddelta: &Array<f32>,
    dlog: &Array<f32>,
    ddt: &mut Array<D>,
    da: &mut Array<f32>,
    dbias: &mut Array<f32>,
    cubes: u32,
    l: u32,
    h: u32,
    lp: u32,
    min: f32,
    max: f32,
    #[comptime] plan: StepPlan,
    #[define(D)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let q = comptime!(plan.q);
    let heads = comptime!(plan.heads);
    let width = comptime!(plan.q + 1);
    let lanes = comptime!(UNITS / plan.heads);
    let mut direct = SharedMemory::<f32>::new(comptime!(plan.heads * (plan.q + 1)));
    let mut decays = SharedMemory::<f32>::new(comptime!(plan.heads * (plan.q + 1)));
    let mut parts = SharedMemory::<f32>::new(comptime!(2 * UNITS));
    let (l, h, lp) = (l as usize, h as usize, lp as usize);
    let unit = UNIT_POS as usize;
    let blocks = h.div_ceil(heads);
    let first = (CUBE_POS % blocks) * heads;
    let chunk = (CUBE_POS / blocks) % (lp / q);
    let row = CUBE_POS / blocks / (lp / q);
    let from = chunk * q;
    let mut real = l;
    if comptime!(plan.segments) {
        real = bounds[row * 2] as usize;
    }

    let mut i = unit;
    while i < heads * q {
        if first + i / q < h && from + i % q < real {
            let at = (row * h + first + i / q) * lp + from + i % q;
            direct[i / q * width + i % q] = ddelta[at];
            decays[i / q * width + i % q] = dlog[at];
        }
        i += UNITS;
    }
    sync_cube();
    let head = first + unit % heads;
    let mut da_sum = 0.0f32;
    let mut dbias_sum = 0.0f32;
    let mut t = unit / heads;
    while t < q {
        if head < h && from + t < l {
            let at = (row * l + from + t) * h + head;
            let mut grad = 0.0f32;
            if from + t < real {
                let mut raw = f32::cast_from(dt[at]);
                if comptime!(plan.bias) {
                    raw += bias[head];
                }
                let (step, slope) = step_size(raw, min, max, plan.softplus);
                let decay = decays[(unit % heads) * width + t];
                grad = (direct[(unit % heads) * width + t] + a[head] * decay) * slope;
                da_sum += step * decay;
                dbias_sum += grad;
            }
            ddt[at] = D::cast_from(grad);
        }
        t += lanes;
    }
    parts[unit] = da_sum;
    parts[UNITS + unit] = dbias_sum;
    sync_cube();
    if unit < heads && head < h {
        for lane in 1..lanes {
            da_sum += parts[lane * heads + unit];
            dbias_sum += parts[UNITS + lane * heads + unit];
        }
        let part = row * (lp / q) + chunk;
        da[part * h + head] = da_sum;
        if comptime!(plan.bias) {
            dbias[part * h + head] = dbias_sum;
        }
    }
}

/// The counterpart of [`prepare`]: gradients of `dt`, `a` and `dt_bias` from the direct gradient of `delta` and that of
/// each token's log decay `delta * a`, both f32 `[b, h, lp]`; values at padding and beyond `l` are not read.
#[allow(clippy::too_many_arguments)]
pub(crate) fn finish<R: CubeRuntime>(
    dt: &CubeTensor<R>,
    dt_bias: Option<&CubeTensor<R>>,
    a: &CubeTensor<R>,
    documents: Option<&Documents<R>>,
    dims: SsdDims,
    options: SsdOptions,
    ddelta: &CubeTensor<R>,
    dlog: &CubeTensor<R>,
) -> StepGrads<R> {
    /// Tokens of a tile; any number will do.
    const TILE: usize = 64;
    let SsdDims { b, l, h, .. } = dims;
    let lp = ddelta.shape()[2];
    // Tiles cover `lp` whatever its divisor.
    let q = [TILE, 32, 16, 8, 4, 2, 1].into_iter().find(|&q| lp.is_multiple_of(q)).unwrap_or(1);
    let plan = StepPlan::new(q, dims, dt_bias.is_some(), options.dt_softplus, documents.is_some());
    let parts = b * (lp / q);
    let cubes = parts * h.div_ceil(plan.heads);
    let dt = packed(dt.clone());
    let rates = flat_f32(a);
    let bias = dt_bias.map_or_else(|| rates.clone(), flat_f32);
    let ddt = empty(&dt, [b, l, h], dt.dtype());
    let da = empty(&dt, [parts, h], DType::F32);
    let dbias = if plan.bias { empty(&dt, [parts, h], DType::F32) } else { da.clone() };
    // SAFETY: the kernel guards tokens and heads.
    unsafe {
        finish_kernel::launch_unchecked::<R>(
            &dt.client,
            line(cubes, &Device::of(&dt.client)),
            CubeDim::new_1d(UNITS as u32),
            addresses(&[&dt, ddelta]),
            array(&dt),
            array(&bias),
            array(&rates),
            array(documents.map_or(&rates, |documents| &documents.bounds)),
            array(ddelta),
            array(dlog),
            array(&ddt),
            array(&da),
            array(&dbias),
            cubes as u32,
            l as u32,
            h as u32,
            lp as u32,
            options.dt_limit.0,
            options.dt_limit.1,
            plan,
            dt.dtype().into(),
        );
    }
    let dt_bias = dt_bias.map(|bias| fold(&dbias, bias.dtype()));
    StepGrads { dt: ddt, a: fold(&da, a.dtype()), dt_bias }
}

/// Columns and slices of rows of a cube of [`fold`].
const COLUMNS: usize = 16;
const SLICES: usize = UNITS / COLUMNS;

#[cube(launch_unchecked, address_type = "dynamic")]
fn fold_kernel<W: Float>(parts: &Array<f32>, out: &mut Array<W>, rows: u32, columns: u32, #[define(W)] _dtype: StorageType) {
    let mut sums = SharedMemory::<f32>::new(UNITS);
    let columns = columns as usize;
    let unit = UNIT_POS as usize;
    let column = CUBE_POS * COLUMNS + unit % COLUMNS;
    let mut sum = 0.0f32;
    if column < columns {
        let mut row = unit / COLUMNS;
        while row < rows as usize {
            sum += parts[row * columns + column];
            row += SLICES;
        }
    }
    sums[unit] = sum;
    sync_cube();
    if unit < COLUMNS && column < columns {
        for slice in 1..SLICES {
            sum += sums[slice * COLUMNS + unit];
        }
        out[column] = W::cast_from(sum);
    }
}

/// Sums float32 `[rows, columns]` over its rows in a fixed order, into `dtype`: what replaces atomics.
pub(crate) fn fold<R: CubeRuntime>(parts: &CubeTensor<R>, dtype: DType) -> CubeTensor<R> {
    let shape = parts.shape();
    let (rows, columns) = (shape[0], shape[1]);
    let out = empty(parts, [columns], dtype);
    // SAFETY: the kernel guards rows and columns.
    unsafe {
        fold_kernel::launch_unchecked::<R>(
            &parts.client,
            line(columns.div_ceil(COLUMNS), &Device::of(&parts.client)),
            CubeDim::new_1d(UNITS as u32),
            addresses(&[parts]),
            array(parts),
            array(&out),
            rows as u32,
            columns as u32,
            dtype.into(),
        );
    }
    out
}
