//! Prompts in pieces: what is read is what is read at once, and the cache takes no more memory than its tokens.

use terrarium::burn::tensor::Tensor;
use terrarium::models::{Cache, Decoder, Layout};
use terrarium::runtime::read_prompts;

use crate::common::*;

/// Of one length, and of many: rows that end in the first piece, on its end, and behind it.
fn batches() -> Vec<Vec<Vec<u32>>> {
    let prompt = |seed: usize, length: usize| ids(seed as u32, length, 61).into_iter().map(|id| id as u32).collect();
    let lengths: [&[usize]; 3] = [&[29], &[21, 21, 21], &[5, 33, 1, 8, 16]];
    lengths.iter().map(|lengths| lengths.iter().enumerate().map(|(seed, &length)| prompt(seed, length)).collect()).collect()
}

/// States after the prompts, then logits of two tokens more.
fn all(model: &Decoder<B>, prompts: &[Vec<u32>], chunk: usize) -> (Vec<Vec<f32>>, Cache<B>) {
    let rows: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let (hidden, cache) = read_prompts(model, &rows, chunk, 2, &device()).unwrap();
    let mut found = vec![floats(hidden)];
    let mut cache = Some(cache);
    for id in [7, 50] {
        let next = tensor(&vec![id; rows.len()], [rows.len(), 1], &device());
        let (logits, after) = model.forward(next, cache.take(), &Layout::full(rows.len(), 1));
        found.push(floats(logits));
        cache = Some(after);
    }
    (found, cache.unwrap())
}

#[test]
fn prompts_in_pieces_are_prompts_at_once() {
    for config in configs() {
        let model = model::<B>(&config, 31, &device());
        for prompts in batches() {
            let (whole, _) = all(&model, &prompts, 0);
            for chunk in [1, 16, 40, 64] {
                let (pieces, _) = all(&model, &prompts, chunk);
                for (at, (found, expected)) in pieces.iter().zip(&whole).enumerate() {
                    let what = format!("{}, {} rows, {chunk} tokens at a time, {at} tokens on", config.family, prompts.len());
                    assert_close(&what, found, expected, 1e-5);
                }
            }
        }
    }
}

#[test]
fn a_cache_takes_the_memory_of_its_tokens() {
    for config in configs() {
        let model = model::<B>(&config, 32, &device());
        for prompts in batches() {
            let longest = prompts.iter().map(Vec::len).max().unwrap();
            for chunk in [0, 16] {
                let (_, cache) = all(&model, &prompts, chunk);
                let what = format!("{}, {} rows, {chunk} tokens at a time", config.family, prompts.len());
                assert_eq!(cache.bytes(), prompts.len() * config.state_bytes(longest + 2, 4), "{what}");
            }
        }
        // Room for fewer tokens than there are changes nothing.
        let (_, cache) = all(&model, &batches()[0], 8);
        let bytes = cache.bytes();
        assert_eq!(cache.reserve(3).bytes(), bytes);
    }
}

#[test]
fn stretched_caches_repeat_their_tokens() {
    for config in configs() {
        let model = model::<B>(&config, 36, &device());
        let prompts: Vec<Vec<u32>> = [3, 4].map(|seed| ids(seed, 7, 61).into_iter().map(|id| id as u32).collect()).to_vec();
        let (_, cache) = read_prompts(&model, &[&prompts[0], &prompts[1]], 0, 0, &device()).unwrap();
        let stretched = cache.clone().stretched(17, 19);
        let name = config.family.name();
        assert_eq!((stretched.len(), stretched.bytes()), (17, 2 * config.state_bytes(19, 4)), "{name}");
        for ((key, short), (_, long)) in cache.tensors().into_iter().zip(stretched.tensors()) {
            let tiled = match short.dims()[2] {
                7 if !key.ends_with("conv") && !key.ends_with("ssm") => {
                    Tensor::cat(vec![short.clone(), short.clone(), short.narrow(2, 0, 3)], 2)
                }
                _ => short,
            };
            assert_eq!(floats(long), floats(tiled), "{name}: {key}");
        }
        // It goes on as caches do.
        let (logits, after) = model.forward(tensor(&[5, 6], [2, 1], &device()), Some(stretched), &Layout::full(2, 1));
        assert!(after.len() == 18 && floats(logits).iter().all(|x| x.is_finite()), "{name}");
        assert_eq!((cache.clone().stretched(3, 5).len(), cache.len()), (7, 7));
    }
}

#[test]
fn a_prompt_without_tokens_is_refused() {
    let model = model::<B>(&configs()[0], 33, &device());
    let error = read_prompts(&model, &[&[1, 2], &[]], 0, 0, &device()).expect_err("an error");
    assert!(error.to_string().contains("input 1 is empty"), "{error}");
}

/// Hidden states of a part of a long row, from the state before it.
fn part(model: &Decoder<B>, all: &[i32], cache: Option<Cache<B>>) -> (Tensor<B, 3>, Cache<B>) {
    model.hidden(tensor(all, [1, all.len()], &device()), cache, &Layout::full(1, all.len()))
}

/// A hundred thousand tokens and more: at every place that is looked at, pieces of another length, from the state that was carried
/// there, say the same, and so does the end.
#[test]
fn long_rows_go_on_right() {
    const LENGTH: usize = 110_000;
    let config = configs().swap_remove(0);
    let model = model::<B>(&config, 34, &device());
    let all = ids(35, LENGTH, 61);
    let (mut cache, mut other) = (None, None);
    for (piece, ids) in all.chunks(2000).enumerate() {
        let before: Option<Cache<B>> = cache.take();
        let (hidden, after) = part(&model, ids, before.clone());
        if piece % 18 == 0 {
            let mut again = before;
            let mut found = Vec::new();
            for ids in ids.chunks(333) {
                let (hidden, after) = part(&model, ids, again.take());
                found.push(hidden);
                again = Some(after);
            }
            assert_close(&format!("piece {piece}"), &floats(Tensor::cat(found, 1)), &floats(hidden), 1e-5);
        }
        cache = Some(after);
    }
    let mut last = None;
    for ids in all.chunks(9999) {
        let (hidden, after) = part(&model, ids, other.take());
        (last, other) = (Some(hidden), Some(after));
    }
    let (cache, other) = (cache.unwrap(), other.unwrap());
    assert_eq!((cache.len(), cache.bytes()), (LENGTH, config.state_bytes(LENGTH, 4)));
    for ((name, found), (_, expected)) in cache.tensors().into_iter().zip(other.tensors()) {
        assert_close(&name, &floats(found), &floats(expected), 1e-5);
    }
    assert!(floats(last.unwrap()).iter().all(|x| x.is_finite()));
}
