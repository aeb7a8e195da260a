//! Rotary positions, rotate-half form (arXiv 2104.09864, in the order of Hugging Face checkpoints), in one pass.
//!
//! With angle `w` of position and pair, `out[i] = x[i] cos w - x[i + half] sin w` and
//! `out[i + half] = x[i + half] cos w + x[i] sin w`; channels from `2 half` on pass through. In float32, whatever `x` is in. The
//! gradient is a rotation by the negative angles and needs neither input nor output.

#[cfg(any(feature = "flex", feature = "ndarray"))]
pub(crate) mod cpu;
#[cfg(feature = "_cube")]
pub(crate) mod cube;
pub mod reference;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::error::expect_shape;
use crate::path::announce;
use crate::{ArgumentError, KernelBackend, Op};

/// Arguments of [`rotary`].
#[derive(Debug, Clone)]
pub struct RotaryArgs<B: Backend> {
    /// `[b, h, l, p]`; read where it lies, as a view of heads behind tokens, say.
    pub x: Tensor<B, 4>,
    /// Cosines of the angles, float32, `[b or 1, 1, l, half]` with `2 half <= p`. A constant: no gradient.
    pub cos: Tensor<B, 4>,
    /// Sines of the angles, as `cos`.
    pub sin: Tensor<B, 4>,
}

impl<B: Backend> RotaryArgs<B> {
    /// Checks that shapes and dtypes agree.
    ///
    /// # Errors
    /// The first disagreement found.
    pub fn check(&self) -> Result<(), ArgumentError> {
        const OP: &str = "rotary";
        let ([b, _, l, p], [rows, _, _, half]) = (self.x.dims(), self.cos.dims());
        let rows = if rows == 1 { 1 } else { b };
        for (name, table) in [("cos", &self.cos), ("sin", &self.sin)] {
            expect_shape(OP, name, &table.dims(), &[rows, 1, l, half.min(p / 2)])?;
            if table.dtype() != DType::F32 {
                let (expected, found) = ("F32".to_string(), format!("{:?}", table.dtype()));
                return Err(ArgumentError::Dtype { op: OP, tensor: name, expected, found });
            }
        }
        Ok(())
    }
}

/// Rotates the pairs `(i, i + half)` of each head; differentiable in `x`. `[b, h, l, p]`, in the dtype of `x`, packed where the
/// backend has a fast path.
///
/// # Panics
/// When [`RotaryArgs::check`] fails.
pub fn rotary<B: KernelBackend>(args: RotaryArgs<B>) -> Tensor<B, 4> {
    if let Err(error) = args.check() {
        panic!("{error}");
    }
    if args.x.dims().contains(&0) || args.cos.dims()[3] == 0 {
        return args.x;
    }
    announce::<B>(Op::Rotary, args.x.dtype());
    B::rotary(args, false)
}
