//! Running sums of pieces, and the addition of what came before each piece.

use cubecl::prelude::*;

/// Units of a cube.
pub(super) const UNITS: usize = 128;
/// Neighbouring elements of one unit.
pub(super) const EACH: usize = 8;

/// Running sums of pieces of `UNITS * EACH` neighbours of `x [outer, n]`; one cube per piece. The whole sum of each goes
/// to `totals [outer, pieces]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn scan_rows<F: Float>(
    x: &Array<F>,
    out: &mut Array<F>,
    totals: &mut Array<f32>,
    outer: u32,
    n: u32,
    pieces: u32,
    #[comptime] reverse: bool,
    #[define(F)] _dtype: StorageType,
) {
    let n = n as usize;
    let pieces = pieces as usize;
    let unit = UNIT_POS as usize;
    let row = CUBE_POS / pieces;
    let piece = CUBE_POS % pieces;
    let live = row < outer as usize;
    let base = select(live, row, 0) * n;
    let first = piece * comptime!(UNITS * EACH) + unit * EACH;
    let mut sums = Array::<f32>::new(comptime!(EACH));
    let mut sum = 0.0f32;
    #[unroll]
    for k in 0..EACH {
        let at = first + k;
        if at < n {
            if comptime!(reverse) {
                sum += f32::cast_from(x[base + n - 1 - at]);
            } else {
                sum += f32::cast_from(x[base + at]);
            }
        }
        sums[k] = sum;
    }
    // Running sum over the units, back and forth between two buffers.
    let mut shared = SharedMemory::<f32>::new(comptime!(2 * UNITS));
    shared[unit] = sum;
    sync_cube();
    let mut from = 0usize;
    #[unroll]
    for exponent in 0..comptime!(UNITS.trailing_zeros() as usize) {
        let step = 1usize << exponent;
        let mut total = shared[from + unit];
        if unit >= step {
            total += shared[from + unit - step];
        }
        from = UNITS - from;
        shared[from + unit] = total;
        sync_cube();
    }
    if live {
        let mut before = 0.0f32;
        if unit > 0 {
            before = shared[from + unit - 1];
        }
        #[unroll]
        for k in 0..EACH {
            let at = first + k;
            if at < n {
                if comptime!(reverse) {
                    out[base + n - 1 - at] = F::cast_from(before + sums[k]);
                } else {
                    out[base + at] = F::cast_from(before + sums[k]);
                }
            }
        }
        if unit == 0 {
            totals[row * pieces + piece] = shared[from + comptime!(UNITS - 1)];
        }
    }
}

/// Running sums down the columns of pieces of `span` rows of `x [outer, n, inner]`; one unit per piece and column. Whole
/// sums go to `totals [outer, pieces, inner]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn scan_columns<F: Float>(
    x: &Array<F>,
    out: &mut Array<F>,
    totals: &mut Array<f32>,
    outer: u32,
    n: u32,
    inner: u32,
    pieces: u32,
    span: u32,
    #[comptime] reverse: bool,
    #[define(F)] _dtype: StorageType,
) {
    let n = n as usize;
    let inner = inner as usize;
    let column = ABSOLUTE_POS % inner;
    let piece = ABSOLUTE_POS / inner % pieces as usize;
    let block = ABSOLUTE_POS / inner / pieces as usize;
    if block < outer as usize {
        let mut sum = 0.0f32;
        let from = piece * span as usize;
        let to = min(from + span as usize, n);
        for at in from..to {
            let mut row = at;
            if comptime!(reverse) {
                row = n - 1 - at;
            }
            let index = (block * n + row) * inner + column;
            sum += f32::cast_from(x[index]);
            out[index] = F::cast_from(sum);
        }
        totals[ABSOLUTE_POS] = sum;
    }
}

/// Adds to each piece after the first the running sum of the `totals [outer, pieces, inner]` before it.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn add_before(
    out: &mut Array<f32>,
    totals: &Array<f32>,
    outer: u32,
    n: u32,
    inner: u32,
    pieces: u32,
    span: u32,
    #[comptime] reverse: bool,
) {
    let n = n as usize;
    let inner = inner as usize;
    let column = ABSOLUTE_POS % inner;
    let row = ABSOLUTE_POS / inner % n;
    let block = ABSOLUTE_POS / inner / n;
    if block < outer as usize {
        let mut at = row;
        if comptime!(reverse) {
            at = n - 1 - row;
        }
        let piece = at / span as usize;
        if piece > 0 {
            out[ABSOLUTE_POS] += totals[(block * pieces as usize + piece - 1) * inner + column];
        }
    }
}
