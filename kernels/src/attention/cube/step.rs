//! One more token for every row: a kernel rotates and writes it, then [`super::decode`] attends, as far as the device says.

#![allow(clippy::manual_div_ceil, reason = "kernels have no such method")]

use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::*;

use super::shared::*;
use super::{Back, Call, View, decode};
use crate::attention::step::{NEAR, StepArgs, StepOut};
use crate::cube::reduce::{addresses, cube_grid};
use crate::cube::{Device, array, down, down_int, empty, packed, up};

/// Units of a cube.
const UNITS: u32 = 256;

/// A unit per channel of every query, key and value head.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
#[allow(clippy::collapsible_if, reason = "without pairs the inner one is not compiled")]
fn place_kernel<F: Float>(
    q: &Array<F>,
    k: &Array<F>,
    v: &Array<F>,
    places: &Array<i32>,
    near: &Array<f32>,
    far: &Array<f32>,
    rotated: &mut Array<F>,
    keys: &mut Array<F>,
    values: &mut Array<F>,
    ks: Strides,
    vs: Strides,
    batch: u32,
    heads: u32,
    groups: u32,
    p: u32,
    blocks: u32,
    #[comptime] half: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (heads, groups, p) = (heads as usize, groups as usize, p as usize);
    let all = heads + 2 * groups;
    if ABSOLUTE_POS >= batch as usize * all * p {
        terminate!();
    }
    let i = ABSOLUTE_POS % p;
    let head = ABSOLUTE_POS / p % all;
    let row = ABSOLUTE_POS / p / all;
    let slot = places[0] as usize;
    if head >= heads + groups {
        let group = head - heads - groups;
        values[vs.origin(row, group) + slot * vs.row as usize + i] = v[(row * groups + group) * p + i];
    } else {
        let query = head < heads;
        let group = select(query, 0, head - select(query, head, heads));
        let base = select(query, row * heads + select(query, head, 0), row * groups + group) * p;
        let mut own = f32::cast_from(k[select(query, 0, base + i)]);
        if query {
            own = f32::cast_from(q[base + i]);
        }
        if comptime!(half > 0) {
            if i < comptime!(2 * half) {
                let pair = i % half;
                let other = base + select(i < half, i + half, i - select(i < half, i, half));
                let mut partner = f32::cast_from(k[select(query, 0, other)]);
                if query {
                    partner = f32::cast_from(q[other]);
                }
                let position = places[1 + row] as usize;
                let at = position % NEAR * half + pair;
                let block = position / NEAR * half + pair;
                let (near_cos, near_sin) = (near[at], near[at + comptime!(NEAR * half)]);
                let (far_cos, far_sin) = (far[block], far[block + blocks as usize * half]);
                let cos = near_cos * far_cos - near_sin * far_sin;
                let sin = near_sin * far_cos + near_cos * far_sin;
                own = select(i < half, own * cos - partner * sin, own * cos + partner * sin);
            }
        }
        if query {
            rotated[base + i] = F::cast_from(own);
        } else {
            keys[ks.origin(row, group) + slot * ks.row as usize + i] = F::cast_from(own);
        }
    }
}

#[cube(launch_unchecked)]
fn next_kernel(places: &mut Array<i32>, count: u32) {
    if ABSOLUTE_POS < count as usize {
        places[ABSOLUTE_POS] += 1;
    }
}

/// Whether places are what the kernels read.
pub(crate) fn readable<R: CubeRuntime>(places: &CubeTensor<R>) -> bool {
    places.dtype() == DType::I32 && places.is_contiguous() && places.shape().num_elements() > 0
}

/// Adds one to every place, in place where nobody else holds them. They must be [`readable`].
pub(crate) fn next_places<R: CubeRuntime>(places: CubeTensor<R>) -> CubeTensor<R> {
    let count = places.shape().num_elements();
    let out = if places.can_mut() { places } else { places.copy() };
    let device = Device::of(&out.client);
    // SAFETY: the kernel checks its position.
    unsafe {
        next_kernel::launch_unchecked::<R>(
            &out.client,
            cube_grid(&device, count.div_ceil(UNITS as usize)),
            CubeDim::new_1d(UNITS.min(device.max_units)),
            array(&out),
            count as u32,
        );
    }
    out
}

/// Whether the kernels take a call; else the reference has to do it.
pub(crate) fn takes<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(args: &StepArgs<Back<R, F, I, BT>>) -> bool {
    let [b, h, p] = args.q.dims();
    let [_, g, s, _] = args.keys.dims();
    let dtype = args.q.dtype();
    let alike = [args.k.dtype(), args.v.dtype(), args.keys.dtype(), args.values.dtype()].iter().all(|other| *other == dtype);
    let small = [b * h * p, b * g * s * p, b * (s + 1)].iter().all(|&count| count < 1 << 31);
    let device = Device::of(&R::client(&args.q.device()));
    let stored = match dtype {
        DType::F32 => true,
        DType::F16 => device.f16,
        DType::BF16 => device.bf16,
        _ => false,
    };
    alike && small && stored && b * h * p > 0 && p <= super::WIDEST && readable(&down_int(args.standing.places().clone()))
}

/// See [`crate::attention::step::attention_step`]; for what it [`takes`].
pub(crate) fn step<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: StepArgs<Back<R, F, I, BT>>,
) -> StepOut<Back<R, F, I, BT>> {
    let [b, h, p] = args.q.dims();
    let [_, g, s, _] = args.keys.dims();
    let dtype = args.q.dtype();
    let StepArgs { q, k, v, keys, values, angles, scale, standing } = args;
    let [q, k, v] = [q, k, v].map(|tensor| packed(down(tensor)));
    let device = Device::of(&q.client);
    let places = down_int(standing.places);
    let own = |tensor: CubeTensor<R>| if tensor.can_mut() && tensor.meta.strides()[3] == 1 { tensor } else { packed(tensor).copy() };
    let [keys, values] = [keys, values].map(|buffer| View::over(own(down(buffer))));
    let rotated = empty(&q, [b, h, 1, p], dtype);
    let (half, blocks) = angles.as_ref().map_or((0, 1), |angles| (angles.half, angles.blocks));
    let nothing = || empty(&q, [1], DType::F32);
    let (near, far) = match angles {
        Some(angles) => (packed(down(angles.near)), packed(down(angles.far))),
        None => (nothing(), nothing()),
    };
    let units = UNITS.min(device.max_units);
    // SAFETY: the kernel checks its position; the caller keeps places within the buffers, whose size was checked against the angles.
    unsafe {
        place_kernel::launch_unchecked::<R>(
            &q.client,
            cube_grid(&device, (b * (h + 2 * g) * p).div_ceil(units as usize)),
            CubeDim::new_1d(units),
            addresses(&[&q, &keys.tensor, &values.tensor]),
            array(&q),
            array(&k),
            array(&v),
            array(&places),
            array(&near),
            array(&far),
            array(&rotated),
            keys.array(),
            values.array(),
            keys.strides(1),
            values.strides(1),
            b as u32,
            h as u32,
            g as u32,
            p as u32,
            blocks as u32,
            half,
            dtype.into(),
        );
    }
    let ids = standing.documents.map(down_int);
    let has_ids = ids.is_some();
    let ids = ids.unwrap_or_else(|| empty(&q, [1], DType::I32));
    let q = View::over(rotated);
    let call = Call { q, k: keys, v: values, ids, has_ids, tensor_cores: false, scale, b, h, g, l: 1, s, p };
    let y = decode::forward(&call, &device, Some(&places));
    let y = up::<Back<R, F, I, BT>, 4>(y).reshape([b, h, p]);
    let [keys, values] = [call.k, call.v].map(|view| up::<Back<R, F, I, BT>, 4>(view.tensor));
    StepOut { y, keys, values }
}
