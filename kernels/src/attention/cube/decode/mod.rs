//! The variant for a few queries and many slots, where reading keys and values is all the work.

pub(crate) mod kernels;

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use self::kernels::{Layout, MERGE_UNITS, UNITS, decode_merge, decode_part};
use super::{Call, cubes};
use crate::cube::{Device, array, empty};

/// Most queries that take this variant.
pub(super) const QUERIES: usize = 8;
/// Sums that a unit can hold in registers.
const REGISTERS: usize = 64;

/// Largest power of two that divides `count`, at most `most`.
fn lanes(count: usize, most: usize) -> usize {
    (1 << count.trailing_zeros()).min(most)
}

fn layout<R: CubeRuntime>(call: &Call<R>, device: &Device) -> Layout {
    let size = [&call.q, &call.k, &call.v].into_iter().map(|view| view.vector(16)).min().unwrap_or(1);
    let vectors = call.p / size;
    let value_lanes = lanes(vectors, 32);
    let plane = if device.plane_ops { device.plane.0.max(1) as usize } else { 1 };
    let key_lanes = lanes(vectors, plane.min(32));
    let count = call.h / call.g * call.l;
    let held = call.p / value_lanes;
    let rows = [8, 4, 2].into_iter().find(|&rows| rows < 2 * count && rows * held <= REGISTERS).unwrap_or(1);
    // Every group of lanes gets a slot, and the device enough cubes.
    let least = if key_lanes.min(value_lanes) > 1 { UNITS / 2 } else { UNITS };
    let wanted = 2 * device.processors.unwrap_or(1) as usize;
    let cubes = |slots: &usize| call.s.div_ceil(*slots) * call.b * call.g * count.div_ceil(rows);
    let slots = [2 * UNITS, UNITS].into_iter().find(|slots| cubes(slots) >= wanted).unwrap_or(least);
    Layout { p: call.p, size, rows, slots, key_lanes, value_lanes, whole: call.s <= slots }
}

/// With `places` the slots are a buffer of which its first number, and one, are looked at (see [`super::step`]).
pub(super) fn forward<R: CubeRuntime>(call: &Call<R>, device: &Device, places: Option<&CubeTensor<R>>) -> CubeTensor<R> {
    let layout = layout(call, device);
    let counted = places.is_some();
    let places = places.unwrap_or(&call.ids);
    let out = call.q.alike();
    let parts = call.s.div_ceil(layout.slots);
    let kept = if layout.whole { [1, 1, 1, 1, layout.size] } else { [call.b, call.h, call.l, parts, call.p] };
    let sums = empty(&call.q.tensor, kept, DType::F32);
    let stats = empty(&call.q.tensor, [kept[0], kept[1], kept[2], kept[3], 2], DType::F32);
    let count = parts * (call.h / call.g * call.l).div_ceil(layout.rows) * call.g * call.b;
    // SAFETY: the kernels check their position, and clamp rows to the tensors.
    unsafe {
        decode_part::launch_unchecked::<R>(
            &call.q.tensor.client,
            cubes(count, device),
            CubeDim::new_1d(UNITS as u32),
            layout.size,
            call.q.array(),
            call.k.array(),
            call.v.array(),
            array(&call.ids),
            array(places),
            out.array(),
            array(&sums),
            array(&stats),
            call.q.strides(layout.size),
            call.k.strides(layout.size),
            call.v.strides(layout.size),
            out.strides(layout.size),
            call.sizes(),
            call.scale,
            parts as u32,
            layout,
            call.has_ids,
            counted,
            call.dtype().into(),
        );
    }
    if !layout.whole {
        let size = if call.p.is_multiple_of(4) { 4 } else { 1 };
        // SAFETY: as above.
        unsafe {
            decode_merge::launch_unchecked::<R>(
                &call.q.tensor.client,
                cubes(call.b * call.h * call.l, device),
                CubeDim::new_1d(MERGE_UNITS as u32),
                size,
                array(&sums),
                array(&stats),
                array(places),
                out.array(),
                out.strides(size),
                call.sizes(),
                parts as u32,
                layout.slots as u32,
                call.p / size,
                counted,
                call.dtype().into(),
            );
        }
    }
    out.tensor
}
