//! CubeCL kernels.

mod kernels;

use burn::tensor::{DType, Tensor, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::*;

use super::{ResidualNormArgs, ResidualNormGrads, ResidualNormKept, ResidualNormOut, gradients, reference};
use crate::cube::reduce::{RowPlan, addresses, cube_grid, sum_rows, vector_width};
use crate::cube::{Device, array, cast, down, empty, packed, up};

/// Whether the kernels are there.
pub(crate) const READY: bool = true;

/// Rows, and how they are shared out. `None` where a row is too wide for the registers of a cube, or there is none.
fn plan<R: CubeRuntime>(sum: &CubeTensor<R>, dtype: DType) -> Option<(Device, usize, RowPlan)> {
    let [b, l, d] = sum.shape().dims();
    if b * l * d == 0 || u32::try_from(b * l).is_err() {
        return None;
    }
    let device = Device::of(&sum.client);
    let row = RowPlan::new(&device, d, vector_width(&sum.client, &[sum.dtype(), dtype], d))?;
    Some((device, b * l, row))
}

/// What is normed, and the sum.
fn add_and_norm<R: CubeRuntime>(
    (device, rows, row): (Device, usize, RowPlan),
    [x, residual, weight]: [CubeTensor<R>; 3],
    eps: f32,
) -> [CubeTensor<R>; 2] {
    let [x, residual, weight] = [x, residual, weight].map(packed);
    let (normed, sum) = (empty(&x, x.shape(), x.dtype()), empty(&x, x.shape(), residual.dtype()));
    // SAFETY: the kernel guards rows and vectors.
    unsafe {
        kernels::residual_forward::launch_unchecked::<R>(
            &x.client,
            cube_grid(&device, rows.div_ceil(row.team.per_cube as usize)),
            CubeDim::new_1d(row.team.cube()),
            addresses(&[&x, &residual]),
            row.width,
            array(&x),
            array(&residual),
            array(&weight),
            array(&normed),
            array(&sum),
            rows as u32,
            eps,
            row,
            [x.dtype().into(), residual.dtype().into(), weight.dtype().into()],
        );
    }
    [normed, sum]
}

/// Gradients of the branch, the residual and the weight.
fn differentiate<R: CubeRuntime>(
    (device, rows, row): (Device, usize, RowPlan),
    [sum, weight, dnormed]: [CubeTensor<R>; 3],
    dsum: Option<CubeTensor<R>>,
    eps: f32,
) -> [CubeTensor<R>; 3] {
    let [sum, weight, dnormed] = [sum, weight, dnormed].map(packed);
    let dsum = dsum.map(|dsum| packed(cast(dsum, sum.dtype())));
    let narrow = dnormed.dtype() != sum.dtype();
    let dresidual = empty(&sum, sum.shape(), sum.dtype());
    // Not written where both gradients are the same tensor.
    let dx = if narrow { empty(&sum, sum.shape(), dnormed.dtype()) } else { empty(&sum, [row.width], dnormed.dtype()) };
    // As many walkers as run at once: with some 100 registers a unit, 512 units of a multiprocessor.
    let cubes = device.processors.unwrap_or(4) as usize * (512 / row.team.cube() as usize).max(1);
    let walkers = (cubes * row.team.per_cube as usize).clamp(1, rows);
    let parts = empty(&sum, [walkers, sum.shape()[2]], DType::F32);
    // SAFETY: the kernel guards rows, walkers and vectors.
    unsafe {
        kernels::residual_backward::launch_unchecked::<R>(
            &sum.client,
            cube_grid(&device, walkers.div_ceil(row.team.per_cube as usize)),
            CubeDim::new_1d(row.team.cube()),
            addresses(&[&sum, &dnormed]),
            row.width,
            array(&sum),
            array(&weight),
            array(&dnormed),
            array(dsum.as_ref().unwrap_or(&sum)),
            array(&dx),
            array(&dresidual),
            array(&parts),
            rows as u32,
            walkers as u32,
            eps,
            row,
            dsum.is_some(),
            narrow,
            [dnormed.dtype().into(), sum.dtype().into(), weight.dtype().into()],
        );
    }
    let dx = if narrow { dx } else { dresidual.clone() };
    [dx, dresidual, sum_rows(&parts, weight.dtype())]
}

pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: ResidualNormArgs<CubeBackend<R, F, I, BT>>,
) -> ResidualNormOut<CubeBackend<R, F, I, BT>> {
    let (x, residual, weight) = (down(args.x.clone()), down(args.residual.clone()), down(args.weight.clone()));
    let Some(plan) = plan(&residual, x.dtype()) else {
        return reference::rms_norm_residual(args);
    };
    let [normed, sum] = add_and_norm(plan, [x, residual, weight], args.eps);
    ResidualNormOut { normed: up(normed), sum: up(sum) }
}

pub(crate) fn backward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    kept: ResidualNormKept<CubeBackend<R, F, I, BT>>,
    dnormed: Tensor<CubeBackend<R, F, I, BT>, 3>,
    dsum: Option<Tensor<CubeBackend<R, F, I, BT>, 3>>,
) -> ResidualNormGrads<CubeBackend<R, F, I, BT>> {
    let sum = down(kept.sum.clone());
    let Some(plan) = plan(&sum, kept.dtype) else {
        return gradients::gradients(kept, dnormed, dsum);
    };
    let dnormed = cast(down(dnormed), kept.dtype);
    let [x, residual, weight] = differentiate(plan, [sum, down(kept.weight), dnormed], dsum.map(down), kept.eps);
    ResidualNormGrads { x: up(x), residual: up(residual), weight: up(weight) }
}
