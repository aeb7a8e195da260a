//! Sums of partial results, in a fixed order: what replaces atomics.

use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::rows::line;
use super::{Device, array, empty};

/// Columns and slices of rows of one cube.
const COLUMNS: u32 = 32;
const SLICES: u32 = 8;

/// `parts [rows, columns]`: the first `split` columns go to `first`, the others to `second`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn fold_kernel<A: Numeric, B: Numeric>(
    parts: &Array<f32>,
    first: &mut Array<A>,
    second: &mut Array<B>,
    rows: u32,
    columns: u32,
    split: u32,
    #[define(A, B)] _types: [StorageType; 2],
) {
    let mut sums = SharedMemory::<f32>::new(comptime!((COLUMNS * SLICES) as usize));
    let lane = UNIT_POS_X as usize;
    let slice = UNIT_POS_Y as usize;
    let column = CUBE_POS * comptime!(COLUMNS as usize) + lane;
    let columns = columns as usize;
    let mut sum = 0.0f32;
    if column < columns {
        for row in range_stepped(slice, rows as usize, comptime!(SLICES as usize)) {
            sum += parts[row * columns + column];
        }
    }
    sums[slice * comptime!(COLUMNS as usize) + lane] = sum;
    sync_cube();
    if slice == 0 && column < columns {
        let mut total = sum;
        #[unroll]
        for i in 1..comptime!(SLICES as usize) {
            total += sums[i * comptime!(COLUMNS as usize) + lane];
        }
        if column < split as usize {
            first[column] = A::cast_from(total);
        } else {
            second[column - split as usize] = B::cast_from(total);
        }
    }
}

/// Sums of the columns of `parts [rows, columns]` (float32, packed), as two tensors of given shapes, the second of
/// which may be empty.
pub(crate) fn fold<R: CubeRuntime>(
    parts: CubeTensor<R>,
    rows: usize,
    (first, first_type): (Shape, DType),
    (second, second_type): (Shape, DType),
) -> [CubeTensor<R>; 2] {
    let (split, rest) = (first.num_elements(), second.num_elements());
    let device = Device::of(&parts.client);
    let outputs = [empty(&parts, first, first_type), empty(&parts, second, second_type)];
    let columns = split + rest;
    if columns > 0 {
        // An output without elements has no memory to bind.
        let bound = |index: usize, size: usize| if size > 0 { outputs[index].clone() } else { empty(&parts, [1], outputs[index].dtype) };
        unsafe {
            fold_kernel::launch_unchecked::<R>(
                &parts.client,
                line(columns.div_ceil(COLUMNS as usize), &device),
                CubeDim::new_2d(COLUMNS, SLICES),
                parts.required_address_type(),
                array(&parts),
                array(&bound(0, split)),
                array(&bound(1, rest)),
                rows as u32,
                columns as u32,
                split as u32,
                [first_type.into(), second_type.into()],
            );
        }
    }
    outputs
}
