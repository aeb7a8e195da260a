//! Float32 matrix products of a cube, by tiles of `q x q` in registers, and what chunks of `q` tokens need around them.
//!
//! 8 x 16 units own `q / 8` rows and `q / 16` columns each. Operands lie in shared memory with the summed index
//! outermost, in vectors along the other one, so that a unit reads whole vectors and planes read them in one go.

use cubecl::prelude::*;

/// Units of a cube along rows and columns of a tile.
pub(super) const ROWS: usize = 8;
pub(super) const COLUMNS: usize = 16;
pub(super) const UNITS: usize = ROWS * COLUMNS;
/// Length of the summed index that is in shared memory at a time.
pub(super) const SLICE: usize = 32;

/// Comptime choices of all tiled kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Plan {
    /// Tokens of a chunk, which is the edge of a tile: 32 or 64.
    pub q: usize,
    /// Elements of a vector in shared memory and registers: `q / 16`.
    pub v: usize,
    /// The same of arrays whose last axis is `p`: `v`, or 1 where that does not divide `p`.
    pub wp: usize,
    /// The same for `n`.
    pub wn: usize,
    /// There are document boundaries.
    pub segments: bool,
    /// Unroll loops that only save time so: small devices take long to compile them.
    pub unroll: bool,
}

impl Plan {
    pub(super) fn new(q: usize, p: usize, n: usize, segments: bool) -> Self {
        let v = q / COLUMNS;
        let wide = |width: usize| if width.is_multiple_of(v) { v } else { 1 };
        Self { q, v, wp: wide(p), wn: wide(n), segments, unroll: q >= 64 }
    }

    /// Vectors from one line of an operand to the next: odd, so that turned stores do not collide.
    pub(super) fn line(self) -> usize {
        self.q / self.v + 1
    }

    /// Rows of a unit.
    pub(super) fn rows(self) -> usize {
        self.q / ROWS
    }

    /// Vectors of an operand of `lines` lines.
    pub(super) fn operand(self, lines: usize) -> usize {
        lines * self.line()
    }

    /// Bytes of shared memory that the largest kernel takes.
    pub(super) fn shared_bytes(self) -> usize {
        4 * (self.v * (2 * self.operand(SLICE) + self.operand(self.q)) + self.q * (COLUMNS + 1) + 8 * self.q + 8)
    }
}

/// Where a matrix lies in an array: `rows` rows of `columns` elements, `stride` apart, from element `start`.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Matrix {
    pub start: usize,
    pub stride: usize,
    pub rows: usize,
    pub columns: usize,
}

/// `V` elements of a row from `column` on; zeros outside. `w` is the width of the array's vectors.
#[cube]
pub(super) fn read<F: Numeric, W: Size, V: Size>(
    source: &Array<Vector<F, W>>,
    at: Matrix,
    row: usize,
    column: usize,
    #[comptime] w: usize,
    #[comptime] v: usize,
) -> Vector<f32, V> {
    // Without branches: what lies outside is read from the matrix's start and dropped.
    let inside = row < at.rows;
    let from = at.start + row * at.stride + column;
    let mut out = Vector::<f32, V>::new(0.0f32);
    if comptime!(w == v) {
        let inside = inside && column < at.columns;
        let found = Vector::<f32, V>::cast_from(source[select(inside, from, at.start) / v]);
        out = select(inside, found, out);
    } else {
        #[unroll]
        for i in 0..v {
            let inside = inside && column + i < at.columns;
            let found = source[select(inside, from + i, at.start)];
            out[i] = select(inside, f32::cast_from(found[0]), 0.0f32);
        }
    }
    out
}

/// The counterpart of [`read`]; nothing is written outside.
#[cube]
pub(super) fn write<F: Numeric, W: Size, V: Size>(
    target: &mut Array<Vector<F, W>>,
    at: Matrix,
    row: usize,
    column: usize,
    value: Vector<f32, V>,
    #[comptime] w: usize,
    #[comptime] v: usize,
) {
    if row < at.rows {
        let from = at.start + row * at.stride + column;
        if comptime!(w == v) {
            if column < at.columns {
                target[from / v] = Vector::cast_from(value);
            }
        } else {
            #[unroll]
            for i in 0..v {
                if column + i < at.columns {
                    target[from + i] = Vector::cast_from(value[i]);
                }
            }
        }
    }
}

/// Fills an operand whose summed index is the rows of `at` from `row` on, its other index the columns from `column` on.
/// Rows are multiplied by `scale[row]` where `scaled`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn load<F: Numeric, W: Size, V: Size>(
    operand: &mut SharedMemory<Vector<f32, V>>,
    source: &Array<Vector<F, W>>,
    at: Matrix,
    row: usize,
    column: usize,
    scale: &SharedMemory<f32>,
    #[comptime] scaled: bool,
    #[comptime] w: usize,
    #[comptime] plan: Plan,
) {
    let across = comptime!(plan.q / plan.v);
    #[unroll(plan.unroll)]
    for i in 0..comptime!(SLICE * plan.q / plan.v / UNITS) {
        let index = UNIT_POS as usize + i * UNITS;
        let k = index / across;
        let m = index % across;
        let mut value = read::<F, W, V>(source, at, row + k, column + m * plan.v, w, plan.v);
        if comptime!(scaled) {
            value *= Vector::<f32, V>::new(scale[row + k]);
        }
        operand[k * plan.line() + m] = value;
    }
}

/// Fills an operand whose summed index is the columns of `at` from `column` on, its other index the rows from `row` on.
/// Rows are multiplied by `scale[row]` where `scaled`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn load_turned<F: Numeric, W: Size, V: Size>(
    operand: &mut SharedMemory<Vector<f32, V>>,
    source: &Array<Vector<F, W>>,
    at: Matrix,
    row: usize,
    column: usize,
    scale: &SharedMemory<f32>,
    #[comptime] scaled: bool,
    #[comptime] w: usize,
    #[comptime] plan: Plan,
) {
    let across = comptime!(plan.q / plan.v);
    // Blocks of v x v; two neighbours along the row share a sector of memory, and 8 stores in a row do not collide.
    #[unroll(plan.unroll)]
    for i in 0..comptime!(SLICE * plan.q / plan.v / plan.v / UNITS) {
        let index = UNIT_POS as usize + i * UNITS;
        let k = (index % 2 + index / (2 * across) * 2) * plan.v;
        let m = index / 2 % across;
        let mut lines = Array::<Vector<f32, V>>::new(plan.v);
        #[unroll]
        for j in 0..plan.v {
            let line = row + m * plan.v + j;
            lines[j] = read::<F, W, V>(source, at, line, column + k, w, plan.v);
            if comptime!(scaled) {
                lines[j] = lines[j] * Vector::<f32, V>::new(scale[line]);
            }
        }
        #[unroll]
        for j in 0..plan.v {
            let mut turned = Vector::<f32, V>::empty();
            #[unroll]
            for c in 0..plan.v {
                let line = lines[c];
                turned[c] = line[j];
            }
            operand[(k + j) * plan.line() + m] = turned;
        }
    }
}

/// Zeros, one vector per row of a unit.
#[cube]
pub(super) fn zeros<V: Size>(#[comptime] plan: Plan) -> Array<Vector<f32, V>> {
    let mut sums = Array::<Vector<f32, V>>::new(plan.rows());
    #[unroll]
    for i in 0..plan.rows() {
        sums[i] = Vector::new(0.0f32);
    }
    sums
}

/// `sums += left^T right` over one slice; the left operand starts at line `first`.
#[cube]
pub(super) fn multiply<V: Size>(
    sums: &mut Array<Vector<f32, V>>,
    left: &SharedMemory<Vector<f32, V>>,
    first: usize,
    right: &SharedMemory<Vector<f32, V>>,
    #[comptime] plan: Plan,
) {
    let line = comptime!(plan.line());
    let each = comptime!(plan.rows() / plan.v);
    let row = first * line + UNIT_POS as usize / COLUMNS * each;
    let column = UNIT_POS as usize % COLUMNS;
    for k in 0..SLICE {
        let b = right[k * line + column];
        #[unroll]
        for r in 0..each {
            let a = left[row + k * line + r];
            #[unroll]
            for i in 0..plan.v {
                sums[r * plan.v + i] += Vector::<f32, V>::new(a[i]) * b;
            }
        }
    }
}

/// First row of the unit's part of a tile.
#[cube]
pub(super) fn first_row(#[comptime] plan: Plan) -> usize {
    UNIT_POS as usize / COLUMNS * plan.rows()
}

/// First column of the unit's part of a tile.
#[cube]
pub(super) fn first_column(#[comptime] plan: Plan) -> usize {
    UNIT_POS as usize % COLUMNS * plan.v
}

/// One chunk of one head (or group): where it is.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Place {
    pub row: usize,
    pub chunk: usize,
    pub head: usize,
    /// First token.
    pub from: usize,
    /// Tokens of the chunk that exist and are not padding.
    pub real: usize,
    /// Tokens of the chunk that exist.
    pub tokens: usize,
}

#[cube]
pub(super) fn place(bounds: &Array<i32>, row: usize, chunk: usize, head: usize, l: usize, #[comptime] plan: Plan) -> Place {
    let from = chunk * plan.q;
    let mut end = l;
    if comptime!(plan.segments) {
        end = bounds[row * 2] as usize;
    }
    let mut real = 0usize.runtime();
    if end > from {
        real = min(end - from, plan.q.runtime());
    }
    let tokens = min(l - from, plan.q.runtime());
    Place { row, chunk, head, from, real, tokens }
}

/// A `[b, l, heads, width]` array's part of a head in a chunk, real tokens only.
#[cube]
pub(super) fn tokens_of(at: Place, l: usize, heads: usize, head: usize, width: usize) -> Matrix {
    Matrix { start: ((at.row * l + at.from) * heads + head) * width, stride: heads * width, rows: at.real, columns: width }
}

/// A `[b, chunks, h, p, n]` array's part of a head in a chunk.
#[cube]
pub(super) fn state_of(at: Place, chunks: usize, h: usize, p: usize, n: usize) -> Matrix {
    Matrix { start: ((at.row * chunks + at.chunk) * h + at.head) * p * n, stride: n, rows: p, columns: n }
}

/// Decays of one head in one chunk.
#[derive(CubeType)]
pub(super) struct Decays {
    /// Inclusive cumulative log decay.
    pub sums: SharedMemory<f32>,
    pub delta: SharedMemory<f32>,
    /// Decay of the entering state up to a token.
    pub enter: SharedMemory<f32>,
    /// Decay of a token up to the chunk's end.
    pub leave: SharedMemory<f32>,
    /// `delta * leave`
    pub feed: SharedMemory<f32>,
    pub ids: SharedMemory<i32>,
}

#[cube]
pub(super) fn new_decays(#[comptime] plan: Plan) -> Decays {
    Decays {
        sums: SharedMemory::new(plan.q),
        delta: SharedMemory::new(plan.q),
        enter: SharedMemory::new(plan.q),
        leave: SharedMemory::new(plan.q),
        feed: SharedMemory::new(plan.q),
        ids: SharedMemory::new(plan.q),
    }
}

/// Id of the state that enters a chunk.
#[cube]
pub(super) fn id_before(filled: &Array<i32>, bounds: &Array<i32>, row: usize, chunk: usize, l: usize, #[comptime] plan: Plan) -> i32 {
    let mut id = bounds[row * 2 + 1];
    if chunk > 0 {
        id = filled[row * l + chunk * plan.q - 1];
    }
    id
}

/// Id of the state that leaves a chunk.
#[cube]
pub(super) fn id_after(filled: &Array<i32>, row: usize, chunk: usize, l: usize, #[comptime] plan: Plan) -> i32 {
    filled[row * l + min((chunk + 1) * plan.q, l) - 1]
}

/// Fills `decays`; the caller synchronises before and after.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn load_decays(
    decays: &mut Decays,
    delta: &Array<f32>,
    sums: &Array<f32>,
    filled: &Array<i32>,
    bounds: &Array<i32>,
    at: Place,
    l: usize,
    h: usize,
    lp: usize,
    #[comptime] plan: Plan,
) {
    let t = UNIT_POS as usize;
    if t < plan.q {
        let from = (at.row * h + at.head) * lp + at.from;
        let sum = sums[from + t];
        let step = delta[from + t];
        let mut enter = sum.exp();
        let mut leave = (sums[from + plan.q - 1] - sum).exp();
        if comptime!(plan.segments) {
            let id = filled[at.row * l + min(at.from + t, l - 1)];
            decays.ids[t] = id;
            if id != id_before(filled, bounds, at.row, at.chunk, l, plan) {
                enter = 0.0f32;
            }
            if id != id_after(filled, at.row, at.chunk, l, plan) {
                leave = 0.0f32;
            }
        }
        decays.sums[t] = sum;
        decays.delta[t] = step;
        decays.enter[t] = enter;
        decays.leave[t] = leave;
        decays.feed[t] = step * leave;
    }
}

/// Decay from token `j` to token `i`; zero for later ones and those of other documents.
#[cube]
pub(super) fn decay(decays: &Decays, i: usize, j: usize, #[comptime] plan: Plan) -> f32 {
    let mut seen = i >= j;
    if comptime!(plan.segments) {
        seen = seen && decays.ids[i] == decays.ids[j];
    }
    let log = select(seen, decays.sums[i] - decays.sums[j], 0.0f32);
    select(seen, log.exp(), 0.0f32)
}
