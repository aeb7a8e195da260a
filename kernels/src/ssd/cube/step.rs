//! Decoding: a few tokens, one kernel that reads and writes the state once, in place where nobody else holds it.
//!
//! A row of the state (one channel `p`, `n` values) lies across `lanes` neighbouring units in vectors of 16 bytes; a unit
//! holds several rows, so that what it reads of `B` and `C` serves all of them.

use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::call::Call;
use super::prepare::{addresses, line, step_size};
use crate::cube::{Device, array, cast, empty, packed};
use crate::ssd::SsdDims;

/// Tokens up to which this is quicker than chunks.
pub(super) const FEW: usize = 4;

/// Comptime choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct StepPlan {
    /// Units along a row of the state, a power of two.
    lanes: usize,
    /// Vectors of a unit in each row, and their elements.
    each: usize,
    w: usize,
    /// Rows of a unit.
    rows: usize,
    /// Units of a cube.
    units: usize,
    /// `n` is not `lanes * each * w`.
    ragged: bool,
    /// Planes can exchange values and hold a row.
    planes: bool,
    /// There is an incoming state.
    started: bool,
    /// It lies where the outgoing one goes.
    in_place: bool,
    skip: bool,
    bias: bool,
    softplus: bool,
    segments: bool,
}

/// Elements from a row of the batch to the next, and from a token to the next.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Strides {
    row: u32,
    token: u32,
}

/// Sums each of `rows` values over the units of a row of the state.
#[cube]
fn fold_lanes(values: &mut Array<f32>, scratch: &mut SharedMemory<f32>, #[comptime] plan: StepPlan) {
    if comptime!(plan.planes) {
        #[unroll]
        for i in 0..comptime!(plan.lanes.trailing_zeros()) {
            #[unroll]
            for r in 0..plan.rows {
                values[r] = values[r] + plane_shuffle_xor(values[r], 1u32 << i);
            }
        }
    } else {
        let unit = UNIT_POS as usize;
        #[unroll]
        for r in 0..plan.rows {
            scratch[r * plan.units + unit] = values[r];
        }
        sync_cube();
        let first = unit - unit % plan.lanes;
        #[unroll]
        for r in 0..plan.rows {
            let mut sum = 0.0f32;
            for i in 0..plan.lanes {
                sum += scratch[r * plan.units + first + i];
            }
            values[r] = sum;
        }
        sync_cube();
    }
}

/// One cube per row of the batch, head and block of channels.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
fn step_kernel<F: Float, D: Float, A: Float, E: Float, S: Float, W: Size>(
    x: &Array<F>,
    b: &Array<Vector<F, W>>,
    c: &Array<Vector<F, W>>,
    dt: &Array<D>,
    a: &Array<A>,
    dt_bias: &Array<E>,
    d: &Array<S>,
    state: &Array<Vector<f32, W>>,
    filled: &Array<i32>,
    bounds: &Array<i32>,
    y: &mut Array<F>,
    out: &mut Array<Vector<f32, W>>,
    of_x: Strides,
    of_b: Strides,
    of_c: Strides,
    of_dt: Strides,
    cubes: u32,
    l: u32,
    h: u32,
    p: u32,
    g: u32,
    n: u32,
    min: f32,
    max: f32,
    #[comptime] plan: StepPlan,
    #[define(F, D, A, E, S)] _dtypes: [StorageType; 5],
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let (l, h, p) = (l as usize, h as usize, p as usize);
    let vectors = n as usize / plan.w;
    let lane = UNIT_POS as usize % plan.lanes;
    let across = comptime!(plan.units / plan.lanes);
    let blocks = p.div_ceil(across * plan.rows);
    let first = CUBE_POS % blocks * across * plan.rows + UNIT_POS as usize / plan.lanes;
    let head = CUBE_POS / blocks % h;
    let row = CUBE_POS / blocks / h;
    let group = head / (h / g as usize);
    let mut scratch = SharedMemory::<f32>::new(comptime!(if plan.planes { 1 } else { plan.rows * plan.units }));

    let base = (row * h + head) * p * vectors;
    let mut held = Array::<Vector<f32, W>>::new(comptime!(plan.rows * plan.each));
    #[unroll]
    for r in 0..plan.rows {
        let channel = first + r * across;
        #[unroll]
        for e in 0..plan.each {
            let vector = lane + comptime!(e * plan.lanes);
            let mut value = Vector::<f32, W>::new(0.0f32);
            if comptime!(plan.started) {
                if channel < p && (comptime!(!plan.ragged) || vector < vectors) {
                    let at = base + channel * vectors + vector;
                    if comptime!(plan.in_place) {
                        value = out[at];
                    } else {
                        value = state[at];
                    }
                }
            }
            held[comptime!(r * plan.each + e)] = value;
        }
    }

    let rate = f32::cast_from(a[head]);
    let mut bias = 0.0f32;
    if comptime!(plan.bias) {
        bias = f32::cast_from(dt_bias[head]);
    }
    let mut through = 0.0f32;
    if comptime!(plan.skip) {
        through = f32::cast_from(d[head]);
    }
    let mut real = l;
    let mut last = 0i32;
    if comptime!(plan.segments) {
        real = bounds[row * 2] as usize;
        last = bounds[row * 2 + 1];
    }
    for t in 0..l {
        let raw = f32::cast_from(dt[row * of_dt.row as usize + t * of_dt.token as usize + head]) + bias;
        let (step, _) = step_size(raw, min, max, plan.softplus);
        let mut delta = step;
        let mut decay = (step * rate).exp();
        if comptime!(plan.segments) {
            let id = filled[row * l + t];
            if id != last {
                decay = 0.0f32;
            }
            last = id;
            if t >= real {
                delta = 0.0f32;
                decay = 1.0f32;
            }
        }
        let from_x = row * of_x.row as usize + t * of_x.token as usize + head * p;
        let mut values = Array::<f32>::new(plan.rows);
        let mut dots = Array::<f32>::new(plan.rows);
        #[unroll]
        for r in 0..plan.rows {
            let channel = first + r * across;
            let mut value = 0.0f32;
            if channel < p && t < real {
                value = f32::cast_from(x[from_x + channel]);
            }
            values[r] = value;
            dots[r] = 0.0f32;
        }
        let from_b = (row * of_b.row as usize + t * of_b.token as usize) / plan.w + group * vectors;
        let from_c = (row * of_c.row as usize + t * of_c.token as usize) / plan.w + group * vectors;
        #[unroll]
        for e in 0..plan.each {
            let vector = lane + comptime!(e * plan.lanes);
            let mut b_t = Vector::<f32, W>::new(0.0f32);
            let mut c_t = Vector::<f32, W>::new(0.0f32);
            if t < real && (comptime!(!plan.ragged) || vector < vectors) {
                b_t = Vector::cast_from(b[from_b + vector]);
                c_t = Vector::cast_from(c[from_c + vector]);
            }
            #[unroll]
            for r in 0..plan.rows {
                let fed = Vector::<f32, W>::new(delta * values[r]);
                let value = held[comptime!(r * plan.each + e)] * Vector::<f32, W>::new(decay) + fed * b_t;
                held[comptime!(r * plan.each + e)] = value;
                let products = value * c_t;
                #[unroll]
                for i in 0..plan.w {
                    dots[r] = dots[r] + products[i];
                }
            }
        }
        fold_lanes(&mut dots, &mut scratch, plan);
        if lane == 0 {
            #[unroll]
            for r in 0..plan.rows {
                let channel = first + r * across;
                if channel < p {
                    y[((row * l + t) * h + head) * p + channel] = F::cast_from(dots[r] + through * values[r]);
                }
            }
        }
    }
    #[unroll]
    for r in 0..plan.rows {
        let channel = first + r * across;
        #[unroll]
        for e in 0..plan.each {
            let vector = lane + comptime!(e * plan.lanes);
            if channel < p && (comptime!(!plan.ragged) || vector < vectors) {
                out[base + channel * vectors + vector] = held[comptime!(r * plan.each + e)];
            }
        }
    }
}

/// Strides of a `[b, l, k, w]` tensor whose last two axes are packed, or of a `[b, l, w]` one; copies any other.
fn strided<R: CubeRuntime>(tensor: CubeTensor<R>, vector: usize) -> (CubeTensor<R>, (u32, u32)) {
    let find = |tensor: &CubeTensor<R>| {
        let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
        let mut inner = 1;
        for axis in (2..shape.num_dims()).rev() {
            if shape[axis] > 1 && strides[axis] != inner {
                return None;
            }
            inner *= shape[axis];
        }
        // Of an axis with one entry any stride will do.
        let of = |axis: usize| if shape[axis] > 1 { strides[axis] } else { 0 };
        let fits = |stride: usize| stride.is_multiple_of(vector) && u32::try_from(stride).is_ok();
        (fits(of(0)) && fits(of(1))).then(|| (of(0) as u32, of(1) as u32))
    };
    match find(&tensor) {
        Some(strides) => (tensor, strides),
        None => {
            let tensor = packed(tensor);
            let shape = tensor.shape();
            let token: usize = (2..shape.num_dims()).map(|axis| shape[axis]).product();
            (tensor, ((token * shape[1]) as u32, token as u32))
        }
    }
}

impl StepPlan {
    /// `None` where a row of the state does not fit into the registers of a few units.
    fn new<R: CubeRuntime>(client: &ComputeClient<R>, device: &Device, call: &Shape) -> Option<Self> {
        let SsdDims { b, h, p, n, .. } = call.dims;
        let bytes = 4;
        let w = client.io_optimized_vector_sizes(bytes).filter(|&w| w * bytes <= 16 && n.is_multiple_of(w)).max().unwrap_or(1);
        let planes = device.plane_ops && device.plane.0 == device.plane.1;
        let most = if planes { device.plane.0 as usize } else { 32 };
        let lanes = (n / w).next_power_of_two().min(most);
        let each = (n / w).div_ceil(lanes);
        if each * w > 32 {
            return None;
        }
        // Enough units in flight first, then fewer reads of B and C.
        let wanted = device.processors.unwrap_or(16) as usize * 2048;
        let fits = |rows: &usize| rows * each * w <= 32 && b * h * p * lanes / rows >= wanted && p.is_multiple_of(rows * 8);
        let rows = [4, 2].into_iter().find(fits).unwrap_or(1);
        let units = (lanes * (p / rows).next_power_of_two()).clamp(32.max(lanes), 256.min(device.max_units as usize));
        Some(Self {
            lanes,
            each,
            w,
            rows,
            units,
            ragged: lanes * each * w != n,
            planes,
            started: call.started,
            in_place: call.in_place,
            skip: call.skip,
            bias: call.bias,
            softplus: call.softplus,
            segments: call.segments,
        })
    }
}

/// What a plan depends on.
struct Shape {
    dims: SsdDims,
    started: bool,
    in_place: bool,
    skip: bool,
    bias: bool,
    softplus: bool,
    segments: bool,
}

/// `y` and the outgoing state, or the call back where it does not fit.
pub(super) fn forward<R: CubeRuntime>(mut call: Call<R>) -> Result<(CubeTensor<R>, CubeTensor<R>), Call<R>> {
    let dims = call.dims;
    let SsdDims { b, l, h, p, g, n } = dims;
    let client = call.x.client.clone();
    let shape = Shape {
        dims,
        started: call.state.is_some(),
        in_place: call.state.as_ref().is_some_and(|state| state.dtype() == DType::F32 && state.can_mut() && state.is_contiguous()),
        skip: call.d.is_some(),
        bias: call.dt_bias.is_some(),
        softplus: call.options.dt_softplus,
        segments: call.documents.is_some(),
    };
    let Some(plan) = StepPlan::new(&client, &call.device, &shape) else { return Err(call) };
    let dtype = call.x.dtype();
    let state = call.state.take().map(|state| packed(cast(state, DType::F32)));
    let (x, of_x) = strided(call.x, 1);
    let (bs, of_b) = strided(cast(call.b, dtype), plan.w);
    let (cs, of_c) = strided(cast(call.c, dtype), plan.w);
    let (dt, of_dt) = strided(call.dt, 1);
    let y = empty(&x, [b, l, h, p], dtype);
    let (state, out) = match state {
        Some(state) if plan.in_place => (None, state),
        state => (state, empty(&x, [b, h, p, n], DType::F32)),
    };
    let a = packed(call.a);
    let bias = call.dt_bias.map_or_else(|| a.clone(), packed);
    let d = call.d.map_or_else(|| a.clone(), packed);
    let (filled, bounds) = match call.documents {
        Some(documents) => (documents.filled, documents.bounds),
        None => (a.clone(), a.clone()),
    };
    let cubes = b * h * p.div_ceil(plan.units / plan.lanes * plan.rows);
    let strides = |(row, token): (u32, u32)| StridesLaunch::new(row, token);
    // SAFETY: the kernel guards channels and lanes.
    unsafe {
        step_kernel::launch_unchecked::<R>(
            &client,
            line(cubes, &call.device),
            CubeDim::new_1d(plan.units as u32),
            addresses(&[&x, &bs, &cs, &dt, &out]),
            plan.w,
            array(&x),
            array(&bs),
            array(&cs),
            array(&dt),
            array(&a),
            array(&bias),
            array(&d),
            array(state.as_ref().unwrap_or(&a)),
            array(&filled),
            array(&bounds),
            array(&y),
            array(&out),
            strides(of_x),
            strides(of_b),
            strides(of_c),
            strides(of_dt),
            cubes as u32,
            l as u32,
            h as u32,
            p as u32,
            g as u32,
            n as u32,
            call.options.dt_limit.0,
            call.options.dt_limit.1,
            plan,
            [dtype.into(), dt.dtype().into(), a.dtype().into(), bias.dtype().into(), d.dtype().into()],
        );
    }
    Ok((y, out))
}
