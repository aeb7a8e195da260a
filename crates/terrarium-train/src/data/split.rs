//! Holding out a part of the data for validation.

use super::cursor::permutation;
use super::packing::{Document, Overflow};

/// Fewer text documents than this are each cut in two; more are held out whole.
const ENOUGH: usize = 20;

/// Splits documents into training, validation, and a sentence on how.
pub(super) fn hold_out(documents: Vec<Document>, fraction: f64, seed: u64) -> (Vec<Document>, Vec<Document>, String) {
    let text = documents.iter().all(|document| document.overflow == Overflow::Split);
    if text && documents.len() < ENOUGH {
        return hold_out_tails(documents, fraction);
    }
    if documents.len() < 2 {
        return (documents, Vec::new(), "one example only: nothing is held out for validation".to_string());
    }
    let count = ((documents.len() as f64 * fraction).round() as usize).clamp(1, documents.len() - 1);
    let mut held = vec![false; documents.len()];
    permutation(documents.len(), seed, u64::MAX).into_iter().take(count).for_each(|index| held[index] = true);
    let how = format!("validation: {count} of {} documents held out", documents.len());
    let (valid, train): (Vec<_>, Vec<_>) = documents.into_iter().zip(held).partition(|(_, held)| *held);
    let strip = |pairs: Vec<(Document, bool)>| pairs.into_iter().map(|(document, _)| document).collect();
    (strip(train), strip(valid), how)
}

fn hold_out_tails(documents: Vec<Document>, fraction: f64) -> (Vec<Document>, Vec<Document>, String) {
    let (mut train, mut valid) = (Vec::new(), Vec::new());
    for mut document in documents {
        let cut = (document.ids.len() as f64 * (1.0 - fraction)).round() as usize;
        if cut >= 2 && document.ids.len() - cut >= 2 {
            let ids = document.ids.split_off(cut);
            let learned = std::iter::once(0..ids.len()).collect();
            document.learned = std::iter::once(0..cut).collect();
            valid.push(Document { ids, learned, overflow: document.overflow });
        }
        train.push(document);
    }
    (train, valid, format!("validation: the last {:.1} % of each text held out", 100.0 * fraction))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(count: usize, len: usize, overflow: Overflow) -> Vec<Document> {
        let document = |index: usize| Document { ids: vec![index as u32; len], learned: std::iter::once(0..len).collect(), overflow };
        (0..count).map(document).collect()
    }

    #[test]
    fn the_split_is_seeded_and_loses_nothing() {
        let all = documents(100, 4, Overflow::Truncate);
        let (train, valid, _) = hold_out(all.clone(), 0.1, 3);
        assert_eq!((train.len(), valid.len()), (90, 10));
        assert!(valid.iter().all(|document| !train.contains(document)));
        assert_eq!(hold_out(all.clone(), 0.1, 3).1, valid);
        assert_ne!(hold_out(all, 0.1, 4).1, valid);
    }

    #[test]
    fn one_long_text_gives_its_end() {
        let (train, valid, _) = hold_out(documents(1, 100, Overflow::Split), 0.1, 0);
        assert_eq!((train[0].ids.len(), valid[0].ids.len()), (90, 10));
    }
}
