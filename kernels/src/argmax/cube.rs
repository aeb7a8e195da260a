//! CubeCL kernel: one cube per row.

#![allow(clippy::manual_div_ceil, reason = "kernels have no such method")]

use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::cube::reduce::{Team, addresses, cube_grid, team_reduce, vector_width};
use crate::cube::{Device, array, cast, empty, packed};

/// Rows of up to this many columns: their numbers are exact in float32.
const MOST: usize = 1 << 24;

#[cube(launch_unchecked, address_type = "dynamic")]
fn argmax_kernel<F: Float, N: Size>(
    logits: &Array<Vector<F, N>>,
    out: &mut Array<i32>,
    rows: u32,
    known: u32,
    vectors: u32,
    #[comptime] team: Team,
    #[define(F)] _dtype: StorageType,
) {
    let units = comptime!(team.units as usize);
    let lane = UNIT_POS as usize;
    let live = CUBE_POS < rows as usize;
    let row = select(live, CUBE_POS, 0);
    let base = row * vectors as usize;
    let used = (known as usize + logits.vector_size() - 1) / logits.vector_size();
    let mut best = f32::min_value();
    let mut number = 0u32;
    let mut broken = 0.0f32;
    for turn in 0..(used + comptime!(units - 1) - lane) / units {
        let at = turn * units + lane;
        let x = Vector::<f32, N>::cast_from(logits[base + at]);
        #[unroll]
        for i in 0..x.vector_size() {
            let column = (at * x.vector_size() + i) as u32;
            let value = x[i];
            // Not by comparing the value with itself: compilers may take that for true.
            let bits = u32::reinterpret(value);
            let bad = bits & 0x7FFF_FFFFu32 > 0x7F80_0000u32 || bits == 0x7F80_0000u32;
            if column < known {
                if bad {
                    broken = 1.0f32;
                } else if value > best {
                    best = value;
                    number = column;
                }
            }
        }
    }
    let mut scratch = SharedMemory::<f32>::new(comptime!(team.scratch(2)));
    let mut tops = Array::<f32>::new(2usize);
    tops[0] = best;
    tops[1] = broken;
    team_reduce(&mut tops, &mut scratch, 2usize, true, team);
    // The first among equals is the largest of the negated numbers.
    let mut first = Array::<f32>::new(2usize);
    first[0] = select(best == tops[0], 0.0f32 - f32::cast_from(number), f32::min_value());
    first[1] = 0.0f32;
    team_reduce(&mut first, &mut scratch, 2usize, true, team);
    if live && lane == 0 {
        out[row] = select(tops[1] > 0.0f32, -1i32, i32::cast_from(0.0f32 - first[0]));
    }
}

/// `[b, v]` -> `[b, 1]` in `ids`, over `into` where it can be; nothing where rows are too long.
pub(crate) fn argmax<R: CubeRuntime>(
    logits: CubeTensor<R>,
    known: usize,
    into: Option<CubeTensor<R>>,
    ids: DType,
) -> Option<CubeTensor<R>> {
    let [b, v] = logits.shape().dims();
    if v > MOST || b == 0 || !matches!(logits.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return None;
    }
    let logits = packed(logits);
    let device = Device::of(&logits.client);
    let width = vector_width(&logits.client, &[logits.dtype()], v);
    let units = device.max_units.min(1024).min((v / width).next_power_of_two() as u32);
    let into = into.filter(|into| into.dtype() == DType::I32 && into.can_mut() && into.is_contiguous());
    let out = into.unwrap_or_else(|| empty(&logits, [b, 1], DType::I32));
    // SAFETY: the kernel guards rows and columns.
    unsafe {
        argmax_kernel::launch_unchecked::<R>(
            &logits.client,
            cube_grid(&device, b),
            CubeDim::new_1d(units),
            addresses(&[&logits]),
            width,
            array(&logits),
            array(&out),
            b as u32,
            known as u32,
            (v / width) as u32,
            Team::new(&device, units, units),
            logits.dtype().into(),
        );
    }
    Some(cast(out, ids))
}
