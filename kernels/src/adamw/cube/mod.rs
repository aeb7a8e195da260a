//! CubeCL kernels.

use burn::tensor::{DType, Tensor, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::*;

use super::{AdamWArgs, AdamWFactors, AdamWOut, reference};
use crate::cube::reduce::{Team, addresses, cube_grid, lanes_sum, team_reduce, vector_width};
use crate::cube::{Device, array, down, empty, packed, up, zeros};

const UNITS: usize = 256;
/// Vectors of a unit that adds squares.
const EACH: usize = 16;

#[cube(launch_unchecked, address_type = "dynamic")]
fn adamw_kernel<G: Float, W: Float, N: Size>(
    grad: &Array<Vector<G, N>>,
    value: &mut Array<Vector<W, N>>,
    first: &mut Array<Vector<f32, N>>,
    second: &mut Array<Vector<f32, N>>,
    vectors: u32,
    clip: f32,
    b1: f32,
    c1: f32,
    b2: f32,
    c2: f32,
    root: f32,
    eps: f32,
    step: f32,
    keep: f32,
    #[define(G)] _grad_dtype: StorageType,
    #[define(W)] _value_dtype: StorageType,
) {
    let at = ABSOLUTE_POS;
    if at < vectors as usize {
        let g = Vector::<f32, N>::cast_from(grad[at]) * Vector::new(clip);
        let m = first[at] * Vector::new(b1) + g * Vector::new(c1);
        let v = second[at] * Vector::new(b2) + g * g * Vector::new(c2);
        let change = m / (Vector::sqrt(v) * Vector::new(root) + Vector::new(eps)) * Vector::new(step);
        first[at] = m;
        second[at] = v;
        value[at] = Vector::<W, N>::cast_from(Vector::<f32, N>::cast_from(value[at]) * Vector::new(keep) - change);
    }
}

/// `sums[start + cube]`: squares of the cube's part of `x`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn square_kernel<F: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    sums: &mut Array<f32>,
    vectors: u32,
    start: u32,
    cubes: u32,
    #[comptime] team: Team,
    #[define(F)] _dtype: StorageType,
) {
    let mut scratch = SharedMemory::<f32>::new(comptime!(team.scratch(1)));
    let cube = CUBE_POS;
    let mut sum = Array::<f32>::new(1usize);
    sum[0] = 0.0f32;
    #[unroll]
    for i in 0..EACH {
        let at = (cube * EACH + i) * UNITS + UNIT_POS as usize;
        if at < vectors as usize {
            let v = Vector::<f32, N>::cast_from(x[at]);
            sum[0] += lanes_sum(v * v);
        }
    }
    team_reduce(&mut sum, &mut scratch, 1usize, false, team);
    if UNIT_POS == 0 && cube < cubes as usize {
        sums[start as usize + cube] = sum[0];
    }
}

/// A packed tensor that may be written: itself, or a copy where somebody else holds it.
fn own<R: CubeRuntime>(tensor: CubeTensor<R>) -> CubeTensor<R> {
    let tensor = packed(tensor);
    if tensor.can_mut() { tensor } else { tensor.copy() }
}

fn run<R: CubeRuntime>(grad: CubeTensor<R>, value: &CubeTensor<R>, first: &CubeTensor<R>, second: &CubeTensor<R>, factors: AdamWFactors) {
    let grad = packed(grad);
    let n = value.shape().num_elements();
    let client = &value.client;
    let width = vector_width(client, &[DType::F32], n);
    let vectors = n / width;
    let AdamWFactors { clip, first: (b1, c1), second: (b2, c2), root, eps, step, keep } = factors;
    // SAFETY: the kernel guards its vectors; what it writes is held by nobody else.
    unsafe {
        adamw_kernel::launch_unchecked::<R>(
            client,
            cube_grid(&Device::of(client), vectors.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            addresses(&[value, first]),
            width,
            array(&grad),
            array(value),
            array(first),
            array(second),
            vectors as u32,
            clip,
            b1,
            c1,
            b2,
            c2,
            root,
            eps,
            step,
            keep,
            grad.dtype().into(),
            value.dtype().into(),
        );
    }
}

/// See [`super`].
pub(crate) fn adamw<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: AdamWArgs<CubeBackend<R, F, I, BT>>,
) -> AdamWOut<CubeBackend<R, F, I, BT>> {
    let float = |dtype| matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    let n = args.value.dims()[0];
    if n == 0 || u32::try_from(n).is_err() || !float(args.value.dtype()) || !float(args.grad.dtype()) {
        return reference::adamw(args);
    }
    let AdamWArgs { value, grad, moments, factors } = args;
    let value = own(down(value));
    let (first, second) = match moments {
        Some((first, second)) => (own(down(first)), own(down(second))),
        None => (zeros(&value, [n], DType::F32), zeros(&value, [n], DType::F32)),
    };
    run(down(grad), &value, &first, &second, factors);
    AdamWOut { value: up(value), first: up(first), second: up(second) }
}

/// Sum of the squares of each tensor. One transfer from the device.
pub(crate) fn square_sums<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    tensors: &[Tensor<CubeBackend<R, F, I, BT>, 1>],
) -> Vec<f64> {
    let parts: Vec<CubeTensor<R>> = tensors.iter().map(|tensor| packed(down(tensor.clone()))).collect();
    let width = |tensor: &CubeTensor<R>| vector_width(&tensor.client, &[tensor.dtype()], tensor.shape().num_elements());
    let cubes: Vec<usize> = parts.iter().map(|part| (part.shape().num_elements() / width(part)).div_ceil(UNITS * EACH)).collect();
    let total: usize = cubes.iter().sum();
    if total == 0 {
        return vec![0.0; tensors.len()];
    }
    if parts.iter().any(|part| u32::try_from(part.shape().num_elements()).is_err()) {
        return reference::square_sums(tensors);
    }
    let sums = empty(&parts[0], [total], DType::F32);
    let device = Device::of(&sums.client);
    let team = Team::new(&device, UNITS as u32, UNITS as u32);
    let mut start = 0;
    for (part, &cubes) in parts.iter().zip(&cubes).filter(|(_, cubes)| **cubes > 0) {
        let width = width(part);
        // SAFETY: the kernel guards vectors and cubes.
        unsafe {
            square_kernel::launch_unchecked::<R>(
                &sums.client,
                cube_grid(&device, cubes),
                CubeDim::new_1d(UNITS as u32),
                addresses(&[part]),
                width,
                array(part),
                array(&sums),
                (part.shape().num_elements() / width) as u32,
                start as u32,
                cubes as u32,
                team,
                part.dtype().into(),
            );
        }
        start += cubes;
    }
    let sums: Tensor<CubeBackend<R, F, I, BT>, 1> = up(sums);
    let sums: Vec<f64> = sums.into_data().iter::<f64>().collect();
    let mut rest = sums.as_slice();
    cubes
        .iter()
        .map(|&cubes| {
            let (own, after) = rest.split_at(cubes);
            rest = after;
            own.iter().sum()
        })
        .collect()
}
