//! A tensor's last axis in parts, whose gradients become one tensor in one pass.
//!
//! Of `narrow`s, each gradient is a tensor of the whole width, mostly zeros, and these are added up: for the three parts of
//! a Mamba-2 projection some ten passes over it.

mod autodiff;
#[cfg(feature = "_cube")]
pub(crate) mod cube;

pub(crate) use autodiff::record;

use burn::tensor::Tensor;

use crate::KernelBackend;

/// `[b, l, sum of widths]` -> `[b, l, width]` for each of `widths`, as views where the backend has views.
///
/// # Panics
/// When the widths do not add up to the last axis.
pub fn split<B: KernelBackend, const N: usize>(x: Tensor<B, 3>, widths: [usize; N]) -> [Tensor<B, 3>; N] {
    let [.., width] = x.dims();
    assert_eq!(width, widths.iter().sum::<usize>(), "split: {widths:?} do not add up to the last axis");
    let parts = B::split(x, &widths);
    parts.try_into().unwrap_or_else(|_| unreachable!("a part for each width"))
}

/// `[b, l, count * w]` -> `[b, l, count, w]`, as a view where the backend has views. Burn copies parts of a wider tensor here.
///
/// # Panics
/// When `count` does not divide the last axis.
pub fn heads<B: KernelBackend>(x: Tensor<B, 3>, count: usize) -> Tensor<B, 4> {
    let [.., width] = x.dims();
    assert!(count > 0 && width.is_multiple_of(count), "heads: {count} do not share {width} channels evenly");
    B::heads(x, count)
}

/// [`heads`] by Burn.
pub(crate) fn reshaped<B: burn::tensor::backend::Backend>(x: Tensor<B, 3>, count: usize) -> Tensor<B, 4> {
    let [b, l, width] = x.dims();
    x.reshape([b, l, count, width / count])
}

/// The parts as views.
pub(crate) fn views<B: burn::tensor::backend::Backend>(x: &Tensor<B, 3>, widths: &[usize]) -> Vec<Tensor<B, 3>> {
    let mut start = 0;
    let mut view = |&width: &usize| {
        start += width;
        x.clone().narrow(2, start - width, width)
    };
    widths.iter().map(&mut view).collect()
}
