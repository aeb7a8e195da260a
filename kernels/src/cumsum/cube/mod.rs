//! CubeCL kernels.

mod kernels;

use burn::tensor::{DType, Tensor, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::*;

use crate::cube::reduce::{addresses, cube_grid};
use crate::cube::{Device, array, cast, down, empty, packed, up};
use kernels::{EACH, UNITS};

/// Whether the kernels are there.
pub(crate) const READY: bool = true;

/// Along the middle of a packed `[outer, n, inner]`: pieces first, then the running sum of their whole sums, which is added
/// to what follows. Linear in `n`, with as many levels as its logarithm to the base of a piece.
fn scan<R: CubeRuntime>(x: CubeTensor<R>, reverse: bool) -> CubeTensor<R> {
    let [outer, n, inner] = x.shape().dims();
    let device = Device::of(&x.client);
    let client = x.client.clone();
    let span = match inner {
        1 => UNITS * EACH,
        // Long columns only where there are enough of them.
        _ if outer * inner >= 1 << 14 => n,
        _ => 64,
    };
    let pieces = n.div_ceil(span);
    // Rounded once, at the end.
    let dtype = x.dtype();
    let x = if pieces > 1 { packed(cast(x, DType::F32)) } else { x };
    let out = empty(&x, [outer, n, inner], x.dtype());
    let totals = empty(&x, [outer, pieces, inner], DType::F32);
    let dim = CubeDim::new_1d(UNITS as u32);
    let grid = |units: usize| cube_grid(&device, units.div_ceil(UNITS));
    // SAFETY: the kernels guard rows, columns and pieces.
    unsafe {
        if inner == 1 {
            kernels::scan_rows::launch_unchecked::<R>(
                &client,
                cube_grid(&device, outer * pieces),
                dim,
                addresses(&[&x, &out]),
                array(&x),
                array(&out),
                array(&totals),
                outer as u32,
                n as u32,
                pieces as u32,
                reverse,
                x.dtype().into(),
            );
        } else {
            kernels::scan_columns::launch_unchecked::<R>(
                &client,
                grid(outer * pieces * inner),
                dim,
                addresses(&[&x, &out]),
                array(&x),
                array(&out),
                array(&totals),
                outer as u32,
                n as u32,
                inner as u32,
                pieces as u32,
                span as u32,
                reverse,
                x.dtype().into(),
            );
        }
        if pieces > 1 {
            let totals = scan(totals, false);
            kernels::add_before::launch_unchecked::<R>(
                &client,
                grid(outer * n * inner),
                dim,
                addresses(&[&out]),
                array(&out),
                array(&totals),
                outer as u32,
                n as u32,
                inner as u32,
                pieces as u32,
                span as u32,
                reverse,
            );
        }
    }
    cast(out, dtype)
}

pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: Tensor<CubeBackend<R, F, I, BT>, 3>,
    reverse: bool,
) -> Tensor<CubeBackend<R, F, I, BT>, 3> {
    let sizes = x.dims();
    if sizes.contains(&0) || sizes.iter().any(|&size| u32::try_from(size).is_err()) {
        return super::reference::cumsum(x, reverse);
    }
    up(scan(packed(down(x)), reverse))
}
