//! Tensors as slices of `f32`.

use std::ops::Deref;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorPrimitive, bf16};

#[cfg(feature = "flex")]
use super::threads::{Shared, for_each};

/// A backend whose tensors can be read in place.
pub(crate) trait HostBackend: Backend {
    /// Keeps the values of a tensor readable: row-major, float32.
    type Values: Deref<Target = [f32]> + Send + Sync;

    /// True when this path computes what the reference computes for tensors of `dtype`.
    fn accepts(dtype: DType) -> bool;

    /// The values of a tensor; copied only if they are not float32 or not row-major.
    fn read<const D: usize>(tensor: Tensor<Self, D>) -> Self::Values;

    /// The values of a tensor if that takes no copy.
    fn borrow<const D: usize>(tensor: &Tensor<Self, D>) -> Option<Self::Values>;

    /// Does `work` with the values of a bfloat16 tensor, if they lie row-major: no copy.
    fn with_bf16<const D: usize, T>(_tensor: &Tensor<Self, D>, _work: impl FnOnce(&[bf16]) -> T) -> Option<T> {
        None
    }

    /// The values of a tensor, with the distances between entries along each dimension, the last of which is 1. Copied only if
    /// they are not float32 or do not lie side by side in the last dimension.
    fn read_strided<const D: usize>(tensor: Tensor<Self, D>) -> (Self::Values, [usize; D]) {
        let dims = tensor.dims();
        (Self::read(tensor), row_major(dims))
    }

    /// The values of a stack of stacks of row-major matrices, such as the filled part of a key cache, with the distances
    /// between matrices along the first two dimensions. Copied only if they are not float32 or not row-major inside.
    fn read_matrices(tensor: Tensor<Self, 4>) -> (Self::Values, [usize; 2]) {
        let [_, g, rows, columns] = tensor.dims();
        match Self::read_strided(tensor.clone()) {
            (values, [outer, inner, row, _]) if row == columns => (values, [outer, inner]),
            _ => (Self::read(tensor), [g * rows * columns, rows * columns]),
        }
    }

    /// The values of a batch of rows, such as a part of a wider projection, with the distances between rows along the first
    /// two dimensions. Copied only if they are not float32 or not contiguous inside a row.
    fn read_rows(tensor: Tensor<Self, 3>) -> (Self::Values, [usize; 2]) {
        let (values, [outer, inner, _]) = Self::read_strided(tensor);
        (values, [outer, inner])
    }

    /// The values of a packed float32 tensor to write over, without a copy, where that can be arranged and nobody else holds it; else
    /// the tensor.
    fn owned<const D: usize>(tensor: Tensor<Self, D>) -> Result<Vec<f32>, Tensor<Self, D>> {
        Err(tensor)
    }

    /// A buffer for results of a tensor's size: [`HostBackend::owned`], or a new one of zeros with the tensor's values beside it.
    fn writable<const D: usize>(tensor: Tensor<Self, D>) -> (Vec<f32>, Option<Self::Values>) {
        match Self::owned(tensor) {
            Ok(values) => (values, None),
            Err(tensor) => {
                let values = Self::read(tensor);
                (vec![0.0; values.len()], Some(values))
            }
        }
    }

    /// The values of a tensor to write over; where that can be arranged, no copy if nobody else holds the tensor.
    fn take<const D: usize>(tensor: Tensor<Self, D>) -> Vec<f32> {
        Self::read(tensor).to_vec()
    }

    /// A tensor of `dtype`.
    fn write<const D: usize>(values: Vec<f32>, shape: [usize; D], dtype: DType) -> Tensor<Self, D>;
}

/// Distances between entries of a packed tensor.
fn row_major<const D: usize>(dims: [usize; D]) -> [usize; D] {
    let mut strides = [1; D];
    for i in (1..D).rev() {
        strides[i - 1] = strides[i] * dims[i];
    }
    strides
}

/// Packs rows of `dims[D - 1]` values that lie `strides` apart.
#[cfg(feature = "flex")]
fn gather<const D: usize>(values: &[f32], dims: [usize; D], strides: [usize; D]) -> Vec<f32> {
    const BLOCK: usize = 1 << 12;
    let width = dims[D - 1];
    let rows: usize = dims[..D - 1].iter().product();
    let block = (BLOCK / width.max(1)).max(1);
    let mut out = vec![0.0; rows * width];
    let shared = Shared::new(&mut out);
    for_each(
        rows.div_ceil(block),
        rows * width,
        || (),
        |(), task| {
            for row in task * block..rows.min((task + 1) * block) {
                let (mut from, mut rest) = (0, row);
                for axis in (0..D - 1).rev() {
                    from += rest % dims[axis] * strides[axis];
                    rest /= dims[axis];
                }
                // SAFETY: each row belongs to one task.
                unsafe { shared.part(row * width, width) }.copy_from_slice(&values[from..from + width]);
            }
        },
    );
    out
}

#[cfg(feature = "flex")]
mod flex {
    use std::ops::Range;

    use burn::backend::Flex;
    use burn::tensor::{Shape, TensorData, f16};
    use burn_flex::FlexTensor;

    use super::*;

    /// A float32 tensor and the part of its buffer that matters.
    pub(crate) struct Values(FlexTensor, Range<usize>);

    impl Values {
        /// `None` unless float32 and row-major.
        fn new(tensor: FlexTensor) -> Option<Self> {
            let (from, to) = tensor.layout().contiguous_offsets().filter(|_| tensor.dtype() == DType::F32)?;
            Some(Self(tensor, from..to))
        }
    }

    impl Deref for Values {
        type Target = [f32];

        fn deref(&self) -> &[f32] {
            &self.0.storage()[self.1.clone()]
        }
    }

    /// The values as they lie, with the distances between entries along each dimension. `None` unless float32 and side by side in
    /// the last dimension.
    fn strided<const D: usize>(tensor: &FlexTensor, dims: [usize; D]) -> Option<(Values, [usize; D])> {
        let layout = tensor.layout();
        // A negative distance makes a number that no buffer has room for.
        let strides: [usize; D] = std::array::from_fn(|axis| layout.strides()[axis] as usize);
        if strides[D - 1] != 1 || tensor.dtype() != DType::F32 {
            return None;
        }
        let mut last = layout.start_offset();
        for (size, stride) in dims.into_iter().zip(strides) {
            last = last.checked_add(size.checked_sub(1)?.checked_mul(stride)?)?;
        }
        Some((Values(tensor.clone(), layout.start_offset()..last + 1), strides))
    }

    fn widen(tensor: &FlexTensor) -> Vec<f32> {
        let tensor = tensor.to_contiguous();
        match tensor.dtype() {
            DType::BF16 => tensor.storage::<bf16>().iter().map(|v| v.to_f32()).collect(),
            DType::F16 => tensor.storage::<f16>().iter().map(|v| v.to_f32()).collect(),
            DType::F64 => tensor.storage::<f64>().iter().map(|&v| v as f32).collect(),
            other => panic!("{other:?} is not a float"),
        }
    }

    fn narrow(values: &[f32], shape: Shape, dtype: DType) -> TensorData {
        match dtype {
            DType::BF16 => TensorData::new(values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>(), shape),
            DType::F16 => TensorData::new(values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>(), shape),
            DType::F64 => TensorData::new(values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(), shape),
            other => panic!("{other:?} is not a float"),
        }
    }

    impl HostBackend for Flex {
        type Values = Values;

        fn accepts(dtype: DType) -> bool {
            matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
        }

        fn read<const D: usize>(tensor: Tensor<Self, D>) -> Values {
            let dims = tensor.dims();
            let tensor = tensor.into_primitive().tensor();
            if let Some(values) = Values::new(tensor.clone()) {
                return values;
            }
            let tensor = match strided(&tensor, dims) {
                Some((values, strides)) => FlexTensor::from_data(TensorData::new(gather(&values, dims, strides), dims)),
                None if tensor.dtype() == DType::F32 => tensor.to_contiguous(),
                None => FlexTensor::from_data(TensorData::new(widen(&tensor), dims)),
            };
            Values::new(tensor).expect("float32 and row-major")
        }

        fn borrow<const D: usize>(tensor: &Tensor<Self, D>) -> Option<Values> {
            Values::new(tensor.clone().into_primitive().tensor())
        }

        fn with_bf16<const D: usize, T>(tensor: &Tensor<Self, D>, work: impl FnOnce(&[bf16]) -> T) -> Option<T> {
            let tensor = tensor.clone().into_primitive().tensor();
            let (from, to) = tensor.layout().contiguous_offsets().filter(|_| tensor.dtype() == DType::BF16)?;
            Some(work(&tensor.storage::<bf16>()[from..to]))
        }

        fn take<const D: usize>(tensor: Tensor<Self, D>) -> Vec<f32> {
            let tensor = tensor.into_primitive().tensor();
            if tensor.is_unique() && tensor.dtype() == DType::F32 {
                return tensor.into_data().into_vec().expect("float32");
            }
            Self::read(Tensor::<Self, D>::from_primitive(TensorPrimitive::Float(tensor))).to_vec()
        }

        fn read_strided<const D: usize>(tensor: Tensor<Self, D>) -> (Values, [usize; D]) {
            let dims = tensor.dims();
            strided(&tensor.clone().into_primitive().tensor(), dims).unwrap_or_else(|| (Self::read(tensor), row_major(dims)))
        }

        fn owned<const D: usize>(tensor: Tensor<Self, D>) -> Result<Vec<f32>, Tensor<Self, D>> {
            let mut tensor = tensor.into_primitive().tensor();
            let whole = tensor.layout().contiguous_offsets() == Some((0, tensor.bytes().len() / size_of::<f32>()));
            if whole && tensor.is_unique() && tensor.dtype() == DType::F32 {
                let TensorData { bytes, shape, dtype } = tensor.into_data();
                // A buffer of Burn's own operations may be aligned otherwise than a vector's.
                match bytes.try_into_vec() {
                    Ok(values) => return Ok(values),
                    Err(bytes) => tensor = FlexTensor::from_data(TensorData { bytes, shape, dtype }),
                }
            }
            Err(Tensor::from_primitive(TensorPrimitive::Float(tensor)))
        }

        fn write<const D: usize>(values: Vec<f32>, shape: [usize; D], dtype: DType) -> Tensor<Self, D> {
            let shape = Shape::from(shape);
            let data = if dtype == DType::F32 { TensorData::new(values, shape) } else { narrow(&values, shape, dtype) };
            Tensor::from_primitive(TensorPrimitive::Float(FlexTensor::from_data(data)))
        }
    }
}

#[cfg(feature = "ndarray")]
mod nd {
    use burn::backend::NdArray;
    use burn::backend::ndarray::NdArrayTensor;
    use ndarray::{ArrayD, ArrayView, IxDyn};

    use super::*;

    pub(crate) struct Values(NdArrayTensor);

    /// The type that holds the values is private to its crate, its methods are not.
    fn view(tensor: &NdArrayTensor) -> ArrayView<'_, f32, IxDyn> {
        match tensor {
            NdArrayTensor::F32(values) => values.view(),
            _ => panic!("float32 was asked for"),
        }
    }

    fn build(values: Vec<f32>, shape: &[usize]) -> NdArrayTensor {
        ArrayD::from_shape_vec(IxDyn(shape), values).expect("as many values as the shape says").into_shared().into()
    }

    impl Deref for Values {
        type Target = [f32];

        fn deref(&self) -> &[f32] {
            view(&self.0).to_slice().expect("row-major")
        }
    }

    impl HostBackend for NdArray<f32> {
        type Values = Values;

        fn accepts(dtype: DType) -> bool {
            dtype == DType::F32
        }

        fn read<const D: usize>(tensor: Tensor<Self, D>) -> Values {
            let tensor = tensor.cast(DType::F32).into_primitive().tensor();
            if view(&tensor).to_slice().is_some() {
                return Values(tensor);
            }
            let values = view(&tensor);
            let copy = build(values.iter().copied().collect(), values.shape());
            Values(copy)
        }

        fn take<const D: usize>(tensor: Tensor<Self, D>) -> Vec<f32> {
            tensor.cast(DType::F32).into_data().into_vec().expect("float32")
        }

        fn borrow<const D: usize>(tensor: &Tensor<Self, D>) -> Option<Values> {
            let tensor = tensor.clone().into_primitive().tensor();
            let there = matches!(tensor, NdArrayTensor::F32(_)) && view(&tensor).to_slice().is_some();
            there.then_some(Values(tensor))
        }

        fn write<const D: usize>(values: Vec<f32>, shape: [usize; D], dtype: DType) -> Tensor<Self, D> {
            Tensor::<Self, D>::from_primitive(TensorPrimitive::Float(build(values, &shape))).cast(dtype)
        }
    }
}
