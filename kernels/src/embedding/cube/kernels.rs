//! A stable counting sort of places by row, eight bits at a time, and sums over the sorted places.

#![allow(clippy::manual_div_ceil, reason = "kernels have no such method")]

use cubecl::prelude::*;

/// Digits of a sorting pass, and units of its cubes: each unit follows one digit through its cube's keys.
pub(super) const DIGITS: usize = 256;
/// Sorted places that one cube sums.
pub(super) const BLOCK: usize = 64;
/// Rows that a unit has in flight.
const DEEP: usize = 8;

/// The digits of one cube's keys; beyond the last key one that no unit follows. Ids outside of the table sort behind it.
#[cube]
fn load_digits(keys: &Array<i32>, digits: &mut SharedMemory<u32>, n: usize, v: u32, shift: u32, #[comptime] chunk: usize) {
    let first = CUBE_POS * chunk;
    for turn in 0..comptime!(chunk / DIGITS) {
        let at = turn * DIGITS + UNIT_POS as usize;
        let index = first + at;
        let mut digit = comptime!(DIGITS as u32).runtime();
        if index < n {
            digit = (row_of(keys[index], v) >> shift) & 255u32;
        }
        digits[at] = digit;
    }
    sync_cube();
}

#[cube]
fn row_of(id: i32, v: u32) -> u32 {
    let row = u32::cast_from(id);
    select(id >= 0 && row < v, row, v)
}

/// How often each digit occurs in each cube's keys, `[chunks, 256]`. The first pass also clears `bounds [2, v]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn count(
    keys: &Array<i32>,
    counts: &mut Array<u32>,
    bounds: &mut Array<u32>,
    n: u32,
    v: u32,
    chunks: u32,
    shift: u32,
    #[comptime] chunk: usize,
    #[comptime] first: bool,
) {
    let mut digits = SharedMemory::<u32>::new(chunk);
    load_digits(keys, &mut digits, n as usize, v, shift, chunk);
    let mut found = 0u32;
    for at in 0..chunk {
        if digits[at] == UNIT_POS {
            found += 1u32;
        }
    }
    if CUBE_POS < chunks as usize {
        counts[CUBE_POS * DIGITS + UNIT_POS as usize] = found;
    }
    if comptime!(first) {
        let all = CUBE_COUNT * DIGITS;
        for turn in 0..(v as usize * 2 + all - 1) / all {
            let at = turn * all + ABSOLUTE_POS;
            if at < v as usize * 2 {
                bounds[at] = 0u32;
            }
        }
    }
}

/// Moves keys, and the places they came from, to where the pass wants them. `places` is not read in the first pass.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn scatter(
    keys: &Array<i32>,
    places: &Array<u32>,
    counts: &Array<u32>,
    keys_out: &mut Array<i32>,
    places_out: &mut Array<u32>,
    n: u32,
    v: u32,
    chunks: u32,
    shift: u32,
    #[comptime] chunk: usize,
    #[comptime] first: bool,
) {
    let mut digits = SharedMemory::<u32>::new(chunk);
    let mut sums = SharedMemory::<u32>::new(comptime!(2 * DIGITS));
    load_digits(keys, &mut digits, n as usize, v, shift, chunk);
    let unit = UNIT_POS as usize;
    // Keys with this digit in all cubes, and in those before this one.
    let mut all = 0u32;
    let mut before = 0u32;
    for other in 0..chunks as usize {
        let found = counts[other * DIGITS + unit];
        all += found;
        if other < CUBE_POS {
            before += found;
        }
    }
    // Running sum over the digits, back and forth between two buffers.
    sums[unit] = all;
    sync_cube();
    let mut from = 0usize;
    #[unroll]
    for exponent in 0..comptime!(DIGITS.trailing_zeros() as usize) {
        let step = 1usize << exponent;
        let mut sum = sums[from + unit];
        if unit >= step {
            sum += sums[from + unit - step];
        }
        from = DIGITS - from;
        sums[from + unit] = sum;
        sync_cube();
    }
    let mut to = (sums[from + unit] - all + before) as usize;
    let base = CUBE_POS * chunk;
    for at in 0..chunk {
        if digits[at] == UNIT_POS {
            let index = base + at;
            keys_out[to] = keys[index];
            if comptime!(first) {
                places_out[to] = u32::cast_from(index);
            } else {
                places_out[to] = places[index];
            }
            to += 1;
        }
    }
}

/// Where each row's places begin and end among the sorted ones, `[2, v]`; both stay zero for a row without any.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn find_bounds(keys: &Array<i32>, bounds: &mut Array<u32>, n: u32, v: u32) {
    let at = ABSOLUTE_POS;
    let n = n as usize;
    if at < n {
        let row = row_of(keys[at], v);
        if row < v {
            let before = row_of(keys[select(at > 0, at - 1, 0)], v);
            let after = row_of(keys[select(at + 1 < n, at + 1, at)], v);
            if at == 0 || before != row {
                bounds[row as usize] = u32::cast_from(at);
            }
            if at + 1 == n || after != row {
                bounds[(v + row) as usize] = u32::cast_from(at + 1);
            }
        }
    }
}

/// Sums the rows of `dout [n, d]` at the sorted places of one block. A table row whose places all lie in the block is
/// done; one that began before it leaves its part in `edges [blocks, 2, d]` at 0, one that goes on at 1.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn sum_blocks<F: Float, N: Size>(
    keys: &Array<i32>,
    places: &Array<u32>,
    bounds: &Array<u32>,
    dout: &Array<Vector<F, N>>,
    out: &mut Array<Vector<F, N>>,
    edges: &mut Array<Vector<f32, N>>,
    count: u32,
    v: u32,
    tiles: u32,
    vectors: u32,
    #[comptime] units: usize,
    #[define(F)] _dtype: StorageType,
) {
    let count = count as usize;
    let vectors = vectors as usize;
    let block = CUBE_POS / tiles as usize;
    let column = CUBE_POS % tiles as usize * units + UNIT_POS as usize;
    let begin = block * BLOCK;
    if begin < count && column < vectors {
        let mut sum = Vector::<f32, N>::new(0.0f32);
        for group in 0..comptime!(BLOCK / DEEP) {
            let first = begin + group * DEEP;
            let mut rows = Array::<Vector<F, N>>::new(comptime!(DEEP));
            #[unroll]
            for k in 0..DEEP {
                rows[k] = dout[places[min(first + k, count - 1)] as usize * vectors + column];
            }
            #[unroll]
            for k in 0..DEEP {
                let at = first + k;
                let row = row_of(keys[min(at, count - 1)], v);
                if at < count && row < v {
                    sum += Vector::<f32, N>::cast_from(rows[k]);
                    let ends = at + 1 == bounds[(v + row) as usize] as usize;
                    if ends || at + 1 == begin + BLOCK {
                        let began = bounds[row as usize] as usize >= begin;
                        if began && ends {
                            out[row as usize * vectors + column] = Vector::cast_from(sum);
                        } else {
                            edges[(block * 2 + select(began, 1, 0)) * vectors + column] = sum;
                        }
                        sum = Vector::new(0.0f32);
                    }
                }
            }
        }
    }
}

/// Table rows that no block has finished: those without places, which are zero, and those in several blocks.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn finish<F: Float, N: Size>(
    bounds: &Array<u32>,
    edges: &Array<Vector<f32, N>>,
    out: &mut Array<Vector<F, N>>,
    v: u32,
    tiles: u32,
    vectors: u32,
    #[comptime] units: usize,
    #[define(F)] _dtype: StorageType,
) {
    let v = v as usize;
    let vectors = vectors as usize;
    let row = CUBE_POS / tiles as usize;
    let column = CUBE_POS % tiles as usize * units + UNIT_POS as usize;
    if row < v && column < vectors {
        let begin = bounds[row] as usize;
        let end = bounds[v + row] as usize;
        if begin == end {
            out[row * vectors + column] = Vector::cast_from(Vector::<f32, N>::new(0.0f32));
        } else {
            let first = begin / BLOCK;
            let last = (end - 1) / BLOCK;
            if first != last {
                let mut sum = edges[(first * 2 + 1) * vectors + column];
                for block in first + 1..last + 1 {
                    sum += edges[block * 2 * vectors + column];
                }
                out[row * vectors + column] = Vector::cast_from(sum);
            }
        }
    }
}

/// `out[i] = weight[ids[i]]`, a vector to a unit.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn rows<F: Float, N: Size>(
    weight: &Array<Vector<F, N>>,
    ids: &Array<i32>,
    out: &mut Array<Vector<F, N>>,
    places: u32,
    v: u32,
    vectors: u32,
    #[define(F)] _dtype: StorageType,
) {
    let vectors = vectors as usize;
    let place = ABSOLUTE_POS / vectors;
    if place < places as usize {
        let row = row_of(ids[place], v);
        // Rows are fewer, so this is NaN. A constant would not compile on CUDA.
        let nan = max(row, 0x7FC0_0000u32);
        let mut value = Vector::<F, N>::cast_from(Vector::<f32, N>::new(f32::reinterpret(nan)));
        if row < v {
            value = weight[row as usize * vectors + ABSOLUTE_POS % vectors];
        }
        out[ABSOLUTE_POS] = value;
    }
}
