//! CubeCL kernels.

mod kernels;

use burn::tensor::{DType, Tensor, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::*;

use super::{CrossEntropyArgs, CrossEntropyOut};
use crate::cube::reduce::{Team, addresses, cube_grid, vector_width};
use crate::cube::{Device, array, cast, down, down_int, empty, packed, up};

/// Whether the kernels are there.
pub(crate) const READY: bool = true;

/// Units of the cubes that make one piece of a row of `vectors`.
fn units(device: &Device, vectors: usize) -> u32 {
    let limit = device.max_units.min(256) as usize;
    vectors.div_ceil(kernels::DEEP).next_power_of_two().clamp(32.min(limit), limit) as u32
}

/// Logits whose rows may lie apart, as Burn pads them on CUDA; copied where vectors of `width` could not read them.
fn pitched<R: CubeRuntime>(logits: CubeTensor<R>, width: usize) -> (CubeTensor<R>, usize) {
    let [rows, v] = logits.shape().dims();
    let strides = logits.meta.strides();
    let pitch = if rows > 1 { strides[0] } else { v };
    let aligned = (logits.handle.offset_start.unwrap_or(0) as usize).is_multiple_of(width * logits.dtype().size());
    if (strides[1] == 1 || v == 1) && pitch >= v && pitch.is_multiple_of(width) && aligned && u32::try_from(pitch).is_ok() {
        return (logits, pitch);
    }
    (packed(logits), v)
}

/// Loss and logarithm of the sum, each `[rows]`.
fn sums<R: CubeRuntime>(logits: CubeTensor<R>, targets: CubeTensor<R>) -> [CubeTensor<R>; 2] {
    let [rows, v] = logits.shape().dims();
    let width = vector_width(&logits.client, &[logits.dtype()], v);
    let (logits, pitch) = pitched(logits, width);
    let targets = packed(cast(targets, DType::I32));
    let client = &logits.client;
    let device = Device::of(client);
    let vectors = v / width;
    let units = units(&device, vectors);
    // A few rows alone would not fill the device.
    let wanted = (4 * device.processors.unwrap_or(1) as usize).div_ceil(rows);
    let splits = vectors.div_ceil(units as usize * kernels::DEEP).min(wanted).max(1);
    let span = vectors.div_ceil(splits);
    let parts = empty(&logits, [rows, splits, 2], DType::F32);
    let [loss, log_sum] = [(); 2].map(|()| empty(&logits, [rows], DType::F32));
    // SAFETY: the kernels guard rows and columns.
    unsafe {
        kernels::exponentials::launch_unchecked::<R>(
            client,
            cube_grid(&device, rows * splits),
            CubeDim::new_1d(units),
            addresses(&[&logits]),
            width,
            array(&logits),
            array(&parts),
            rows as u32,
            splits as u32,
            span as u32,
            vectors as u32,
            (pitch / width) as u32,
            Team::new(&device, units, units),
            logits.dtype().into(),
        );
        kernels::losses::launch_unchecked::<R>(
            client,
            cube_grid(&device, rows.div_ceil(64)),
            CubeDim::new_1d(64),
            addresses(&[&logits]),
            array(&logits),
            array(&targets),
            array(&parts),
            array(&loss),
            array(&log_sum),
            rows as u32,
            splits as u32,
            v as u32,
            pitch as u32,
            logits.dtype().into(),
        );
    }
    [loss, log_sum]
}

/// Gradient of the logits, in their place if nobody else holds them.
fn gradient<R: CubeRuntime>(logits: CubeTensor<R>, targets: CubeTensor<R>, log_sum: CubeTensor<R>, dloss: CubeTensor<R>) -> CubeTensor<R> {
    let [rows, v] = logits.shape().dims();
    let width = vector_width(&logits.client, &[logits.dtype()], v);
    let (logits, pitch) = pitched(logits, width);
    let targets = packed(cast(targets, DType::I32));
    let (log_sum, dloss) = (packed(log_sum), packed(cast(dloss, DType::F32)));
    let client = logits.client.clone();
    let device = Device::of(&client);
    let vectors = v / width;
    let units = units(&device, vectors);
    let splits = vectors.div_ceil(units as usize * kernels::DEEP);
    let grid = cube_grid(&device, rows * splits);
    let dtype = logits.dtype().into();
    let sizes = [rows as u32, splits as u32, vectors as u32, (pitch / width) as u32];
    let out = if logits.can_mut() { None } else { Some(empty(&logits, [rows, v], logits.dtype())) };
    // SAFETY: the kernels guard rows and columns; a vector is read and written by one unit.
    unsafe {
        let [rows, splits, vectors, pitch] = sizes;
        let (dim, addresses) = (CubeDim::new_1d(units), addresses(&[&logits]));
        let [targets, log_sum, dloss] = [&targets, &log_sum, &dloss].map(array);
        let x = array(&logits);
        match &out {
            None => kernels::gradient_in_place::launch_unchecked::<R>(
                &client, grid, dim, addresses, width, x, targets, log_sum, dloss, rows, splits, vectors, pitch, units, dtype,
            ),
            Some(out) => kernels::gradient::launch_unchecked::<R>(
                &client,
                grid,
                dim,
                addresses,
                width,
                x,
                targets,
                log_sum,
                dloss,
                array(out),
                rows,
                splits,
                vectors,
                pitch,
                units,
                dtype,
            ),
        }
    }
    out.unwrap_or(logits)
}

pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: CrossEntropyArgs<CubeBackend<R, F, I, BT>>,
) -> CrossEntropyOut<CubeBackend<R, F, I, BT>> {
    let [loss, log_sum] = sums(down(args.logits), down_int(args.targets));
    CrossEntropyOut { loss: up(loss), log_sum: up(log_sum) }
}

pub(crate) fn backward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: CrossEntropyArgs<CubeBackend<R, F, I, BT>>,
    log_sum: Tensor<CubeBackend<R, F, I, BT>, 1>,
    dloss: Tensor<CubeBackend<R, F, I, BT>, 1>,
) -> Tensor<CubeBackend<R, F, I, BT>, 2> {
    up(gradient(down(args.logits), down_int(args.targets), down(log_sum), down(dloss)))
}
