//! Reductions over the units of a cube, and the cubes of a launch.

#![allow(clippy::manual_is_multiple_of, clippy::manual_div_ceil, reason = "kernels have no such methods")]

use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::AddressType;
use cubecl::prelude::*;

use super::{Device, array, empty};

/// Units that reduce values together: a power of two of them, several teams to a cube.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Team {
    /// Units of one team.
    pub units: u32,
    /// Teams of one cube.
    pub per_cube: u32,
    /// Units of a plane, where planes can exchange values; else 0.
    pub plane: u32,
}

impl Team {
    /// Teams of `units`, in cubes of about `cube` units.
    pub(crate) fn new(device: &Device, units: u32, cube: u32) -> Self {
        let plane = if device.plane_ops && device.plane.0 == device.plane.1 { device.plane.0 } else { 0 };
        Self { units, per_cube: (cube.min(device.max_units) / units).max(1), plane }
    }

    /// Units of one cube.
    pub(crate) fn cube(self) -> u32 {
        self.units * self.per_cube
    }

    /// Shared values that reducing `count` values takes.
    pub(crate) fn scratch(self, count: usize) -> usize {
        let slots = if self.plane == 0 { self.cube() } else { self.planes() * self.per_cube };
        slots as usize * count
    }

    /// Exchanges of a plane's part of the team.
    fn steps(self) -> u32 {
        self.units.min(self.plane).max(1).trailing_zeros()
    }

    /// Planes of one team, 1 if it is less than one.
    fn planes(self) -> u32 {
        self.units.checked_div(self.plane).unwrap_or(1).max(1)
    }
}

#[cube]
fn join(a: f32, b: f32, #[comptime] largest: bool) -> f32 {
    if comptime!(largest) { max(a, b) } else { a + b }
}

/// Replaces each of `count` values by its sum, or its largest, over the team: the same bits in every unit. All units of
/// the cube must call it.
#[cube]
pub(crate) fn team_reduce(
    values: &mut Array<f32>,
    scratch: &mut SharedMemory<f32>,
    #[comptime] count: usize,
    #[comptime] largest: bool,
    #[comptime] team: Team,
) {
    if comptime!(team.plane > 0) {
        #[unroll]
        for step in 0..comptime!(team.steps()) {
            #[unroll]
            for i in 0..count {
                values[i] = join(values[i], plane_shuffle_xor(values[i], 1u32 << step), largest);
            }
        }
        if comptime!(team.planes() > 1) {
            let planes = comptime!(team.planes() as usize);
            let plane = UNIT_POS as usize / comptime!(team.plane as usize);
            if UNIT_POS % comptime!(team.plane) == 0 {
                #[unroll]
                for i in 0..count {
                    scratch[plane * count + i] = values[i];
                }
            }
            sync_cube();
            let first = UNIT_POS as usize / comptime!(team.units as usize) * planes;
            #[unroll]
            for i in 0..count {
                values[i] = scratch[first * count + i];
            }
            #[unroll]
            for other in 1..planes {
                #[unroll]
                for i in 0..count {
                    values[i] = join(values[i], scratch[(first + other) * count + i], largest);
                }
            }
            sync_cube();
        }
    } else {
        let at = UNIT_POS as usize;
        let lane = at % comptime!(team.units as usize);
        #[unroll]
        for i in 0..count {
            scratch[at * count + i] = values[i];
        }
        sync_cube();
        // Not a `while`: its blocks come out in an order that Vulkan refuses.
        #[unroll]
        for step in 0..comptime!(team.units.trailing_zeros() as usize) {
            let half = comptime!(team.units as usize) >> (step + 1);
            if lane < half {
                #[unroll]
                for i in 0..count {
                    scratch[at * count + i] = join(scratch[at * count + i], scratch[(at + half) * count + i], largest);
                }
            }
            sync_cube();
        }
        #[unroll]
        for i in 0..count {
            values[i] = scratch[(at - lane) * count + i];
        }
        sync_cube();
    }
}

/// Sum of a vector's elements.
#[cube]
pub(crate) fn lanes_sum<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut sum = vector[0];
    #[unroll]
    for i in 1..vector.vector_size() {
        sum += vector[i];
    }
    sum
}

/// How the units of a team share out a row of vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RowPlan {
    pub team: Team,
    /// Elements of a vector.
    pub width: usize,
    /// Vectors of a row.
    pub vectors: usize,
    /// Vectors of a unit; the last of them may lie beyond the row.
    pub each: usize,
}

impl RowPlan {
    /// `None` where a row does not fit into the registers of a cube.
    pub(crate) fn new(device: &Device, row: usize, width: usize) -> Option<Self> {
        const MOST: usize = 16;
        let vectors = row / width;
        let limit = device.max_units.min(1024) as usize;
        let fits =
            |each: &usize| vectors.is_multiple_of(*each) && (vectors / each).is_power_of_two() && (8..=limit).contains(&(vectors / each));
        let each = match [2, 3, 1, 4, 5, 6].into_iter().find(fits) {
            Some(each) => each,
            None => {
                let units = vectors.div_ceil(2).next_power_of_two().clamp(8.min(limit), limit);
                vectors.div_ceil(units)
            }
        };
        let units = vectors.div_ceil(each).next_power_of_two().clamp(8.min(limit), limit);
        (each <= MOST).then(|| Self { team: Team::new(device, units as u32, 256), width, vectors, each })
    }

    /// True when the last vectors of some units lie beyond the row.
    pub(crate) fn ragged(self) -> bool {
        self.each * self.team.units as usize != self.vectors
    }
}

/// Elements of the widest vector, at most 16 bytes of the widest of `dtypes`, that divides `row`.
pub(crate) fn vector_width<R: CubeRuntime>(client: &ComputeClient<R>, dtypes: &[DType], row: usize) -> usize {
    let bytes = dtypes.iter().map(|dtype| dtype.size()).min().unwrap_or(4);
    client.io_optimized_vector_sizes(bytes).find(|width| row.is_multiple_of(*width)).unwrap_or(1)
}

/// Cubes numbered by `CUBE_POS`, folded where an axis is too short; the last may be beyond `cubes`.
pub(crate) fn cube_grid(device: &Device, cubes: usize) -> CubeCount {
    let x = cubes.min(device.max_cubes.0 as usize).max(1);
    let y = cubes.div_ceil(x).min(device.max_cubes.1 as usize).max(1);
    CubeCount::Static(x as u32, y as u32, cubes.div_ceil(x * y) as u32)
}

/// What it takes to index the largest of `tensors`.
pub(crate) fn addresses<R: CubeRuntime>(tensors: &[&CubeTensor<R>]) -> AddressType {
    tensors.iter().map(|tensor| tensor.required_address_type()).max().unwrap_or_default()
}

const COLUMNS: usize = 32;
const LANES: usize = 8;

/// `out[c] = sum over r of parts[r, c]`: one cube for 32 columns.
#[cube(launch_unchecked, address_type = "dynamic")]
fn sum_rows_kernel<W: Float>(parts: &Array<f32>, out: &mut Array<W>, rows: u32, columns: u32, #[define(W)] _dtype: StorageType) {
    let mut sums = SharedMemory::<f32>::new(comptime!(COLUMNS * LANES));
    let columns = columns as usize;
    let at = UNIT_POS as usize;
    let column = CUBE_POS * COLUMNS + at % COLUMNS;
    let safe = select(column < columns, column, 0);
    let mut sum = 0.0f32;
    let lane = at / COLUMNS;
    for turn in 0..(rows as usize + LANES - 1 - lane) / LANES {
        sum += parts[(turn * LANES + lane) * columns + safe];
    }
    sums[at] = sum;
    sync_cube();
    if at < COLUMNS && column < columns {
        let mut total = sums[at];
        #[unroll]
        for lane in 1..LANES {
            total += sums[lane * COLUMNS + at];
        }
        out[column] = W::cast_from(total);
    }
}

/// Sums float32 `[rows, columns]` over its rows, in `dtype`.
pub(crate) fn sum_rows<R: CubeRuntime>(parts: &CubeTensor<R>, dtype: DType) -> CubeTensor<R> {
    let [rows, columns] = parts.shape().dims();
    let out = empty(parts, [columns], dtype);
    let device = Device::of(&parts.client);
    if columns > 0 {
        // SAFETY: the kernel guards its columns.
        unsafe {
            sum_rows_kernel::launch_unchecked::<R>(
                &parts.client,
                cube_grid(&device, columns.div_ceil(COLUMNS)),
                CubeDim::new_1d((COLUMNS * LANES) as u32),
                addresses(&[parts]),
                array(parts),
                array(&out),
                rows as u32,
                columns as u32,
                dtype.into(),
            );
        }
    }
    out
}
