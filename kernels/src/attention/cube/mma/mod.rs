//! The variant with tensor cores.
//!
//! | kernel | a cube owns | walks | products |
//! | --- | --- | --- | --- |
//! | [`forward::forward_mma`] | 64 or 128 queries of a head | slots | 2 |
//! | [`backward::query_grad_mma`] | 64 or 128 queries of a head | slots | 3 |
//! | [`backward::key_grad_mma`] | 64 slots of a key head | queries of all heads of the group | 4 |
//!
//! Four planes of 16 or 32 rows each. Tiles of 64 rows stream through two buffers; one sync a tile. An operand made by one
//! product feeds the next from registers, so nothing but the tiles passes through shared memory.

pub(crate) mod backward;
pub(crate) mod forward;
pub(crate) mod tiles;

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use self::backward::{key_grad_mma, query_grad_mma};
use self::forward::forward_mma;
use self::tiles::{PLANES, STREAM, stride};
use super::{Call, Saved, View, row_sums};
use crate::cube::{Device, array, empty};

/// Elements of a 16-byte vector.
pub(super) const VECTOR: usize = 8;

/// How a kernel cuts its work, chosen so that (next to) no register spills on sm_80 and sm_90.
struct Cut {
    /// 16-row blocks of a plane.
    blocks: usize,
    /// Rows of a streamed tile whose scores are in registers at a time.
    part: usize,
    /// The cube's own rows stay in registers.
    hold: bool,
}

impl Cut {
    fn forward(p: usize) -> Self {
        Self { blocks: 2, part: STREAM, hold: p <= 64 }
    }

    fn query_grad(p: usize) -> Self {
        Self { blocks: if p <= 64 { 2 } else { 1 }, part: 16, hold: true }
    }

    fn key_grad(p: usize) -> Self {
        Self { blocks: 1, part: 32, hold: p <= 64 }
    }

    fn rows(&self) -> usize {
        PLANES * 16 * self.blocks
    }

    /// Shared memory with `own` tensors of the cube's own rows.
    fn bytes(&self, p: usize, own: usize) -> usize {
        (own * self.rows() + 4 * STREAM) * stride(p) * 16 + 2 * STREAM * 8 + 1024
    }
}

/// Whether forward and backward can run here.
pub(super) fn fits(device: &Device, dtype: DType, p: usize, scale: f32) -> bool {
    let bytes = [Cut::forward(p).bytes(p, 1), Cut::query_grad(p).bytes(p, 2), Cut::key_grad(p).bytes(p, 2)];
    device.tensor_cores
        && matches!(dtype, DType::BF16 | DType::F16)
        && p.is_multiple_of(16)
        && p <= 128
        // The running maximum is of scores that are not scaled yet.
        && scale > 0.0
        && bytes.into_iter().all(|bytes| bytes <= device.shared_bytes)
}

fn cube_dim() -> CubeDim {
    CubeDim::new_2d(32, PLANES as u32)
}

fn cube_count(count: usize) -> CubeCount {
    CubeCount::Static(count as u32, 1, 1)
}

pub(super) fn forward<R: CubeRuntime>(call: &Call<R>) -> Saved<R> {
    let cut = Cut::forward(call.p);
    let out = call.q.alike();
    let lse = empty(&call.q.tensor, [call.b, call.h, call.lp()], DType::F32);
    // SAFETY: the kernel clamps rows to the tensors; it fills rows of `lse` up to a whole tile, which it has room for.
    unsafe {
        forward_mma::launch_unchecked::<R>(
            &call.q.tensor.client,
            cube_count(call.b * call.h * call.l.div_ceil(cut.rows())),
            cube_dim(),
            VECTOR,
            2,
            call.q.array(),
            call.k.array(),
            call.v.array(),
            array(&call.ids),
            out.array(),
            array(&lse),
            call.q.strides(VECTOR),
            call.k.strides(VECTOR),
            call.v.strides(VECTOR),
            out.strides(VECTOR),
            call.sizes(),
            call.scale,
            call.p,
            cut.blocks,
            cut.hold,
            call.has_ids,
            call.dtype().into(),
        );
    }
    Saved { out: out.tensor, lse }
}

/// Gradients of q, k and v.
pub(super) fn backward<R: CubeRuntime>(call: &Call<R>, device: &Device, saved: Saved<R>, dout: CubeTensor<R>) -> [CubeTensor<R>; 3] {
    let (out, dout) = (View::new(saved.out, VECTOR), View::new(dout, VECTOR));
    let delta = row_sums::of(call, device, &out, &dout);
    let (dq, dk, dv) = (call.q.alike(), call.k.alike(), call.k.alike());
    let client = &call.q.tensor.client;
    let cut = Cut::query_grad(call.p);
    // SAFETY: the kernels clamp rows to the tensors.
    unsafe {
        query_grad_mma::launch_unchecked::<R>(
            client,
            cube_count(call.b * call.h * call.l.div_ceil(cut.rows())),
            cube_dim(),
            VECTOR,
            2,
            call.q.array(),
            call.k.array(),
            call.v.array(),
            dout.array(),
            array(&call.ids),
            array(&saved.lse),
            array(&delta),
            dq.array(),
            call.q.strides(VECTOR),
            call.k.strides(VECTOR),
            call.v.strides(VECTOR),
            dout.strides(VECTOR),
            dq.strides(VECTOR),
            call.sizes(),
            call.scale,
            call.p,
            cut.blocks,
            cut.part,
            cut.hold,
            call.has_ids,
            call.dtype().into(),
        );
    }
    let cut = Cut::key_grad(call.p);
    // SAFETY: as above; rows of `lse` and `delta` are there up to a whole tile.
    unsafe {
        key_grad_mma::launch_unchecked::<R>(
            client,
            cube_count(call.b * call.g * call.s.div_ceil(cut.rows())),
            cube_dim(),
            VECTOR,
            2,
            call.q.array(),
            call.k.array(),
            call.v.array(),
            dout.array(),
            array(&call.ids),
            array(&saved.lse),
            array(&delta),
            dk.array(),
            dv.array(),
            call.q.strides(VECTOR),
            call.k.strides(VECTOR),
            call.v.strides(VECTOR),
            dout.strides(VECTOR),
            dk.strides(VECTOR),
            call.sizes(),
            call.scale,
            call.p,
            cut.blocks,
            cut.part,
            cut.hold,
            call.has_ids,
            call.dtype().into(),
        );
    }
    [dq.tensor, dk.tensor, dv.tensor]
}
