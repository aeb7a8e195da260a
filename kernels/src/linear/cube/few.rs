//! Few rows against a weight: the time is that of reading the weight once.
//!
//! A team of units takes some rows of the weight at a time, in vectors of 16 bytes, and holds the sums of all rows of `x` for
//! them in registers; `x` stays in cache.

#![allow(clippy::manual_div_ceil, reason = "kernels have no such method")]

use burn::tensor::TensorMetadata;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::cube::reduce::{Team, addresses, cube_grid, team_reduce};
use crate::cube::{Device, array, empty, packed};

/// Up to this many rows of `x`.
pub(super) const MOST: usize = 8;

/// How the work is shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Plan {
    team: Team,
    /// Rows of `x`.
    rows: usize,
    /// Rows of the weight that a team takes at a time.
    outputs: usize,
    /// Vectors of each that a unit asks for before it reads the first.
    ahead: usize,
    biased: bool,
}

impl Plan {
    fn sums(self) -> usize {
        self.rows * self.outputs
    }
}

/// Adds the products of one vector of each row of the weight with the same of each row of `x`.
#[cube]
fn add_products<F: Float, N: Size>(
    w: &Array<Vector<F, N>>,
    x: &Array<Vector<F, N>>,
    sums: &mut Array<f32>,
    at: usize,
    x_pitch: usize,
    #[comptime] first: usize,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for r in 0..plan.rows {
        let value = Vector::<f32, N>::cast_from(x[r * x_pitch + at]);
        #[unroll]
        for o in 0..plan.outputs {
            let products = Vector::<f32, N>::cast_from(w[comptime!(first + o)]) * value;
            #[unroll]
            for e in 0..products.vector_size() {
                sums[comptime!(r * plan.outputs + o)] += products[e];
            }
        }
    }
}

/// `y[r, o] = sum over i of x[r, i] weight[o, i]`; `vectors` make a row, `x_pitch` and `pitch` lie between rows of `x` and
/// of the weight.
#[cube(launch_unchecked, address_type = "dynamic")]
fn few_rows<F: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    weight: &Array<Vector<F, N>>,
    bias: &Array<F>,
    y: &mut Array<F>,
    vectors: u32,
    x_pitch: u32,
    pitch: u32,
    outputs: u32,
    #[comptime] plan: Plan,
    #[define(F)] _dtype: StorageType,
) {
    let units = comptime!(plan.team.units as usize);
    let ahead = comptime!(plan.ahead);
    let vectors = vectors as usize;
    let x_pitch = x_pitch as usize;
    let outputs = outputs as usize;
    let lane = UNIT_POS as usize % units;
    let team = CUBE_POS * comptime!(plan.team.per_cube as usize) + UNIT_POS as usize / units;
    let first = team * comptime!(plan.outputs);

    // Beyond the last row of the weight it is read again: no branch around a load.
    let mut begins = Array::<usize>::new(comptime!(plan.outputs));
    #[unroll]
    for o in 0..plan.outputs {
        begins[o] = min(first + o, outputs - 1) * pitch as usize;
    }
    let mut sums = Array::<f32>::new(comptime!(plan.sums()));
    #[unroll]
    for i in 0..comptime!(plan.sums()) {
        sums[i] = 0.0f32;
    }
    let mut w = Array::<Vector<F, N>>::new(comptime!(plan.outputs * plan.ahead));
    let turns = vectors / comptime!(plan.ahead * plan.team.units as usize);
    for turn in 0..turns {
        let base = turn * comptime!(plan.ahead * plan.team.units as usize) + lane;
        #[unroll]
        for j in 0..ahead {
            #[unroll]
            for o in 0..plan.outputs {
                w[comptime!(j * plan.outputs + o)] = weight[begins[o] + base + comptime!(j * plan.team.units as usize)];
            }
        }
        #[unroll]
        for j in 0..ahead {
            add_products::<F, N>(
                &w,
                x,
                &mut sums,
                base + comptime!(j * plan.team.units as usize),
                x_pitch,
                comptime!(j * plan.outputs),
                plan,
            );
        }
    }
    let rest = turns * comptime!(plan.ahead * plan.team.units as usize);
    for turn in 0..(vectors - rest + units - 1) / units {
        let at = rest + turn * units + lane;
        if at < vectors {
            #[unroll]
            for o in 0..plan.outputs {
                w[o] = weight[begins[o] + at];
            }
            add_products::<F, N>(&w, x, &mut sums, at, x_pitch, 0usize, plan);
        }
    }

    let mut scratch = SharedMemory::<f32>::new(comptime!(plan.team.scratch(plan.sums())));
    team_reduce(&mut sums, &mut scratch, comptime!(plan.sums()), false, plan.team);
    #[unroll]
    for r in 0..plan.rows {
        #[unroll]
        for o in 0..plan.outputs {
            let i = comptime!(r * plan.outputs + o);
            let output = first + o;
            if lane == i % units && output < outputs {
                let mut total = sums[i];
                if comptime!(plan.biased) {
                    total += f32::cast_from(bias[output]);
                }
                y[r * outputs + output] = F::cast_from(total);
            }
        }
    }
}

/// Whether rows lie densely, if not one behind the other.
fn dense<R: CubeRuntime>(matrix: &CubeTensor<R>, inputs: usize) -> bool {
    let strides = matrix.meta.strides();
    (strides[1] == 1 || inputs == 1) && strides[0] >= inputs
}

/// The widest vector of at most 16 bytes in which rows of all can be read.
fn width<R: CubeRuntime>(matrices: [&CubeTensor<R>; 2], inputs: usize) -> usize {
    let size = matrices[0].dtype().size();
    let fits = |n: &usize| {
        inputs.is_multiple_of(*n)
            && matrices.iter().all(|matrix| {
                let offset = matrix.handle.offset_start.unwrap_or(0) as usize;
                matrix.meta.strides()[0].is_multiple_of(*n) && offset.is_multiple_of(*n * size)
            })
    };
    matrices[0].client.io_optimized_vector_sizes(size).filter(|n| n * size <= 16).find(fits).unwrap_or(1)
}

/// `x [rows, in] weight [out, in]^T (+ bias [out])` in their dtype, or nothing where another path has to: too many rows, a weight by
/// columns, an odd size.
pub(super) fn product<R: CubeRuntime>(x: &CubeTensor<R>, weight: &CubeTensor<R>, bias: Option<&CubeTensor<R>>) -> Option<CubeTensor<R>> {
    let ([rows, inputs], [outputs, _]): ([usize; 2], [usize; 2]) = (x.shape().dims(), weight.shape().dims());
    if rows > MOST || u32::try_from(outputs * rows).is_err() || !dense(weight, inputs) {
        return None;
    }
    // Rows of a part of a product are read where they lie, unless that would narrow the vectors.
    let narrow = || width([x, weight], inputs) < width([weight, weight], inputs);
    let x = if !dense(x, inputs) || narrow() { packed(x.clone()) } else { x.clone() };
    let width = width([&x, weight], inputs);
    let device = Device::of(&x.client);
    let pitches = [&x, weight].map(|matrix| u32::try_from(matrix.meta.strides()[0] / width).ok());
    let [Some(x_pitch), Some(pitch)] = pitches else { return None };
    let vectors = inputs / width;
    let units = 32.min(device.max_units).min(vectors.next_power_of_two().max(8) as u32);
    let units = if device.plane_ops && device.plane.0 == device.plane.1 { device.plane.0.min(device.max_units) } else { units };
    let team = Team::new(&device, units, 128);
    // With more rows of `x` each vector of it serves more rows of the weight.
    let (at_a_time, ahead) = if rows == 1 { (2, 2) } else { (4, 1) };
    let plan = Plan { team, rows, outputs: at_a_time, ahead, biased: bias.is_some() };
    let y = empty(&x, [rows, outputs], x.dtype());
    let cubes = outputs.div_ceil(at_a_time).div_ceil(team.per_cube as usize);
    // SAFETY: the kernel guards vectors of a row and rows of the weight; `u32` holds both, since `pitch` is less than a row's bytes.
    unsafe {
        few_rows::launch_unchecked::<R>(
            &x.client,
            cube_grid(&device, cubes),
            CubeDim::new_1d(team.cube()),
            addresses(&[&x, weight, &y]),
            width,
            array(&x),
            array(weight),
            // Not read without a bias.
            array(bias.unwrap_or(&x)),
            array(&y),
            vectors as u32,
            x_pitch,
            pitch,
            outputs as u32,
            plan,
            x.dtype().into(),
        );
    }
    Some(y)
}
