//! Tensors as slices of `f32`.

use std::ops::Deref;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorPrimitive};

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

    /// The values of a stack of stacks of row-major matrices, such as the filled part of a key cache, with the distances
    /// between matrices along the first two dimensions. Copied only if they are not float32 or not row-major inside.
    fn read_matrices(tensor: Tensor<Self, 4>) -> (Self::Values, [usize; 2]) {
        let [_, g, rows, columns] = tensor.dims();
        (Self::read(tensor), [g * rows * columns, rows * columns])
    }

    /// The values of a batch of rows, such as a part of a wider projection, with the distances between rows along the first
    /// two dimensions. Copied only if they are not float32 or not contiguous inside a row.
    fn read_rows(tensor: Tensor<Self, 3>) -> (Self::Values, [usize; 2]) {
        let [_, l, width] = tensor.dims();
        (Self::read(tensor), [l * width, width])
    }

    /// The values of a tensor to write over; where that can be arranged, no copy if nobody else holds the tensor.
    fn take<const D: usize>(tensor: Tensor<Self, D>) -> Vec<f32> {
        Self::read(tensor).to_vec()
    }

    /// A tensor of `dtype`.
    fn write<const D: usize>(values: Vec<f32>, shape: [usize; D], dtype: DType) -> Tensor<Self, D>;
}

#[cfg(feature = "flex")]
mod flex {
    use std::ops::Range;

    use burn::backend::Flex;
    use burn::tensor::{Shape, TensorData, bf16, f16};
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
            let tensor = tensor.into_primitive().tensor();
            if let Some(values) = Values::new(tensor.clone()) {
                return values;
            }
            let tensor = if tensor.dtype() == DType::F32 {
                tensor.to_contiguous()
            } else {
                let shape = tensor.layout().shape().clone();
                FlexTensor::from_data(TensorData::new(widen(&tensor), shape))
            };
            Values::new(tensor).expect("float32 and row-major")
        }

        fn borrow<const D: usize>(tensor: &Tensor<Self, D>) -> Option<Values> {
            Values::new(tensor.clone().into_primitive().tensor())
        }

        fn take<const D: usize>(tensor: Tensor<Self, D>) -> Vec<f32> {
            let tensor = tensor.into_primitive().tensor();
            if tensor.is_unique() && tensor.dtype() == DType::F32 {
                return tensor.into_data().into_vec().expect("float32");
            }
            Self::read(Tensor::<Self, D>::from_primitive(TensorPrimitive::Float(tensor))).to_vec()
        }

        fn read_matrices(tensor: Tensor<Self, 4>) -> (Values, [usize; 2]) {
            let [b, g, rows, columns] = tensor.dims();
            let primitive = tensor.clone().into_primitive().tensor();
            let layout = primitive.layout();
            let strides: Option<Vec<usize>> = layout.strides().iter().map(|&stride| usize::try_from(stride).ok()).collect();
            match strides.as_deref() {
                Some(&[outer, inner, row, 1]) if row == columns && b * g * rows > 0 && primitive.dtype() == DType::F32 => {
                    let from = layout.start_offset();
                    let to = from + (b - 1) * outer + (g - 1) * inner + rows * columns;
                    (Values(primitive, from..to), [outer, inner])
                }
                _ => (Self::read(tensor), [g * rows * columns, rows * columns]),
            }
        }

        fn read_rows(tensor: Tensor<Self, 3>) -> (Values, [usize; 2]) {
            let [b, l, width] = tensor.dims();
            let primitive = tensor.clone().into_primitive().tensor();
            let layout = primitive.layout();
            let strides: Option<Vec<usize>> = layout.strides().iter().map(|&stride| usize::try_from(stride).ok()).collect();
            match strides.as_deref() {
                Some(&[outer, inner, 1]) if b * l * width > 0 && primitive.dtype() == DType::F32 => {
                    let from = layout.start_offset();
                    let to = from + (b - 1) * outer + (l - 1) * inner + width;
                    (Values(primitive, from..to), [outer, inner])
                }
                _ => (Self::read(tensor), [l * width, width]),
            }
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
