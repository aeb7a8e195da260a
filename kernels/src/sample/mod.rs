//! Tokens drawn from logits, on the device where it can: the same draw from the same numbers everywhere.
//!
//! A draw is the largest of `logit / temperature + g` over the tokens that may be chosen, with `g` from Gumbel's distribution, which
//! gives each its softmax probability (Gumbel-max). `g` is a hash of the row's seed, of how many draws it has made, and of the token: so a row
//! does not depend on its batch, and draws need no state but a count.

#[cfg(feature = "_cube")]
pub(crate) mod cube;
pub mod host;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::KernelBackend;

/// Which tokens may be drawn, and how their probabilities are changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleOptions {
    /// Divides the logits; above 0.
    pub temperature: f32,
    /// Keeps the best so many, and those equal to the last of them; 0 keeps all.
    pub top_k: usize,
    /// Of these, keeps the smallest set of best ones with at least this share of the probability, and those equal to the last; 1 keeps all.
    pub top_p: f32,
}

/// Seeds of rows and how many tokens each has drawn, on the device.
#[derive(Debug, Clone)]
pub struct Draws<B: Backend> {
    /// `[3 * b]`: low and high half of a seed, and the count.
    pub(crate) state: Tensor<B, 1, Int>,
}

impl<B: Backend> Draws<B> {
    /// Rows of these seeds that have made so many draws.
    pub fn new(rows: &[(u64, u32)], device: &B::Device) -> Self {
        let values: Vec<i32> =
            rows.iter().flat_map(|&(seed, count)| [seed as u32 as i32, (seed >> 32) as u32 as i32, count as i32]).collect();
        let len = values.len();
        Self { state: Tensor::from_data(TensorData::new(values, [len]), (device, DType::I32)) }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.state.dims()[0] / 3
    }

    /// Keeps the given rows, in the given order.
    ///
    /// # Panics
    /// When a row does not exist.
    pub fn select_rows(self, rows: &[usize]) -> Self {
        let at: Vec<i32> = rows.iter().flat_map(|&row| (0..3).map(move |i| (3 * row + i) as i32)).collect();
        let len = at.len();
        let at = Tensor::<B, 1, Int>::from_data(TensorData::new(at, [len]), &self.state.device());
        Self { state: self.state.select(0, at) }
    }

    /// Seeds and counts as they lie on the device.
    pub fn state(&self) -> &Tensor<B, 1, Int> {
        &self.state
    }
}

/// Draws one of the first `known` columns of each row of `logits [b, v]`: `[b, 1]`, and the draws, one further. -1 where a logit is NaN
/// or plus infinity, or all are minus infinity. Ids and draws are written over `into` and `draws` where the backend can and nobody else holds
/// them: a recorded step then reads at the next replay what it drew at this one.
///
/// # Panics
/// When `known` is 0 or above `v`, `into` is not `[b, 1]`, there are not `b` draws, or an option is out of its range.
pub fn sample<B: KernelBackend>(
    logits: Tensor<B, 2>,
    known: usize,
    options: SampleOptions,
    draws: Draws<B>,
    into: Option<Tensor<B, 2, Int>>,
) -> (Tensor<B, 2, Int>, Draws<B>) {
    let [b, v] = logits.dims();
    assert!((1..=v).contains(&known), "sample: {known} of {v} columns");
    assert!(into.as_ref().is_none_or(|into| into.dims() == [b, 1]), "sample: the ids to overwrite are not [{b}, 1]");
    assert_eq!(draws.rows(), b, "sample: draws of other rows");
    assert!(options.temperature > 0.0 && options.top_p > 0.0, "sample: {options:?}");
    B::sample(logits, known, options, draws, into)
}

/// On the host.
pub(crate) fn reference<B: Backend>(
    logits: Tensor<B, 2>,
    known: usize,
    options: SampleOptions,
    draws: Draws<B>,
) -> (Tensor<B, 2, Int>, Draws<B>) {
    let ([b, v], device) = (logits.dims(), logits.device());
    let logits: Vec<f32> = logits.into_data().iter::<f32>().collect();
    let state: Vec<i32> = draws.state.into_data().iter::<i32>().collect();
    let rows = state.chunks(3).map(|row| (u64::from(row[0] as u32) | u64::from(row[1] as u32) << 32, row[2] as u32));
    let rows: Vec<(u64, u32)> = rows.collect();
    let draw = |(row, &(seed, count)): (usize, &(u64, u32))| {
        let logits = &logits[row * v..row * v + known];
        let bad = logits.iter().any(|x| x.is_nan() || *x == f32::INFINITY);
        if bad { -1 } else { host::draw(logits, options, seed, count).map_or(-1, |id| id as i32) }
    };
    let ids: Vec<i32> = rows.iter().enumerate().map(draw).collect();
    let next: Vec<(u64, u32)> = rows.iter().map(|&(seed, count)| (seed, count.wrapping_add(1))).collect();
    (Tensor::from_data(TensorData::new(ids, [b, 1]), &device), Draws::new(&next, &device))
}
