//! Linear projection with the weight stored as in Hugging Face files, `[out, in]`.
//!
//! `y = x weight^T + bias`, sums in float32 where the backend's products have them. On CUDA products are cuBLASLt's, found at run
//! time; float32 products there are true float32, never TF32. Gradients: `dx = dy weight`, `dweight = dy^T x`, `dbias` the
//! columns' sums of `dy`.

#[cfg(any(feature = "flex", feature = "ndarray"))]
pub(crate) mod cpu;
#[cfg(feature = "_cube")]
pub(crate) mod cube;
pub mod reference;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::error::expect_shape;
use crate::path::announce;
use crate::{ArgumentError, KernelBackend, Op};

/// What the backward of a linear layer reads; each gradient reads the other input.
#[derive(Debug, Clone)]
pub struct LinearKept<B: Backend> {
    /// `[rows, in]`, where the weight's gradient is wanted.
    pub x: Option<Tensor<B, 2>>,
    /// `[out, in]`, where the gradient of `x` is wanted.
    pub weight: Option<Tensor<B, 2>>,
    /// Whether the bias's gradient is wanted.
    pub bias: bool,
}

/// The gradients that [`LinearKept`] asks for.
#[derive(Debug, Clone)]
pub struct LinearGrads<B: Backend> {
    /// `[rows, in]`
    pub x: Option<Tensor<B, 2>>,
    /// `[out, in]`
    pub weight: Option<Tensor<B, 2>>,
    /// `[out]`
    pub bias: Option<Tensor<B, 1>>,
}

/// Checks that `x [rows, in]` and `weight [out, in]` fit, dtypes included: Burn's GPU products read mixed dtypes as
/// garbage without an error.
///
/// # Errors
/// The first disagreement found.
pub fn check<B: Backend>(x: &Tensor<B, 2>, weight: &Tensor<B, 2>) -> Result<(), ArgumentError> {
    let [_, inputs] = x.dims();
    let [out, _] = weight.dims();
    expect_shape("linear", "weight", &weight.dims(), &[out, inputs])?;
    if x.dtype() != weight.dtype() {
        return Err(ArgumentError::Dtype {
            op: "linear",
            tensor: "weight",
            expected: format!("{:?}", x.dtype()),
            found: format!("{:?}", weight.dtype()),
        });
    }
    Ok(())
}

/// `x weight^T + bias` over the last dimension: `x [.., in]`, `weight [out, in]`, `bias [out]`; returns `[.., out]`.
///
/// # Panics
/// When [`check`] fails, or the bias has another size.
pub fn linear<B: KernelBackend, const D: usize>(x: Tensor<B, D>, weight: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Tensor<B, D> {
    let mut shape = x.dims();
    let (rows, inputs) = (shape[..D - 1].iter().product(), shape[D - 1]);
    let [out, _] = weight.dims();
    shape[D - 1] = out;
    let (device, dtype) = (x.device(), x.dtype());
    let nothing = rows * inputs * out == 0;
    // Burn's reshape takes a zero to mean the old size.
    let x = match (nothing, D) {
        (true, _) => Tensor::empty([rows, inputs], (&device, dtype)),
        (false, 3) => B::flatten_rows(Tensor::from_primitive(x.into_primitive())),
        _ => x.reshape([rows, inputs]),
    };
    if let Err(error) = check(&x, &weight) {
        panic!("{error}");
    }
    if let Some(bias) = &bias {
        let expected = expect_shape("linear", "bias", &bias.dims(), &[out]);
        expected.unwrap_or_else(|error| panic!("{error}"));
    }
    if nothing {
        // Neither is anything to be launched for no numbers, nor may Burn broadcast no rows to the bias's one.
        if rows * out == 0 {
            return Tensor::empty(shape, (&device, dtype));
        }
        let y = Tensor::zeros(shape, (&device, dtype));
        return match bias {
            Some(bias) => y + bias.unsqueeze(),
            None => y,
        };
    }
    announce::<B>(Op::Linear, dtype);
    <B as KernelBackend>::linear(x, weight, bias).reshape(shape)
}
