//! Document boundaries and padding inside a batch of rows.

use std::sync::Arc;

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Bool, Int, Tensor, TensorData};

use crate::ArgumentError;

/// Which document each token of a `[b, l]` batch belongs to, and which tokens are padding.
///
/// Rules, checked by [`Segments::new`]:
/// - the real tokens of a row come first; padding (`-1`) only follows them;
/// - ids of real tokens are `>= prev` of their row and never decrease;
/// - `prev` is the id that the incoming state (convolution, SSM, keys) belongs to.
///
/// A token sees earlier tokens, and the incoming state, only under its own id. Padding leaves every state as it is,
/// and its outputs are zero. Values live on the host (they steer control flow), with one upload per batch.
#[derive(Debug, Clone)]
pub struct Segments<B: Backend> {
    pub(crate) host: Arc<Host>,
    /// `[b, l]`: ids, with padding given the id of its row's last real token (or `prev`).
    pub(crate) filled: Tensor<B, 2, Int>,
    /// `[b, l]`: true at real tokens.
    pub(crate) valid: Tensor<B, 2, Bool>,
    /// `[b, 2]`: per row the number of real tokens and `prev`.
    #[cfg_attr(not(feature = "_cube"), allow(dead_code, reason = "only kernels on devices read it"))]
    pub(crate) bounds: Tensor<B, 2, Int>,
}

/// What the host knows of [`Segments`].
#[derive(Debug)]
pub(crate) struct Host {
    batch: usize,
    len: usize,
    ids: Vec<i32>,
    prev: Vec<i32>,
    lengths: Vec<usize>,
}

impl<B: Backend> Segments<B> {
    /// Ids in row-major `[b, l]` order, `prev` in `[b]`.
    ///
    /// # Errors
    /// [`ArgumentError::Segments`] for a broken rule, [`ArgumentError::Shape`] for wrong counts.
    pub fn new(batch: usize, len: usize, ids: Vec<i32>, prev: Vec<i32>, device: &B::Device) -> Result<Self, ArgumentError> {
        crate::error::expect_shape("segments", "ids", &[ids.len()], &[batch * len])?;
        crate::error::expect_shape("segments", "prev", &[prev.len()], &[batch])?;
        let mut filled = Vec::with_capacity(batch * len);
        let mut valid = Vec::with_capacity(batch * len);
        let mut lengths = Vec::with_capacity(batch);
        for row in 0..batch {
            let mut last = prev[row];
            let mut real = 0;
            for position in 0..len {
                let id = ids[row * len + position];
                let fail = |reason| ArgumentError::Segments { row, position, reason };
                if id >= 0 {
                    if real != position {
                        return Err(fail("a real token follows padding"));
                    }
                    if id < last {
                        return Err(fail("the id is smaller than the one before it"));
                    }
                    last = id;
                    real += 1;
                } else if id != -1 {
                    return Err(fail("ids are -1 (padding) or not negative"));
                }
                filled.push(last);
                valid.push(id >= 0);
            }
            lengths.push(real);
        }
        let bounds: Vec<i32> = lengths.iter().zip(&prev).flat_map(|(&real, &prev)| [real as i32, prev]).collect();
        Ok(Self {
            bounds: Tensor::from_data(TensorData::new(bounds, [batch, 2]), device),
            filled: Tensor::from_data(TensorData::new(filled, [batch, len]), device),
            valid: Tensor::from_data(TensorData::new(valid, [batch, len]), device),
            host: Arc::new(Host { batch, len, ids, prev, lengths }),
        })
    }

    /// Rows of different lengths, one document each, all continuing the incoming state.
    ///
    /// # Errors
    /// As [`Segments::new`].
    pub fn ragged(lengths: &[usize], len: usize, device: &B::Device) -> Result<Self, ArgumentError> {
        let ids = lengths.iter().flat_map(|&n| (0..len).map(move |t| if t < n { 0 } else { -1 })).collect();
        Self::new(lengths.len(), len, ids, vec![0; lengths.len()], device)
    }

    /// `[b, l]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.host.batch, self.host.len]
    }

    /// Ids on the host, row-major `[b, l]`, `-1` at padding.
    pub fn ids(&self) -> &[i32] {
        &self.host.ids
    }

    /// Id of the incoming state, `[b]`.
    pub fn prev(&self) -> &[i32] {
        &self.host.prev
    }

    /// Real tokens per row, `[b]`.
    pub fn lengths(&self) -> &[usize] {
        &self.host.lengths
    }

    /// True when some row has padding.
    pub fn padded(&self) -> bool {
        self.host.lengths.iter().any(|&n| n < self.host.len)
    }

    /// Id that the outgoing state belongs to, `[b]`.
    pub fn last(&self) -> Vec<i32> {
        (0..self.host.batch)
            .map(|row| match self.host.lengths[row] {
                0 => self.host.prev[row],
                n => self.host.ids[row * self.host.len + n - 1],
            })
            .collect()
    }

    /// `[b, l]` on the device: ids with padding filled in by the last real id.
    pub fn filled(&self) -> Tensor<B, 2, Int> {
        self.filled.clone()
    }

    /// `[b, l]` on the device: true at real tokens.
    pub fn valid(&self) -> Tensor<B, 2, Bool> {
        self.valid.clone()
    }

    /// `[b, 2]` on the device: per row the number of real tokens and the id of the incoming state.
    #[cfg(feature = "_cube")]
    pub(crate) fn bounds(&self) -> Tensor<B, 2, Int> {
        self.bounds.clone()
    }

    /// `[b]` values on the device as `[b, 1]`.
    pub(crate) fn column(values: &[i32], device: &B::Device) -> Tensor<B, 2, Int> {
        Tensor::from_data(TensorData::new(values.to_vec(), [values.len(), 1]), device)
    }

    /// `prev` on the device, `[b, 1]`.
    pub(crate) fn prev_column(&self) -> Tensor<B, 2, Int> {
        Self::column(&self.host.prev, &self.filled.device())
    }

    /// [`Self::last`] on the device, `[b, 1]`.
    pub(crate) fn last_column(&self) -> Tensor<B, 2, Int> {
        Self::column(&self.last(), &self.filled.device())
    }
}

impl<B: AutodiffBackend> Segments<B> {
    /// The same segments on the backend below autodiff.
    pub fn inner(&self) -> Segments<B::InnerBackend> {
        Segments {
            host: Arc::clone(&self.host),
            filled: self.filled.clone().inner(),
            valid: self.valid.clone().inner(),
            bounds: self.bounds.clone().inner(),
        }
    }
}
