//! A batch of rows on the host.

use serde::Serialize;
use terrarium_models::Layout;

/// Label of a position that is not predicted.
pub const IGNORED: i32 = -1;

/// Rows of ids, labels and document numbers, row-major.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Batch {
    /// Rows.
    pub rows: usize,
    /// Tokens per row.
    pub length: usize,
    /// Token ids, 0 at padding.
    pub ids: Vec<i32>,
    /// The token to predict at each position, [`IGNORED`] where there is none.
    pub labels: Vec<i32>,
    /// Document of each token within its row, -1 at padding.
    pub documents: Vec<i32>,
}

impl Batch {
    /// Tokens that are not padding.
    pub fn tokens(&self) -> usize {
        self.documents.iter().filter(|id| **id >= 0).count()
    }

    /// Positions to predict.
    pub fn labelled(&self) -> usize {
        self.labels.iter().filter(|label| **label != IGNORED).count()
    }

    /// Documents and padding for the model. Rows filled by one document need no boundaries, which is the faster path.
    pub fn layout(&self) -> Layout {
        if self.documents.iter().all(|id| *id == 0) {
            return Layout::full(self.rows, self.length);
        }
        Layout::documents(self.rows, self.length, self.documents.clone()).expect("a batch has one document id per token, none below -1")
    }
}
