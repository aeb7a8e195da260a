//! Random arguments on a device, parts of tensors as float64 on the host, and their comparison.

use std::f64::consts::LN_10;
use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Distribution, Shape, Tensor, TensorData};

use super::truth::RowIds;
use crate::{KernelBackend, Segments};

/// Multiply-adds that a check may cost on the host, so that it takes seconds.
pub(super) const CHECK_WORK: usize = 400_000_000;

/// Makes tensors. They are made flat, so that rows are packed on devices that would pad them.
pub(super) struct Source<'a, B: Backend> {
    pub device: &'a B::Device,
    /// Of activations.
    pub dtype: DType,
}

impl<B: Backend> Source<'_, B> {
    fn make<const D: usize>(&self, shape: [usize; D], distribution: Distribution) -> Tensor<B, D> {
        Tensor::<B, 1>::random([shape.iter().product::<usize>()], distribution, (self.device, DType::F32)).reshape(shape)
    }

    /// Standard normal activations.
    pub fn normal<const D: usize>(&self, shape: [usize; D]) -> Tensor<B, D> {
        self.make(shape, Distribution::Normal(0.0, 1.0)).cast(self.dtype)
    }

    /// Standard normal, float32.
    pub fn normal32<const D: usize>(&self, shape: [usize; D]) -> Tensor<B, D> {
        self.make(shape, Distribution::Normal(0.0, 1.0))
    }

    /// Uniform, float32.
    pub fn uniform32<const D: usize>(&self, shape: [usize; D], low: f64, high: f64) -> Tensor<B, D> {
        self.make(shape, Distribution::Uniform(low, high))
    }

    /// Step sizes as models have them: the logarithm is uniform from 0.001 to 0.1; float32.
    pub fn steps32<const D: usize>(&self, shape: [usize; D]) -> Tensor<B, D> {
        self.uniform32(shape, -3.0 * LN_10, -LN_10).exp()
    }

    /// Row numbers below `v`, in no order.
    pub fn ids(&self, count: usize, v: usize) -> Vec<i32> {
        let mut state = 1u64;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 33) % v as u64) as i32
            })
            .collect()
    }

    /// `tensor` where every index lies in its range, zero elsewhere.
    pub fn only<const D: usize>(&self, tensor: Tensor<B, D>, ranges: [Range<usize>; D]) -> Tensor<B, D> {
        let shape = tensor.dims();
        let dtype = tensor.dtype();
        let mut tensor = tensor;
        for (axis, range) in ranges.into_iter().enumerate().filter(|(axis, range)| *range != (0..shape[*axis])) {
            let ones = (0..shape[axis]).map(|i| f32::from(u8::from(range.contains(&i)))).collect::<Vec<_>>();
            let mut wide = [1; D];
            wide[axis] = shape[axis];
            let mask = Tensor::<B, D>::from_data(TensorData::new(ones, Shape::from(wide)), (self.device, DType::F32));
            tensor = tensor * mask.cast(dtype).expand(shape);
        }
        // Some operations pad rows.
        let count = shape.iter().product::<usize>();
        tensor.reshape([count]).reshape(shape)
    }
}

/// Part of a tensor on the host.
pub(super) fn host<B: Backend, const D: usize>(tensor: &Tensor<B, D>, ranges: [Range<usize>; D]) -> Vec<f64> {
    tensor.clone().slice(ranges).cast(DType::F32).into_data().iter::<f64>().collect()
}

/// Part of a vector on the host.
pub(super) fn host_span<B: Backend>(tensor: &Tensor<B, 1>, span: Range<usize>) -> Vec<f64> {
    host(&tensor.clone().reshape([1, -1]), [0..1, span])
}

/// All of a tensor on the host; nothing for an absent one.
pub(super) fn host_all<B: Backend, const D: usize>(tensor: Option<&Tensor<B, D>>) -> Vec<f64> {
    tensor.map_or_else(Vec::new, |tensor| host(tensor, tensor.dims().map(|n| 0..n)))
}

/// Ids of one row.
pub(super) fn row_ids<B: Backend>(segments: Option<&Segments<B>>, row: usize) -> RowIds {
    segments.map_or_else(RowIds::default, |segments| {
        let [_, l] = segments.dims();
        RowIds { ids: segments.ids()[row * l..(row + 1) * l].to_vec(), prev: segments.prev()[row] }
    })
}

/// How the tokens of a batch are divided into documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Documents {
    /// One per row.
    One,
    /// Several per row, of 700 tokens or a third of the row.
    Packed,
    /// One per row, each of another length, padded to the longest.
    Ragged,
}

impl Documents {
    /// Suffix of a case's name.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::One => "",
            Self::Packed => " segments",
            Self::Ragged => " ragged",
        }
    }

    pub fn segments<B: KernelBackend>(self, b: usize, l: usize, device: &B::Device) -> Option<Segments<B>> {
        let length = 700.min(l / 3).max(1);
        let made = match self {
            Self::One => return None,
            Self::Packed => {
                let ids = (0..b * l).map(|i| ((i % l + 61 * (i / l)) / length) as i32).collect();
                Segments::new(b, l, ids, vec![0; b], device)
            }
            Self::Ragged => {
                let lengths: Vec<usize> = (0..b).map(|row| l - (row * 37 + 5) % (l / 4).max(1)).collect();
                Segments::ragged(&lengths, l, device)
            }
        };
        Some(made.unwrap_or_else(|error| panic!("{error}")))
    }
}

/// One tensor's distance from the truth.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Deviation {
    /// Tensor.
    pub name: &'static str,
    /// Norm of the difference over the norm of the truth.
    pub error: f64,
}

impl Deviation {
    /// Relative Frobenius error; infinite where counts differ.
    pub(super) fn new(name: &'static str, got: &[f64], want: &[f64]) -> Self {
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let difference = norm(&mut got.iter().zip(want).map(|(a, b)| a - b));
        let size = norm(&mut want.iter().copied());
        let error = match got.len() == want.len() {
            true if size > 0.0 => difference / size,
            true => difference,
            false => f64::INFINITY,
        };
        Self { name, error }
    }
}

/// Bytes of one element.
pub(super) fn width(dtype: DType) -> usize {
    dtype.size()
}
