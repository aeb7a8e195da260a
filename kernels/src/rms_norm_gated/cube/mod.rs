//! CubeCL kernels.

mod kernels;

use burn::tensor::{DType, Tensor, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::*;

use super::{NormArgs, NormGrads, gradients, reference};
use crate::cube::reduce::{RowPlan, addresses, cube_grid, sum_rows, vector_width};
use crate::cube::{Device, array, cast, down, empty, packed, up};

/// Whether the kernels are there.
pub(crate) const READY: bool = true;

/// Packed arguments and how rows are shared out.
struct Plan<R: CubeRuntime> {
    y: CubeTensor<R>,
    z: Option<CubeTensor<R>>,
    /// From a row of the gate to the next, in vectors.
    gate_pitch: u32,
    weight: CubeTensor<R>,
    groups: usize,
    rows: usize,
    eps: f32,
    device: Device,
    row: RowPlan,
}

/// From a row of a `[b, l, e]` view to the next, in vectors, if that is all that its layout takes: parts of a projection lie so.
fn pitched<R: CubeRuntime>(z: &CubeTensor<R>, width: usize) -> Option<u32> {
    let [b, l, e] = z.shape().dims();
    let strides = z.meta.strides();
    let pitch = if l > 1 { strides[1] } else { strides[0] };
    let even = strides[2] == 1 && pitch >= e && pitch.is_multiple_of(width) && (b == 1 || l == 1 || strides[0] == l * pitch);
    let aligned = (z.handle.offset_start.unwrap_or(0) as usize).is_multiple_of(width * z.dtype().size());
    if even && aligned { u32::try_from(pitch / width).ok() } else { None }
}

/// `None` where a group of a row is too wide for the registers of a cube, or there is nothing to do.
fn plan<R: CubeRuntime>(y: CubeTensor<R>, z: Option<CubeTensor<R>>, weight: CubeTensor<R>, groups: usize, eps: f32) -> Option<Plan<R>> {
    let shape = y.shape();
    let (rows, e) = (shape[0] * shape[1], shape[2]);
    if rows * e == 0 || u32::try_from(rows * groups).is_err() {
        return None;
    }
    let device = Device::of(&y.client);
    let row = RowPlan::new(&device, e / groups, vector_width(&y.client, &[y.dtype()], e / groups))?;
    let mut gate_pitch = (e / row.width) as u32;
    let z = z.map(|z| match pitched(&z, row.width) {
        Some(pitch) => {
            gate_pitch = pitch;
            z
        }
        None => packed(z),
    });
    Some(Plan { y: packed(y), z, gate_pitch, weight: packed(weight), groups, rows, eps, device, row })
}

impl<R: CubeRuntime> Plan<R> {
    fn dtypes(&self) -> [StorageType; 3] {
        let gate = self.z.as_ref().unwrap_or(&self.y).dtype();
        [self.y.dtype().into(), gate.into(), self.weight.dtype().into()]
    }

    /// The gate; what stands in for it is not read.
    fn gate(&self) -> &CubeTensor<R> {
        self.z.as_ref().unwrap_or(&self.y)
    }

    fn forward(&self) -> CubeTensor<R> {
        let out = empty(&self.y, self.y.shape(), self.y.dtype());
        let pieces = self.rows * self.groups;
        let team = self.row.team;
        // SAFETY: the kernel guards pieces and vectors.
        unsafe {
            kernels::norm_forward::launch_unchecked::<R>(
                &self.y.client,
                cube_grid(&self.device, pieces.div_ceil(team.per_cube as usize)),
                CubeDim::new_1d(team.cube()),
                addresses(&[&self.y, self.gate()]),
                self.row.width,
                array(&self.y),
                array(self.gate()),
                array(&self.weight),
                array(&out),
                pieces as u32,
                self.groups as u32,
                self.gate_pitch,
                self.eps,
                self.row,
                self.z.is_some(),
                self.dtypes(),
            );
        }
        out
    }

    /// Of the signal, the gate and the weight.
    fn backward(&self, dout: CubeTensor<R>) -> (CubeTensor<R>, Option<CubeTensor<R>>, CubeTensor<R>) {
        let dout = packed(cast(dout, self.y.dtype()));
        let dy = empty(&self.y, self.y.shape(), self.y.dtype());
        let dz = self.z.as_ref().map(|z| empty(z, z.shape(), z.dtype()));
        let team = self.row.team;
        // As many walkers as run at once: with some 128 registers a unit, 512 units of a multiprocessor.
        let cubes = self.device.processors.unwrap_or(4) as usize * (512 / team.cube() as usize).max(1);
        let walkers = (cubes * team.per_cube as usize).div_ceil(self.groups).clamp(1, self.rows);
        let parts = empty(&self.y, [walkers, self.y.shape()[2]], DType::F32);
        // Nothing is written through a stand-in, but it may not be an input as well.
        let spare = dz.clone().unwrap_or_else(|| empty(&self.y, [self.row.width], self.y.dtype()));
        // SAFETY: the kernel guards rows, walkers and vectors.
        unsafe {
            kernels::norm_backward::launch_unchecked::<R>(
                &self.y.client,
                cube_grid(&self.device, (walkers * self.groups).div_ceil(team.per_cube as usize)),
                CubeDim::new_1d(team.cube()),
                addresses(&[&self.y, self.gate()]),
                self.row.width,
                array(&self.y),
                array(self.gate()),
                array(&self.weight),
                array(&dout),
                array(&dy),
                array(&spare),
                array(&parts),
                self.rows as u32,
                self.groups as u32,
                walkers as u32,
                self.gate_pitch,
                self.eps,
                self.row,
                self.z.is_some(),
                self.dtypes(),
            );
        }
        let dw = sum_rows(&parts, self.weight.dtype());
        (dy, dz, dw)
    }
}

pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: NormArgs<CubeBackend<R, F, I, BT>>,
) -> Tensor<CubeBackend<R, F, I, BT>, 3> {
    let [y, weight] = [down(args.y.clone()), down(args.weight.clone())];
    match plan(y, args.z.clone().map(down), weight, args.groups, args.eps) {
        Some(plan) => {
            drop(args);
            up(plan.forward())
        }
        None => reference::rms_norm_gated(args),
    }
}

pub(crate) fn backward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: NormArgs<CubeBackend<R, F, I, BT>>,
    dout: Tensor<CubeBackend<R, F, I, BT>, 3>,
) -> NormGrads<CubeBackend<R, F, I, BT>> {
    let [y, weight] = [down(args.y.clone()), down(args.weight.clone())];
    match plan(y, args.z.clone().map(down), weight, args.groups, args.eps) {
        Some(plan) => {
            let (dy, dz, dw) = plan.backward(down(dout));
            NormGrads { y: up(dy), z: dz.map(up), weight: up(dw) }
        }
        None => gradients::gradients(args, dout),
    }
}
