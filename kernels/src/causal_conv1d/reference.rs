//! Plain tensor operations: one shifted product per tap.

use burn::tensor::activation::silu;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};

use super::{ConvArgs, ConvOut};
use crate::Segments;

/// See [`super::causal_conv1d`]. Half precisions are widened, so that only the result is rounded.
pub fn causal_conv1d<B: Backend>(args: ConvArgs<B>) -> ConvOut<B> {
    let ConvArgs { x, weight, bias, state, segments, silu: activate } = args;
    let [b, l, e] = x.dims();
    let k = weight.dims()[1];
    let device = x.device();
    let dtype = x.dtype();
    let wide = if matches!(dtype, DType::F16 | DType::BF16) { DType::F32 } else { dtype };
    let past = state.unwrap_or_else(|| Tensor::zeros([b, k - 1, e], (&device, x.dtype())));
    let padded = if k > 1 { Tensor::cat(vec![past, x.clone()], 1) } else { x.clone() }; // [b, k-1+l, e]

    let mut y = Tensor::<B, 3>::zeros([b, l, e], (&device, wide));
    for j in 0..k {
        let tap = weight.clone().narrow(1, j, 1).reshape([1, 1, e]).cast(wide);
        let mut source = padded.clone().narrow(1, j, l).cast(wide);
        if let Some(segments) = &segments {
            source = source.mask_fill(foreign_sources(segments, k, j).expand([b, l, e]), 0.0);
        }
        y = y + source * tap;
    }
    if let Some(bias) = bias {
        y = y + bias.reshape([1, 1, e]).cast(wide);
    }
    if activate {
        y = silu(y);
    }
    let state = match &segments {
        None => padded.narrow(1, l, k - 1),
        Some(segments) => {
            y = y.mask_fill(segments.valid().bool_not().unsqueeze_dim::<3>(2).expand([b, l, e]), 0.0);
            last_inputs(padded, segments, k)
        }
    };
    ConvOut { y: y.cast(dtype), state }
}

/// Ids of the `k - 1 + l` inputs a row sees: the state's, then its own. `[b, k-1+l]`
fn source_ids<B: Backend>(segments: &Segments<B>, k: usize) -> Tensor<B, 2, Int> {
    let [b, _] = segments.dims();
    let past = segments.prev_column().expand([b, k - 1]);
    if k > 1 { Tensor::cat(vec![past, segments.filled()], 1) } else { segments.filled() }
}

/// True where tap `j` of a token reads another document. `[b, l, 1]`
fn foreign_sources<B: Backend>(segments: &Segments<B>, k: usize, j: usize) -> Tensor<B, 3, burn::tensor::Bool> {
    let [_, l] = segments.dims();
    source_ids(segments, k).narrow(1, j, l).not_equal(segments.filled()).unsqueeze_dim(2)
}

/// The `k - 1` inputs that end at each row's last real token. `[b, k-1, e]`
fn last_inputs<B: Backend>(padded: Tensor<B, 3>, segments: &Segments<B>, k: usize) -> Tensor<B, 3> {
    let [b, _, e] = padded.dims();
    if k == 1 {
        return padded.narrow(1, 0, 0);
    }
    // Padded index of token t is t + k - 1, so the window that ends at token n - 1 starts at n.
    let index: Vec<i32> = segments.lengths().iter().flat_map(|&n| (0..k - 1).map(move |j| (n + j) as i32)).collect();
    let index = Tensor::<B, 2, Int>::from_data(TensorData::new(index, [b, k - 1]), &padded.device());
    let foreign = source_ids(segments, k).gather(1, index.clone()).not_equal(segments.last_column().expand([b, k - 1]));
    padded.gather(1, index.unsqueeze_dim::<3>(2).expand([b, k - 1, e])).mask_fill(foreign.unsqueeze_dim::<3>(2).expand([b, k - 1, e]), 0.0)
}
