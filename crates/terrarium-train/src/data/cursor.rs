//! The order in which rows are met: seeded per epoch, and a position that can be saved and restored.

use serde::{Deserialize, Serialize};

/// Where in the data a run stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Passes completed.
    pub epoch: u64,
    /// Rows taken from the current pass.
    pub position: usize,
}

/// Deals rows in a new order every epoch. The order is a function of the seed and the epoch alone.
#[derive(Debug, Clone)]
pub struct Sampler {
    rows: usize,
    seed: u64,
    cursor: Cursor,
    order: Vec<usize>,
}

impl Sampler {
    /// Starts (or goes on) at `cursor`.
    ///
    /// # Panics
    /// Without rows, or with a position beyond them.
    pub fn new(rows: usize, seed: u64, cursor: Cursor) -> Self {
        assert!(rows > 0 && cursor.position <= rows, "{cursor:?} is not in {rows} rows");
        Self { rows, seed, cursor, order: permutation(rows, seed, cursor.epoch) }
    }

    /// The next `count` rows, going on into the next epoch as needed.
    pub fn take(&mut self, count: usize) -> Vec<usize> {
        (0..count)
            .map(|_| {
                if self.cursor.position == self.rows {
                    self.cursor = Cursor { epoch: self.cursor.epoch + 1, position: 0 };
                    self.order = permutation(self.rows, self.seed, self.cursor.epoch);
                }
                self.cursor.position += 1;
                self.order[self.cursor.position - 1]
            })
            .collect()
    }

    /// Where the next row comes from.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Passes made so far, with the fraction of the current one.
    pub fn epochs(&self) -> f64 {
        self.cursor.epoch as f64 + self.cursor.position as f64 / self.rows as f64
    }
}

/// A shuffle of `0..n`. SplitMix64 and Fisher-Yates are spelled out here because a random number crate may change its streams
/// between versions, and with them the meaning of a saved cursor.
pub fn permutation(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut state = seed ^ epoch.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(0x2545_f491_4f6c_dd1d);
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        // The high half of a 128-bit product: unbiased enough for any n that fits in memory.
        let pick = ((u128::from(next()) * (last as u128 + 1)) >> 64) as usize;
        order.swap(last, pick);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_meets_every_row_once_in_a_new_order() {
        let mut sampler = Sampler::new(10, 7, Cursor::default());
        let (first, second) = (sampler.take(10), sampler.take(10));
        for epoch in [&first, &second] {
            let mut sorted = epoch.clone();
            sorted.sort();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(first, second);
        assert_eq!(first, permutation(10, 7, 0));
        assert_ne!(first, permutation(10, 8, 0));
    }

    #[test]
    fn a_restored_cursor_deals_the_same_rows() {
        for taken in [0, 3, 9, 10, 11, 25] {
            let mut straight = Sampler::new(10, 1, Cursor::default());
            straight.take(taken);
            let saved: Cursor = serde_json::from_str(&serde_json::to_string(&straight.cursor()).unwrap()).unwrap();
            assert_eq!(straight.take(17), Sampler::new(10, 1, saved).take(17), "after {taken}");
        }
    }
}
