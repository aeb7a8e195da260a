//! The variant for any device.

mod kernels;

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use self::kernels::{UNITS_PER_ROW, backward_tiled, forward_tiled};
use super::{Call, Saved, View, cubes, row_sums};
use crate::cube::{Device, array, empty};

/// Rows of the two sides of a tile, largest first.
const TILES: [[usize; 2]; 7] = [[32, 32], [32, 16], [16, 16], [16, 8], [8, 8], [8, 4], [4, 4]];
/// Bytes of shared memory beyond which too few cubes would run at a time.
const SHARED: usize = 32 << 10;

/// Largest tile that fits, where a row of either side holds `vectors` rows of `p` and `maps` scores are kept.
fn tile(device: &Device, p: usize, vectors: [usize; 2], maps: usize) -> Option<[usize; 2]> {
    let stride = (p.div_ceil(4) | 1) * 16;
    TILES.into_iter().find(|&[rows, cols]| {
        let bytes = (rows * vectors[0] + cols * vectors[1]) * stride + maps * rows * (cols + 1) * 4 + rows * UNITS_PER_ROW * 4;
        bytes <= device.shared_bytes.min(SHARED) && rows * UNITS_PER_ROW <= device.max_units as usize
    })
}

/// Whether forward and backward fit the device.
pub(super) fn fits(device: &Device, p: usize) -> bool {
    tile(device, p, [2, 2], 2).is_some()
}

pub(super) fn forward<R: CubeRuntime>(call: &Call<R>, device: &Device) -> Option<Saved<R>> {
    let [rows, cols] = tile(device, call.p, [1, 1], 1)?;
    let client = &call.q.tensor.client;
    let out = call.q.alike();
    let lse = empty(&call.q.tensor, [call.b, call.h, call.lp()], DType::F32);
    let count = call.b * call.h * call.l.div_ceil(rows);
    // SAFETY: the kernel checks its position, and clamps rows to the tensors.
    unsafe {
        forward_tiled::launch_unchecked::<R>(
            client,
            cubes(count, device),
            CubeDim::new_1d((rows * UNITS_PER_ROW) as u32),
            4,
            call.q.array(),
            call.k.array(),
            call.v.array(),
            array(&call.ids),
            out.array(),
            array(&lse),
            call.q.strides(1),
            call.k.strides(1),
            call.v.strides(1),
            out.strides(1),
            call.sizes(),
            call.scale,
            call.p,
            rows,
            cols,
            call.has_ids,
            call.dtype().into(),
        );
    }
    Some(Saved { out: out.tensor, lse })
}

/// Gradients of q, k and v.
pub(super) fn backward<R: CubeRuntime>(
    call: &Call<R>,
    device: &Device,
    saved: Saved<R>,
    dout: CubeTensor<R>,
) -> Option<[CubeTensor<R>; 3]> {
    let [rows, cols] = tile(device, call.p, [2, 2], 2)?;
    let (out, dout) = (View::new(saved.out, 1), View::new(dout, 1));
    let delta = row_sums::of(call, device, &out, &dout);
    let (dq, dk, dv) = (call.q.alike(), call.k.alike(), call.k.alike());
    for keys in [false, true] {
        let (first, second) = if keys { (&dk, &dv) } else { (&dq, &dq) };
        let count = call.b * if keys { call.g * call.s.div_ceil(rows) } else { call.h * call.l.div_ceil(rows) };
        // SAFETY: as above; without `keys` the second output is not written.
        unsafe {
            backward_tiled::launch_unchecked::<R>(
                &call.q.tensor.client,
                cubes(count, device),
                CubeDim::new_1d((rows * UNITS_PER_ROW) as u32),
                4,
                call.q.array(),
                call.k.array(),
                call.v.array(),
                dout.array(),
                array(&call.ids),
                array(&saved.lse),
                array(&delta),
                first.array(),
                second.array(),
                call.q.strides(1),
                call.k.strides(1),
                call.v.strides(1),
                dout.strides(1),
                first.strides(1),
                call.sizes(),
                call.scale,
                keys,
                call.p,
                rows,
                cols,
                call.has_ids,
                call.dtype().into(),
            );
        }
    }
    Some([dq.tensor, dk.tensor, dv.tensor])
}
