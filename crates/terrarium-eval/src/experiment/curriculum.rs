//! Which size a step trains on, and the random numbers of its rows.

use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

/// How a run goes through several sizes of its task.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Curriculum {
    /// One after another, for equal numbers of steps.
    Stages,
    /// In turn.
    #[default]
    Cycle,
}

impl Curriculum {
    /// Index among `sizes` for `step` of `steps`, counted from 0.
    pub fn at(self, step: usize, steps: usize, sizes: usize) -> usize {
        match self {
            Self::Stages => (step * sizes / steps.max(1)).min(sizes.saturating_sub(1)),
            Self::Cycle => step % sizes.max(1),
        }
    }
}

/// A generator of its own for every row of every step, so that rows can be made in any order.
pub(crate) fn generator(place: [u64; 4]) -> StdRng {
    let mut seed = [0u8; 32];
    for (bytes, part) in seed.chunks_mut(8).zip(place) {
        bytes.copy_from_slice(&part.to_le_bytes());
    }
    StdRng::from_seed(seed)
}

/// Streams of examples: what is measured on is never trained on.
pub(crate) const TRAIN: u64 = 0;
pub(crate) const TEST: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_has_its_share() {
        let order = |curriculum: Curriculum| (0..6).map(|step| curriculum.at(step, 6, 3)).collect::<Vec<_>>();
        assert_eq!(order(Curriculum::Stages), [0, 0, 1, 1, 2, 2]);
        assert_eq!(order(Curriculum::Cycle), [0, 1, 2, 0, 1, 2]);
    }
}
