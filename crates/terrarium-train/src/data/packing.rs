//! Documents of any length into rows of one length, without letting one see another.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::Serialize;

use super::batch::{Batch, IGNORED};

/// A tokenised document.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Tokens that are to be predicted.
    pub learned: Vec<Range<usize>>,
    /// What to do when it is longer than a row.
    pub overflow: Overflow,
}

/// What happens to a document that is longer than a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// Text: the rest becomes further pieces, each without the context before it.
    Split,
    /// Examples: the rest is dropped, since a completion without its prompt teaches nothing.
    Truncate,
}

/// A piece of a document in a row: predictions of tokens `start + 1 ..= start + len` from those before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    document: usize,
    start: usize,
    len: usize,
}

/// How well the packing went.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct PackStats {
    /// Documents read.
    pub documents: usize,
    /// Rows made.
    pub rows: usize,
    /// Tokens per row.
    pub length: usize,
    /// Tokens in rows.
    pub tokens: usize,
    /// Tokens that are predicted.
    pub labelled: usize,
    /// Examples cut to the length of a row.
    pub truncated: usize,
    /// Examples left out because nothing of their completion fits.
    pub dropped: usize,
}

impl PackStats {
    /// Part of the rows that holds tokens rather than padding.
    pub fn fill(&self) -> f64 {
        self.tokens as f64 / (self.rows * self.length).max(1) as f64
    }
}

impl fmt::Display for PackStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { documents, rows, length, tokens, labelled, truncated, dropped } = self;
        write!(
            f,
            "{documents} documents, {tokens} tokens ({labelled} to predict) in {rows} rows of {length}, {:.1} % filled",
            100.0 * self.fill()
        )?;
        if *truncated > 0 {
            write!(f, "; {truncated} longer than a row and cut")?;
        }
        if *dropped > 0 {
            write!(f, "; {dropped} dropped, their prompts fill a row")?;
        }
        Ok(())
    }
}

/// Rows of `length` tokens, each holding pieces of one or more documents.
#[derive(Debug, Clone)]
pub struct PackedRows {
    documents: Vec<Document>,
    rows: Vec<Vec<Span>>,
    length: usize,
    /// How well the packing went.
    pub stats: PackStats,
}

impl PackedRows {
    /// Packs by best fit, longest piece first. The same documents give the same rows.
    pub fn pack(documents: Vec<Document>, length: usize) -> Self {
        let mut stats = PackStats { documents: documents.len(), length, ..PackStats::default() };
        let mut pieces = Vec::new();
        for (index, document) in documents.iter().enumerate() {
            cut(index, document, length, &mut pieces, &mut stats);
        }
        pieces.sort_by_key(|piece| std::cmp::Reverse(piece.len));
        let mut rows: Vec<Vec<Span>> = Vec::new();
        // Rows by the room left in them.
        let mut room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for piece in pieces {
            let fitting = room.range(piece.len..).next().map(|(space, _)| *space);
            let row = match fitting {
                Some(space) => {
                    let candidates = room.get_mut(&space).expect("found just above");
                    let row = candidates.pop().expect("lists in the map are never empty");
                    if candidates.is_empty() {
                        room.remove(&space);
                    }
                    rows[row].push(piece);
                    (space - piece.len, row)
                }
                None => {
                    rows.push(vec![piece]);
                    (length - piece.len, rows.len() - 1)
                }
            };
            if row.0 > 0 {
                room.entry(row.0).or_default().push(row.1);
            }
        }
        stats.rows = rows.len();
        stats.tokens = rows.iter().flatten().map(|span| span.len).sum();
        stats.labelled = rows.iter().flatten().map(|span| labels(&documents, *span).filter(|label| *label != IGNORED).count()).sum();
        Self { documents, rows, length, stats }
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The given rows as a batch.
    pub fn batch(&self, rows: &[usize]) -> Batch {
        let size = rows.len() * self.length;
        let mut batch =
            Batch { rows: rows.len(), length: self.length, ids: vec![0; size], labels: vec![IGNORED; size], documents: vec![-1; size] };
        for (row, at) in rows.iter().zip((0..).step_by(self.length)) {
            let mut at = at;
            for (number, span) in self.rows[*row].iter().enumerate() {
                let ids = &self.documents[span.document].ids[span.start..span.start + span.len];
                for ((offset, id), label) in ids.iter().enumerate().zip(labels(&self.documents, *span)) {
                    batch.ids[at + offset] = *id as i32;
                    batch.labels[at + offset] = label;
                    batch.documents[at + offset] = number as i32;
                }
                at += span.len;
            }
        }
        batch
    }

    /// A number that changes when the data change (FNV-1a over ids, labels and packing).
    pub fn fingerprint(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut mix = |value: u64| hash = (hash ^ value).wrapping_mul(0x0100_0000_01b3);
        mix(self.length as u64);
        for span in self.rows.iter().flatten() {
            mix(span.len as u64);
            labels(&self.documents, *span).for_each(|label| mix(label as u64));
            self.documents[span.document].ids[span.start..span.start + span.len].iter().for_each(|id| mix(u64::from(*id)));
        }
        hash
    }
}

/// Labels of a span, one per input token.
fn labels(documents: &[Document], span: Span) -> impl Iterator<Item = i32> + '_ {
    let document = &documents[span.document];
    (span.start + 1..=span.start + span.len).map(|at| document.label(at))
}

/// Cuts a document into pieces of at most `length` predictions.
fn cut(index: usize, document: &Document, length: usize, pieces: &mut Vec<Span>, stats: &mut PackStats) {
    let predictions = document.ids.len() - 1;
    let end = match document.overflow {
        Overflow::Split => predictions,
        Overflow::Truncate => predictions.min(length),
    };
    stats.truncated += usize::from(end < predictions);
    if !document.learned.iter().any(|range| range.start <= end && range.end > 1) {
        stats.dropped += 1;
        return;
    }
    pieces.extend((0..end).step_by(length).map(|start| Span { document: index, start, len: length.min(end - start) }));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(from: u32, len: u32) -> Document {
        Document { ids: (from..from + len).collect(), learned: std::iter::once(0..len as usize).collect(), overflow: Overflow::Split }
    }

    #[test]
    fn every_prediction_lands_in_exactly_one_row() {
        let documents = vec![text(0, 3), text(100, 20), text(200, 2), text(300, 9), text(400, 6)];
        let rows = PackedRows::pack(documents.clone(), 8);
        let mut seen: Vec<(i32, i32)> = Vec::new();
        for row in 0..rows.len() {
            let batch = rows.batch(&[row]);
            assert_eq!(batch.ids.len(), 8);
            for at in (0..8).filter(|at| batch.labels[*at] != IGNORED) {
                assert_eq!(batch.labels[at], batch.ids[at] + 1, "a label is the token that follows in the same document");
                seen.push((batch.ids[at], batch.labels[at]));
            }
        }
        let mut expected: Vec<(i32, i32)> =
            documents.iter().flat_map(|document| document.ids.windows(2).map(|pair| (pair[0] as i32, pair[1] as i32))).collect();
        seen.sort();
        expected.sort();
        assert_eq!(seen, expected);
        assert_eq!(rows.stats.labelled, 35);
        assert_eq!(rows.stats.tokens, 35);
        assert_eq!(rows.stats.rows, 5, "35 predictions need at least 5 rows of 8");
    }

    #[test]
    fn documents_in_a_row_have_their_own_numbers_and_padding_has_none() {
        let rows = PackedRows::pack(vec![text(0, 4), text(10, 3)], 8);
        let batch = rows.batch(&[0]);
        assert_eq!(batch.documents, [0, 0, 0, 1, 1, -1, -1, -1]);
        assert_eq!(batch.labels, [1, 2, 3, 11, 12, IGNORED, IGNORED, IGNORED]);
        assert!((rows.stats.fill() - 5.0 / 8.0).abs() < 1e-12);
    }

    #[test]
    fn only_completions_have_labels_and_long_examples_are_cut() {
        let example = |prompt: u32, len: u32| Document {
            ids: (0..len).collect(),
            learned: std::iter::once(prompt as usize..len as usize).collect(),
            overflow: Overflow::Truncate,
        };
        let rows = PackedRows::pack(vec![example(2, 5)], 8);
        assert_eq!(rows.batch(&[0]).labels[..5], [IGNORED, 2, 3, 4, IGNORED]);
        let rows = PackedRows::pack(vec![example(6, 20), example(10, 12)], 8);
        assert_eq!((rows.stats.truncated, rows.stats.dropped, rows.len()), (2, 1, 1));
        assert_eq!(rows.batch(&[0]).labels, [-1, -1, -1, -1, -1, 6, 7, 8]);
    }

    #[test]
    fn the_fingerprint_follows_the_data() {
        let one = PackedRows::pack(vec![text(0, 9)], 8).fingerprint();
        assert_eq!(one, PackedRows::pack(vec![text(0, 9)], 8).fingerprint());
        assert_ne!(one, PackedRows::pack(vec![text(1, 9)], 8).fingerprint());
    }
}
