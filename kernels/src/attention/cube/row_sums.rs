//! Row sums of the output times its gradient, which every score's gradient needs.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::shared::*;
use super::{Call, View, cubes};
use crate::cube::{Device, array, empty};

const UNITS: usize = 128;

/// `delta [b, h, lp]`. A row's vectors are shared out over units, whose parts meet in shared memory.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn row_products<F: Float, N: Size>(
    out: &Array<Vector<F, N>>,
    dout: &Array<Vector<F, N>>,
    delta: &mut Array<f32>,
    os: Strides,
    ds: Strides,
    z: Sizes,
    #[comptime] vectors: usize,
    #[comptime] size: usize,
    #[comptime] rows: usize,
    #[define(F)] _dtype: StorageType,
) {
    let mut parts = SharedMemory::<f32>::new(comptime!(rows * vectors));
    let heads = z.heads as usize;
    let lp = z.lp as usize;
    let first = CUBE_POS * rows;
    let unit = UNIT_POS as usize;
    let mut index = unit;
    while index < comptime!(rows * vectors) {
        let place = first + index / vectors;
        let row = place % lp;
        let batch = place / lp / heads;
        let head = place / lp % heads;
        let mut sum = f32::new(0.0);
        if batch < z.batch as usize && row < z.l as usize {
            let column = index % vectors;
            let a = Vector::<f32, N>::cast_from(out[os.origin(batch, head) + row * os.row as usize + column]);
            let b = Vector::<f32, N>::cast_from(dout[ds.origin(batch, head) + row * ds.row as usize + column]);
            let product = a * b;
            #[unroll]
            for e in 0..size {
                sum += product[e];
            }
        }
        parts[index] = sum;
        index += UNITS;
    }
    sync_cube();
    let place = first + unit;
    if unit < rows && place < z.batch as usize * heads * lp {
        let mut sum = f32::new(0.0);
        for i in 0..vectors {
            sum += parts[unit * vectors + i];
        }
        delta[place] = sum;
    }
}

/// Runs [`row_products`] with the widest vectors that both tensors allow.
pub(super) fn of<R: CubeRuntime>(call: &Call<R>, device: &Device, out: &View<R>, dout: &View<R>) -> CubeTensor<R> {
    let delta = empty(&call.q.tensor, [call.b, call.h, call.lp()], DType::F32);
    let size = out.vector(16).min(dout.vector(16));
    let vectors = call.p / size;
    let rows = (UNITS * 4 / vectors).clamp(1, UNITS);
    let count = (call.b * call.h * call.lp()).div_ceil(rows);
    // SAFETY: the kernel checks its position.
    unsafe {
        row_products::launch_unchecked::<R>(
            &call.q.tensor.client,
            cubes(count, device),
            CubeDim::new_1d(UNITS as u32),
            size,
            out.array(),
            dout.array(),
            array(&delta),
            out.strides(size),
            dout.strides(size),
            call.sizes(),
            vectors,
            size,
            rows,
            call.dtype().into(),
        );
    }
    delta
}
