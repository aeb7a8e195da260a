//! Generation and scoring: real text from a real checkpoint, batches that equal single rows, and inputs that are refused.

mod common;

use std::ops::ControlFlow;

use burn::tensor::{Int, Tensor, TensorData};
use common::{B, HYBRID, LLAMA, device, random, stories};
use serde_json::Value;
use terrarium_models::{Decoder, DecoderConfig, Layout};
use terrarium_runtime::{
    Finish, GenerateOptions, Generated, InputError, LoadOptions, Loaded, Sampling, Score, ScoreInput, ScoreOptions, Tokenizer, generate,
    load, prompt_ids, score,
};

fn run(
    model: &Decoder<B>,
    config: &DecoderConfig,
    tokenizer: Option<&Tokenizer>,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
) -> Generated {
    generate(model, config, tokenizer, prompts, options, &device(), &mut |_| ControlFlow::Continue(())).expect("generates")
}

fn real() -> Option<(Loaded<B>, Value)> {
    let dir = stories()?;
    let golden = std::fs::read_to_string(dir.join("golden.json")).expect("golden.json is beside the weights");
    let loaded = load(&dir, &LoadOptions::default(), &device()).expect("loads");
    Some((loaded, serde_json::from_str(&golden).expect("JSON")))
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("ids")
}

/// Prompts of many lengths, with ids below `vocab`.
fn prompts(vocab: u32) -> Vec<Vec<u32>> {
    [7usize, 1, 23, 12, 40].iter().map(|&n| (0..n as u32).map(|i| (i * i * 7 + n as u32 * 13 + 3) % vocab).collect()).collect()
}

#[test]
fn golden_text_of_a_real_checkpoint() {
    let Some((Loaded { model, config, tokenizer, .. }, golden)) = real() else { return };
    let expected = ids(&golden["greedy_from_bos_ids"]);
    let mut text = String::new();
    let options = GenerateOptions::new(expected.len() - 1);
    let found = generate(&model, &config, tokenizer.as_ref(), &[expected[..1].to_vec()], &options, &device(), &mut |piece| {
        text.push_str(piece.text);
        ControlFlow::Continue(())
    })
    .expect("generates");
    assert_eq!(found.rows[0].ids, expected[1..]);
    let golden_text = golden["greedy_from_bos_text"].as_str().expect("text");
    assert_eq!(found.rows[0].text.as_deref().map(str::trim_start), Some(golden_text.trim_start()));
    assert_eq!(Some(text), found.rows[0].text, "the stream is the text");
    assert_eq!((found.rows[0].finish.clone(), found.rows[0].prompt_tokens), (Finish::Length, 1));

    let tokenizer = tokenizer.expect("there is one");
    let prompt = prompt_ids(&tokenizer, &config, golden["prompt"].as_str().expect("text")).expect("encodes");
    assert_eq!(prompt, ids(&golden["prompt_ids"]));
    let scored =
        score(&model, &config, None, &[ScoreInput::Ids { ids: prompt, from: None }], &ScoreOptions::default(), &device()).expect("scores");
    let nll = golden["prompt_nll_sum"].as_f64().expect("a number");
    assert!((scored[0].sum + nll).abs() < 1e-3, "expected {}, found {}", -nll, scored[0].sum);
}

/// Set TERRARIUM_SMOLLM2 to a SmolLM2-135M-Instruct directory to run it.
#[test]
fn smollm2_knows_the_capital_of_france() {
    let Some(dir) = std::env::var_os("TERRARIUM_SMOLLM2") else {
        eprintln!("skipped: TERRARIUM_SMOLLM2 is not set");
        return;
    };
    let Loaded { model, config, tokenizer, notes, .. } = load::<B>(dir.as_ref(), &LoadOptions::default(), &device()).expect("loads");
    eprintln!("{notes:?}");
    let tokenizer = tokenizer.expect("there is one");
    let prompt = prompt_ids(&tokenizer, &config, "The capital of France is").expect("encodes");
    let found = run(&model, &config, Some(&tokenizer), &[prompt], &GenerateOptions::new(20));
    eprintln!("{:?}, {:.1} tokens/s", found.rows[0], found.timings.decode_rate());
    assert!(found.rows[0].text.as_deref().expect("text").starts_with(" Paris"));
    let chat =
        tokenizer.chat(&[terrarium_runtime::Message { role: "user".into(), content: "Name a fruit.".into() }], true).expect("renders");
    eprintln!("{chat:?}");
    let input = ScoreInput::Text { context: "The capital of France is".into(), continuation: " Paris".into() };
    eprintln!(
        "{:?}",
        score(&model, &config, Some(&tokenizer), &[input], &ScoreOptions { top: 3, ..ScoreOptions::default() }, &device()).expect("scores")
    );
}

#[test]
fn rows_of_a_ragged_batch_are_what_they_are_alone() {
    for config in [HYBRID, LLAMA] {
        let (config, model) = random(config, 3);
        let prompts = prompts(config.vocab_size as u32);
        for temperature in [0.0, 1.0] {
            let sampling = Sampling { temperature, top_k: 20, top_p: 0.95, repetition_penalty: 1.1 };
            // Every row ends at another step, so that rows leave the batch.
            let eos = vec![3, 5, 8, 13, 21, 34, 55];
            let options = GenerateOptions { sampling, eos, seed: 11, ..GenerateOptions::new(24) };
            let together = run(&model, &config, None, &prompts, &options);
            for (i, prompt) in prompts.iter().enumerate() {
                let alone =
                    run(&model, &config, None, std::slice::from_ref(prompt), &GenerateOptions { seed: 11 + i as u64, ..options.clone() });
                assert_eq!(alone.rows[0], together.rows[i], "row {i}, temperature {temperature}");
            }
            for (batch, prefill_chunk) in [(2, Some(0)), (16, Some(25)), (16, Some(5)), (3, Some(1)), (5, None)] {
                let other = run(&model, &config, None, &prompts, &GenerateOptions { batch, prefill_chunk, ..options.clone() });
                assert_eq!(other.rows, together.rows, "batches of {batch}, prompts in chunks of {prefill_chunk:?}");
            }
        }
    }
}

#[test]
fn greedy_steps_are_those_of_full_passes() {
    let (config, model) = random(HYBRID, 4);
    let prompt = prompts(97)[3].clone();
    let found = run(&model, &config, None, std::slice::from_ref(&prompt), &GenerateOptions::new(10));
    let mut all = prompt;
    for id in &found.rows[0].ids {
        let input: Vec<i32> = all.iter().map(|&id| id as i32).collect();
        let tensor = Tensor::<B, 2, Int>::from_data(TensorData::new(input, [1, all.len()]), &device());
        let (logits, _) = model.forward(tensor, None, &Layout::full(1, all.len()));
        let logits: Vec<f32> = logits.into_data().into_vec().expect("f32");
        let last = &logits[logits.len() - 97..];
        assert_eq!(terrarium_runtime::sampling::argmax(last), *id);
        all.push(*id);
    }
}

#[test]
fn stop_strings_end_the_text_before_them() {
    let Some((Loaded { model, config, tokenizer, .. }, _)) = real() else { return };
    let options = GenerateOptions { stop: vec!["little girl".into(), "never".into()], ..GenerateOptions::new(60) };
    let found = run(&model, &config, tokenizer.as_ref(), &[vec![1]], &options);
    assert_eq!(found.rows[0].finish, Finish::Stop("little girl".into()));
    assert!(found.rows[0].text.as_deref().expect("text").ends_with("there was a "), "{:?}", found.rows[0].text);
    let error =
        generate(&model, &config, None, &[vec![1]], &options, &device(), &mut |_| ControlFlow::Continue(())).expect_err("no tokenizer");
    assert!(error.to_string().contains("need a tokenizer"), "{error}");
}

#[test]
fn end_ids_and_the_caller_end_rows() {
    let (config, model) = random(LLAMA, 3);
    let free = run(&model, &config, None, &[vec![4, 5]], &GenerateOptions::new(8));
    let end = free.rows[0].ids[3];
    let first = free.rows[0].ids.iter().position(|&id| id == end).expect("there");
    let ended = run(&model, &config, None, &[vec![4, 5]], &GenerateOptions { eos: vec![end], ..GenerateOptions::new(8) });
    assert_eq!((ended.rows[0].finish.clone(), &ended.rows[0].ids[..]), (Finish::Eos(end), &free.rows[0].ids[..=first]));
    let mut count = 0;
    let cancelled = generate(&model, &config, None, &[vec![4], vec![5, 6]], &GenerateOptions::new(8), &device(), &mut |_| {
        count += 1;
        if count == 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .expect("returns what there is");
    assert!(cancelled.rows.iter().all(|row| row.finish == Finish::Cancelled && row.ids.len() == 2));
    assert!(run(&model, &config, None, &[vec![4]], &GenerateOptions::new(0)).rows[0].ids.is_empty());
}

#[test]
fn inputs_that_cannot_be_are_refused() {
    let (config, model) = random(LLAMA, 3);
    let refuse = |prompt: Vec<u32>| {
        generate(&model, &config, None, &[vec![1], prompt], &GenerateOptions::new(1), &device(), &mut |_| ControlFlow::Continue(()))
            .expect_err("an error")
    };
    let text = refuse(vec![1, 61]).to_string();
    assert!(text.contains("input 1: id 61 at position 1 is out of range: the model has 61 ids (0 to 60)"), "{text}");
    let scored = |input| score(&model, &config, None, &[input], &ScoreOptions::default(), &device()).expect_err("an error").to_string();
    assert!(scored(ScoreInput::Ids { ids: vec![99], from: None }).contains("out of range"));
    assert!(scored(ScoreInput::Ids { ids: vec![], from: None }).contains("empty"));
    assert!(scored(ScoreInput::Text { context: "a".into(), continuation: "b".into() }).contains("no tokenizer.json"));
    // An empty prompt starts from bos; without one there is nothing to start from.
    assert_eq!(
        run(&model, &config, None, &[vec![]], &GenerateOptions::new(3)).rows[0].ids,
        run(&model, &config, None, &[vec![1]], &GenerateOptions::new(3)).rows[0].ids
    );
    let bare = DecoderConfig { bos: None, ..config.clone() };
    let error = generate(&model, &bare, None, &[vec![]], &GenerateOptions::new(1), &device(), &mut |_| ControlFlow::Continue(()))
        .expect_err("an error");
    assert!(matches!(error, terrarium_runtime::Error::Input(InputError::Empty { row: 0 })), "{error}");
}

#[test]
fn a_model_that_gives_nan_is_named_with_the_step() {
    let (config, mut model) = random(LLAMA, 3);
    model.norm_f.weight = burn::module::Param::from_tensor(model.norm_f.weight.val() * f32::NAN);
    let error = generate(&model, &config, None, &[vec![1]], &GenerateOptions::new(1), &device(), &mut |_| ControlFlow::Continue(()))
        .expect_err("NaN");
    assert!(error.to_string().contains("step 0: 61 of 61 logits are not finite"), "{error}");
    let input = ScoreInput::Ids { ids: vec![1, 2], from: None };
    assert!(score(&model, &config, None, &[input], &ScoreOptions::default(), &device()).is_err());
}

fn close(a: &Score, b: &Score) {
    assert_eq!((&a.tokens, &a.greedy), (&b.tokens, &b.greedy));
    for (x, y) in a.logprobs.iter().zip(&b.logprobs) {
        assert!((x - y).abs() < 1e-5, "{x} {y}");
    }
}

#[test]
fn scores_do_not_depend_on_batches_and_slices() {
    for config in [HYBRID, LLAMA] {
        let (config, model) = random(config, 3);
        let inputs: Vec<ScoreInput> =
            prompts(config.vocab_size as u32).into_iter().map(|ids| ScoreInput::Ids { ids, from: None }).collect();
        let together = score(&model, &config, None, &inputs, &ScoreOptions { top: 3, batch_tokens: 2048 }, &device()).expect("scores");
        for batch_tokens in [1, 7, 64] {
            let other = score(&model, &config, None, &inputs, &ScoreOptions { top: 3, batch_tokens }, &device()).expect("scores");
            together.iter().zip(&other).for_each(|(a, b)| close(a, b));
        }
        for (input, found) in inputs.iter().zip(&together) {
            let ScoreInput::Ids { ids, .. } = input else { unreachable!() };
            assert_eq!(found.tokens, ids[1..]);
            assert!((found.sum - found.logprobs.iter().map(|x| f64::from(*x)).sum::<f64>()).abs() < 1e-9);
            let top = found.top.as_ref().expect("asked for");
            for (position, best) in top.iter().enumerate() {
                assert_eq!(best.len(), 3);
                assert!(best[0].1 >= best[1].1 && best[1].1 >= best[2].1);
                assert_eq!(found.greedy[position], best[0].0 == found.tokens[position]);
            }
        }
    }
}

#[test]
fn inputs_that_are_read_together_score_as_alone() {
    for config in [HYBRID, LLAMA] {
        let (config, model) = random(config, 5);
        let ids = |last: u32| ScoreInput::Ids { ids: vec![4, 1, 7, 2, last], from: None };
        let from = |from: usize| ScoreInput::Ids { ids: vec![4, 1, 7, 2, 9], from: Some(from) };
        // Of one reading: other last tokens, the same input twice, fewer places, none. Of others: another token before, another length.
        let other = ScoreInput::Ids { ids: vec![4, 1, 7, 3, 9], from: Some(4) };
        let longer = ScoreInput::Ids { ids: vec![4, 1, 7, 2, 9, 9], from: Some(2) };
        let inputs = [ids(3), from(4), other, ids(8), from(2), longer, ids(3), from(5)];
        for batch_tokens in [1, 2048] {
            let options = ScoreOptions { top: 2, batch_tokens };
            let together = score(&model, &config, None, &inputs, &options, &device()).expect("scores");
            for (input, found) in inputs.iter().zip(&together) {
                let alone = score(&model, &config, None, std::slice::from_ref(input), &options, &device()).expect("scores").remove(0);
                close(found, &alone);
                assert!((found.sum - alone.sum).abs() < 1e-4 && found.top.as_ref().map(Vec::len) == Some(found.tokens.len()));
            }
            let counts: Vec<usize> = together.iter().map(|found| found.tokens.len()).collect();
            assert_eq!(counts, [4, 1, 1, 4, 3, 4, 4, 0]);
        }
    }
}

#[test]
fn greedy_text_scores_as_greedy() {
    let (config, model) = random(HYBRID, 9);
    let start = vec![1, 2, 3];
    let new = run(&model, &config, None, std::slice::from_ref(&start), &GenerateOptions::new(12)).rows.remove(0).ids;
    let ids = [start, new].concat();
    let found = score(&model, &config, None, &[ScoreInput::Ids { ids, from: None }], &ScoreOptions::default(), &device()).expect("scores");
    assert!(found[0].greedy[2..].iter().all(|g| *g), "{:?}", found[0].greedy);
}

#[test]
fn blanks_before_a_continuation_belong_to_it() {
    let Some((Loaded { model, config, tokenizer, .. }, _)) = real() else { return };
    let tokenizer = tokenizer.expect("there is one");
    let text = |context: &str, continuation: &str| {
        let input = ScoreInput::Text { context: context.into(), continuation: continuation.into() };
        score(&model, &config, Some(&tokenizer), &[input], &ScoreOptions::default(), &device()).expect("scores").remove(0)
    };
    let (a, b) = (text("Once upon a time, there was a ", "little girl"), text("Once upon a time, there was a", " little girl"));
    assert_eq!(a, b);
    let whole = tokenizer.encode("Once upon a time, there was a little girl", true).expect("encodes");
    assert_eq!(a.tokens, whole[whole.len() - a.tokens.len()..]);
    let direct = score(&model, &config, None, &[ScoreInput::Ids { ids: whole, from: None }], &ScoreOptions::default(), &device())
        .expect("scores")
        .remove(0);
    for (x, y) in a.logprobs.iter().rev().zip(direct.logprobs.iter().rev()) {
        assert!((x - y).abs() < 1e-5, "{x} {y}");
    }
    // From nothing: bos stands before.
    let empty = text("", "Once upon a time");
    assert_eq!(empty.tokens, tokenizer.encode("Once upon a time", false).expect("encodes"));
    assert!(text("Once", "").tokens.is_empty());
}
