//! How kernels see rows of tokens: strides of views, document boundaries, the grid.

use burn::tensor::{DType, Int, Tensor, TensorData, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::CubeCount;
use cubecl::client::ComputeClient;

use super::{Device, cast, down_int, packed};
use crate::Segments;

/// A `[b, l, w]` tensor whose tokens may lie apart, as parts of wider ones do.
pub(crate) struct Tokens<R: CubeRuntime> {
    pub tensor: CubeTensor<R>,
    /// From a token to the next, and from a row to the next, in vectors.
    pub token: u32,
    pub row: u32,
}

/// Reads `tensor` in vectors of `vector` elements, which divides `w`; copies it only where its layout forbids that.
pub(crate) fn tokens<R: CubeRuntime>(tensor: CubeTensor<R>, vector: usize) -> Tokens<R> {
    let strides = |tensor: &CubeTensor<R>| {
        let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
        // Of an axis with one entry any stride will do.
        let [row, token, last] = std::array::from_fn(|i| if shape[i] > 1 { strides[i] } else { 0 });
        let fits = |stride: usize| stride.is_multiple_of(vector) && u32::try_from(stride / vector).is_ok();
        ((last == 1 || shape[2] == 1) && fits(row) && fits(token)).then(|| (row / vector, token / vector))
    };
    let (tensor, (row, token)) = match strides(&tensor) {
        Some(found) => (tensor, found),
        None => {
            let shape = tensor.shape();
            (packed(tensor), (shape[1] * shape[2] / vector, shape[2] / vector))
        }
    };
    Tokens { tensor, token: token as u32, row: row as u32 }
}

/// The widest vector of at most 16 bytes that divides `width` elements of each of `dtypes`.
pub(crate) fn vector_size<R: CubeRuntime>(client: &ComputeClient<R>, width: usize, dtypes: &[DType]) -> usize {
    let size = dtypes.iter().map(|dtype| dtype.size()).max().unwrap_or(4);
    client.io_optimized_vector_sizes(size).filter(|&n| n * size <= 16 && width.is_multiple_of(n)).max().unwrap_or(1)
}

/// Document boundaries on the device; some array in their place where a call has none.
pub(crate) struct Rows<R: CubeRuntime> {
    /// [`Segments::filled`], `[b, l]`.
    pub ids: CubeTensor<R>,
    /// Per row, the number of real tokens and the id of the incoming state, `[b, 2]`.
    pub bounds: CubeTensor<R>,
    pub present: bool,
}

/// What kernels read of `segments`; `stand_in` is passed where there are none.
pub(crate) fn rows<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    segments: Option<&Segments<CubeBackend<R, F, I, BT>>>,
    stand_in: &CubeTensor<R>,
) -> Rows<R> {
    let Some(segments) = segments else {
        return Rows { ids: stand_in.clone(), bounds: stand_in.clone(), present: false };
    };
    let bounds: Vec<i32> = segments.lengths().iter().zip(segments.prev()).flat_map(|(&length, &prev)| [length as i32, prev]).collect();
    let count = bounds.len();
    let ids = segments.filled();
    let bounds = Tensor::<CubeBackend<R, F, I, BT>, 1, Int>::from_data(TensorData::new(bounds, [count]), &ids.device());
    let ready = |tensor| packed(cast(tensor, DType::I32));
    Rows { ids: ready(down_int(ids)), bounds: ready(down_int(bounds)), present: true }
}

/// A grid of `cubes` cubes in a line, folded where an axis is too short for them: kernels go by `CUBE_POS` or
/// `ABSOLUTE_POS` and leave where that is too large.
pub(crate) fn line(cubes: usize, device: &Device) -> CubeCount {
    let across = cubes.min(device.max_cubes.0.min(65535) as usize);
    CubeCount::Static(across as u32, cubes.div_ceil(across.max(1)) as u32, 1)
}
