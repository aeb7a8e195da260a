//! What the kernels share: a unit is one channel (or part of its states), a cube some channels of one row and one piece of it,
//! and it goes by tiles of a few tokens. Within a tile a unit keeps what belongs to its tokens in registers and takes the states one
//! after the other, so that neither code nor registers grow with the number of states.

#![allow(clippy::manual_div_ceil, clippy::collapsible_if, reason = "branches at compile time; integers of kernels have no div_ceil")]

use cubecl::prelude::*;

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Setting {
    /// States.
    pub n: usize,
    /// Tokens of a tile, a multiple of 4.
    pub tile: usize,
    /// Units of a cube.
    pub units: usize,
    /// Units of a channel, each with as many of its states. The way forward alone has several.
    pub split: usize,
    pub bias: bool,
    pub skip: bool,
    pub gate: bool,
    /// There is an incoming state, or, on the way back, a gradient of the outgoing one.
    pub state: bool,
    pub segments: bool,
    pub softplus: bool,
    /// A row is walked in several pieces at once.
    pub pieces: bool,
}

/// Where a unit works.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Place {
    pub row: usize,
    pub piece: usize,
    /// Block of channels.
    pub block: usize,
    /// Channel; one that exists even where the unit is not active.
    pub channel: usize,
    pub active: bool,
    /// Tokens of a row, channels of a token.
    pub l: usize,
    pub e: usize,
    /// First token of the piece, and the first behind it.
    pub from: usize,
    pub to: usize,
    /// Real tokens of the row.
    pub real: usize,
}

/// The place of this unit; cubes are numbered by row, piece and block. `length` tokens to a piece, a multiple of a tile.
#[cube]
pub(super) fn place(bounds: &Array<i32>, rows: u32, l: u32, e: u32, length: u32, #[comptime] set: Setting) -> Place {
    let (l, e, length) = (l as usize, e as usize, length as usize);
    let channels = comptime!(set.units / set.split);
    let blocks = (e + channels - 1) / channels;
    let pieces = (l + length - 1) / length;
    let block = CUBE_POS % blocks;
    let piece = (CUBE_POS / blocks) % pieces;
    let row = CUBE_POS / (blocks * pieces);
    let channel = block * channels + UNIT_POS as usize % channels;
    let mut real = l;
    if comptime!(set.segments) {
        // Cubes behind the last row leave after this.
        real = bounds[min(row, rows as usize - 1) * 2] as usize;
    }
    Place {
        row,
        piece,
        block,
        channel: min(channel, e - 1),
        active: channel < e,
        l,
        e,
        from: piece * length,
        to: min(piece * length + length, l),
        real,
    }
}

/// Id of token `t - 1`, or that of the incoming state.
#[cube]
pub(super) fn id_before(ids: &Array<i32>, bounds: &Array<i32>, row: usize, l: usize, t: usize) -> i32 {
    let mut id = bounds[row * 2 + 1];
    if t > 0 {
        id = ids[row * l + t - 1];
    }
    id
}

/// Whether a document begins among tokens `from..to`, which is not empty: ids never return.
#[cube]
pub(super) fn begins(
    ids: &Array<i32>,
    bounds: &Array<i32>,
    row: usize,
    l: usize,
    from: usize,
    to: usize,
    #[comptime] set: Setting,
) -> bool {
    let mut found = false;
    if comptime!(set.segments) {
        found = id_before(ids, bounds, row, l, from) != ids[row * l + to - 1];
    }
    found
}

/// 0 at tokens of a tile where a document begins, else 1; nothing without documents.
#[cube]
pub(super) fn keeps(ids: &Array<i32>, bounds: &Array<i32>, place: Place, from: usize, #[comptime] set: Setting) -> Array<f32> {
    let mut keep = Array::<f32>::new(comptime!(set.tile));
    if comptime!(set.segments) {
        let mut last = id_before(ids, bounds, place.row, place.l, from);
        #[unroll]
        for i in 0..comptime!(set.tile) {
            let id = ids[place.row * place.l + min(from + i, place.l - 1)];
            keep[i] = select(id == last, 1.0f32, 0.0f32);
            last = id;
        }
    }
    keep
}

/// `ln(1 + e^x)`; above 20, where float32 shows no difference, `x`.
#[cube]
pub(super) fn softplus(x: f32) -> f32 {
    let small = min(x, 20.0f32);
    select(x > 20.0f32, x, small.exp().log1p())
}

/// `1 / (1 + e^-x)`
#[cube]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0f32 / (1.0f32 + (0.0f32 - max(x, -80.0f32)).exp())
}

/// Values of the unit's channel at the tokens of a tile; some other value behind the row's end. `at` is the place of the
/// channel at the row's start.
#[cube]
pub(super) fn load<F: Numeric>(
    values: &Array<F>,
    at: usize,
    token_stride: u32,
    from: usize,
    l: usize,
    #[comptime] count: usize,
) -> Array<f32> {
    let mut loaded = Array::<F>::new(count);
    #[unroll]
    for i in 0..count {
        loaded[i] = values[at + min(from + i, l - 1) * token_stride as usize];
    }
    let mut wide = Array::<f32>::new(count);
    #[unroll]
    for i in 0..count {
        wide[i] = f32::cast_from(loaded[i]);
    }
    wide
}

/// Step sizes of `count` tokens from raw ones; zero from `real` on.
#[cube]
pub(super) fn steps(
    raw: &Array<f32>,
    bias: f32,
    from: usize,
    real: usize,
    #[comptime] count: usize,
    #[comptime] set: Setting,
) -> Array<f32> {
    let mut step = Array::<f32>::new(count);
    #[unroll]
    for i in 0..count {
        let mut value = raw[i] + bias;
        if comptime!(set.softplus) {
            value = softplus(value);
        }
        step[i] = select(from + i < real, value, 0.0f32);
    }
    step
}

/// A tile of `b` or `c`, as four tokens of a state in a vector: `[n, tile / 4]`. `at` is the row's start.
#[cube]
pub(super) fn stage<F: Numeric, Q: Size>(
    values: &Array<F>,
    staged: &mut SharedMemory<Vector<f32, Q>>,
    at: usize,
    token_stride: u32,
    from: usize,
    l: usize,
    #[comptime] set: Setting,
) {
    let n = comptime!(set.n);
    let quads = comptime!(set.tile / 4);
    for i in range_stepped(UNIT_POS as usize, comptime!(set.n * set.tile / 4), comptime!(set.units)) {
        let state = i % n;
        let quad = i / n;
        let mut four = Vector::<f32, Q>::empty();
        #[unroll]
        for k in 0..4usize {
            let t = min(from + quad * 4 + k, l - 1);
            four[k] = f32::cast_from(values[at + t * token_stride as usize + state]);
        }
        staged[state * quads + quad] = four;
    }
}
