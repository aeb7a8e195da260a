//! A few rows against a weight of 16-bit numbers, on tensor cores: the time is still that of reading the weight once.
//!
//! A plane multiplies 16 rows of the weight (the left operand) by blocks of 8 rows of `x` (the right one). A product does not
//! care in which order it sums, as long as both operands have the same: so a lane takes 8 neighbouring numbers of a row, 16 bytes,
//! straight from memory into its registers, and they serve two steps of `mma.sync` m16n8k16, as if they were the columns that
//! a lane holds of each. The planes of a cube take turns along the row and add up in shared memory.

#![allow(clippy::manual_div_ceil, reason = "kernels have no such method")]

use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cmma::MmaDefinition;
use cubecl::prelude::*;

use crate::cube::reduce::{addresses, cube_grid};
use crate::cube::{Device, array, empty, packed};

/// Up to this many rows of `x`: beyond, reading `x` again for every 16 rows of the weight counts.
pub(super) const MOST: usize = 16;
/// Planes of a cube.
const PLANES: usize = 4;
/// Steps of 32 numbers that a plane asks for before it reads the first.
const AHEAD: usize = 4;
/// Numbers of a vector.
const WIDTH: usize = 8;
/// Vectors of a row that a plane takes at a time.
const TURN: usize = 4 * AHEAD;

/// `y[r, o] = sum over i of x[r, i] weight[o, i]`. Vectors are those of the pairs' bits; `vectors` make a row, `pitch` lie
/// between rows of the weight.
#[cube(launch_unchecked, address_type = "dynamic")]
fn skinny<E: Float, N4: Size, N2: Size>(
    x: &Array<Vector<u32, N4>>,
    weight: &Array<Vector<u32, N4>>,
    bias: &Array<E>,
    y: &mut Array<E>,
    rows: u32,
    vectors: u32,
    pitch: u32,
    outputs: u32,
    #[comptime] blocks: usize,
    #[comptime] biased: bool,
    #[define(E)] _dtype: StorageType,
) {
    let mma = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let (rows, vectors, outputs) = (rows as usize, vectors as usize, outputs as usize);
    let lane = (UNIT_POS_X % 32) as usize;
    let plane = UNIT_POS_X as usize / 32;
    let row = lane / 4;
    let quarter = lane % 4;
    let first = CUBE_POS * 16;

    let mut sums = Sequence::<Array<Vector<f32, N2>>>::new();
    #[unroll]
    for _ in 0..blocks {
        let mut block = Array::<Vector<f32, N2>>::new(2usize);
        block[0] = Vector::new(0.0f32);
        block[1] = Vector::new(0.0f32);
        sums.push(block);
    }
    // Beyond the last row of either operand it is read again; those products are not written.
    let upper = min(first + row, outputs - 1) * pitch as usize;
    let lower = min(first + row + 8, outputs - 1) * pitch as usize;
    let last = vectors - 1;
    let turns = (vectors + PLANES * TURN - 1) / (PLANES * TURN);
    for turn in 0..turns {
        let base = (turn * PLANES + plane) * TURN + quarter;
        let mut w = Array::<Vector<u32, N4>>::new(comptime!(2 * AHEAD));
        #[unroll]
        for j in 0..AHEAD {
            // Beyond the end of a row the weight's last vector meets zeros.
            let at = min(base + comptime!(4 * j), last);
            w[comptime!(2 * j)] = weight[upper + at];
            w[comptime!(2 * j + 1)] = weight[lower + at];
        }
        #[unroll]
        for b in 0..blocks {
            let begin = min(comptime!(8 * b) + row, rows - 1) * vectors;
            let mut v = Array::<Vector<u32, N4>>::new(AHEAD);
            #[unroll]
            for j in 0..AHEAD {
                let at = base + comptime!(4 * j);
                let value = x[begin + min(at, last)];
                v[j] = select(at <= last, value, Vector::new(0u32));
            }
            let block = sums.index_mut(b);
            #[unroll]
            for j in 0..AHEAD {
                let (up, low, right) = (w[comptime!(2 * j)], w[comptime!(2 * j + 1)], v[j]);
                #[unroll]
                for half in 0..2usize {
                    let mut a = Array::<Vector<E, N2>>::new(4usize);
                    let mut c = Array::<Vector<E, N2>>::new(2usize);
                    #[unroll]
                    for i in 0..2usize {
                        a[comptime!(2 * i)] = Vector::<E, N2>::reinterpret(up[comptime!(2 * half + i)]);
                        a[comptime!(2 * i + 1)] = Vector::<E, N2>::reinterpret(low[comptime!(2 * half + i)]);
                        c[i] = Vector::<E, N2>::reinterpret(right[comptime!(2 * half + i)]);
                    }
                    mma.execute_inplace(&a, &c, block);
                }
            }
        }
    }

    let mut shared = SharedMemory::<f32>::new(comptime!(PLANES * blocks * 128));
    #[unroll]
    for b in 0..blocks {
        #[unroll]
        for i in 0..2usize {
            let pair = sums.index(b)[i];
            let at = (plane * blocks + b) * 128 + 2 * quarter * 16 + row + comptime!(8 * i);
            shared[at] = pair[0];
            shared[at + 16] = pair[1];
        }
    }
    sync_cube();
    let output = first + UNIT_POS_X as usize % 16;
    #[unroll]
    for b in 0..blocks {
        let r = comptime!(8 * b) + UNIT_POS_X as usize / 16;
        let mut sum = 0.0f32;
        #[unroll]
        for p in 0..PLANES {
            sum += shared[comptime!((p * blocks + b) * 128) + UNIT_POS_X as usize];
        }
        if output < outputs && r < rows {
            if comptime!(biased) {
                sum += f32::cast_from(bias[output]);
            }
            y[r * outputs + output] = E::cast_from(sum);
        }
    }
}

/// `x [rows, in] weight [out, in]^T (+ bias [out])` in their dtype, or nothing where another path has to.
pub(super) fn product<R: CubeRuntime>(x: &CubeTensor<R>, weight: &CubeTensor<R>, bias: Option<&CubeTensor<R>>) -> Option<CubeTensor<R>> {
    let ([rows, inputs], [outputs, _]): ([usize; 2], [usize; 2]) = (x.shape().dims(), weight.shape().dims());
    let strides = weight.meta.strides();
    let device = Device::of(&x.client);
    let offset = weight.handle.offset_start.unwrap_or(0);
    let dense = strides[1] == 1 && inputs.is_multiple_of(WIDTH) && strides[0].is_multiple_of(WIDTH) && offset.is_multiple_of(16);
    let half = matches!(x.dtype(), DType::BF16 | DType::F16);
    if rows > MOST || !half || !dense || !device.tensor_cores || u32::try_from(outputs * rows).is_err() {
        return None;
    }
    let pitch = u32::try_from(strides[0] / WIDTH).ok()?;
    let x = packed(x.clone());
    let y = empty(&x, [rows, outputs], x.dtype());
    // SAFETY: the kernel guards rows of both operands and vectors of a row.
    unsafe {
        skinny::launch_unchecked::<R>(
            &x.client,
            cube_grid(&device, outputs.div_ceil(16)),
            CubeDim::new_1d((PLANES * 32) as u32),
            addresses(&[&x, weight, &y]),
            WIDTH / 2,
            2,
            array(&x),
            array(weight),
            // Not read without a bias.
            array(bias.unwrap_or(&x)),
            array(&y),
            rows as u32,
            (inputs / WIDTH) as u32,
            pitch,
            outputs as u32,
            rows.div_ceil(8),
            bias.is_some(),
            x.dtype().into(),
        );
    }
    Some(y)
}
