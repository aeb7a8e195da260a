//! Products on GPUs: a kernel of our own for few rows, cuBLASLt on CUDA where it is installed, else Burn's product.

mod few;
mod skinny;
mod sums;

use burn::tensor::{DType, Tensor, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};

use super::{LinearGrads, LinearKept};
use crate::cube::{down, library, packed, up, zeros};

type Backend<R, F, I, BT> = CubeBackend<R, F, I, BT>;

/// What runs, in words.
pub(crate) fn path<R: CubeRuntime>() -> &'static str {
    match library::present::<R>() {
        Some(true) => "cuBLASLt, cubecl kernel for few rows",
        Some(false) => "cubek (cuBLASLt not found), cubecl kernel for few rows",
        None => "cubek, cubecl kernel for few rows",
    }
}

/// `left [m, k] x right [k, n]`; either may be a transposed view.
fn product<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    left: Tensor<Backend<R, F, I, BT>, 2>,
    right: Tensor<Backend<R, F, I, BT>, 2>,
) -> Tensor<Backend<R, F, I, BT>, 2> {
    let ([m, k], [_, n]) = (left.dims(), right.dims());
    let (left, right) = (down(left), down(right));
    if m * k * n == 0 {
        return up(zeros(&left, [m, n], left.dtype()));
    }
    match library::product(&left, &right, None) {
        Some(product) => up(product),
        None => up::<Backend<R, F, I, BT>, 2>(left).matmul(up(right)),
    }
}

/// `x [rows, in]`, `weight [out, in]`, `bias [out]` -> `[rows, out]`.
pub(crate) fn forward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: Tensor<Backend<R, F, I, BT>, 2>,
    weight: Tensor<Backend<R, F, I, BT>, 2>,
    bias: Option<Tensor<Backend<R, F, I, BT>, 1>>,
) -> Tensor<Backend<R, F, I, BT>, 2> {
    let ([rows, inputs], [outputs, _]) = (x.dims(), weight.dims());
    if rows * inputs * outputs > 0 {
        let (x, weight) = (down(x.clone()), down(weight.clone()));
        // A kernel reads it packed, in the dtype of the rest.
        let bias = bias.clone().map(|bias| packed(down(bias.cast(x.dtype()))));
        let turned = || down(up::<Backend<R, F, I, BT>, 2>(weight.clone()).transpose());
        let by_library = || library::product(&x, &turned(), bias.as_ref());
        // One row leaves tensor cores idle, and needs none. From two on the library is the fastest there is.
        let own = || {
            let skinny = if rows > 1 { skinny::product(&x, &weight, bias.as_ref()) } else { None };
            skinny.or_else(|| few::product(&x, &weight, bias.as_ref()))
        };
        let y = if rows > 1 && x.dtype() != DType::F32 { by_library().or_else(own) } else { own().or_else(by_library) };
        if let Some(y) = y {
            return up(y);
        }
    }
    let y = product(x, weight.transpose());
    match bias {
        Some(bias) => y + bias.reshape([1, outputs]),
        None => y,
    }
}

/// Gradients from that of the output.
pub(crate) fn backward<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    kept: LinearKept<Backend<R, F, I, BT>>,
    dy: Tensor<Backend<R, F, I, BT>, 2>,
) -> LinearGrads<Backend<R, F, I, BT>> {
    let [rows, outputs] = dy.dims();
    let bias = |dy: &Tensor<Backend<R, F, I, BT>, 2>| {
        let dy = down(dy.clone());
        up(if rows * outputs == 0 { zeros(&dy, [outputs], dy.dtype()) } else { sums::columns(dy) })
    };
    LinearGrads {
        bias: kept.bias.then(|| bias(&dy)),
        x: kept.weight.map(|weight| product(dy.clone(), weight)),
        weight: kept.x.map(|x| product(dy.transpose(), x)),
    }
}
