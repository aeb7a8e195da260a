//! CubeCL kernels.

mod kernels;

use burn::tensor::{DType, Tensor, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::*;

use super::{ResidualNormArgs, ResidualNormGrads, ResidualNormKept, ResidualNormOut, gradients, reference};
use crate::cube::reduce::{RowPlan, addresses, cube_grid, sum_rows, vector_width};
use crate::cube::{Device, array, cast, down, empty, fold, packed, up};

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

/// Tensors of a call.
struct Call<R: CubeRuntime> {
    x: Option<CubeTensor<R>>,
    residual: CubeTensor<R>,
    weight: CubeTensor<R>,
    /// In the dtype of the weight.
    bias: Option<CubeTensor<R>>,
}

/// What is normed, in `dtype`, and the sum.
fn add_and_norm<R: CubeRuntime>(
    (device, rows, row): (Device, usize, RowPlan),
    call: Call<R>,
    dtype: DType,
    eps: f32,
) -> [CubeTensor<R>; 2] {
    let [residual, weight] = [call.residual, call.weight].map(packed);
    let [x, bias] = [call.x, call.bias].map(|tensor| tensor.map(packed));
    let normed = empty(&residual, residual.shape(), dtype);
    // Not written without a branch.
    let sum = match &x {
        Some(_) => empty(&residual, residual.shape(), residual.dtype()),
        None => empty(&residual, [row.width], residual.dtype()),
    };
    // SAFETY: the kernel guards rows and vectors, and touches no branch, bias or sum that is not there.
    unsafe {
        kernels::residual_forward::launch_unchecked::<R>(
            &residual.client,
            cube_grid(&device, rows.div_ceil(row.team.per_cube as usize)),
            CubeDim::new_1d(row.team.cube()),
            addresses(&[&normed, &residual]),
            row.width,
            array(x.as_ref().unwrap_or(&residual)),
            array(&residual),
            array(&weight),
            array(bias.as_ref().unwrap_or(&weight)),
            array(&normed),
            array(&sum),
            rows as u32,
            eps,
            row,
            x.is_some(),
            bias.is_some(),
            [dtype.into(), residual.dtype().into(), weight.dtype().into()],
        );
    }
    [normed, if x.is_some() { sum } else { residual }]
}

/// Gradients of the branch, the residual and the weight, and of the bias where `bias` gives its dtype.
fn differentiate<R: CubeRuntime>(
    (device, rows, row): (Device, usize, RowPlan),
    [sum, weight, dnormed]: [CubeTensor<R>; 3],
    dsum: Option<CubeTensor<R>>,
    bias: Option<DType>,
    eps: f32,
) -> ([CubeTensor<R>; 3], Option<CubeTensor<R>>) {
    let [sum, weight, dnormed] = [sum, weight, dnormed].map(packed);
    let dsum = dsum.map(|dsum| packed(cast(dsum, sum.dtype())));
    let narrow = dnormed.dtype() != sum.dtype();
    let dresidual = empty(&sum, sum.shape(), sum.dtype());
    // Not written where both gradients are the same tensor.
    let dx = if narrow { empty(&sum, sum.shape(), dnormed.dtype()) } else { empty(&sum, [row.width], dnormed.dtype()) };
    // As many walkers as run at once: with some 100 registers a unit, 512 units of a multiprocessor.
    let cubes = device.processors.unwrap_or(4) as usize * (512 / row.team.cube() as usize).max(1);
    let walkers = (cubes * row.team.per_cube as usize).clamp(1, rows);
    let d = sum.shape()[2];
    let parts = empty(&sum, [walkers, if bias.is_some() { 2 * d } else { d }], DType::F32);
    // SAFETY: the kernel guards rows, walkers and vectors.
    unsafe {
        kernels::residual_backward::launch_unchecked::<R>(
            &sum.client,
            cube_grid(&device, walkers.div_ceil(row.team.per_cube as usize)),
            CubeDim::new_1d(row.team.cube()),
            addresses(&[&sum, &dnormed, &parts]),
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
            bias.is_some(),
            [dnormed.dtype().into(), sum.dtype().into(), weight.dtype().into()],
        );
    }
    let dx = if narrow { dx } else { dresidual.clone() };
    match bias {
        None => ([dx, dresidual, sum_rows(&parts, weight.dtype())], None),
        Some(dtype) => {
            let [dweight, dbias] = fold(parts, walkers, ([d].into(), weight.dtype()), ([d].into(), dtype));
            ([dx, dresidual, dweight], Some(dbias))
        }
    }
}

pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: ResidualNormArgs<CubeBackend<R, F, I, BT>>,
) -> ResidualNormOut<CubeBackend<R, F, I, BT>> {
    let (dtype, residual) = (args.dtype(), down(args.residual.clone()));
    let Some(plan) = plan(&residual, dtype) else {
        return reference::norm_residual(args);
    };
    let weight = down(args.weight);
    let bias = args.bias.map(|bias| cast(down(bias), weight.dtype()));
    let call = Call { x: args.x.map(down), residual, weight, bias };
    let [normed, sum] = add_and_norm(plan, call, dtype, args.eps);
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
    let ([x, residual, weight], bias) = differentiate(plan, [sum, down(kept.weight), dnormed], dsum.map(down), kept.bias, kept.eps);
    ResidualNormGrads { x: up(x), residual: up(residual), weight: up(weight), bias: bias.map(up) }
}
