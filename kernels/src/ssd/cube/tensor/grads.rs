//! Gradients of `b`, `c`, step sizes and decays: one cube per chunk and group, over all heads of the group.
//!
//! From the state `S` that enters the chunk and the gradient `R` of the state that leaves it, with `i >= j`:
//!
//! ```text
//! dM[i, j] = dy_i . x_j            dG[i, j] = sum over heads of dM exp(s_i - s_j) delta_j
//! dc_i = sum over heads of exp(s_i) S^T dy_i                     + sum_j dG[i, j] b_j
//! db_j = sum over heads of delta_j exp(total - s_j) R^T x_j      + sum_i dG[i, j] c_i
//! ```
//!
//! The gradient of a token's log decay `delta_t a` is a sum over the pairs (from, to) that the decay lies between: both in the
//! chunk, from before it, to behind it, or across it. Every term is added where it occurs. (The short form, a suffix sum of
//! `y . dy - u . du` over the whole sequence, cancels large numbers that were rounded differently.)
//!
//! A plane owns 16 columns of `b` and `c` as rows of transposed sums over all 64 tokens, or over half of them.

use burn::tensor::f16;
use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;

use super::tiles::*;

/// Sums over the eight lanes that hold different rows of the same columns. Lane `g` of them is left with value `g` of
/// eight, or value `g / 2` of four.
#[cube]
fn sum_rows(values: &mut Array<f32>, #[comptime] count: usize) -> f32 {
    let lane = UNIT_POS_X;
    #[unroll]
    for step in 0..3usize {
        let mask = comptime!(16u32 >> step as u32);
        let half = comptime!(count >> (step + 1));
        if comptime!(half > 0) {
            let high = lane & mask != 0;
            #[unroll]
            for k in 0..half {
                let sent = select(high, values[k], values[k + half]);
                let kept = select(high, values[k + half], values[k]);
                values[k] = kept + plane_shuffle_xor(sent, mask);
            }
        } else {
            values[0] = values[0] + plane_shuffle_xor(values[0], mask);
        }
    }
    values[0]
}

/// Sum over the four lanes that hold different columns of the same rows: even ones are left with the first value, odd ones
/// with the second.
#[cube]
fn sum_columns(first: f32, second: f32) -> f32 {
    let odd = UNIT_POS_X & 1 == 1;
    let sent = select(odd, first, second);
    let kept = select(odd, second, first);
    let sum = kept + plane_shuffle_xor(sent, 1u32);
    sum + plane_shuffle_xor(sum, 2u32)
}

/// The largest of a tile's four.
#[cube]
fn largest<N4: Size>(tops: Vector<f32, N4>) -> f32 {
    max(max(tops[0], tops[1]), max(tops[2], tops[3]))
}

/// A head's `x` and `dy` as float16 in units of their own, of whose largest magnitudes `tops` and `dtops` hold four parts. Behind `rows`
/// there may be anything.
#[cube]
fn halve<E: Float, N8: Size, N4: Size>(
    sx: &mut SharedMemory<Vector<E, N8>>,
    sdy: &mut SharedMemory<Vector<E, N8>>,
    base: usize,
    rows: u32,
    tops: Vector<f32, N4>,
    dtops: Vector<f32, N4>,
    #[comptime] threads: usize,
) {
    let (up_x, _of_x) = unit_of(largest::<N4>(tops));
    let (up_y, _of_y) = unit_of(largest::<N4>(dtops));
    to_half::<E, N8>(sx, base, rows, up_x, threads);
    to_half::<E, N8>(sdy, base, rows, up_y, threads);
}

/// What the kernel reads and writes; part of the compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct GradsShape {
    /// State width.
    pub n: usize,
    /// Rows have documents and lengths.
    pub ids: bool,
    /// Head tiles in flight.
    pub slots: usize,
    /// Planes that share the columns of a plane, each with its part of the tokens: 1 or 2.
    pub parts: usize,
}

#[cube(launch_unchecked, fast_math = FastMath::all())]
pub(crate) fn ssd_grads<E: Float, N8: Size, N4: Size, N2: Size>(
    x: &Array<Vector<E, N8>>,
    dy: &Array<Vector<E, N8>>,
    b: &Array<Vector<E, N8>>,
    c: &Array<Vector<E, N8>>,
    states: &Array<Vector<E, N8>>,
    dstates: &Array<Vector<E, N8>>,
    units: &Array<Vector<f32, N4>>,
    dunits: &Array<Vector<f32, N4>>,
    delta: &Array<f32>,
    sums: &Array<f32>,
    ids: &Array<i32>,
    rows: &Array<i32>,
    db: &mut Array<Vector<E, N8>>,
    dc: &mut Array<Vector<E, N8>>,
    ddelta: &mut Array<f32>,
    ddecay: &mut Array<f32>,
    dskip: &mut Array<f32>,
    l: u32,
    heads: u32,
    groups: u32,
    x_stride: u32,
    dy_stride: u32,
    b_stride: u32,
    c_stride: u32,
    #[comptime] shape: GradsShape,
    #[define(E)] _dtype: StorageType,
) {
    let n = comptime!(shape.n);
    let slots = comptime!(shape.slots);
    let columns = comptime!(shape.n / 16);
    let planes = comptime!(shape.n / 16 * shape.parts);
    let threads = comptime!(shape.n * 2 * shape.parts);
    let rounds = comptime!(BLOCKS.div_ceil(shape.n / 16 * shape.parts));
    let own = comptime!(4 / shape.parts); // blocks of 16 tokens of a plane
    let at_once = comptime!(if shape.n > 128 { 1usize } else { 2usize }); // as registers allow
    let def = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let halves = MmaDefinition::<f16, f16, f32>::new(16usize, 8usize, 16usize);
    let bs = comptime!(n / 8 + 1);
    let nv = comptime!(n / 8);
    let bsz = comptime!(64 * (n / 8 + 1));
    let mut sx = SharedMemory::<Vector<E, N8>>::new_aligned(comptime!(TILE * slots), 128usize);
    let mut sdy = SharedMemory::<Vector<E, N8>>::new_aligned(comptime!(TILE * slots), 128usize);
    let mut ss = SharedMemory::<Vector<E, N8>>::new_aligned(comptime!(64 * (n / 8 + 1) * slots), 128usize);
    let mut sds = SharedMemory::<Vector<E, N8>>::new_aligned(comptime!(64 * (n / 8 + 1) * slots), 128usize);
    let mut sb = SharedMemory::<Vector<E, N8>>::new_aligned(comptime!(64 * (n / 8 + 1)), 128usize);
    let mut sc = SharedMemory::<Vector<E, N8>>::new_aligned(comptime!(64 * (n / 8 + 1)), 128usize);
    let mut sdg = SharedMemory::<Vector<E, N2>>::new_aligned(comptime!(64usize * 36), 128usize);
    // Per token of a head, twice: sum of log decays, step size, weights of reading and feeding.
    let mut s1 = SharedMemory::<f32>::new_aligned(128usize, 16usize);
    let mut s2 = SharedMemory::<Vector<f32, N2>>::new_aligned(64usize, 16usize);
    let mut sdelta = SharedMemory::<Vector<f32, N2>>::new_aligned(64usize, 16usize);
    let mut sread = SharedMemory::<Vector<f32, N2>>::new_aligned(64usize, 16usize);
    let mut sfeed = SharedMemory::<Vector<f32, N2>>::new_aligned(64usize, 16usize);
    let mut scarry = SharedMemory::<f32>::new_aligned(2usize, 16usize);
    // What a product of a head's dy and x is in, twice.
    let mut sunit = SharedMemory::<f32>::new_aligned(2usize, 16usize);
    let mut sid = SharedMemory::<i32>::new_aligned(comptime!(if shape.ids { 64usize } else { 4usize }), 16usize);
    // Partial sums of a head, twice: pairs from before and to behind the chunk per plane, pairs inside per block.
    let mut sends = SharedMemory::<f32>::new_aligned(comptime!(2 * 2 * 64 * (n / 16)), 16usize);
    let mut srow = SharedMemory::<f32>::new_aligned(comptime!(2 * 16 * BLOCKS), 16usize);
    let mut scol = SharedMemory::<f32>::new_aligned(comptime!(2 * 16 * BLOCKS), 16usize);
    let mut sacross = SharedMemory::<f32>::new_aligned(comptime!(2 * planes), 16usize);
    let mut sskip = SharedMemory::<f32>::new_aligned(comptime!(2usize * 4), 16usize);
    let bar0 = Barrier::shared(CUBE_DIM, UNIT_POS == 0);
    let bar1 = Barrier::shared(CUBE_DIM, UNIT_POS == 0);

    let lane = UNIT_POS_X as usize;
    let w = UNIT_POS_Y as usize;
    let cw = w % columns; // 16 columns of this plane
    let j0 = w / columns * own; // its first block of tokens
    let g = lane / 4;
    let t = lane % 4;
    let l7 = lane % 8;
    let q = lane / 8;
    let ra = lane % 16;
    let ca = lane / 16;
    let rb = (q / 2) * 8 + l7;
    let cb = q % 2;
    let rk = (q % 2) * 8 + l7;
    let ck = q / 2;
    let nh = heads as usize;
    let ratio = heads / groups;
    let all_chunks = l.div_ceil(64u32);
    let lp = (all_chunks * 64) as usize;
    let group = CUBE_POS_Y as usize;
    let bi = (CUBE_POS_X / all_chunks) as usize;
    let chunk = CUBE_POS_X % all_chunks;
    let t0 = chunk * 64;
    let tok0 = bi * l as usize + t0 as usize;
    let left = (l - t0) as usize;
    let mut length = l;
    if comptime!(shape.ids) {
        length = rows[bi * 2] as u32;
    }
    let real_rows = select(length > t0, length - t0, 0u32);
    let head0 = group * ratio as usize;
    let first_tile = (bi * all_chunks as usize + chunk as usize) * nh;
    let srow0 = first_tile * 64 * nv;
    sync_cube();

    copy_rows::<E, N8>(b, &mut sb, tok0 * b_stride as usize + group * nv, b_stride as usize, left, 0usize, nv, threads);
    copy_rows::<E, N8>(c, &mut sc, tok0 * c_stride as usize + group * nv, c_stride as usize, left, 0usize, nv, threads);
    copy_rows::<E, N8>(x, &mut sx, tok0 * x_stride as usize + head0 * PV, x_stride as usize, left, 0usize, PV, threads);
    copy_rows::<E, N8>(dy, &mut sdy, tok0 * dy_stride as usize + head0 * PV, dy_stride as usize, left, 0usize, PV, threads);
    copy_rows::<E, N8>(states, &mut ss, srow0 + head0 * 64 * nv, nv, 64usize, 0usize, nv, threads);
    copy_rows::<E, N8>(dstates, &mut sds, srow0 + head0 * 64 * nv, nv, 64usize, 0usize, nv, threads);
    bar0.commit_copy_async();
    let _t0 = bar0.arrive();

    // The first plane makes the weights of a head and gathers its sums.
    let mut valid0 = 0.0f32;
    let mut valid1 = 0.0f32;
    let mut from0 = 1.0f32;
    let mut from1 = 1.0f32;
    let mut to0 = 1.0f32;
    let mut to1 = 1.0f32;
    let mut through = 1.0f32;
    let ta = t0 + 2 * lane as u32;
    if w == 0 {
        valid0 = select(ta < length, 1.0f32, 0.0f32);
        valid1 = select(ta + 1 < length, 1.0f32, 0.0f32);
        if comptime!(shape.ids) {
            let last = l - 1;
            let row = bi * l as usize;
            let i0 = ids[row + select(ta < last, ta, last) as usize];
            let i1 = ids[row + select(ta + 1 < last, ta + 1, last) as usize];
            let mut before = rows[bi * 2 + 1];
            if t0 > 0 {
                before = ids[tok0 - 1];
            }
            let behind = plane_broadcast(i1, 31u32);
            sid[2 * lane] = i0;
            sid[2 * lane + 1] = i1;
            from0 = select(i0 == before, 1.0f32, 0.0f32);
            from1 = select(i1 == before, 1.0f32, 0.0f32);
            to0 = select(i0 == behind, 1.0f32, 0.0f32);
            to1 = select(i1 == behind, 1.0f32, 0.0f32);
            through = select(behind == before, 1.0f32, 0.0f32);
        }
    }
    let mut adc = zeros::<N2>(comptime!(2 * own));
    let mut adb = zeros::<N2>(comptime!(2 * own));
    let mut gs = zeros::<N2>(comptime!(2 * rounds));
    let mut dgs = zeros::<N2>(comptime!(2 * rounds));

    if comptime!(slots == 2) {
        bar0.wait_parity(0u32);
        let tile = (first_tile + head0) * 2;
        halve::<E, N8, N4>(&mut sx, &mut sdy, 0usize, real_rows, units[tile], dunits[tile], threads);
    }
    for hi in 0..ratio {
        let par = (hi & 1u32) as usize;
        let slot = comptime!(if slots == 2 { 1usize } else { 0usize }) * par;
        let head = head0 + hi as usize;
        if w == 0 {
            let at = (bi * nh + head) * lp + t0 as usize + 2 * lane;
            let c0 = sums[at];
            let c1 = sums[at + 1];
            // x and dy are in units of their own, and so are the states that they meet.
            let tile = (first_tile + head) * 2;
            let (_up_x, of_x) = unit_of(largest::<N4>(units[tile]));
            let (_up_y, of_y) = unit_of(largest::<N4>(dunits[tile]));
            let of_s = units[tile + 1][0];
            let of_r = dunits[tile + 1][0];
            let ct = plane_broadcast(c1, 31u32);
            let mut vs = Vector::<f32, N2>::new(c0);
            vs[1] = c1;
            let mut vd = Vector::<f32, N2>::new(delta[at]);
            vd[1] = delta[at + 1];
            let reads = of_s * of_y;
            let feeds = of_r * of_x;
            let mut vr = Vector::<f32, N2>::new(f32::exp(c0) * from0 * valid0 * reads);
            vr[1] = f32::exp(c1) * from1 * valid1 * reads;
            let mut vf = Vector::<f32, N2>::new(f32::exp(ct - c0) * to0 * feeds);
            vf[1] = f32::exp(ct - c1) * to1 * feeds;
            let o = par * 32 + lane;
            s2[o] = vs;
            s1[2 * o] = c0;
            s1[2 * o + 1] = c1;
            sdelta[o] = vd;
            sread[o] = vr;
            sfeed[o] = vf;
            if lane == 0 {
                scarry[par] = f32::exp(ct) * through * of_s * of_r;
                sunit[par] = of_x * of_y;
            }
        }
        sync_cube();
        if w == 0 && hi > 0 {
            finish::<N2>(
                &sends,
                &srow,
                &scol,
                &sacross,
                &sskip,
                &sdelta,
                &mut *ddelta,
                &mut *ddecay,
                &mut *dskip,
                1 - par,
                (bi * nh + head - 1) * lp + t0 as usize,
                (bi * all_chunks as usize + chunk as usize) * nh + head - 1,
                valid0,
                valid1,
                columns,
                planes,
            );
        }
        if comptime!(slots == 2) {
            if hi + 1 < ratio {
                let next = head + 1;
                let other = 1 - par;
                copy_rows::<E, N8>(x, &mut sx, tok0 * x_stride as usize + next * PV, x_stride as usize, left, other * TILE, PV, threads);
                copy_rows::<E, N8>(
                    dy,
                    &mut sdy,
                    tok0 * dy_stride as usize + next * PV,
                    dy_stride as usize,
                    left,
                    other * TILE,
                    PV,
                    threads,
                );
                copy_rows::<E, N8>(states, &mut ss, srow0 + next * 64 * nv, nv, 64usize, other * bsz, nv, threads);
                copy_rows::<E, N8>(dstates, &mut sds, srow0 + next * 64 * nv, nv, 64usize, other * bsz, nv, threads);
                if par == 0 {
                    bar1.commit_copy_async();
                    let _t1 = bar1.arrive();
                } else {
                    bar0.commit_copy_async();
                    let _t2 = bar0.arrive();
                }
            }
        } else {
            if hi > 0 {
                copy_rows::<E, N8>(x, &mut sx, tok0 * x_stride as usize + head * PV, x_stride as usize, left, 0usize, PV, threads);
                copy_rows::<E, N8>(dy, &mut sdy, tok0 * dy_stride as usize + head * PV, dy_stride as usize, left, 0usize, PV, threads);
                copy_rows::<E, N8>(states, &mut ss, srow0 + head * 64 * nv, nv, 64usize, 0usize, nv, threads);
                copy_rows::<E, N8>(dstates, &mut sds, srow0 + head * 64 * nv, nv, 64usize, 0usize, nv, threads);
                bar0.commit_copy_async();
                let _t3 = bar0.arrive();
            }
            bar0.wait_parity(hi & 1u32);
            let tile = (first_tile + head) * 2;
            halve::<E, N8, N4>(&mut sx, &mut sdy, 0usize, real_rows, units[tile], dunits[tile], threads);
            sync_cube();
        }
        if hi == 0 {
            // G = c b^T, the blocks that this plane keeps.
            #[unroll]
            for round in 0..rounds {
                let block = planes - 1 - w + comptime!(round * planes);
                if block < BLOCKS {
                    let (mi, ni) = place(block);
                    #[unroll]
                    for k in 0..comptime!(n / 16) {
                        let fa = load4::<E, N8, N2>(def, &sc, (mi * 16 + ra) * bs + ca + k * 2, false);
                        let fb = load4::<E, N8, N2>(def, &sb, (ni * 16 + rb) * bs + cb + k * 2, false);
                        multiply::<E, N2>(def, &fa, &fb, 0usize, gs.index_mut(comptime!(2 * round)));
                        multiply::<E, N2>(def, &fa, &fb, 1usize, gs.index_mut(comptime!(2 * round + 1)));
                    }
                }
            }
        }
        let xb = slot * TILE;
        let sbase = slot * bsz;
        // Pairs inside the chunk.
        #[unroll]
        for round in 0..rounds {
            let block = planes - 1 - w + comptime!(round * planes);
            if block < BLOCKS {
                let (mi, ni) = place(block);
                let mut dm = zeros::<N2>(2usize);
                #[unroll]
                for k in 0..4usize {
                    let fa = load4_half::<E, N8, N2>(def, &sdy, xb + (mi * 16 + ra) * 9 + ca + k * 2, false);
                    let fb = load4_half::<E, N8, N2>(def, &sx, xb + (ni * 16 + rb) * 9 + cb + k * 2, false);
                    multiply::<f16, N2>(halves, &fa, &fb, 0usize, dm.index_mut(0usize));
                    multiply::<f16, N2>(halves, &fa, &fb, 1usize, dm.index_mut(1usize));
                }
                let unit = Vector::<f32, N2>::new(sunit[par]);
                let r0 = mi * 16 + g;
                let r1 = r0 + 8;
                let sl0 = s1[par * 64 + r0];
                let sl1 = s1[par * 64 + r1];
                let real0 = t0 + (r0 as u32) < length;
                let real1 = t0 + (r1 as u32) < length;
                let mut row0 = 0.0f32;
                let mut row1 = 0.0f32;
                let mut diagonal = 0.0f32;
                let mut columns = Array::<f32>::new(4usize);
                #[unroll]
                for half in 0..2usize {
                    let cc = ni * 8 + half * 4 + t;
                    let col = cc * 2;
                    let sv = s2[par * 32 + cc];
                    let dv = sdelta[par * 32 + cc];
                    let m = dm.index(half);
                    let gm = gs.index(comptime!(2 * round + half));
                    let dg = dgs.index_mut(comptime!(2 * round + half));
                    let m0 = m[0] * unit;
                    let m1 = m[1] * unit;
                    let g0 = gm[0];
                    let g1 = gm[1];
                    let mut a0 = dg[0];
                    let mut a1 = dg[1];
                    #[unroll]
                    for e in 0..2usize {
                        let mut see0 = r0 >= col + e && real0;
                        let mut see1 = r1 >= col + e && real1;
                        if comptime!(shape.ids) {
                            let id = sid[col + e];
                            see0 = see0 && sid[r0] == id;
                            see1 = see1 && sid[r1] == id;
                        }
                        let f0 = select(see0, m0[e] * f32::exp(sl0 - sv[e]), 0.0f32);
                        let f1 = select(see1, m1[e] * f32::exp(sl1 - sv[e]), 0.0f32);
                        a0[e] = a0[e] + f0 * dv[e];
                        a1[e] = a1[e] + f1 * dv[e];
                        let p0 = f0 * g0[e];
                        let p1 = f1 * g1[e];
                        columns[comptime!(2 * half + e)] = p0 + p1;
                        row0 += p0 * dv[e];
                        row1 += p1 * dv[e];
                        if mi == ni {
                            diagonal += select(r0 == col + e, f0, 0.0f32) + select(r1 == col + e, f1, 0.0f32);
                        }
                    }
                    dg[0] = a0;
                    dg[1] = a1;
                }
                let column = sum_rows(&mut columns, 4usize);
                if g % 2 == 0 {
                    scol[(par * BLOCKS + block) * 16 + g / 4 * 8 + 2 * t + g / 2 % 2] = column;
                }
                let row = sum_columns(row0, row1);
                if t < 2 {
                    srow[(par * BLOCKS + block) * 16 + g + 8 * t] = row;
                }
                if mi == ni {
                    let diagonal = plane_sum(diagonal);
                    if lane == 0 {
                        sskip[par * 4 + mi] = diagonal;
                    }
                }
            }
        }
        // Pairs from before the chunk (S with dy), to behind it (R with x), and across it; some blocks of tokens at a time.
        let mut across = 0.0f32;
        #[unroll]
        for part in 0..comptime!(own / at_once) {
            let mut ends = Sequence::<Array<f32>>::new();
            #[unroll]
            for _ in 0..at_once {
                ends.push(Array::<f32>::new(8usize));
            }
            #[unroll]
            for side in 0..2usize {
                let mut sums = zeros::<N2>(comptime!(2 * at_once));
                #[unroll]
                for k in 0..4usize {
                    let at = sbase + (k * 16 + rb) * bs + cw * 2 + cb;
                    let stored = if comptime!(side == 0) {
                        load4_half::<E, N8, N2>(def, &ss, at, true)
                    } else {
                        load4_half::<E, N8, N2>(def, &sds, at, true)
                    };
                    // Planes with the same columns have the same fragments: each counts its part.
                    if comptime!(part == 0 && side == 1) {
                        if k / own * own == j0 {
                            let other = load4_half::<E, N8, N2>(def, &ss, at, true);
                            let mut both = Vector::<f32, N2>::new(0.0f32);
                            #[unroll]
                            for i in 0..4usize {
                                both += Vector::<f32, N2>::cast_from(stored[i]) * Vector::<f32, N2>::cast_from(other[i]);
                            }
                            across += both[0] + both[1];
                        }
                    }
                    #[unroll]
                    for i in 0..at_once {
                        let at = xb + ((j0 + comptime!(part * at_once + i)) * 16 + rb) * 9 + cb + k * 2;
                        let four = if comptime!(side == 0) {
                            load4_half::<E, N8, N2>(def, &sdy, at, false)
                        } else {
                            load4_half::<E, N8, N2>(def, &sx, at, false)
                        };
                        #[unroll]
                        for half in 0..2usize {
                            multiply::<f16, N2>(halves, &stored, &four, half, sums.index_mut(comptime!(2 * i + half)));
                        }
                    }
                }
                #[unroll]
                for i in 0..at_once {
                    let j = comptime!(part * at_once + i);
                    let tokens = j0 + j;
                    let at = (tokens * 16 + rb) * bs + cw * 2 + cb;
                    let four =
                        if comptime!(side == 0) { load4::<E, N8, N2>(def, &sc, at, true) } else { load4::<E, N8, N2>(def, &sb, at, true) };
                    #[unroll]
                    for half in 0..2usize {
                        let o = par * 32 + tokens * 8 + half * 4 + t;
                        let weight = if comptime!(side == 0) { sread[o] } else { sfeed[o] };
                        let s0 = sums.index(comptime!(2 * i + half))[0] * weight;
                        let s1 = sums.index(comptime!(2 * i + half))[1] * weight;
                        let end = s0 * Vector::<f32, N2>::cast_from(four[comptime!(2 * half)])
                            + s1 * Vector::<f32, N2>::cast_from(four[comptime!(2 * half + 1)]);
                        if comptime!(side == 0) {
                            let ac = adc.index_mut(comptime!(2 * j + half));
                            ac[0] = ac[0] + s0;
                            ac[1] = ac[1] + s1;
                        } else {
                            let step = sdelta[o];
                            let ab = adb.index_mut(comptime!(2 * j + half));
                            ab[0] = ab[0] + s0 * step;
                            ab[1] = ab[1] + s1 * step;
                        }
                        let own_ends = ends.index_mut(i);
                        #[unroll]
                        for e in 0..2usize {
                            own_ends[comptime!(4 * side + 2 * half + e)] = end[e];
                        }
                    }
                }
            }
            #[unroll]
            for i in 0..at_once {
                let tokens = j0 + comptime!(part * at_once + i);
                // Lane `g` has one of: from or to, left or right half, first or second column.
                let end = sum_rows(ends.index_mut(i), 8usize);
                sends[((par * 2 + g / 4) * columns + cw) * 64 + (tokens * 8 + g / 2 % 2 * 4 + t) * 2 + g % 2] = end;
            }
        }
        let across = plane_sum(across);
        if lane == 0 {
            sacross[par * planes + w] = across * scarry[par];
        }
        if comptime!(slots == 2) {
            // The next head's tiles, which arrived meanwhile.
            if hi + 1 < ratio {
                let phase = ((hi + 1) >> 1u32) & 1u32;
                if par == 0 {
                    bar1.wait_parity(phase);
                } else {
                    bar0.wait_parity(phase);
                }
                let tile = (first_tile + head + 1) * 2;
                halve::<E, N8, N4>(&mut sx, &mut sdy, (1 - par) * TILE, real_rows, units[tile], dunits[tile], threads);
            }
        } else {
            sync_cube();
        }
    }
    sync_cube();
    if w == 0 {
        let par = ((ratio - 1) & 1u32) as usize;
        let head = head0 + ratio as usize - 1;
        finish::<N2>(
            &sends,
            &srow,
            &scol,
            &sacross,
            &sskip,
            &sdelta,
            &mut *ddelta,
            &mut *ddecay,
            &mut *dskip,
            par,
            (bi * nh + head) * lp + t0 as usize,
            (bi * all_chunks as usize + chunk as usize) * nh + head,
            valid0,
            valid1,
            columns,
            planes,
        );
    }
    // dG for the products with b and c, in a high and a low part: once for all heads, that costs next to nothing.
    #[unroll]
    for part in 0..2usize {
        #[unroll]
        for round in 0..rounds {
            let block = planes - 1 - w + comptime!(round * planes);
            if block < BLOCKS {
                let (mi, ni) = place(block);
                #[unroll]
                for half in 0..2usize {
                    let dg = dgs.index_mut(comptime!(2 * round + half));
                    let at = (mi * 16 + g) * 36 + ni * 8 + half * 4 + t;
                    let upper = Vector::<E, N2>::cast_from(dg[0]);
                    let lower = Vector::<E, N2>::cast_from(dg[1]);
                    sdg[at] = upper;
                    sdg[at + 8 * 36] = lower;
                    dg[0] = dg[0] - Vector::<f32, N2>::cast_from(upper);
                    dg[1] = dg[1] - Vector::<f32, N2>::cast_from(lower);
                }
            }
        }
        sync_cube();
        #[unroll]
        for k in 0..4usize {
            let at = (k * 16 + rb) * bs + cw * 2 + cb;
            let fb = load4::<E, N8, N2>(def, &sb, at, true);
            let fc = load4::<E, N8, N2>(def, &sc, at, true);
            #[unroll]
            for j in 0..own {
                let tokens = j0 + j;
                if tokens >= k {
                    let four = load4_pairs::<E, N2>(def, &sdg, (tokens * 16 + rb) * 36 + k * 8 + cb * 4, false);
                    multiply::<E, N2>(def, &fb, &four, 0usize, adc.index_mut(comptime!(2 * j)));
                    multiply::<E, N2>(def, &fb, &four, 1usize, adc.index_mut(comptime!(2 * j + 1)));
                }
                if tokens <= k {
                    let four = load4_pairs::<E, N2>(def, &sdg, (k * 16 + rk) * 36 + tokens * 8 + ck * 4, true);
                    multiply::<E, N2>(def, &fc, &four, 0usize, adb.index_mut(comptime!(2 * j)));
                    multiply::<E, N2>(def, &fc, &four, 1usize, adb.index_mut(comptime!(2 * j + 1)));
                }
            }
        }
        if comptime!(part == 0) {
            sync_cube();
        }
    }
    // Out through each plane's own part of the tiles of states.
    #[unroll]
    for j in 0..own {
        let o = ((j0 + j) * 16 + rb) * bs + cw * 2 + cb;
        let rc = narrow::<E, N2>(adc.index(comptime!(2 * j)), adc.index(comptime!(2 * j + 1)));
        let rbs = narrow::<E, N2>(adb.index(comptime!(2 * j)), adb.index(comptime!(2 * j + 1)));
        def.store_matrix::<Vector<E, N8>, N2>(&mut ss.slice_mut(o, o + 1), &rc, MatrixIdent::Accumulator, 4usize, true);
        def.store_matrix::<Vector<E, N8>, N2>(&mut sds.slice_mut(o, o + 1), &rbs, MatrixIdent::Accumulator, 4usize, true);
    }
    sync_plane();
    #[unroll]
    for j in 0..own {
        let row = (j0 + j) * 16 + lane / 2;
        let v = cw * 2 + lane % 2;
        if row < left {
            let at = ((tok0 + row) * groups as usize + group) * nv + v;
            dc[at] = ss[row * bs + v];
            db[at] = sds[row * bs + v];
        }
    }
}

/// Gathers what the planes found for one head: gradients of its step sizes and log decays, and of the skip connection.
#[cube]
fn finish<N2: Size>(
    sends: &SharedMemory<f32>,
    srow: &SharedMemory<f32>,
    scol: &SharedMemory<f32>,
    sacross: &SharedMemory<f32>,
    sskip: &SharedMemory<f32>,
    sdelta: &SharedMemory<Vector<f32, N2>>,
    ddelta: &mut Array<f32>,
    ddecay: &mut Array<f32>,
    dskip: &mut Array<f32>,
    par: usize,
    at: usize,
    head: usize,
    valid0: f32,
    valid1: f32,
    #[comptime] columns: usize,
    #[comptime] planes: usize,
) {
    let lane = UNIT_POS_X as usize;
    // Two tokens a lane, the last ones first: sums over what follows are running sums then.
    let pair = 31 - lane;
    let mut from = Vector::<f32, N2>::new(0.0f32);
    let mut to = Vector::<f32, N2>::new(0.0f32);
    let mut across = 0.0f32;
    #[unroll]
    for p in 0..columns {
        let at = (par * 2 * columns + p) * 64 + 2 * pair;
        let mut own = Vector::<f32, N2>::new(sends[at]);
        own[1] = sends[at + 1];
        from += own;
        let at = at + columns * 64;
        let mut own = Vector::<f32, N2>::new(sends[at]);
        own[1] = sends[at + 1];
        to += own;
    }
    #[unroll]
    for p in 0..planes {
        across += sacross[par * planes + p];
    }
    let own = pair / 8;
    let inside = (pair % 8) * 2;
    let mut row0 = 0.0f32;
    let mut row1 = 0.0f32;
    let mut col0 = 0.0f32;
    let mut col1 = 0.0f32;
    #[unroll]
    for other in 0..4usize {
        if other <= own {
            let o = (par * BLOCKS + own * (own + 1) / 2 + other) * 16 + inside;
            row0 += srow[o];
            row1 += srow[o + 1];
        }
        if other >= own {
            let o = (par * BLOCKS + comptime!(other * (other + 1) / 2) + own) * 16 + inside;
            col0 += scol[o];
            col1 += scol[o + 1];
        }
    }
    let step = sdelta[par * 32 + pair];
    let end0 = row0 + from[0] - step[0] * col0;
    let end1 = row1 + from[1] - step[1] * col1;
    let behind = plane_inclusive_sum(end0 + end1);
    let begin = (to[0] * step[0]) + (to[1] * step[1]);
    // Exclusive sum over earlier tokens: those of higher lanes.
    let upto = plane_inclusive_sum(begin);
    let whole = plane_broadcast(upto, 31u32);
    let before = whole - upto;
    let token = at + 2 * pair;
    ddecay[token] = behind + across + before;
    ddecay[token + 1] = behind - end0 + across + before + to[0] * step[0];
    // Validity was read by the lane that holds the pair in its own order.
    let real0 = plane_shuffle(valid0, 31u32 - UNIT_POS_X);
    let real1 = plane_shuffle(valid1, 31u32 - UNIT_POS_X);
    ddelta[token] = (col0 + to[0]) * real0;
    ddelta[token + 1] = (col1 + to[1]) * real1;
    if lane == 0 {
        dskip[head] = sskip[par * 4] + sskip[par * 4 + 1] + sskip[par * 4 + 2] + sskip[par * 4 + 3];
    }
}
