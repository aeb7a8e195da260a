//! CubeCL kernels: a unit for each pair of vectors.

mod kernels;

use burn::tensor::{Tensor, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::*;

use self::kernels::Layout;
use super::RotaryArgs;
use crate::cube::reduce::{addresses, cube_grid, vector_width};
use crate::cube::{Device, array, down, empty, packed, up};

/// Whether the kernels are there.
pub(crate) const READY: bool = true;

/// Units of a cube.
const UNITS: usize = 256;

/// Distances between rows of the batch, heads and tokens in vectors of `width`; nothing where vectors cannot be read as they lie.
fn strides<R: CubeRuntime>(x: &CubeTensor<R>, width: usize) -> Option<[u32; 3]> {
    let (shape, strides) = (x.meta.shape(), x.meta.strides());
    let offset = x.handle.offset_start.unwrap_or(0) as usize;
    if (strides[3] != 1 && shape[3] > 1) || !offset.is_multiple_of(width * x.dtype().size()) {
        return None;
    }
    let mut found = [0; 3];
    for (axis, found) in found.iter_mut().enumerate() {
        // Of an axis with one entry any stride will do.
        let stride = if shape[axis] > 1 { strides[axis] } else { 0 };
        *found = u32::try_from(stride / width).ok().filter(|_| stride.is_multiple_of(width))?;
    }
    Some(found)
}

/// `[b, h, l, p]`, packed; on the way back as a view of `[b, l, h, p]`.
fn rotate<R: CubeRuntime>(x: CubeTensor<R>, [cos, sin]: [CubeTensor<R>; 2], back: bool) -> CubeTensor<R> {
    let ([b, h, l, p], [rows, _, _, half]) = (x.shape().dims(), cos.shape().dims());
    let [cos, sin] = [cos, sin].map(packed);
    let width = [half, p].into_iter().map(|size| vector_width(&x.client, &[x.dtype()], size)).min().unwrap_or(1);
    let (x, [outer, middle, inner]) = match strides(&x, width) {
        Some(found) => (x, found),
        None => (packed(x), [h * l * p, l * p, p].map(|stride| (stride / width) as u32)),
    };
    let out = empty(&x, if back { [b, l, h, p] } else { [b, h, l, p] }, x.dtype());
    let layout = Layout { half: half / width, p: p / width, back };
    let units = b * h * l * layout.units();
    // SAFETY: the kernel guards its vectors.
    unsafe {
        kernels::rotate::launch_unchecked::<R>(
            &x.client,
            cube_grid(&Device::of(&x.client), units.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            addresses(&[&x, &out]),
            width,
            array(&x),
            array(&cos),
            array(&sin),
            array(&out),
            units as u32,
            h as u32,
            l as u32,
            outer,
            middle,
            inner,
            if rows == 1 { 0 } else { l as u32 },
            layout,
            x.dtype().into(),
        );
    }
    out
}

pub(crate) fn rotary<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    args: RotaryArgs<CubeBackend<R, F, I, BT>>,
    back: bool,
) -> Tensor<CubeBackend<R, F, I, BT>, 4> {
    let out: Tensor<_, 4> = up(rotate(down(args.x), [args.cos, args.sin].map(down), back));
    if back { out.swap_dims(1, 2) } else { out }
}
