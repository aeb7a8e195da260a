//! One kernel that walks a sequence chunk by chunk with the state in registers.
//!
//! Forward in time it is the scan; backward in time, with `x` replaced by the gradient of `y` and `b` and `c` exchanged, it
//! is the gradient of `x`. With `keys` feeding the state and `queries` reading it, tokens `u` before `t` in walking order:
//!
//! ```text
//! out_t = scale_t (sum_u M[t, u] input_u + read_t S queries_t) + skip input_t
//! M[t, u] = (queries_t . keys_u) exp(|s_t - s_u|) column_u
//! S = carry S + sum_u feed_u input_u keys_u^T
//! ```
//!
//! | | forward | backward |
//! |---|---|---|
//! | column, scale | `delta`, 1 | 1, `delta` |
//! | read | `exp(s)` | `exp(total - s)` |
//! | feed | `delta exp(total - s)` | `exp(s)` |
//!
//! A cube is `4 hg` planes and `hw hg` heads of one batch row and one segment of the sequence. Plane `w` of four owns rows
//! `16 w .. 16 w + 16` of `S [p, n]` for `hw` heads, as sums of `mma`: cast to 16 bits they are the left operand of
//! `S queries^T` as they stand, so the state never leaves registers. `M` is made by all planes, goes through shared memory,
//! and meets the same fragments of `input^T` that feed the state.

use burn::tensor::f16;
use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;

use super::tiles::*;

/// First token of the `i`th chunk of a walk over `count` chunks from `first` on.
#[cube]
fn chunk_start(first: u32, count: u32, i: u32, #[comptime] reverse: bool) -> u32 {
    let mut chunk = first + i;
    if comptime!(reverse) {
        chunk = first + count - 1 - i;
    }
    chunk * 64
}

/// What a walk does; part of the compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Walk {
    /// Heads of a plane.
    pub hw: usize,
    /// Groups of four planes.
    pub hg: usize,
    /// State width.
    pub n: usize,
    /// Walk from the last token to the first.
    pub reverse: bool,
    /// Start from `init`, not from zeros.
    pub init: bool,
    /// Write `out`.
    pub out: bool,
    /// Write the state that enters each chunk, see [`unit_of`], and the largest magnitudes of the chunk's input.
    pub dump: bool,
    /// Write the state that leaves every segment and how much of what entered it kept, not the last state alone.
    pub locals: bool,
    /// Rows have documents and lengths.
    pub ids: bool,
    /// There is a skip connection.
    pub skip: bool,
    /// Feed the state with high and low parts of weighted inputs: high ones alone leave it off by 1.7e-3 of its norm in bf16.
    pub split_feed: bool,
}

#[cube(launch_unchecked, fast_math = FastMath::all())]
pub(crate) fn ssd_walk<E: Float, N8: Size, N4: Size, N2: Size>(
    input: &Array<Vector<E, N8>>,
    keys: &Array<Vector<E, N8>>,
    queries: &Array<Vector<E, N8>>,
    delta: &Array<f32>,
    sums: &Array<f32>,
    ids: &Array<i32>,
    rows: &Array<i32>,
    skip: &Array<f32>,
    init: &Array<Vector<f32, N2>>,
    out: &mut Array<Vector<E, N8>>,
    end: &mut Array<Vector<f32, N2>>,
    dump: &mut Array<Vector<u32, N4>>,
    units: &mut Array<f32>,
    kept: &mut Array<f32>,
    l: u32,
    heads: u32,
    groups: u32,
    chunks: u32,
    segments: u32,
    running: u32,
    first_segment: u32,
    input_stride: u32,
    key_stride: u32,
    query_stride: u32,
    #[comptime] walk: Walk,
    #[define(E)] _dtype: StorageType,
) {
    let hw = comptime!(walk.hw);
    let hg = comptime!(walk.hg);
    let n = comptime!(walk.n);
    let reverse = comptime!(walk.reverse);
    let hb = comptime!(hw * hg);
    let def = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let bs = comptime!(n / 8 + 1);
    let nv = comptime!(n / 8);
    let half_n = comptime!(n / 2);
    let threads = comptime!(128 * hg);
    let bsz = comptime!(64 * (n / 8 + 1));
    // Keys and queries arrive a chunk ahead; inputs too where there are no outputs and so nothing to do while they come.
    let ahead = comptime!(if walk.out { 1usize } else { 2usize });
    let mut sx = SharedMemory::<Vector<E, N8>>::new_aligned(comptime!(ahead * TILE * hw * hg), 128usize);
    let mut sb = SharedMemory::<Vector<E, N8>>::new_aligned(comptime!(2 * 64 * (n / 8 + 1)), 128usize);
    let mut sc = SharedMemory::<Vector<E, N8>>::new_aligned(comptime!(if walk.out { 2 * 64 * (n / 8 + 1) } else { 8 }), 128usize);
    let mut sm = SharedMemory::<Vector<E, N2>>::new_aligned(comptime!(if walk.out { hw * hg * 64 * 36 } else { 8 }), 128usize);
    // Of each token, for this chunk and the next: the sum of log decays (also two by two), its weight as a column of M, as a
    // reader and a feeder of the state, and the scale of its output.
    let mut s1 = SharedMemory::<f32>::new_aligned(comptime!(2 * hw * hg * 64), 16usize);
    let mut s2 = SharedMemory::<Vector<f32, N2>>::new_aligned(comptime!(2 * hw * hg * 32), 16usize);
    let mut scol = SharedMemory::<Vector<f32, N2>>::new_aligned(comptime!(2 * hw * hg * 32), 16usize);
    let mut sread = SharedMemory::<Vector<f32, N2>>::new_aligned(comptime!(2 * hw * hg * 32), 16usize);
    let mut sfeed = SharedMemory::<Vector<f32, N2>>::new_aligned(comptime!(2 * hw * hg * 32), 16usize);
    let mut sscale = SharedMemory::<Vector<f32, N2>>::new_aligned(comptime!(if walk.reverse { 2 * hw * hg * 32 } else { 8 }), 16usize);
    let mut scarry = SharedMemory::<f32>::new_aligned(comptime!(2 * hw * hg), 16usize);
    let mut sid = SharedMemory::<i32>::new_aligned(comptime!(if walk.ids { 128usize } else { 4usize }), 16usize);
    // Largest magnitude of each plane's rows of the state that enters the chunk.
    let mut stop = SharedMemory::<f32>::new_aligned(comptime!(if walk.dump { 2 * 4 * hw * hg } else { 4 }), 16usize);
    let bar0 = Barrier::shared(CUBE_DIM, UNIT_POS == 0);
    let bar1 = Barrier::shared(CUBE_DIM, UNIT_POS == 0);
    let barx = Barrier::shared(CUBE_DIM, UNIT_POS == 0);

    let lane = UNIT_POS_X as usize;
    let w = UNIT_POS_Y as usize;
    let hl = (w / 4) * hw; // first of this plane's heads in the cube
    let pw = (w % 4) * 2; // first vector of this plane's 16 columns of P
    let g = lane / 4;
    let t = lane % 4;
    let nh = heads as usize;
    let h0 = CUBE_POS_X as usize * hb;
    let hc = h0 + w; // head whose weights this plane makes, if w < hb
    let bi = (CUBE_POS_Y / running) as usize;
    let seg = first_segment + CUBE_POS_Y % running;
    let sidx = bi * segments as usize + seg as usize;
    let all_chunks = l.div_ceil(64u32);
    let first = seg * chunks;
    let mut count = chunks;
    if first + count > all_chunks {
        count = all_chunks - first;
    }
    let lp = (all_chunks * 64) as usize;
    let tok0 = bi * l as usize;
    let group = (h0 as u32 / (heads / groups)) as usize;
    let mut length = l;
    if comptime!(walk.ids) {
        length = rows[bi * 2] as u32;
    }
    let xs = input_stride as usize;
    let ks = key_stride as usize;
    let qs = query_stride as usize;
    // Where each lane points in the loads of four matrices.
    let l7 = lane % 8;
    let q = lane / 8;
    let ra = lane % 16; // left operand, row-major
    let ca = lane / 16;
    let rb = (q / 2) * 8 + l7; // right operand [n][k]
    let cb = q % 2;
    let rk = (q % 2) * 8 + l7; // right operand [k][n], transposed
    let ck = q / 2;
    sync_cube();

    let start = chunk_start(first, count, 0u32, reverse);
    let from = tok0 + start as usize;
    let rows_left = (l - start) as usize;
    copy_rows::<E, N8>(keys, &mut sb, from * ks + group * nv, ks, rows_left, 0usize, nv, threads);
    if comptime!(walk.out) {
        copy_rows::<E, N8>(queries, &mut sc, from * qs + group * nv, qs, rows_left, 0usize, nv, threads);
    } else {
        copy_heads::<E, N8>(input, &mut sx, from * xs + h0 * PV, xs, rows_left, 0usize, hb, threads);
    }
    bar0.commit_copy_async();
    let _t0 = bar0.arrive();
    let mut total = 1.0f32;
    let mut st = zeros::<N2>(comptime!(hw * n / 8));
    if comptime!(walk.init) {
        #[unroll]
        for h in 0..hw {
            let sbase = ((sidx * nh + h0 + hl + h) * 64 + pw * 8) * half_n;
            #[unroll]
            for j in 0..comptime!(n / 8) {
                let s = st.index_mut(comptime!(h * n / 8 + j));
                s[0] = init[sbase + g * half_n + j * 4 + t];
                s[1] = init[sbase + (g + 8) * half_n + j * 4 + t];
            }
        }
    }
    // Values of the coming chunk, two tokens a lane.
    let mut c0 = 0.0f32;
    let mut c1 = 0.0f32;
    let mut d0 = 0.0f32;
    let mut d1 = 0.0f32;
    let mut i0 = 0i32;
    let mut i1 = 0i32;
    let mut before = 0i32;
    if w < hb {
        let at = (bi * nh + hc) * lp + start as usize + 2 * lane;
        c0 = sums[at];
        c1 = sums[at + 1];
        d0 = delta[at];
        d1 = delta[at + 1];
        if comptime!(walk.ids) {
            let ta = start + 2 * lane as u32;
            let last = l - 1;
            i0 = ids[tok0 + select(ta < last, ta, last) as usize];
            i1 = ids[tok0 + select(ta + 1 < last, ta + 1, last) as usize];
            before = rows[bi * 2 + 1];
            if start > 0 {
                before = ids[tok0 + start as usize - 1];
            }
        }
    }
    for i in 0..count {
        let par = (i & 1u32) as usize;
        let t0 = chunk_start(first, count, i, reverse);
        let hbase = (par * hb + w) * 32;
        if w < hb {
            let ct = plane_broadcast(c1, 31u32);
            let ta = t0 + 2 * lane as u32;
            let v0 = select(ta < length, 1.0f32, 0.0f32);
            let v1 = select(ta + 1 < length, 1.0f32, 0.0f32);
            let mut carry = f32::exp(ct);
            let mut from0 = 1.0f32; // of the document that enters the chunk
            let mut from1 = 1.0f32;
            let mut to0 = 1.0f32; // of the document that leaves it
            let mut to1 = 1.0f32;
            if comptime!(walk.ids) {
                let last = plane_broadcast(i1, 31u32);
                from0 = select(i0 == before, 1.0f32, 0.0f32);
                from1 = select(i1 == before, 1.0f32, 0.0f32);
                to0 = select(i0 == last, 1.0f32, 0.0f32);
                to1 = select(i1 == last, 1.0f32, 0.0f32);
                carry = select(last == before, carry, 0.0f32);
                if w == 0 {
                    sid[par * 64 + 2 * lane] = i0;
                    sid[par * 64 + 2 * lane + 1] = i1;
                }
            }
            let mut vs = Vector::<f32, N2>::new(c0);
            vs[1] = c1;
            let mut vd = Vector::<f32, N2>::new(d0);
            vd[1] = d1;
            s2[hbase + lane] = vs;
            s1[hbase * 2 + 2 * lane] = c0;
            s1[hbase * 2 + 2 * lane + 1] = c1;
            if comptime!(reverse) {
                let mut vc = Vector::<f32, N2>::new(v0);
                vc[1] = v1;
                let mut vr = Vector::<f32, N2>::new(f32::exp(ct - c0) * to0);
                vr[1] = f32::exp(ct - c1) * to1;
                let mut vf = Vector::<f32, N2>::new(f32::exp(c0) * from0 * v0);
                vf[1] = f32::exp(c1) * from1 * v1;
                scol[hbase + lane] = vc;
                sread[hbase + lane] = vr;
                sfeed[hbase + lane] = vf;
                sscale[hbase + lane] = vd;
            } else {
                let mut vr = Vector::<f32, N2>::new(f32::exp(c0) * from0);
                vr[1] = f32::exp(c1) * from1;
                let mut vf = Vector::<f32, N2>::new(f32::exp(ct - c0) * to0 * d0);
                vf[1] = f32::exp(ct - c1) * to1 * d1;
                scol[hbase + lane] = vd;
                sread[hbase + lane] = vr;
                sfeed[hbase + lane] = vf;
            }
            if lane == 0 {
                scarry[par * hb + w] = carry;
            }
            total *= carry;
            if i + 1 < count {
                let tn = chunk_start(first, count, i + 1, reverse);
                let at = (bi * nh + hc) * lp + tn as usize + 2 * lane;
                c0 = sums[at];
                c1 = sums[at + 1];
                d0 = delta[at];
                d1 = delta[at + 1];
                if comptime!(walk.ids) {
                    let tb = tn + 2 * lane as u32;
                    let last = l - 1;
                    i0 = ids[tok0 + select(tb < last, tb, last) as usize];
                    i1 = ids[tok0 + select(tb + 1 < last, tb + 1, last) as usize];
                    before = rows[bi * 2 + 1];
                    if tn > 0 {
                        before = ids[tok0 + tn as usize - 1];
                    }
                }
            }
        }
        if comptime!(walk.dump) {
            #[unroll]
            for h in 0..hw {
                let mut top = 0.0f32;
                #[unroll]
                for j in 0..comptime!(n / 8) {
                    let s = st.index(comptime!(h * n / 8 + j));
                    #[unroll]
                    for r in 0..2usize {
                        top = max(top, max(s[r][0].abs(), s[r][1].abs()));
                    }
                }
                let top = plane_max(top);
                if lane == 0 {
                    stop[(par * hb + hl + h) * 4 + w % 4] = top;
                }
            }
        }
        sync_cube();
        if comptime!(walk.out) {
            let from = tok0 + t0 as usize;
            copy_heads::<E, N8>(input, &mut sx, from * xs + h0 * PV, xs, (l - t0) as usize, 0usize, hb, threads);
            barx.commit_copy_async();
            let _tx = barx.arrive();
        }
        if i + 1 < count {
            let tn = chunk_start(first, count, i + 1, reverse);
            let from = tok0 + tn as usize;
            copy_rows::<E, N8>(keys, &mut sb, from * ks + group * nv, ks, (l - tn) as usize, (1 - par) * bsz, nv, threads);
            if comptime!(walk.out) {
                copy_rows::<E, N8>(queries, &mut sc, from * qs + group * nv, qs, (l - tn) as usize, (1 - par) * bsz, nv, threads);
            } else {
                copy_heads::<E, N8>(
                    input,
                    &mut sx,
                    from * xs + h0 * PV,
                    xs,
                    (l - tn) as usize,
                    (1 - par) * comptime!(TILE * hb),
                    hb,
                    threads,
                );
            }
            if par == 0 {
                bar1.commit_copy_async();
                let _t1 = bar1.arrive();
            } else {
                bar0.commit_copy_async();
                let _t2 = bar0.arrive();
            }
        }
        if comptime!(walk.dump) {
            #[unroll]
            for h in 0..hw {
                let chunk = bi * all_chunks as usize + (t0 / 64) as usize;
                let tile = chunk * nh + h0 + hl + h;
                let dbase = (tile * 64 + pw * 8) * nv + t;
                let at = (par * hb + hl + h) * 4;
                let (up, unit) = unit_of(max(max(stop[at], stop[at + 1]), max(stop[at + 2], stop[at + 3])));
                if w % 4 == 0 && lane == 0 {
                    units[tile * 8 + 4] = unit;
                }
                let up = Vector::<f32, N2>::new(up);
                #[unroll]
                for j in 0..comptime!(n / 32) {
                    #[unroll]
                    for r in 0..2usize {
                        let mut four = Array::<u32>::new(4usize);
                        #[unroll]
                        for k in 0..4usize {
                            let s = st.index(comptime!(h * n / 8 + 4 * j + k));
                            four[k] = u32::reinterpret(Vector::<f16, N2>::cast_from(s[r] * up));
                        }
                        // 16 bytes of one row a lane instead of 4 bytes of four places.
                        exchange(&mut four, t as u32);
                        let mut v = Vector::<u32, N4>::empty();
                        #[unroll]
                        for k in 0..4usize {
                            v[k] = four[k];
                        }
                        dump[dbase + (g + 8 * r) * nv + 4 * j] = v;
                    }
                }
            }
        }
        let ph = (i >> 1u32) & 1u32;
        if par == 0 {
            bar0.wait_parity(ph);
        } else {
            bar1.wait_parity(ph);
        }
        let bbase = par * bsz;
        let mut xbase = hl * TILE;
        if comptime!(!walk.out) {
            xbase += par * comptime!(TILE * hb);
        }
        let hs0 = (par * hb + hl) * 32;
        let mut results = Sequence::<Array<Vector<E, N2>>>::new();
        #[unroll]
        for _ in 0..comptime!(if walk.out { hw * 4 } else { 0usize }) {
            results.push(Array::<Vector<E, N2>>::new(4usize));
        }
        if comptime!(walk.out) {
            // M: a row of 16 x 16 blocks a plane, another one from chunk to chunk; groups of planes share a row.
            let mi = (w + i as usize + CUBE_POS_X as usize) % 4;
            let mut fa = Sequence::<Array<Vector<E, N2>>>::new();
            #[unroll]
            for k in 0..comptime!(n / 16) {
                fa.push(load4::<E, N8, N2>(def, &sc, bbase + (mi * 16 + ra) * bs + ca + k * 2, false));
            }
            let r0 = mi * 16 + g;
            let r1 = r0 + 8;
            let mut ni = w / 4;
            let mut ni_end = mi + 1;
            if comptime!(reverse) {
                ni = mi + w / 4;
                ni_end = 4usize.runtime();
            }
            // Where a row has few blocks there is time to keep what rounding takes from the nearest pairs, the largest of all: the
            // block beside the diagonal is free for it.
            let mut few = mi < 2;
            let mut beside = mi + 1;
            if comptime!(reverse) {
                few = mi >= 2;
                beside = mi - 1;
            }
            while ni < ni_end {
                let low = few && ni == mi;
                let mut gg = zeros::<N2>(4usize);
                #[unroll]
                for k in 0..comptime!(n / 16) {
                    let fb = load4::<E, N8, N2>(def, &sb, bbase + (ni * 16 + rb) * bs + cb + k * 2, false);
                    multiply::<E, N2>(def, fa.index(k), &fb, 0usize, gg.index_mut(comptime!(2 * (k % 2))));
                    multiply::<E, N2>(def, fa.index(k), &fb, 1usize, gg.index_mut(comptime!(2 * (k % 2) + 1)));
                }
                #[unroll]
                for block in 0..2usize {
                    let ga = gg.index(block);
                    let gb = gg.index(comptime!(block + 2));
                    let g0 = ga[0] + gb[0];
                    let g1 = ga[1] + gb[1];
                    let cc = ni * 8 + block * 4 + t;
                    let col = cc * 2;
                    #[unroll]
                    for h in 0..hb {
                        let hs = (par * hb + h) * 64;
                        let sl0 = s1[hs + r0];
                        let sl1 = s1[hs + r1];
                        let sv = s2[hs / 2 + cc];
                        let dv = scol[hs / 2 + cc];
                        let mut m0 = Vector::<f32, N2>::new(0.0f32);
                        let mut m1 = Vector::<f32, N2>::new(0.0f32);
                        #[unroll]
                        for e in 0..2usize {
                            let mut see0 = r0 >= col + e;
                            let mut see1 = r1 >= col + e;
                            let mut x0 = sl0 - sv[e];
                            let mut x1 = sl1 - sv[e];
                            if comptime!(reverse) {
                                see0 = r0 <= col + e;
                                see1 = r1 <= col + e;
                                x0 = sv[e] - sl0;
                                x1 = sv[e] - sl1;
                            }
                            if comptime!(walk.ids) {
                                let id = sid[par * 64 + col + e];
                                see0 = see0 && sid[par * 64 + r0] == id;
                                see1 = see1 && sid[par * 64 + r1] == id;
                            }
                            m0[e] = select(see0, g0[e] * f32::exp(x0) * dv[e], 0.0f32);
                            m1[e] = select(see1, g1[e] * f32::exp(x1) * dv[e], 0.0f32);
                        }
                        let high0 = Vector::<E, N2>::cast_from(m0);
                        let high1 = Vector::<E, N2>::cast_from(m1);
                        sm[(h * 64 + r0) * 36 + cc] = high0;
                        sm[(h * 64 + r1) * 36 + cc] = high1;
                        if low {
                            let at = (h * 64 + r0) * 36 + beside * 8 + block * 4 + t;
                            sm[at] = Vector::<E, N2>::cast_from(m0 - Vector::<f32, N2>::cast_from(high0));
                            sm[at + 8 * 36] = Vector::<E, N2>::cast_from(m1 - Vector::<f32, N2>::cast_from(high1));
                        }
                    }
                }
                ni += hg;
            }
            #[unroll]
            for half in 0..2usize {
                // (S queries^T) read, 32 tokens.
                let mut acc = zeros::<N2>(comptime!(hw * 4));
                #[unroll]
                for k in 0..comptime!(n / 16) {
                    let mut fs = Sequence::<Array<Vector<E, N2>>>::new();
                    #[unroll]
                    for h in 0..hw {
                        fs.push(narrow::<E, N2>(st.index(comptime!(h * n / 8 + 2 * k)), st.index(comptime!(h * n / 8 + 2 * k + 1))));
                    }
                    #[unroll]
                    for j in 0..2usize {
                        let fb = load4::<E, N8, N2>(def, &sc, bbase + (comptime!((half * 2 + j) * 16) + rb) * bs + cb + k * 2, false);
                        #[unroll]
                        for h in 0..hw {
                            multiply::<E, N2>(def, fs.index(h), &fb, 0usize, acc.index_mut(comptime!(h * 4 + 2 * j)));
                            multiply::<E, N2>(def, fs.index(h), &fb, 1usize, acc.index_mut(comptime!(h * 4 + 2 * j + 1)));
                        }
                    }
                }
                #[unroll]
                for h in 0..hw {
                    #[unroll]
                    for j in 0..4usize {
                        let ev = sread[hs0 + h * 32 + comptime!((half * 4 + j) * 4) + t];
                        let c = acc.index_mut(comptime!(h * 4 + j));
                        c[0] = c[0] * ev;
                        c[1] = c[1] * ev;
                    }
                }
                if comptime!(half == 0) {
                    sync_cube();
                    barx.wait_parity(i & 1u32);
                }
                // + input^T M^T
                #[unroll]
                for h in 0..hw {
                    #[unroll]
                    for k in comptime!(if reverse { 2usize * half } else { 0usize })..comptime!(if reverse {
                        4usize
                    } else {
                        2usize * half + 2usize
                    }) {
                        let fx = load4::<E, N8, N2>(def, &sx, xbase + h * TILE + (k * 16 + rb) * 9 + pw + cb, true);
                        #[unroll]
                        for j in 0..2usize {
                            if comptime!(if reverse { half * 2 + j <= k } else { half * 2 + j >= k }) {
                                let at = ((hl + h) * 64 + comptime!((half * 2 + j) * 16) + rb) * 36 + k * 8 + cb * 4;
                                let fb = load4_pairs::<E, N2>(def, &sm, at, false);
                                multiply::<E, N2>(def, &fx, &fb, 0usize, acc.index_mut(comptime!(h * 4 + 2 * j)));
                                multiply::<E, N2>(def, &fx, &fb, 1usize, acc.index_mut(comptime!(h * 4 + 2 * j + 1)));
                            }
                            if comptime!(half * 2 + j == k && (k < 2) != reverse) {
                                let beside = comptime!(if reverse { k - 1 } else { k + 1 });
                                let at = ((hl + h) * 64 + k * 16 + rb) * 36 + beside * 8 + cb * 4;
                                let fb = load4_pairs::<E, N2>(def, &sm, at, false);
                                multiply::<E, N2>(def, &fx, &fb, 0usize, acc.index_mut(comptime!(h * 4 + 2 * j)));
                                multiply::<E, N2>(def, &fx, &fb, 1usize, acc.index_mut(comptime!(h * 4 + 2 * j + 1)));
                            }
                        }
                    }
                }
                // The layout of sums is that of the input's fragments: scale, add the skip connection, round.
                #[unroll]
                for h in 0..hw {
                    #[unroll]
                    for j in 0..2usize {
                        let k = comptime!(half * 2 + j);
                        let ya = acc.index(comptime!(h * 4 + 2 * j));
                        let yb = acc.index(comptime!(h * 4 + 2 * j + 1));
                        let mut a0 = ya[0];
                        let mut a1 = ya[1];
                        let mut b0 = yb[0];
                        let mut b1 = yb[1];
                        if comptime!(reverse) {
                            let va = sscale[hs0 + h * 32 + comptime!(k * 8) + t];
                            let vb = sscale[hs0 + h * 32 + comptime!(k * 8 + 4) + t];
                            a0 *= va;
                            a1 *= va;
                            b0 *= vb;
                            b1 *= vb;
                        }
                        if comptime!(walk.skip) {
                            let fx = load4::<E, N8, N2>(def, &sx, xbase + h * TILE + (k * 16 + rb) * 9 + pw + cb, true);
                            let dv = Vector::<f32, N2>::new(skip[h0 + hl + h]);
                            a0 += Vector::<f32, N2>::cast_from(fx[0]) * dv;
                            a1 += Vector::<f32, N2>::cast_from(fx[1]) * dv;
                            b0 += Vector::<f32, N2>::cast_from(fx[2]) * dv;
                            b1 += Vector::<f32, N2>::cast_from(fx[3]) * dv;
                        }
                        let r = results.index_mut(comptime!(h * 4 + half * 2 + j));
                        r[0] = Vector::<E, N2>::cast_from(a0);
                        r[1] = Vector::<E, N2>::cast_from(a1);
                        r[2] = Vector::<E, N2>::cast_from(b0);
                        r[3] = Vector::<E, N2>::cast_from(b1);
                    }
                }
            }
        }
        // S = carry S + (feed input)^T keys
        #[unroll]
        for h in 0..hw {
            let ev = Vector::<f32, N2>::new(scarry[par * hb + hl + h]);
            #[unroll]
            for j in 0..comptime!(n / 8) {
                let c = st.index_mut(comptime!(h * n / 8 + j));
                c[0] = c[0] * ev;
                c[1] = c[1] * ev;
            }
        }
        let mut tops = Array::<f32>::new(hw);
        #[unroll]
        for h in 0..hw {
            tops[h] = 0.0f32;
        }
        #[unroll]
        for k in 0..4usize {
            let mut fw = Sequence::<Array<Vector<E, N2>>>::new();
            let mut lw = Sequence::<Array<Vector<E, N2>>>::new();
            #[unroll]
            for h in 0..hw {
                let fx = load4::<E, N8, N2>(def, &sx, xbase + h * TILE + (k * 16 + rb) * 9 + pw + cb, true);
                let w0 = sfeed[hs0 + h * 32 + k * 8 + t];
                let w1 = sfeed[hs0 + h * 32 + k * 8 + 4 + t];
                let mut high = Array::<Vector<E, N2>>::new(4usize);
                let mut low = Array::<Vector<E, N2>>::new(4usize);
                #[unroll]
                for r in 0..4usize {
                    let weight = if comptime!(r < 2) { w0 } else { w1 };
                    let value = Vector::<f32, N2>::cast_from(fx[r]);
                    if comptime!(walk.dump) {
                        let mut one = value[0].abs();
                        let mut other = value[1].abs();
                        if comptime!(walk.ids) {
                            // What stands behind the row has no say.
                            let token = t0 + comptime!((k * 16 + r / 2 * 8) as u32) + 2 * t as u32;
                            one = select(token < length, one, 0.0f32);
                            other = select(token + 1 < length, other, 0.0f32);
                        }
                        tops[h] = max(tops[h], max(one, other));
                    }
                    let fed = value * weight;
                    high[r] = Vector::<E, N2>::cast_from(fed);
                    if comptime!(walk.split_feed) {
                        low[r] = Vector::<E, N2>::cast_from(fed - Vector::<f32, N2>::cast_from(high[r]));
                    }
                }
                lw.push(low);
                fw.push(high);
            }
            #[unroll]
            for j in 0..comptime!(n / 16) {
                let fb = load4::<E, N8, N2>(def, &sb, bbase + (k * 16 + rk) * bs + ck + j * 2, true);
                #[unroll]
                for h in 0..hw {
                    multiply::<E, N2>(def, fw.index(h), &fb, 0usize, st.index_mut(comptime!(h * n / 8 + 2 * j)));
                    multiply::<E, N2>(def, fw.index(h), &fb, 1usize, st.index_mut(comptime!(h * n / 8 + 2 * j + 1)));
                    if comptime!(walk.split_feed) {
                        multiply::<E, N2>(def, lw.index(h), &fb, 0usize, st.index_mut(comptime!(h * n / 8 + 2 * j)));
                        multiply::<E, N2>(def, lw.index(h), &fb, 1usize, st.index_mut(comptime!(h * n / 8 + 2 * j + 1)));
                    }
                }
            }
        }
        if comptime!(walk.dump) {
            #[unroll]
            for h in 0..hw {
                let tile = (bi * all_chunks as usize + (t0 / 64) as usize) * nh + h0 + hl + h;
                let top = plane_max(tops[h]);
                if lane == 0 {
                    units[tile * 8 + w % 4] = top;
                }
            }
        }
        if comptime!(walk.out) {
            // Each plane reads and now overwrites its own columns of the input tile alone.
            #[unroll]
            for h in 0..hw {
                let xb = xbase + h * TILE;
                #[unroll]
                for k in 0..4usize {
                    let o = xb + (k * 16 + rb) * 9 + pw + cb;
                    let four = results.index(comptime!(h * 4 + k));
                    def.store_matrix::<Vector<E, N8>, N2>(&mut sx.slice_mut(o, o + 1), four, MatrixIdent::Accumulator, 4usize, true);
                }
                sync_plane();
                #[unroll]
                for k in 0..4usize {
                    let row = k * 16 + lane / 2;
                    let v = pw + lane % 2;
                    let token = t0 + row as u32;
                    if token < l {
                        let at = ((tok0 + token as usize) * nh + h0 + hl + h) * PV + v;
                        if token < length {
                            out[at] = sx[xb + row * 9 + v];
                        } else {
                            out[at] = Vector::<E, N8>::new(E::from_int(0));
                        }
                    }
                }
            }
        }
    }
    let mut row = bi;
    let mut last = seg == segments - 1;
    if comptime!(reverse) {
        last = seg == 0;
    }
    if comptime!(walk.locals) {
        row = sidx;
        last = true;
    }
    if last && comptime!(walk.locals || !walk.dump || walk.out) {
        #[unroll]
        for h in 0..hw {
            let ob = ((row * nh + h0 + hl + h) * 64 + pw * 8) * half_n;
            #[unroll]
            for j in 0..comptime!(n / 8) {
                let s = st.index(comptime!(h * n / 8 + j));
                end[ob + g * half_n + j * 4 + t] = s[0];
                end[ob + (g + 8) * half_n + j * 4 + t] = s[1];
            }
        }
    }
    if comptime!(walk.locals) {
        if w < hb && lane == 0 {
            kept[sidx * nh + hc] = total;
        }
    }
}

/// Transposes four values of four neighbouring lanes.
#[cube]
fn exchange(four: &mut Array<u32>, t: u32) {
    #[unroll]
    for k in 0..2usize {
        let odd = t & 1 == 1;
        let got = plane_shuffle_xor(select(odd, four[2 * k], four[2 * k + 1]), 1u32);
        let kept = select(odd, four[2 * k + 1], four[2 * k]);
        four[2 * k] = select(odd, got, kept);
        four[2 * k + 1] = select(odd, kept, got);
    }
    #[unroll]
    for k in 0..2usize {
        let high = t & 2 == 2;
        let got = plane_shuffle_xor(select(high, four[k], four[k + 2]), 2u32);
        let kept = select(high, four[k + 2], four[k]);
        four[k] = select(high, got, kept);
        four[k + 2] = select(high, kept, got);
    }
}

/// Turns the local states of segments into the states that enter them, in walking order.
#[cube(launch_unchecked)]
pub(crate) fn ssd_pass<N2: Size>(
    states: &mut Array<Vector<f32, N2>>,
    kept: &Array<f32>,
    init: &Array<Vector<f32, N2>>,
    segments: u32,
    heads: u32,
    #[comptime] per_head: usize,
    #[comptime] reverse: bool,
    #[comptime] has_init: bool,
) {
    let nh = heads as usize;
    let at = ABSOLUTE_POS;
    let per_row = nh * per_head;
    let bi = at / per_row;
    let inner = at % per_row;
    let head = inner / per_head;
    let mut state = Vector::<f32, N2>::new(0.0f32);
    if comptime!(has_init) {
        state = init[at];
    }
    for i in 0..segments {
        let mut seg = i;
        if comptime!(reverse) {
            seg = segments - 1 - i;
        }
        let row = bi * segments as usize + seg as usize;
        let local = row * per_row + inner;
        // The last segment's own state was not made: nothing follows it.
        if i + 1 < segments {
            let own = states[local];
            let keep = Vector::<f32, N2>::new(kept[row * nh + head]);
            states[local] = state;
            state = state * keep + own;
        } else {
            states[local] = state;
        }
    }
}
