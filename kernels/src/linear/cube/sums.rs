//! Sums of columns: the gradient of a bias.

#![allow(clippy::manual_div_ceil, reason = "kernels have no such method")]

use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::cube::reduce::{addresses, cube_grid, sum_rows, vector_width};
use crate::cube::{Device, array, empty, packed};

const UNITS: usize = 64;

/// `parts[part, c] = sum over the part's rows of values[r, c]`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn sum_parts<F: Float, N: Size>(
    values: &Array<Vector<F, N>>,
    parts: &mut Array<Vector<f32, N>>,
    rows: u32,
    vectors: u32,
    number: u32,
    #[define(F)] _dtype: StorageType,
) {
    let vectors = vectors as usize;
    let strips = (vectors + UNITS - 1) / UNITS;
    let column = CUBE_POS % strips * UNITS + UNIT_POS as usize;
    let part = CUBE_POS / strips;
    let number = number as usize;
    if column < vectors && part < number {
        let each = (rows as usize + number - 1) / number;
        let begin = min(part * each, rows as usize);
        let mut sum = Vector::<f32, N>::new(0.0f32);
        for row in begin..min(begin + each, rows as usize) {
            sum += Vector::<f32, N>::cast_from(values[row * vectors + column]);
        }
        parts[part * vectors + column] = sum;
    }
}

/// `[columns]` from `values [rows, columns]`, in their dtype; float32 inside. No size is 0.
pub(super) fn columns<R: CubeRuntime>(values: CubeTensor<R>) -> CubeTensor<R> {
    let [rows, columns] = values.shape().dims();
    let values = packed(values);
    let device = Device::of(&values.client);
    let width = vector_width(&values.client, &[values.dtype()], columns);
    let vectors = columns / width;
    let strips = vectors.div_ceil(UNITS);
    let units = device.processors.unwrap_or(4) as usize * 1024;
    let number = (units / (strips * UNITS)).clamp(1, rows.div_ceil(8));
    let parts = empty(&values, [number, columns], DType::F32);
    // SAFETY: the kernel guards columns, parts and rows.
    unsafe {
        sum_parts::launch_unchecked::<R>(
            &values.client,
            cube_grid(&device, strips * number),
            CubeDim::new_1d(UNITS as u32),
            addresses(&[&values]),
            width,
            array(&values),
            array(&parts),
            rows as u32,
            vectors as u32,
            number as u32,
            values.dtype().into(),
        );
    }
    sum_rows(&parts, values.dtype())
}
