//! One pass for the sums of a row's exponentials, one for its gradient.

use cubecl::prelude::*;

use crate::cube::reduce::{Team, lanes_sum, team_reduce};

/// Vectors that a unit has in flight.
pub(super) const DEEP: usize = 4;

/// Largest element of a vector.
#[cube]
fn lanes_max<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut largest = vector[0];
    #[unroll]
    for i in 1..vector.vector_size() {
        largest = max(largest, vector[i]);
    }
    largest
}

/// For each of `splits` pieces of each row the largest logit and the sum of exponentials relative to it,
/// `parts [rows, splits, 2]`; one cube per piece of `span` vectors.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
pub(super) fn exponentials<F: Float, N: Size>(
    logits: &Array<Vector<F, N>>,
    parts: &mut Array<f32>,
    rows: u32,
    splits: u32,
    span: u32,
    vectors: u32,
    pitch: u32,
    #[comptime] team: Team,
    #[define(F)] _dtype: StorageType,
) {
    let units = comptime!(team.units as usize);
    let vectors = vectors as usize;
    let splits = splits as usize;
    let lane = UNIT_POS as usize;
    let live = CUBE_POS < rows as usize * splits;
    let base = select(live, CUBE_POS / splits, 0) * pitch as usize;
    let from = min(CUBE_POS % splits * span as usize, vectors);
    let to = min(from + span as usize, vectors);

    // Below every finite logit, yet subtracting it from itself is zero.
    let mut largest = f32::min_value();
    let mut sum = 0.0f32;
    let deep = comptime!(DEEP * units);
    let turns = (to - from) / deep;
    for turn in 0..turns {
        let at = from + turn * deep + lane;
        let mut x = Array::<Vector<F, N>>::new(comptime!(DEEP));
        #[unroll]
        for k in 0..DEEP {
            x[k] = logits[base + at + k * units];
        }
        let mut top = Vector::<f32, N>::cast_from(x[0]);
        #[unroll]
        for k in 1..DEEP {
            top = max(top, Vector::<f32, N>::cast_from(x[k]));
        }
        let next = max(largest, lanes_max::<N>(top));
        let shift = Vector::<f32, N>::new(next);
        let mut sums = (Vector::<f32, N>::cast_from(x[0]) - shift).exp();
        #[unroll]
        for k in 1..DEEP {
            sums += (Vector::<f32, N>::cast_from(x[k]) - shift).exp();
        }
        sum = sum * (largest - next).exp() + lanes_sum::<N>(sums);
        largest = next;
    }
    let rest = from + turns * deep;
    for turn in 0..(to - rest + comptime!(units - 1) - lane) / units {
        let at = rest + turn * units + lane;
        let x = Vector::<f32, N>::cast_from(logits[base + at]);
        let next = max(largest, lanes_max::<N>(x));
        sum = sum * (largest - next).exp() + lanes_sum::<N>((x - Vector::new(next)).exp());
        largest = next;
    }

    let mut scratch = SharedMemory::<f32>::new(comptime!(team.scratch(1)));
    let mut values = Array::<f32>::new(1usize);
    values[0] = largest;
    team_reduce(&mut values, &mut scratch, 1usize, true, team);
    let top = values[0];
    values[0] = sum * (largest - top).exp();
    team_reduce(&mut values, &mut scratch, 1usize, false, team);
    if live && lane == 0 {
        parts[CUBE_POS * 2] = top;
        parts[CUBE_POS * 2 + 1] = values[0];
    }
}

/// Joins the pieces of each row; one unit per row.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn losses<F: Float>(
    logits: &Array<F>,
    targets: &Array<i32>,
    parts: &Array<f32>,
    loss: &mut Array<f32>,
    log_sum: &mut Array<f32>,
    rows: u32,
    splits: u32,
    v: u32,
    pitch: u32,
    #[define(F)] _dtype: StorageType,
) {
    let row = ABSOLUTE_POS;
    if row < rows as usize {
        let splits = splits as usize;
        let mut largest = parts[row * splits * 2];
        let mut sum = parts[row * splits * 2 + 1];
        for piece in 1..splits {
            let top = parts[(row * splits + piece) * 2];
            let next = max(largest, top);
            sum = sum * (largest - next).exp() + parts[(row * splits + piece) * 2 + 1] * (top - next).exp();
            largest = next;
        }
        let total = largest + sum.ln();
        log_sum[row] = total;
        let target = targets[row];
        if target >= 0 && target < v as i32 {
            loss[row] = total - f32::cast_from(logits[row * pitch as usize + target as usize]);
        } else {
            loss[row] = 0.0f32;
        }
    }
}

/// `(exp(x - log_sum) - [column == target]) * dloss` for a vector of logits.
#[cube]
fn slope<F: Float, N: Size>(x: Vector<F, N>, log_sum: f32, dloss: f32, target: i32, at: usize) -> Vector<F, N> {
    let mut p = (Vector::<f32, N>::cast_from(x) - Vector::new(log_sum)).exp();
    let width = x.vector_size();
    if target >= 0 && target as usize / width == at {
        #[unroll]
        for i in 0..width {
            if at * width + i == target as usize {
                p[i] = p[i] - 1.0f32;
            }
        }
    }
    let mut d = p * Vector::new(dloss);
    if target < 0 {
        d = Vector::new(0.0f32);
    }
    Vector::cast_from(d)
}

/// Gradient of the logits. A cube takes `DEEP` vectors of each unit in one row; `splits` cubes make a row.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
pub(super) fn gradient<F: Float, N: Size>(
    logits: &Array<Vector<F, N>>,
    targets: &Array<i32>,
    log_sum: &Array<f32>,
    dloss: &Array<f32>,
    out: &mut Array<Vector<F, N>>,
    rows: u32,
    splits: u32,
    vectors: u32,
    pitch: u32,
    #[comptime] units: u32,
    #[define(F)] _dtype: StorageType,
) {
    let units = comptime!(units as usize);
    let row = CUBE_POS / splits as usize;
    if row < rows as usize {
        let base = row * pitch as usize;
        let into = row * vectors as usize;
        let from = CUBE_POS % splits as usize * comptime!(units * DEEP) + UNIT_POS as usize;
        let mut x = Array::<Vector<F, N>>::new(comptime!(DEEP));
        #[unroll]
        for k in 0..DEEP {
            x[k] = logits[base + min(from + k * units, vectors as usize - 1)];
        }
        #[unroll]
        for k in 0..DEEP {
            let at = from + k * units;
            if at < vectors as usize {
                out[into + at] = slope::<F, N>(x[k], log_sum[row], dloss[row], targets[row], at);
            }
        }
    }
}

/// [`gradient`] over the logits themselves.
#[cube(launch_unchecked, address_type = "dynamic", fast_math = FastMath::all())]
pub(super) fn gradient_in_place<F: Float, N: Size>(
    logits: &mut Array<Vector<F, N>>,
    targets: &Array<i32>,
    log_sum: &Array<f32>,
    dloss: &Array<f32>,
    rows: u32,
    splits: u32,
    vectors: u32,
    pitch: u32,
    #[comptime] units: u32,
    #[define(F)] _dtype: StorageType,
) {
    let units = comptime!(units as usize);
    let row = CUBE_POS / splits as usize;
    if row < rows as usize {
        let base = row * pitch as usize;
        let from = CUBE_POS % splits as usize * comptime!(units * DEEP) + UNIT_POS as usize;
        let mut x = Array::<Vector<F, N>>::new(comptime!(DEEP));
        #[unroll]
        for k in 0..DEEP {
            // Reading what another unit may be writing over does no harm: it is not used.
            x[k] = logits[base + min(from + k * units, vectors as usize - 1)];
        }
        #[unroll]
        for k in 0..DEEP {
            let at = from + k * units;
            if at < vectors as usize {
                logits[base + at] = slope::<F, N>(x[k], log_sum[row], dloss[row], targets[row], at);
            }
        }
    }
}
