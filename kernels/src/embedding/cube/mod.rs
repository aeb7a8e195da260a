//! CubeCL kernels.

mod kernels;

use burn::tensor::{DType, Int, Tensor, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::*;

use crate::cube::reduce::{addresses, cube_grid, vector_width};
use crate::cube::{Device, array, cast, down, down_int, empty, packed, up};
use kernels::{BLOCK, DIGITS};

/// Whether the kernels are there.
pub(crate) const READY: bool = true;

/// Places sorted by their row.
struct Sorted<R: CubeRuntime> {
    keys: CubeTensor<R>,
    places: CubeTensor<R>,
    /// Where each row's places begin and end, `[2, v]`.
    bounds: CubeTensor<R>,
}

/// Sorts `keys [n]`, places in ascending order among equal ones.
fn sort<R: CubeRuntime>(device: &Device, mut keys: CubeTensor<R>, v: usize) -> Sorted<R> {
    let n = keys.shape()[0];
    let client = keys.client.clone();
    // Long enough for the counts of all cubes to stay few, since every cube reads them all.
    let chunk = (n / 128).next_power_of_two().clamp(512, 2048);
    let chunks = n.div_ceil(chunk);
    let bits = usize::BITS - v.leading_zeros();
    let counts = empty(&keys, [chunks, DIGITS], DType::U32);
    let bounds = empty(&keys, [2, v], DType::U32);
    let mut places: Option<CubeTensor<R>> = None;
    let (grid, dim) = (|| cube_grid(device, chunks), CubeDim::new_1d(DIGITS as u32));
    for shift in (0..bits).step_by(8) {
        let (keys_out, places_out) = (empty(&keys, [n], DType::I32), empty(&keys, [n], DType::U32));
        let sizes = [n as u32, v as u32, chunks as u32, shift];
        let [size, rows, cubes, shift] = sizes;
        // SAFETY: the kernels guard keys and chunks; digits stay below 256 and rows are bounded by `v`.
        unsafe {
            kernels::count::launch_unchecked::<R>(
                &client,
                grid(),
                dim,
                addresses(&[&keys, &bounds]),
                array(&keys),
                array(&counts),
                array(&bounds),
                size,
                rows,
                cubes,
                shift,
                chunk,
                shift == 0,
            );
            kernels::scatter::launch_unchecked::<R>(
                &client,
                grid(),
                dim,
                addresses(&[&keys, &bounds]),
                array(&keys),
                array(places.as_ref().unwrap_or(&counts)),
                array(&counts),
                array(&keys_out),
                array(&places_out),
                size,
                rows,
                cubes,
                shift,
                chunk,
                shift == 0,
            );
        }
        (keys, places) = (keys_out, Some(places_out));
    }
    let places = places.expect("a table with rows has at least one digit");
    // SAFETY: the kernel guards keys and rows.
    unsafe {
        kernels::find_bounds::launch_unchecked::<R>(
            &client,
            cube_grid(device, n.div_ceil(256)),
            CubeDim::new_1d(256),
            addresses(&[&keys, &bounds]),
            array(&keys),
            array(&bounds),
            n as u32,
            v as u32,
        );
    }
    Sorted { keys, places, bounds }
}

/// `[v, d]` from `dout [n, d]` at rows `ids [n]`.
fn sum<R: CubeRuntime>(device: &Device, ids: CubeTensor<R>, dout: CubeTensor<R>, v: usize) -> CubeTensor<R> {
    let n = ids.shape()[0];
    let d = dout.shape().num_elements() / n;
    let client = dout.client.clone();
    let sorted = sort(device, ids, v);
    let width = vector_width(&client, &[dout.dtype()], d);
    let vectors = d / width;
    let limit = device.max_units.min(256) as usize;
    let units = vectors.next_power_of_two().clamp(32.min(limit), limit);
    let tiles = vectors.div_ceil(units);
    let blocks = n.div_ceil(BLOCK);
    let edges = empty(&dout, [blocks, 2, d], DType::F32);
    let out = empty(&dout, [v, d], dout.dtype());
    let dim = CubeDim::new_1d(units as u32);
    // SAFETY: the kernels guard blocks, rows and columns; places are below `n`, rows below `v`.
    unsafe {
        kernels::sum_blocks::launch_unchecked::<R>(
            &client,
            cube_grid(device, blocks * tiles),
            dim,
            addresses(&[&dout, &out, &edges]),
            width,
            array(&sorted.keys),
            array(&sorted.places),
            array(&sorted.bounds),
            array(&dout),
            array(&out),
            array(&edges),
            n as u32,
            v as u32,
            tiles as u32,
            vectors as u32,
            units,
            dout.dtype().into(),
        );
        kernels::finish::launch_unchecked::<R>(
            &client,
            cube_grid(device, v * tiles),
            dim,
            addresses(&[&out, &edges]),
            width,
            array(&sorted.bounds),
            array(&edges),
            array(&out),
            v as u32,
            tiles as u32,
            vectors as u32,
            units,
            dout.dtype().into(),
        );
    }
    out
}

/// Rows of `weight [v, d]`; NaN where an id is none of them.
pub(crate) fn forward<R: CubeRuntime>(weight: CubeTensor<R>, ids: CubeTensor<R>) -> CubeTensor<R> {
    let ([v, d], [b, l]): ([usize; 2], [usize; 2]) = (weight.shape().dims(), ids.shape().dims());
    let (weight, ids) = (packed(weight), packed(cast(ids, DType::I32)));
    let device = Device::of(&weight.client);
    let width = vector_width(&weight.client, &[weight.dtype()], d);
    let vectors = d / width;
    let out = empty(&weight, [b, l, d], weight.dtype());
    let units = device.max_units.min(256);
    // SAFETY: the kernel guards places and ids.
    unsafe {
        kernels::rows::launch_unchecked::<R>(
            &weight.client,
            cube_grid(&device, (b * l * vectors).div_ceil(units as usize)),
            CubeDim::new_1d(units),
            addresses(&[&weight, &out]),
            width,
            array(&weight),
            array(&ids),
            array(&out),
            (b * l) as u32,
            v as u32,
            vectors as u32,
            weight.dtype().into(),
        );
    }
    out
}

pub(crate) fn backward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    ids: Tensor<CubeBackend<R, F, I, BT>, 2, Int>,
    v: usize,
    dout: Tensor<CubeBackend<R, F, I, BT>, 3>,
) -> Tensor<CubeBackend<R, F, I, BT>, 2> {
    let [b, l, d] = dout.dims();
    let device = Device::of(&down(dout.clone()).client);
    // Places and rows are numbered in 31 bits; the forward lets nothing empty come here.
    if (device.max_units as usize) < DIGITS || (b * l).max(v) >= 1 << 30 {
        let table = Tensor::zeros([v, d], (&dout.device(), dout.dtype()));
        return table.select_assign(0, ids.reshape([b * l]), dout.reshape([b * l, d]), burn::tensor::IndexingUpdateOp::Add);
    }
    let ids = packed(cast(down_int(ids.reshape([b * l])), DType::I32));
    up(sum(&device, ids, packed(down(dout)), v))
}
