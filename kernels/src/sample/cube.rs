//! CubeCL kernel: one cube per row, which it reads several times.
//!
//! The smallest logit that may be drawn is found as a number of 32 bits that are in the order of floats, two bits in a pass: a pass
//! counts, or weighs, what lies at or above each of three numbers, and all units agree on the largest that still has enough.

#![allow(clippy::manual_div_ceil, reason = "kernels have no such method")]

use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::SampleOptions;
use crate::cube::reduce::{Team, addresses, cube_grid, team_reduce, vector_width};
use crate::cube::{Device, array, cast, empty, packed};

/// Rows of up to this many columns: counts of them are exact in float32.
const MOST: usize = 1 << 24;
/// Numbers that a pass tries.
const TRIED: usize = 3;
/// Smallest number that stands for a float: minus infinity. Below it are NaNs.
const LEAST: u32 = 0x007F_FFFF;

/// A float's bits in the order of floats.
#[cube]
fn ordered(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    select(bits >> 31 == 1, bits ^ 0xFFFF_FFFFu32, bits | 0x8000_0000u32)
}

/// See [`super::host`].
#[cube]
fn mix(x: u32) -> u32 {
    let x = (x ^ (x >> 16)) * 0x7feb_352du32;
    let x = (x ^ (x >> 15)) * 0x846c_a68bu32;
    x ^ (x >> 16)
}

/// A row that a cube looks at.
#[derive(CubeType)]
struct Row {
    base: usize,
    known: u32,
    /// Its largest logit.
    best: f32,
    /// One over the temperature.
    sharp: f32,
}

/// The largest number with at least `goal` at or above it: tokens, or with `weigh` their weights, of those at or above `floor`. Of the
/// 32 bits the last `spare` are the same in all logits.
#[cube]
fn threshold<F: Float, N: Size>(
    logits: &Array<Vector<F, N>>,
    row: &Row,
    floor: u32,
    goal: f32,
    scratch: &mut SharedMemory<f32>,
    #[comptime] weigh: bool,
    #[comptime] spare: u32,
    #[comptime] team: Team,
) -> u32 {
    let units = comptime!(team.units as usize);
    let lane = UNIT_POS as usize;
    let used = (row.known as usize + logits.vector_size() - 1) / logits.vector_size();
    let turns = (used + comptime!(units - 1) - lane) / units;
    let mut found = 0u32.runtime();
    // Unrolled: as a loop it comes out wrong on Vulkan, where only the first pass counts.
    #[unroll]
    for pass in 0..comptime!((32 - spare) / 2) {
        let low = comptime!(30 - 2 * pass);
        let mut sums = Array::<f32>::new(TRIED);
        #[unroll]
        for i in 0..TRIED {
            sums[i] = 0.0f32;
        }
        for turn in 0..turns {
            let at = turn * units + lane;
            let x = Vector::<f32, N>::cast_from(logits[row.base + at]);
            #[unroll]
            for e in 0..x.vector_size() {
                let number = ordered(x[e]);
                if ((at * x.vector_size() + e) as u32) < row.known && number >= floor {
                    let mut share = f32::new(1.0);
                    if comptime!(weigh) {
                        share = f32::exp((x[e] - row.best) * row.sharp);
                    }
                    #[unroll]
                    for i in 0..TRIED {
                        sums[i] = sums[i] + select(number >= found + comptime!((i as u32 + 1) << low), share, 0.0f32);
                    }
                }
            }
        }
        team_reduce(&mut sums, scratch, TRIED, false, team);
        let mut enough = 0u32.runtime();
        #[unroll]
        for i in 0..TRIED {
            if sums[i] >= goal {
                enough = comptime!((i as u32 + 1) << low).runtime();
            }
        }
        found += enough;
    }
    found
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn sample_kernel<F: Float, N: Size>(
    logits: &Array<Vector<F, N>>,
    draws: &mut Array<u32>,
    out: &mut Array<i32>,
    rows: u32,
    known: u32,
    vectors: u32,
    sharp: f32,
    top_k: f32,
    top_p: f32,
    #[comptime] some: bool,
    #[comptime] most: bool,
    #[comptime] spare: u32,
    #[comptime] team: Team,
    #[define(F)] _dtype: StorageType,
) {
    let units = comptime!(team.units as usize);
    let lane = UNIT_POS as usize;
    let live = CUBE_POS < rows as usize;
    let number = select(live, CUBE_POS, 0);
    let base = number * vectors as usize;
    let used = (known as usize + logits.vector_size() - 1) / logits.vector_size();
    let turns = (used + comptime!(units - 1) - lane) / units;
    let mut scratch = SharedMemory::<f32>::new(comptime!(team.scratch(TRIED)));

    let mut tops = Array::<f32>::new(2usize);
    tops[0] = f32::min_value();
    tops[1] = 0.0f32;
    for turn in 0..turns {
        let at = turn * units + lane;
        let x = Vector::<f32, N>::cast_from(logits[base + at]);
        #[unroll]
        for e in 0..x.vector_size() {
            let bits = u32::reinterpret(x[e]);
            let bad = bits & 0x7FFF_FFFFu32 > 0x7F80_0000u32 || bits == 0x7F80_0000u32;
            if ((at * x.vector_size() + e) as u32) < known {
                if bad {
                    tops[1] = 1.0f32;
                } else {
                    tops[0] = max(tops[0], x[e]);
                }
            }
        }
    }
    team_reduce(&mut tops, &mut scratch, 2usize, true, team);
    let row = Row { base, known, best: tops[0], sharp };

    let mut floor = comptime!(LEAST + 1).runtime();
    if comptime!(some) {
        floor = max(floor, threshold::<F, N>(logits, &row, floor, top_k, &mut scratch, false, spare, team));
    }
    if comptime!(most) {
        let mut total = Array::<f32>::new(1usize);
        total[0] = 0.0f32;
        for turn in 0..turns {
            let at = turn * units + lane;
            let x = Vector::<f32, N>::cast_from(logits[base + at]);
            #[unroll]
            for e in 0..x.vector_size() {
                if ((at * x.vector_size() + e) as u32) < known && ordered(x[e]) >= floor {
                    total[0] = total[0] + f32::exp((x[e] - row.best) * sharp);
                }
            }
        }
        team_reduce(&mut total, &mut scratch, 1usize, false, team);
        let found = threshold::<F, N>(logits, &row, floor, top_p * total[0], &mut scratch, true, spare, team);
        floor = max(floor, found);
    }
    // Rounding may not shut out the best.
    floor = min(floor, ordered(row.best));

    let count = draws[number * 3 + 2];
    let low = mix(draws[number * 3] + 0x9e37_79b9u32 * (count + 1));
    let high = mix(draws[number * 3 + 1] ^ (low + 0x85eb_ca6bu32));
    let mut top = f32::min_value();
    let mut token = 0u32.runtime();
    for turn in 0..turns {
        let at = turn * units + lane;
        let x = Vector::<f32, N>::cast_from(logits[base + at]);
        #[unroll]
        for e in 0..x.vector_size() {
            let id = (at * x.vector_size() + e) as u32;
            if id < known && ordered(x[e]) >= floor {
                let hash = mix(mix(id ^ low) + high);
                let uniform = (f32::cast_from(hash >> 9) + 0.5f32) * comptime!(1.0f32 / 8_388_608.0);
                let score = (x[e] - row.best) * sharp - f32::ln(0.0f32 - f32::ln(uniform));
                if score > top {
                    top = score;
                    token = id;
                }
            }
        }
    }
    let mut tries = Array::<f32>::new(1usize);
    tries[0] = top;
    team_reduce(&mut tries, &mut scratch, 1usize, true, team);
    // The first among equals is the largest of the negated numbers.
    let mut first = Array::<f32>::new(1usize);
    first[0] = select(top == tries[0], 0.0f32 - f32::cast_from(token), f32::min_value());
    team_reduce(&mut first, &mut scratch, 1usize, true, team);
    sync_cube();
    if live && lane == 0 {
        let broken = tops[1] > 0.0f32 || row.best == f32::min_value();
        out[number] = select(broken, -1i32, i32::cast_from(0.0f32 - first[0]));
        draws[number * 3 + 2] = count + 1;
    }
}

/// `[b, v]` -> `[b, 1]` in `ids`, over `into` where it can be, and the draws one further.
pub(crate) fn sample<R: CubeRuntime>(
    logits: CubeTensor<R>,
    known: usize,
    options: SampleOptions,
    draws: CubeTensor<R>,
    into: Option<CubeTensor<R>>,
    ids: DType,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [b, v] = logits.shape().dims();
    let logits = packed(logits);
    let draws = packed(draws);
    let draws = if draws.can_mut() { draws } else { draws.copy() };
    let device = Device::of(&logits.client);
    let width = vector_width(&logits.client, &[logits.dtype()], v);
    let units = device.max_units.min(1024).min((v / width).next_power_of_two() as u32);
    let into = into.filter(|into| into.dtype() == DType::I32 && into.can_mut() && into.is_contiguous());
    let out = into.unwrap_or_else(|| empty(&logits, [b, 1], DType::I32));
    // Bits behind the mantissa of a half are zeros, or ones where the sign turned them; an even number of them.
    let spare = match logits.dtype() {
        DType::BF16 => 16,
        DType::F16 => 12,
        _ => 0,
    };
    // SAFETY: the kernel guards rows and columns.
    unsafe {
        sample_kernel::launch_unchecked::<R>(
            &logits.client,
            cube_grid(&device, b),
            CubeDim::new_1d(units),
            addresses(&[&logits]),
            width,
            array(&logits),
            array(&draws),
            array(&out),
            b as u32,
            known as u32,
            (v / width) as u32,
            1.0 / options.temperature,
            options.top_k as f32,
            options.top_p,
            options.top_k > 0 && options.top_k < known,
            options.top_p < 1.0,
            spare,
            Team::new(&device, units, units),
            logits.dtype().into(),
        );
    }
    (cast(out, ids), draws)
}

/// Whether the kernel takes these: else the host does it.
pub(crate) fn takes<R: CubeRuntime>(logits: &CubeTensor<R>, draws: &CubeTensor<R>) -> bool {
    let [b, v] = logits.shape().dims();
    let float = matches!(logits.dtype(), DType::F32 | DType::F16 | DType::BF16);
    v <= MOST && b > 0 && float && draws.dtype() == DType::I32
}
