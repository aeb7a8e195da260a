//! Tiles in shared memory and their fragments: what every kernel of the tensor-core path is made of.
//!
//! `E` is bf16 or f16; products are `mma.sync` m16n8k16 with float32 sums. A tile row is padded by 16 bytes, so that the
//! eight rows of one `ldmatrix` phase lie in different banks.

use burn::tensor::f16;
use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::barrier::copy_async;
use cubecl::prelude::*;

/// Tokens of a chunk.
pub(crate) const Q: usize = 64;
/// Head width.
pub(crate) const P: usize = 64;
/// 16-byte vectors of one head's row.
pub(crate) const PV: usize = P / 8;
/// 16-byte vectors of a `[64][64]` tile with its padding.
pub(crate) const TILE: usize = Q * (PV + 1);

/// Blocks of 16 x 16 on and below the diagonal of 64 x 64.
pub(crate) const BLOCKS: usize = 10;

/// Row and column of such a block.
#[cube]
pub(crate) fn place(block: usize) -> (usize, usize) {
    let row = select(block >= 6, 3usize, select(block >= 3, 2usize, select(block >= 1, 1usize, 0usize)));
    (row, block - row * (row + 1) / 2)
}

/// Four 8 x 8 matrices; `off` is the 16-byte vector that this lane points at.
#[cube]
pub(crate) fn load4<E: Float, N8: Size, N2: Size>(
    def: MmaDefinition<E, E, f32>,
    tile: &SharedMemory<Vector<E, N8>>,
    off: usize,
    #[comptime] transposed: bool,
) -> Array<Vector<E, N2>> {
    def.load_matrix::<Vector<E, N8>, N2>(&tile.slice(off, off + 1), MatrixIdent::A, 4usize, transposed)
}

/// As [`load4`], from a tile that is written two values at a time; `off` counts pairs.
#[cube]
pub(crate) fn load4_pairs<E: Float, N2: Size>(
    def: MmaDefinition<E, E, f32>,
    tile: &SharedMemory<Vector<E, N2>>,
    off: usize,
    #[comptime] transposed: bool,
) -> Array<Vector<E, N2>> {
    def.load_matrix::<Vector<E, N2>, N2>(&tile.slice(off, off + 4), MatrixIdent::A, 4usize, transposed)
}

/// `sums += a b`, where `b` is half `half` of four loaded matrices.
#[cube]
pub(crate) fn multiply<E: Float, N2: Size>(
    def: MmaDefinition<E, E, f32>,
    a: &Array<Vector<E, N2>>,
    four: &Array<Vector<E, N2>>,
    #[comptime] half: usize,
    sums: &mut Array<Vector<f32, N2>>,
) {
    let mut b = Array::<Vector<E, N2>>::new(2usize);
    b[0] = four[comptime!(2 * half)];
    b[1] = four[comptime!(2 * half + 1)];
    def.execute_inplace(a, &b, sums);
}

/// `count` blocks of 16 x 8 zeros: a lane has rows `lane / 4` and 8 further, columns `2 (lane % 4)` and the next.
#[cube]
pub(crate) fn zeros<N2: Size>(#[comptime] count: usize) -> Sequence<Array<Vector<f32, N2>>> {
    let mut blocks = Sequence::<Array<Vector<f32, N2>>>::new();
    #[unroll]
    for _ in 0..count {
        let mut block = Array::<Vector<f32, N2>>::new(2usize);
        block[0] = Vector::new(0.0f32);
        block[1] = Vector::new(0.0f32);
        blocks.push(block);
    }
    blocks
}

/// Two neighbouring 16 x 8 blocks of sums as the 16 x 16 left operand of a product.
#[cube]
pub(crate) fn narrow<E: Float, N2: Size>(left: &Array<Vector<f32, N2>>, right: &Array<Vector<f32, N2>>) -> Array<Vector<E, N2>> {
    let mut a = Array::<Vector<E, N2>>::new(4usize);
    a[0] = Vector::<E, N2>::cast_from(left[0]);
    a[1] = Vector::<E, N2>::cast_from(left[1]);
    a[2] = Vector::<E, N2>::cast_from(right[0]);
    a[3] = Vector::<E, N2>::cast_from(right[1]);
    a
}

/// Largest magnitude of a tile -> the power of two to store it with as float16, and that to read it with (its inverse).
///
/// States that enter a chunk are kept so: three bits more than bf16 has, in the same space. The gradient of `a` is a sum over all
/// tokens in which most cancels, and states in bf16 make its error about five times as large. What meets them in products
/// is turned into float16 likewise, by [`to_half`]: of a bf16 value nothing is lost above 2^-22 of the tile's largest.
#[cube]
pub(crate) fn unit_of(top: f32) -> (f32, f32) {
    // Not so small that the inverse has none. The top comes to lie between 2^14 and 2^15.
    let exponent = max(u32::reinterpret(top) >> 23u32, 15u32);
    (f32::reinterpret((268u32 - exponent) << 23u32), f32::reinterpret((exponent - 14u32) << 23u32))
}

/// Turns a `[64][64]` tile into float16, times `by`; rows from `rows` on are zeros.
#[cube]
pub(crate) fn to_half<E: Float, N8: Size>(
    tile: &mut SharedMemory<Vector<E, N8>>,
    base: usize,
    rows: u32,
    by: f32,
    #[comptime] threads: usize,
) {
    #[unroll]
    for i in 0..comptime!(64 * PV / threads) {
        let index = UNIT_POS as usize + i * threads;
        let row = index / PV;
        let at = base + row * comptime!(PV + 1) + index % PV;
        let own = select((row as u32) < rows, by, 0.0f32);
        let value = Vector::<f32, N8>::cast_from(tile[at]) * Vector::<f32, N8>::new(own);
        tile[at] = Vector::<E, N8>::reinterpret(Vector::<f16, N8>::cast_from(value));
    }
}

/// As [`load4`], of values that are float16 whatever `E` is.
#[cube]
pub(crate) fn load4_half<E: Float, N8: Size, N2: Size>(
    def: MmaDefinition<E, E, f32>,
    tile: &SharedMemory<Vector<E, N8>>,
    off: usize,
    #[comptime] transposed: bool,
) -> Array<Vector<f16, N2>> {
    let four = load4::<E, N8, N2>(def, tile, off, transposed);
    let mut halves = Array::<Vector<f16, N2>>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        halves[i] = Vector::<f16, N2>::reinterpret(four[i]);
    }
    halves
}

/// Starts copying 64 rows of `width` vectors, `stride` apart from `from` on, into a padded tile at `base`. Rows from
/// `rows` on repeat the last one: readers give them no weight.
#[cube]
pub(crate) fn copy_rows<E: Float, N8: Size>(
    source: &Array<Vector<E, N8>>,
    tile: &mut SharedMemory<Vector<E, N8>>,
    from: usize,
    stride: usize,
    rows: usize,
    base: usize,
    #[comptime] width: usize,
    #[comptime] threads: usize,
) {
    let unit = UNIT_POS as usize;
    #[unroll]
    for i in 0..comptime!((64 * width).div_ceil(threads)) {
        let index = unit + i * threads;
        let row = index / width;
        let v = index % width;
        let last = rows - 1;
        let at = from + select(row < last, row, last) * stride + v;
        let to = base + row * comptime!(width + 1) + v;
        if comptime!((64 * width) % threads == 0) {
            copy_async(&source.slice(at, at + 1), &mut tile.slice_mut(to, to + 1), 8u32);
        } else if row < 64 {
            copy_async(&source.slice(at, at + 1), &mut tile.slice_mut(to, to + 1), 8u32);
        }
    }
}

/// As [`copy_rows`] for `heads` neighbouring heads, each into a tile of its own.
#[cube]
pub(crate) fn copy_heads<E: Float, N8: Size>(
    source: &Array<Vector<E, N8>>,
    tile: &mut SharedMemory<Vector<E, N8>>,
    from: usize,
    stride: usize,
    rows: usize,
    base: usize,
    #[comptime] heads: usize,
    #[comptime] threads: usize,
) {
    let unit = UNIT_POS as usize;
    #[unroll]
    for i in 0..comptime!(64 * PV * heads / threads) {
        let index = unit + i * threads;
        let row = index / comptime!(PV * heads);
        let v = index % comptime!(PV * heads);
        let last = rows - 1;
        let at = from + select(row < last, row, last) * stride + v;
        let to = base + (v / PV) * TILE + row * comptime!(PV + 1) + v % PV;
        copy_async(&source.slice(at, at + 1), &mut tile.slice_mut(to, to + 1), 8u32);
    }
}
