//! CubeCL kernels: parts as views, and parts joined in one pass over each.

use burn::tensor::{Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use cubecl::zspace::metadata::Metadata;

use crate::cube::reduce::{addresses, cube_grid};
use crate::cube::{Device, Tokens, array, empty, library, packed, tokens};

const UNITS: usize = 256;
/// Bytes that the widest loads of any kernel are aligned to.
const VECTORS: u64 = 16;

/// Parts of the last axis of a `[b, l, width]` tensor. Burn's slices are views only where the device could bind what comes behind
/// them, too.
pub(crate) fn split<R: CubeRuntime>(x: &CubeTensor<R>, widths: &[usize]) -> Vec<CubeTensor<R>> {
    let [b, l, _] = x.shape().dims();
    // CUDA binds any address that the vectors of kernels may begin at.
    let alignment = if library::present::<R>().is_some() { VECTORS } else { x.client.properties().memory.alignment };
    let mut end = 0;
    let part = |&width: &usize| {
        let start = end;
        end += width;
        let offset = (start * x.meta.strides()[2] * x.dtype().size()) as u64;
        if !offset.is_multiple_of(alignment) || x.shape().num_elements() == 0 {
            return burn_cubecl::kernel::slice(x.clone(), &[0..b, 0..l, start..end]);
        }
        let mut view = x.clone();
        view.handle = view.handle.offset_start(offset);
        *view.meta.shape_mut() = Shape::from([b, l, width]);
        view
    };
    widths.iter().map(part).collect()
}

/// `[b, l, count * w]` -> `[b, l, count, w]`; nothing where channels do not lie side by side.
pub(crate) fn heads<R: CubeRuntime>(x: &CubeTensor<R>, count: usize) -> Option<CubeTensor<R>> {
    let [b, l, width] = x.shape().dims();
    let [row, token, last] = std::array::from_fn(|axis| x.meta.strides()[axis]);
    if last != 1 || width == 0 {
        return None;
    }
    let mut view = x.clone();
    *view.meta = Metadata::new([b, l, count, width / count], [row, token, width / count, 1]);
    Some(view)
}

/// `[b, l, w]` -> `[b l, w]`; nothing where tokens are not evenly apart.
pub(crate) fn flatten_rows<R: CubeRuntime>(x: &CubeTensor<R>) -> Option<CubeTensor<R>> {
    let [b, l, width] = x.shape().dims();
    let [row, token, last] = std::array::from_fn(|axis| x.meta.strides()[axis]);
    let apart = match (b, l) {
        (0, _) | (_, 0) => return None,
        (1, 1) => width,
        (_, 1) => row,
        (1, _) => token,
        _ if row == l * token => token,
        _ => return None,
    };
    if last != 1 || apart < width {
        return None;
    }
    let mut view = x.clone();
    *view.meta = Metadata::new([b * l, width], [apart, 1]);
    Some(view)
}

/// `to[token, start..start + part] = from[token, ..]`, in vectors.
#[cube(launch_unchecked, address_type = "dynamic")]
fn copy_part<F: Float, N: Size>(
    from: &Array<Vector<F, N>>,
    to: &mut Array<Vector<F, N>>,
    vectors: u32,
    l: u32,
    part: u32,
    width: u32,
    start: u32,
    token: u32,
    row: u32,
    #[define(F)] _dtype: StorageType,
) {
    let at = ABSOLUTE_POS;
    if at < vectors as usize {
        let place = at / part as usize;
        let inner = at % part as usize;
        let source = place / l as usize * row as usize + place % l as usize * token as usize + inner;
        to[place * width as usize + start as usize + inner] = from[source];
    }
}

/// Parts `[b, l, width]` beside one another; `None` where sizes do not fit 32 bits.
pub(crate) fn join<R: CubeRuntime>(parts: Vec<CubeTensor<R>>) -> Option<CubeTensor<R>> {
    let first = parts.first()?;
    let [b, l, _] = first.shape().dims();
    let dtype = first.dtype();
    let widths: Vec<usize> = parts.iter().map(|part| part.shape()[2]).collect();
    let width: usize = widths.iter().sum();
    if b * l * width == 0 || u32::try_from(b * l * width).is_err() || parts.iter().any(|part| part.dtype() != dtype) {
        return None;
    }
    let out = empty(first, [b, l, width], dtype);
    let client = &out.client;
    // The widest vector that divides every part, and so every start.
    let vector =
        client.io_optimized_vector_sizes(dtype.size()).find(|vector| widths.iter().all(|width| width.is_multiple_of(*vector))).unwrap_or(1);
    let device = Device::of(client);
    let mut start = 0;
    for (part, width_of) in parts.into_iter().zip(&widths).filter(|(_, width)| **width > 0) {
        let offset = part.handle.offset_start.unwrap_or(0) as usize;
        let part = if offset.is_multiple_of(vector * dtype.size()) { part } else { packed(part) };
        let Tokens { tensor, token, row } = tokens(part, vector);
        let vectors = b * l * width_of / vector;
        // SAFETY: the kernel guards its vectors; parts lie beside one another within the output.
        unsafe {
            copy_part::launch_unchecked::<R>(
                client,
                cube_grid(&device, vectors.div_ceil(UNITS)),
                CubeDim::new_1d(UNITS as u32),
                addresses(&[&out, &tensor]),
                vector,
                array(&tensor),
                array(&out),
                vectors as u32,
                l as u32,
                (width_of / vector) as u32,
                (width / vector) as u32,
                (start / vector) as u32,
                token,
                row,
                dtype.into(),
            );
        }
        start += width_of;
    }
    Some(out)
}
